"""How far a gradient reaches back through the calls of one layer: a recurrent network written as a loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_sym.observe.weights import accumulation_dtype

Guard = Callable[[Callable[..., None]], Callable[..., None]]
#: Calls in a row that make a layer recurrent: an encoder that embeds two views is called twice.
CALLS = 8
#: Samples of a call that are looked at.
SAMPLES = 16


class LoopGradients:
    """Squared gradients of one layer's outputs, call by call, of one step.

    A layer that is called once costs nothing: gradients are followed from the second call on.

    Args:
        guard: what hooks are put through, so that none ends the user's backward pass.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._made = 0
        self._first: Any = None
        self._arrived: list[tuple[int, Tensor]] = []

    def follow(self, output: Tensor) -> None:
        """Take in a call by its output, which has a gradient function."""
        node = output.grad_fn
        if self._made == 0:
            self._first = node
        else:
            if self._first is not None:
                self._first.register_prehook(self._guard(partial(self._take, 0)))
                self._first = None
            node.register_prehook(self._guard(partial(self._take, self._made)))  # type: ignore[union-attr]
        self._made += 1

    def _take(self, call: int, gradients: tuple[Tensor | None, ...]) -> None:
        found = gradients[0]
        if found is not None:
            dtype = accumulation_dtype(found.device)
            self._arrived.append((call, found.detach()[:SAMPLES].to(dtype).square().sum()))

    def ends(self) -> Tensor | None:
        """Return squared gradients of the first call and of the last, summed over backward passes, ``[2]``.

        A pass goes through the calls backwards. None where none has eight calls or more.
        """
        passes: list[list[tuple[int, Tensor]]] = []
        for call, square in self._arrived:
            if not passes or call >= passes[-1][-1][0]:
                passes.append([])
            passes[-1].append((call, square))
        long = [each for each in passes if len(each) >= CALLS]
        if not long:
            return None
        return torch.stack([sum_of([each[-1][1] for each in long]), sum_of([each[0][1] for each in long])])


class FirstUses:
    """Whether the first half of a recurrent module's outputs is used by itself.

    Where each position's output has a loss of its own, nothing needs to reach back from the last one.

    Args:
        guard: what hooks are put through.

    Attributes:
        early: whether a gradient came to an output of the first half.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard, self.early = guard, False

    def follow(self, output: Tensor, *, batch_first: bool) -> None:
        """Take in a call by its output ``[N, T, U]`` (or ``[T, N, U]``), which has a gradient function."""
        hook = self._guard(partial(self._take, int(batch_first)))
        output.grad_fn.register_prehook(hook)  # type: ignore[union-attr]

    def _take(self, dim: int, gradients: tuple[Tensor | None, ...]) -> None:
        found = gradients[0]
        if found is not None and found.ndim == 3:
            half = found.detach().narrow(dim, 0, found.shape[dim] // 2)
            self.early = self.early or bool(half.any())


def sum_of(values: list[Tensor]) -> Tensor:
    """Return the sum of some scalars."""
    return torch.stack(values).sum()
