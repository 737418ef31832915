"""Four plastic synapses a layer, each taught by what the other stream evokes: a reconstruction."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from lightning_sym.papers.learning_circuit.rules.geometry import Geometry, lateral, lateral_outer
from lightning_sym.papers.learning_circuit.rules.rule import Rule, Site, bias_update, register_rule


@register_rule
class FourSynapse(Rule):
    r"""Heterosynaptic plasticity of ascending, descending and two lateral populations.

    **A reconstruction.** "Self-Assembly of a Biologically Plausible Learning Circuit" (2024,
    arXiv:2412.20018) describes two streams joined by a motif of four plastic synapses; its exact
    equations and settings were not available to us. Here each synapse changes by what the *other*
    stream evokes in its target times its own presynaptic activity, less decay (the decay is the
    circuit's, :math:`\gamma`, of all four alike; :math:`s` is ``lateral_rate``):

    .. math::
        \Delta W_l &= \eta\, [(R_l g_l) h_{l-1}^T - \gamma W_l], &
        \Delta R_l &= \eta\, [s (W_l h_{l-1}) g_l^T - \gamma R_l], \\
        \Delta V_l &= \eta\, [(L_l h_l) g_{l+1}^T - \gamma V_l], &
        \Delta L_l &= \eta\, [s (V_l g_{l+1}) h_l^T - \gamma L_l].

    In gradient flow :math:`s W W^T - R R^T` and :math:`s V V^T - L L^T` decay as
    :math:`e^{-2\gamma\eta t}` for any activity (with ``frozen_laterals`` and ``unit_rows`` off). With
    laterals frozen at the identity the rule *is* Kolen-Pollack. Convolutions have laterals between
    channels, the same at every position.

    Args:
        lateral_rate: s, learning rate of R and L relative to W's and V's.
        laterals: how R and L begin: ``"identity"``; ``"random"``, where about half of the directions of
            the error are taken with the wrong sign; or ``"positive"``, random and positive semi-definite.
        frozen_laterals: leave R and L as they begin, without decay.
        unit_rows: after every step scale what each neuron receives through R, and through L, to unit
            norm (synaptic scaling).

    Raises:
        ValueError: if ``lateral_rate`` is negative or ``laterals`` is none of the words.
    """

    name = "four_synapse"
    reconstruction = True

    def __init__(
        self,
        lateral_rate: float = 0.01,
        *,
        laterals: str = "identity",
        frozen_laterals: bool = False,
        unit_rows: bool = True,
    ) -> None:
        if not lateral_rate >= 0:
            raise ValueError(f"lateral_rate must be at least 0, got {lateral_rate!r}")
        if laterals not in ("identity", "random", "positive"):
            raise ValueError(f"laterals must be 'identity', 'random' or 'positive', got {laterals!r}")
        self.lateral_rate, self.laterals = lateral_rate, laterals
        self.frozen_laterals, self.unit_rows = frozen_laterals, unit_rows

    @override
    def synapses(self, geometry: Geometry, *, first: bool) -> dict[str, str]:
        return {"R": self.laterals} if first else {"R": self.laterals, "B": "random", "L": self.laterals}

    @override
    def descend(self, geometry: Geometry, synapses: Mapping[str, Tensor], error: Tensor) -> Tensor:
        return geometry.down(error, synapses["B"])

    @override
    def updates(self, site: Site) -> dict[str, Tensor]:
        taught = lateral(site.error, site.synapses["R"])
        found = {"W": site.geometry.outer(taught, site.below), "bias": bias_update(taught)}
        if not self.frozen_laterals:
            found["R"] = self.lateral_rate * lateral_outer(site.drive, site.error)
        if site.descending is not None:
            found["B"] = site.geometry.outer(site.error, lateral(site.below, site.synapses["L"]))
            if not self.frozen_laterals:
                found["L"] = self.lateral_rate * lateral_outer(site.descending, site.below)
        return found

    @override
    def after_step(self, synapses: Mapping[str, Tensor]) -> None:
        if not self.unit_rows or self.frozen_laterals:
            return
        for name in ("R", "L"):
            if name in synapses:
                norms = torch.linalg.vector_norm(synapses[name], dim=1, keepdim=True)
                synapses[name].div_(torch.where(norms > 0, norms, 1.0))

    @override
    def balances(
        self, geometry: Geometry, synapses: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        w, r = geometry.rows(synapses["W"]), synapses["R"]
        found = {"WWt_RRt": (self.lateral_rate * w @ w.mT, r @ r.mT)}
        if "B" in synapses:
            v, b = geometry.feedback_rows(synapses["B"]), synapses["L"]
            found["VVt_LLt"] = (self.lateral_rate * v @ v.mT, b @ b.mT)
            # What both pairs of synapses leave of the way down and of the way up, in W's shape.
            vr = (r @ synapses["B"].flatten(1)).view_as(synapses["B"])
            found["VRt_LWt"] = (geometry.feedback_rows(vr), b @ geometry.feedback_rows(synapses["W"]))
        return found
