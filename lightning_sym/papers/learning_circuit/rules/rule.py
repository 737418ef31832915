"""The one interface of all rules: what a synapse may see, and what a rule has to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_sym.papers.learning_circuit.rules.geometry import Geometry

RULES: dict[str, type[Rule]] = {}


@dataclass(frozen=True)
class Site:
    """All that the synapses of one layer see in one step.

    Args:
        geometry: what the layer connects.
        synapses: the layer's populations by name: ``W`` and those the rule asked for.
        below: activity h of the lower population, ``[N, *lower]``.
        drive: what W evokes in the upper population, without bias, ``[N, *upper]``.
        error: activity g of the descending stream at the upper population, ``[N, *upper]``.
        descending: what the rule's feedback evokes in the lower population before its gate,
            ``[N, *lower]``; None in the first layer, below which nothing descends.
    """

    geometry: Geometry
    synapses: Mapping[str, Tensor]
    below: Tensor
    drive: Tensor
    error: Tensor
    descending: Tensor | None


class Rule(ABC):
    """How the synapses of a layer change, from what they see.

    A rule of one's own implements :meth:`synapses`, :meth:`descend` and :meth:`updates`; pass an
    instance as ``LearningCircuit(rule=...)``, or give the class a ``name`` and register it with
    :func:`register_rule` to use it by that name.
    """

    name: ClassVar[str] = "custom"
    #: Whether the rule's equations are a reconstruction rather than a source's own.
    reconstruction: ClassVar[bool] = False

    @abstractmethod
    def synapses(self, geometry: Geometry, *, first: bool) -> Mapping[str, str | Tensor]:
        """Return the populations next to ``W``, and how each begins.

        Args:
            geometry: what the layer connects.
            first: whether it is the layer on the input, which needs no feedback.

        Returns:
            By name (``B``: feedback in W's shape; ``R``, ``L``: laterals of the upper and of the
            lower population's channels) ``"random"`` or, of laterals, ``"identity"`` or ``"positive"``
            (random and positive semi-definite). Or a tensor, with which a population of any name begins.
        """

    @abstractmethod
    def descend(self, geometry: Geometry, synapses: Mapping[str, Tensor], error: Tensor) -> Tensor:
        """Return what the descending stream evokes in the lower population, ``[N, *lower]``."""

    @abstractmethod
    def updates(self, site: Site) -> dict[str, Tensor]:
        """Return by population the change it makes (to be added), summed over samples.

        Populations that are left out stay as they are, without decay; ``"bias"`` is one of them.
        """

    def after_step(self, synapses: Mapping[str, Tensor]) -> None:
        """Change the synapses of a layer in place after an optimizer step; nothing by default."""
        return

    def balances(
        self, geometry: Geometry, synapses: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return pairs of matrices that self-assembly makes equal, by name; none by default."""
        return {}


def register_rule(cls: type[Rule]) -> type[Rule]:
    """Make a rule known by its ``name``; a class decorator.

    Raises:
        ValueError: if another class has the name.
    """
    if RULES.get(cls.name, cls) is not cls:
        raise ValueError(f"the rule name {cls.name!r} is taken by {RULES[cls.name].__name__}; choose another")
    RULES[cls.name] = cls
    return cls


def bias_update(error: Tensor) -> Tensor:
    """Return the change of a bias, a synapse from a neuron that is always at one: ``[O]``."""
    return error.flatten(2).sum((0, 2)) if error.ndim > 2 else error.sum(0)
