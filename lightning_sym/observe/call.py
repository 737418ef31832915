"""One forward call of a layer: rows, casts and norms are made once, for all statistics of the layer.

Shape letters: N rows, K kept features, G groups, O outputs, A inputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_sym.observe.samples import Ragged, Samples
from lightning_sym.observe.statistics.statistic import Tally

if TYPE_CHECKING:
    from lightning_sym.observe.hooks import LayerWatch


class Half:
    """One half of the samples of one side, as rows cut to the kept features; each thing is made once.

    Args:
        number: 0 or 1.
        samples: the half's features at some positions.
    """

    def __init__(self, number: int, samples: Samples) -> None:
        self.number, self._samples = number, samples
        self._kept: dict[int, tuple[Tensor | None, Tensor]] = {}

    @cached_property
    def norm_N(self) -> Tensor:
        """Euclidean norms over all features; not finite where a feature is not."""
        return self._norms()

    @cached_property
    def finite_N(self) -> Tensor:
        """Where all features are finite."""
        return self.norm_N.isfinite()

    @cached_property
    def all_finite(self) -> bool:
        """Whether nothing needs to be masked."""
        return math.isfinite(float(self.norm_N.sum())) or bool(self.finite_N.all())

    def _norms(self) -> Tensor:
        return self._samples.norms().flatten()

    def _features(self, keep: Tensor | None) -> Tensor:
        return self._samples.features(keep).flatten(0, 1)

    def features(self, keep: Tensor | None) -> Tensor:
        """Return ``[N, K]`` in at least float32; rows that are not finite are zero."""
        found = self._kept.get(id(keep))
        if found is None:
            x_NK = self._features(keep)
            x_NK = self.masked(x_NK if x_NK.dtype == torch.float64 else x_NK.float())
            found = self._kept[id(keep)] = keep, x_NK  # the tensor is kept so that its id stays its own
        return found[1]

    def directions(self, keep: Tensor | None) -> Tensor:
        """Return ``[N, K]`` over the norms of whole samples, a new tensor; a zero sample stays zero."""
        x_NK, norm_N = self.features(keep), self.norm_N
        fine_N = norm_N > 0 if self.all_finite else self.finite_N & (norm_N > 0)
        safe_N = torch.where(fine_N, norm_N, 1.0)
        return x_NK / safe_N.to(x_NK.dtype)[:, None]

    def masked(self, x_NK: Tensor) -> Tensor:
        """Return rows with zeros for those that are not finite."""
        return x_NK if self.all_finite else torch.where(self.finite_N[:, None], x_NK, 0.0)


class InputGradientHalf(Half):
    """``g_a = W^T g_b``, of a wide side only the kept features."""

    def __init__(self, half: Half, watch: LayerWatch) -> None:
        super().__init__(half.number, half._samples)
        self._of, self._watch = half, watch

    def _norms(self) -> Tensor:
        g_NO = self._of.features(None)
        grams = self._watch.weight().row_grams
        if grams is None:  # of a vocabulary: a Gram matrix would be larger than what it saves
            norm_N = torch.linalg.vector_norm(self._features(None), dim=-1)
        else:
            g_GNO = g_NO.unflatten(-1, (len(grams), -1)).transpose(0, 1)
            made_GNO = g_GNO @ grams.to(g_NO.dtype)
            norm_N = made_GNO.mul_(g_GNO).sum(dim=(0, 2)).clamp_min_(0.0).sqrt_()
        return norm_N if self._of.all_finite else torch.where(self._of.finite_N, norm_N, torch.nan)

    def _features(self, keep: Tensor | None) -> Tensor:
        g_NO, weight = self._of.features(None), self._watch.weight()
        if keep is not None:
            return g_NO @ weight.columns(keep).to(g_NO.dtype)
        g_NGO = g_NO.unflatten(-1, (len(weight.blocks), -1))
        return torch.einsum("ngo,goa->nga", g_NGO, weight.blocks.to(g_NO.dtype)).flatten(1)


class Rows:
    """Samples of one side in two halves: every second sample is in one, with all of its positions.

    Samples are numbered as a distributed sampler deals them out, so that halves do not depend on the number
    of ranks. Halves are cut before anything is computed of them: what is cut later would be copied.

    Args:
        samples: features at some positions.
        scale: what turns them into those of per-sample losses; 1 of all but gradients.
        count: samples that the call's batch has, to tell samples from positions where they are flat.
        first: number of the first sample, for the halves.
        stride: how many numbers further the next sample of this rank is.

    Attributes:
        halves: those that have rows here.
    """

    def __init__(self, samples: Samples, *, scale: float, count: int | None, first: int, stride: int) -> None:
        self.scale = scale
        flat = count is not None and samples.positions == 1 and 0 < count < samples.count
        each = samples.count // count if flat and samples.count % count == 0 else 1  # type: ignore[operator]
        self.halves: list[Half] = []
        for number in (0, 1):
            rows = _half(samples, number, each=each, first=first, stride=stride)
            if rows is not None:
                self.halves.append(Half(number, samples.part(rows)))


def _half(samples: Samples, number: int, *, each: int, first: int, stride: int) -> slice | Tensor | None:
    """Return the rows of every second sample, each of which has so many of them; None if there are none."""
    if samples.owner is not None:
        mine_N = (first + samples.owner * stride) % 2 == number
        return mine_N.nonzero().flatten() if bool(mine_N.any()) else None
    if stride % 2 == 0:  # an even number of ranks: all of this one's samples are in one half
        return slice(None) if first % 2 == number else None
    begin = (first + number) % 2
    if begin * each >= samples.count:
        return None
    if each > 1:
        return torch.arange(samples.count).unflatten(0, (-1, each))[begin::2].flatten()
    return slice(begin, None, 2)


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
        """Return the units that feed the layer, ``[B, U, P]``, if its input is known."""
        if self.x is None:
            return None
        if self.lengths is not None:
            return Ragged(self.x, None, self.lengths).features().mT
        return self.watch.layer.units(self.x)

    def gradient_rows(self, gradient: Tensor, side: str, positions: int | None) -> Rows:
        """Return the rows of ``"output_gradients"`` or ``"input_gradients"``, of per-sample losses."""
        key = "output_gradients", positions
        if key not in self._rows:
            samples = self._samples(gradient, self.watch.layer.outputs, positions)
            self._rows[key] = self._made(samples, self.watch.step.scale)
        if side == "input_gradients" and (side, positions) not in self._rows:
            self._rows[side, positions] = made = copy.copy(self._rows[key])
            made.halves = [InputGradientHalf(half, self.watch) for half in made.halves]
        return self._rows[side, positions]

    def _made(self, samples: Samples, scale: float) -> Rows:
        return Rows(samples, scale=scale, count=self.samples, first=self.first, stride=self.stride)

    def release(self) -> None:
        """Let go of all tensors of the call."""
        self._rows = {}
        self.x, self.output = None, self.output[:0]
