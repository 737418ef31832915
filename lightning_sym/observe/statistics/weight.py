"""The weight of a layer, how the step changed it, and its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from lightning_sym.observe.statistics.statistic import Statistic, Tally, Unavailable
from lightning_sym.observe.weights import LayerWeight

if TYPE_CHECKING:
    from lightning_sym.observe.hooks import LayerWatch


class _OfParameters(Tally):
    """A tally of the parameters, which are the same on every rank."""

    def __init__(self, watch: LayerWatch) -> None:
        self.watch = watch

    def parameters(self) -> None:
        """Read the weight, where that was not done yet."""
        self.watch.weight()

    def forward(self, call: object) -> None:
        """Read the weight before it changes."""
        self.parameters()


@dataclass(frozen=True)
class Weight(Statistic):
    """The weight and bias that the forward pass used, before the step, as a :class:`LayerWeight`."""

    uses_weight: ClassVar[bool] = True
    of_calls: ClassVar[bool] = False
    of_step: ClassVar[bool] = False

    def begin(self, watch: LayerWatch) -> Tally:
        """Return the tally."""
        return WeightTally(watch)


class WeightTally(_OfParameters):
    """The weight."""

    def result(self) -> LayerWeight:
        """Return the weight."""
        return self.watch.weight()


@dataclass(frozen=True)
class WeightUpdate(Statistic):
    """``||W_after - W_before|| / ||W_before||`` of the optimizer's step, at least 0.

    Of the weights that the forward passes use: momentum, decay, adaptive scaling and what is made of the
    parameters are included. None of a weight that is zero.
    """

    uses_weight: ClassVar[bool] = True
    of_calls: ClassVar[bool] = False

    def begin(self, watch: LayerWatch) -> Tally:
        """Return the tally."""
        return UpdateTally(watch)


class UpdateTally(_OfParameters):
    """Compares the weight right after its optimizer's step with the one before."""

    update: float | None = None

    def stepped(self) -> None:
        """Read the weight that the next forward pass will use.

        Raises:
            Unavailable: if it is made in the forward pass.
        """
        if self.watch.made:
            raise Unavailable("its forward makes the weight, so that the next one is not known yet")
        after = self.watch.layer.next_blocks()  # a sharded one on all ranks, whether or not it ran here
        if self.watch.calls and (before := self.watch.weight()).norm > 0:
            self.update = LayerWeight(after - before.blocks).norm / before.norm

    def result(self) -> float | None:
        """Return the relative size of the update."""
        return self.update


@dataclass(frozen=True)
class ZeroGradients(Statistic):
    """Share of exact zeros in the weight's gradient, in [0, 1], as the optimizer used it.

    None where there was no gradient, or the weight is made of other parameters.
    """

    of_calls: ClassVar[bool] = False

    def begin(self, watch: LayerWatch) -> Tally:
        """Return the tally."""
        return GradientTally(watch)


class GradientTally(_OfParameters):
    """Counts zeros of the gradient; a sharded one is gathered on all ranks."""

    share: float | None = None

    def parameters(self) -> None:
        """Do nothing: there is no gradient before the step."""

    def stepped(self) -> None:
        """Read the gradient."""
        found = self.watch.layer.gradients()
        if not found:
            return
        dense = [g.coalesce().values() if g.is_sparse else g for g in found]
        count = sum(g.numel() for g in found)  # what a sparse one leaves out is 0
        if not count:
            return
        self.share = (count - sum(int(torch.count_nonzero(g)) for g in dense)) / count

    def result(self) -> float | None:
        """Return the share."""
        return self.share
