"""One forward call of a layer: rows, casts and norms are made once, for all statistics of the layer.

Shape letters: B samples, P positions, D features, K kept features, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_sym.observe.samples import Ragged, Samples
from lightning_sym.observe.statistics.statistic import Tally

if TYPE_CHECKING:
    from lightning_sym.observe.hooks import LayerWatch


class Rows:
    """Samples of one side, cut to the kept features, in a type that sums can be formed in.

    Samples at which a feature is not finite are zero, and counted apart.

    Args:
        samples: features at some positions.
        scale: factor of all of them.
        count: samples that the call's batch has, to tell samples from positions where they are flat.
        first: number of the first sample, for the halves.
        stride: how many numbers further the next sample of this rank is.
    """

    def __init__(self, samples: Samples, *, scale: float, count: int | None, first: int, stride: int) -> None:
        self._samples, self._scale, self._owner = samples, scale, samples.owner
        flat = count is not None and samples.positions == 1 and 0 < count < samples.count
        self._flat = samples.count // count if flat and samples.count % count == 0 else 1  # type: ignore[operator]
        self._first, self._stride = first, stride
        self._kept: dict[int, tuple[Tensor | None, Tensor]] = {}
        self._units: dict[int, Tensor] = {}

    @cached_property
    def norm_BP(self) -> Tensor:
        """Euclidean norms over all features, before ``scale``."""
        return self._norms()

    def _norms(self) -> Tensor:
        return self._samples.norms()

    @cached_property
    def finite_BP(self) -> Tensor:
        """Where all features are finite."""
        return self.norm_BP.isfinite()

    @cached_property
    def all_finite(self) -> bool:
        """Whether nothing needs to be masked."""
        return bool(self.finite_BP.all())

    def _features(self, keep: Tensor | None) -> Tensor:
        return self._samples.features(keep)

    def features(self, keep: Tensor | None) -> Tensor:
        """Return ``[B, P, K]`` in at least float32."""
        found = self._kept.get(id(keep))
        if found is None:
            x_BPK = self._features(keep)
            x_BPK = x_BPK if x_BPK.dtype == torch.float64 else x_BPK.float()
            x_BPK = x_BPK * self._scale if self._scale != 1.0 else x_BPK
            if not self.all_finite:
                x_BPK = torch.where(self.finite_BP[..., None], x_BPK, 0.0)
            found = self._kept[id(keep)] = keep, x_BPK  # the tensor is kept so that its id stays its own
        return found[1]

    def directions(self, keep: Tensor | None) -> Tensor:
        """Return ``[B, P, K]`` over the norms of whole samples; a zero sample stays zero."""
        found = self._units.get(id(keep))
        if found is None:
            x_BPK = self.features(keep)
            norm_BP = self.norm_BP * abs(self._scale)
            safe_BP = torch.where(self.finite_BP & (norm_BP > 0), norm_BP, torch.ones_like(norm_BP))
            found = self._units[id(keep)] = x_BPK / safe_BP.to(x_BPK.dtype)[..., None]
        return found

    def half(self, tensor: Tensor, number: int) -> Tensor:
        """Return the rows ``[N, ...]`` of every second sample.

        Samples are numbered as a distributed sampler deals them out, so that halves do not depend on
        the number of ranks; all positions of a sample are in one half.
        """
        if self._owner is not None:
            mine_N = (self._first + self._owner * self._stride) % 2 == number
            return tensor[mine_N].reshape(-1, *tensor.shape[2:])
        if self._flat > 1:
            tensor = tensor.unflatten(0, (-1, self._flat))
        if self._stride % 2 == 0:  # an even number of ranks: all of this one's samples are in one half
            mine = self._first % 2 == number
            return (tensor if mine else tensor[:0]).reshape(-1, *self._tail(tensor))
        return tensor[(self._first + number) % 2 :: 2].reshape(-1, *self._tail(tensor))

    def _tail(self, tensor: Tensor) -> torch.Size:
        return tensor.shape[2 + (self._flat > 1) :]


class InputGradientRows(Rows):
    """``g_a = W^T g_b``, of a wide side only the kept features."""

    def __init__(self, rows: Rows, watch: LayerWatch) -> None:
        self._of, self._watch, self._owner = rows, watch, rows._owner
        self._scale, self._flat, self._first, self._stride = 1.0, rows._flat, rows._first, rows._stride
        self._kept, self._units = {}, {}

    def _norms(self) -> Tensor:
        g_BPO = self._of.features(None)
        grams = self._watch.weight().row_grams
        if grams is None:  # of a vocabulary: a Gram matrix would be larger than what it saves
            norm_BP = torch.linalg.vector_norm(self._features(None), dim=-1)
        else:
            g_BPGO = g_BPO.unflatten(-1, (len(grams), -1))
            made_BPGO = torch.einsum("bpgo,gou->bpgu", g_BPGO, grams.to(g_BPO.dtype))
            norm_BP = (made_BPGO * g_BPGO).sum(dim=(-1, -2)).clamp_min(0.0).sqrt()
        return torch.where(self._of.finite_BP, norm_BP, torch.nan)

    def _features(self, keep: Tensor | None) -> Tensor:
        g_BPO, weight = self._of.features(None), self._watch.weight()
        if keep is not None:
            return g_BPO @ weight.columns(keep).to(g_BPO.dtype)
        g_BPGO = g_BPO.unflatten(-1, (len(weight.blocks), -1))
        return torch.einsum("bpgo,goa->bpga", g_BPGO, weight.blocks.to(g_BPO.dtype)).flatten(2)


class Call:
    """A forward call of a layer, its input and output as they were, and the rows made of them.

    Attributes:
        watch: what the layer is watched with.
        x: the input, or None where it is no tensor.
        output: the output (of a packed projection, this layer's part), while the call is shown.
        tallies: what it is shown to.
        lengths: of each sample, how many of its positions count; None: all.
        kept: what a tally keeps of the call until its gradient comes, by tally.
    """

    def __init__(
        self,
        watch: LayerWatch,
        x: Tensor | None,
        output: Tensor,
        tallies: list[Tally],
        *,
        lengths: list[int] | None = None,
    ) -> None:
        self.watch, self.x, self.output, self.tallies, self.lengths = watch, x, output, tallies, lengths
        step = watch.step
        self.first = (step.before * step.ranks) + step.rank
        self.samples, self.stride = (step.samples if watch.layer.in_order else None), step.ranks
        self.kept: dict[Tally, Any] = {}
        self._rows: dict[tuple[str, int | None], Rows] = {}

    def rows(self, side: str, positions: int | None) -> Rows:
        """Return the rows of ``"inputs"`` or ``"outputs"``, at most so many positions of each sample."""
        key = side, positions
        if key not in self._rows:
            if side == "inputs":
                assert self.x is not None  # told apart by has_input
                samples = self._samples(self.x, self.watch.layer.inputs, positions)
            else:
                samples = self._samples(self.output, self.watch.layer.outputs, positions)
            self._rows[key] = self._made(samples, 1.0)
        return self._rows[key]

    def _samples(
        self, tensor: Tensor, read: Callable[[Tensor, int | None], Samples], positions: int | None
    ) -> Samples:
        if self.lengths is not None:
            return Ragged(tensor, positions, self.lengths)
        return read(self.watch.batch_first(tensor), positions)

    def units(self) -> Tensor | None:
        """Return the units that feed the layer as rows ``[N, U]``, if its input is known."""
        if self.x is None:
            return None
        if self.lengths is not None:
            return Ragged(self.x, None, self.lengths).features().flatten(0, 1)
        return self.watch.layer.units(self.x)

    def gradient_rows(self, gradient: Tensor, side: str, positions: int | None) -> Rows:
        """Return the rows of ``"output_gradients"`` or ``"input_gradients"``, of per-sample losses."""
        key = "output_gradients", positions
        if key not in self._rows:
            samples = self._samples(gradient, self.watch.layer.outputs, positions)
            self._rows[key] = self._made(samples, self.watch.step.scale)
        if side == "input_gradients" and (side, positions) not in self._rows:
            self._rows[side, positions] = InputGradientRows(self._rows[key], self.watch)
        return self._rows[side, positions]

    def _made(self, samples: Samples, scale: float) -> Rows:
        return Rows(samples, scale=scale, count=self.samples, first=self.first, stride=self.stride)

    def release(self) -> None:
        """Let go of all tensors of the call."""
        self._rows = {}
        self.x, self.output = None, self.output[:0]
