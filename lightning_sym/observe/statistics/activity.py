"""How active the units are that feed a layer.

Shape letters: B samples, U units, P positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_sym.observe.statistics.second_moments import Nothing
from lightning_sym.observe.statistics.statistic import Statistic, Tally
from lightning_sym.observe.weights import accumulation_dtype

if TYPE_CHECKING:
    from lightning_sym.observe.call import Call
    from lightning_sym.observe.hooks import LayerWatch


class UnitActivity(NamedTuple):
    """Of each input unit: ``mean [U]``, the mean of ``|x|``; ``live [U]``, the share of ``x != 0``."""

    mean: Tensor
    live: Tensor


@dataclass(frozen=True)
class Activity(Statistic):
    """Mean size and liveness of each unit that feeds the layer, over all samples and positions.

    Units are the layer's inputs, or a convolution's input channels: the neurons before it, after their
    activation.
    """

    def begin(self, watch: LayerWatch) -> Tally:
        """Return the empty sums."""
        return ActivityTally(watch) if watch.layer.has_input else Nothing()


class ActivityTally(Tally):
    """Counts, and sums over samples and positions; a NaN or Inf counts as live and adds nothing."""

    def __init__(self, watch: LayerWatch) -> None:
        self.watch = watch
        layer, dtype = watch.layer, accumulation_dtype(watch.device)
        self.count = torch.zeros(1, dtype=dtype, device=watch.device)
        self.sums_2U = torch.zeros(2, layer.in_units, dtype=dtype, device=watch.device)

    def forward(self, call: Call) -> None:
        """Add a call's inputs."""
        x_BUP = call.units()
        if x_BUP is None:
            return
        size_BUP = x_BUP.abs()
        size_BUP = size_BUP if size_BUP.dtype == torch.float64 else size_BUP.float()
        size_U = size_BUP.sum(dim=(0, 2))
        if math.isfinite(float(size_U.sum())):
            live_U = size_BUP.sign_().sum(dim=(0, 2))  # counting costs several times as much
        else:
            size_U = size_BUP.nan_to_num_(nan=0.0, posinf=0.0).sum(dim=(0, 2), dtype=self.sums_2U.dtype)
            live_U = torch.count_nonzero(x_BUP, dim=(0, 2))
        self.count += len(x_BUP) * x_BUP.shape[2]
        self.sums_2U[0] += size_U
        self.sums_2U[1] += live_U

    def tensors(self) -> list[Tensor]:
        """Return count and sums."""
        return [self.count, self.sums_2U]

    def result(self) -> UnitActivity | None:
        """Return the means, or None if no sample came."""
        return UnitActivity(*(self.sums_2U / self.count)) if self.count > 0 else None
