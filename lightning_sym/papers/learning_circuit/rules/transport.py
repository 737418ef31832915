"""Rules whose error reaches the ascending weights as it is: backprop and its two relatives."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from typing_extensions import override

from lightning_sym.papers.learning_circuit.rules.geometry import Geometry
from lightning_sym.papers.learning_circuit.rules.rule import Rule, Site, bias_update, register_rule


@register_rule
class Backprop(Rule):
    """The reference: the error descends through the transpose of ``W``, which is weight transport."""

    name = "backprop"

    @override
    def synapses(self, geometry: Geometry, *, first: bool) -> dict[str, str]:
        return {}

    @override
    def descend(self, geometry: Geometry, synapses: Mapping[str, Tensor], error: Tensor) -> Tensor:
        return geometry.down(error, synapses["W"])

    @override
    def updates(self, site: Site) -> dict[str, Tensor]:
        return {"W": site.geometry.outer(site.error, site.below), "bias": bias_update(site.error)}


@register_rule
class FeedbackAlignment(Backprop):
    """The error descends through fixed random synapses (Lillicrap et al., 2016, arXiv:1411.0247)."""

    name = "feedback_alignment"

    @override
    def synapses(self, geometry: Geometry, *, first: bool) -> dict[str, str]:
        return {} if first else {"B": "random"}

    @override
    def descend(self, geometry: Geometry, synapses: Mapping[str, Tensor], error: Tensor) -> Tensor:
        return geometry.down(error, synapses["B"])


@register_rule
class KolenPollack(FeedbackAlignment):
    r"""Both directions get the same change and decay alike (Kolen & Pollack, 1994).

    With SGD at rate :math:`\eta` and decay :math:`\gamma`, whatever the data,
    :math:`W_t - V_t^T = (1 - \eta\gamma)^t (W_0 - V_0^T)`.
    """

    name = "kolen_pollack"

    @override
    def updates(self, site: Site) -> dict[str, Tensor]:
        found = super().updates(site)
        if "B" in site.synapses:
            found["B"] = found["W"]
        return found

    @override
    def balances(
        self, geometry: Geometry, synapses: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        return {"W_Vt": (synapses["W"], synapses["B"])} if "B" in synapses else {}
