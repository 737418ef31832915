"""How large the gradients of a layer's outputs are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lightning_sym.observe.statistics.statistic import Statistic, Tally
from lightning_sym.observe.weights import accumulation_dtype

if TYPE_CHECKING:
    from lightning_sym.observe.call import Call
    from lightning_sym.observe.hooks import LayerWatch


@dataclass(frozen=True)
class GradientSize(Statistic):
    """Root mean square of a layer's output gradients, of per-sample losses; None if none came.

    Args:
        max_positions: positions of a sample that count, evenly spread (None: all).
    """

    max_positions: int | None = 16

    uses_gradients: ClassVar[bool] = True

    def begin(self, watch: LayerWatch) -> Tally:
        """Return the empty sums."""
        return SizeTally(self, watch)


class SizeTally(Tally):
    """Sums of squares; a gradient with a NaN or Inf makes the result infinite."""

    def __init__(self, what: GradientSize, watch: LayerWatch) -> None:
        self.what = what
        self.sums = torch.zeros(2, dtype=accumulation_dtype(watch.device), device=watch.device)

    def backward(self, call: Call, gradient: Tensor) -> None:
        """Add a call's gradient."""
        rows = call.gradient_rows(gradient, "output_gradients", self.what.max_positions)
        for half in rows.halves:
            square = (half.norm_N.to(self.sums.dtype) * rows.scale).square().sum()
            self.sums[0] += torch.where(square.isfinite(), square, torch.inf)
            self.sums[1] += half.norm_N.numel() * call.watch.layer.out_features

    def tensors(self) -> list[Tensor]:
        """Return sum of squares and count."""
        return [self.sums]

    def result(self) -> float | None:
        """Return the root mean square."""
        total, count = self.sums.tolist()
        return float((total / count) ** 0.5) if count > 0 else None
