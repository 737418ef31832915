"""What a statistic is: a value that says what is kept of a layer, and the sums that it keeps.

A statistic is a frozen dataclass: its fields are its identity. Equal statistics of two monitors are
kept once, unequal ones side by side. For each layer and step it begins a :class:`Tally`, which is
shown the layer's calls, adds them up, and is summed over ranks without knowing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from lightning_sym.observe.call import Call
    from lightning_sym.observe.hooks import LayerWatch
    from lightning_sym.observe.layers import Layer


class Unavailable(Exception):  # noqa: N818
    """Why a statistic has nothing to say of a layer in this step: not a fault, but worth a sentence."""


class Tally:
    """What one statistic keeps of one layer during one step; override what is needed.

    Attributes:
        reason: why there is no result, as far as this rank knows; ``""`` if nothing is in the way.
    """

    reason: str = ""

    def forward(self, call: Call) -> None:
        """Take in a forward call."""

    def parameters(self) -> None:
        """Read parameters before the step, where it is of them alone and a call can't be read."""

    def hold(self, call: Call) -> None:
        """Get ready for the gradient of a call whose output has one."""

    def backward(self, call: Call, gradient: Tensor) -> None:
        """Take in the gradient of the step's loss with respect to a call's output."""

    def end_batch(self) -> None:
        """End a micro-batch of an accumulated step."""

    def stepped(self) -> None:
        """See the parameters right after their optimizer's step; its gradients are still there."""

    def tensors(self) -> list[Tensor]:
        """Return what is summed over ranks in place, float64, of the same shapes on every rank."""
        return []

    def second_pass(self) -> list[Tensor]:
        """Return what is summed over ranks once :meth:`tensors` are global; mostly nothing."""
        return []

    def result(self) -> Any:
        """Return what it came to, over all ranks, or None if nothing was seen."""
        raise NotImplementedError


@dataclass(frozen=True)
class Statistic:
    """Base of all statistics of a layer: what is kept of it, and of which layers."""

    #: Whether it is of the weight: it is left out where the weight that was used cannot be read.
    uses_weight: ClassVar[bool] = False
    #: Whether it is of a step; else parameters alone show it, at an epoch's end as well.
    of_step: ClassVar[bool] = True
    #: Whether it is of what passes through the layer; else of its parameters and their gradients.
    of_calls: ClassVar[bool] = True
    #: Whether it needs the gradients of outputs.
    uses_gradients: ClassVar[bool] = False

    def where(self, layers: Sequence[Layer]) -> list[Layer]:
        """Return which of a monitor's layers it is kept of."""
        return [layer for layer in layers if layer.linear]

    def begin(self, watch: LayerWatch) -> Tally:
        """Return the empty tally of one layer for one step."""
        raise NotImplementedError
