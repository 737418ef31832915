"""How active the units are that feed a layer.

Shape letters: N samples and positions, U units.
"""

from __future__ import annotations

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
        x_NU = call.units()
        if x_NU is None:
            return
        size_NU = x_NU.abs().to(torch.float32 if x_NU.dtype != torch.float64 else x_NU.dtype)
        size_NU = size_NU.nan_to_num(nan=0.0, posinf=0.0)
        self.count += len(x_NU)
        self.sums_2U[0] += size_NU.sum(dim=0, dtype=self.sums_2U.dtype)
        self.sums_2U[1] += (x_NU != 0).sum(dim=0)

    def tensors(self) -> list[Tensor]:
        """Return count and sums."""
        return [self.count, self.sums_2U]

    def result(self) -> UnitActivity | None:
        """Return the means, or None if no sample came."""
        return UnitActivity(*(self.sums_2U / self.count)) if self.count > 0 else None
