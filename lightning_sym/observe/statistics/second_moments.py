"""First and second moments of one stream of samples, in two halves.

Shape letters: B samples of a call, P positions, N rows, D features, K <= D features kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_sym.functional.eigen import low_rank_eigvalsh
from lightning_sym.functional.split_halves import split_participation_ratio
from lightning_sym.observe.grams import add_gram, mirror, upper
from lightning_sym.observe.statistics.statistic import Statistic, Tally
from lightning_sym.observe.weights import accumulation_dtype, kept_features

if TYPE_CHECKING:
    from lightning_sym.observe.call import Call, Half, Rows
    from lightning_sym.observe.hooks import LayerWatch

Side = Literal["inputs", "outputs", "input_gradients", "output_gradients"]
SIDES: tuple[Side, ...] = ("inputs", "outputs", "input_gradients", "output_gradients")


@dataclass(frozen=True)
class SecondMoments(Statistic):
    """Mean and second moment of a layer's inputs, outputs or their gradients.

    Samples are dealt into two halves, all positions of a sample into one: what is estimated from both
    apart has no bias by the number of samples.

    Args:
        side: ``"inputs"`` (``h_a``, a convolution's patches), ``"outputs"`` (``h_b``, before the
            activation), ``"input_gradients"`` (``g_a = W^T g_b``) or ``"output_gradients"`` (``g_b``), of
            per-sample losses: the loss's batch mean, accumulation and loss scale are undone.
        normalized: divide each sample by its Euclidean norm (of all features) first.
        max_positions: positions of a sample that count, evenly spread (None: all).
        max_width: widest moment matrix (None: no limit); of wider sides a fixed random subset of
            features is kept.
        max_patch_width: the same for a convolution's patches, which overlap.
    """

    side: Side
    normalized: bool = False
    max_positions: int | None = 16
    max_width: int | None = 512
    max_patch_width: int | None = 256

    @property
    def uses_weight(self) -> bool:  # type: ignore[override]
        """Whether it is formed with the weight."""
        return self.side == "input_gradients"

    @property
    def uses_gradients(self) -> bool:  # type: ignore[override]
        """Whether it needs the gradients of outputs."""
        return self.side.endswith("gradients")

    def begin(self, watch: LayerWatch) -> Tally:
        """Return the empty sums."""
        layer = watch.layer
        inputs = self.side.startswith("input")
        if inputs and not layer.has_input:
            return Nothing()
        width = layer.in_features if inputs else layer.out_features
        most = self.max_patch_width if inputs and layer.is_convolution else self.max_width
        keep = kept_features(width, most, watch.device)
        return MomentTally(self, width, keep=keep, device=watch.device, ranks=watch.step.ranks)


class Nothing(Tally):
    """The tally of a statistic that a layer does not have."""

    def result(self) -> None:
        """Return None."""
        return None


class MomentTally(Tally):
    """Sums of one stream; a sample with a NaN or Inf is counted and left out.

    Moments of samples as they are are formed in float64: their spectra are read, and float32 loses
    singular values below 3e-4 of the largest. Those of directions are compared entry by entry: products are
    formed in float32 (of no wider samples), about a point near their mean, and added in float64. Covariances
    do not depend on that point; it is taken back where sums are added to those of other ranks.
    """

    def __init__(
        self, what: SecondMoments, width: int, *, keep: Tensor | None, device: torch.device, ranks: int = 1
    ) -> None:
        self.what, self.width, self.keep, self._ranks = what, width, keep, ranks
        dtype = accumulation_dtype(device)
        k = width if keep is None else len(keep)
        self.counts = torch.zeros(3, dtype=dtype, device=device)  # rows of each half, rows not finite
        self.first_HK = torch.zeros(2, k, dtype=dtype, device=device)
        self.second_HKK = torch.empty(2, k, k, dtype=dtype, device=device)
        self._shift_K: Tensor | None = None
        self._count = [0, 0, 0]
        self._empty = {0, 1}  # halves of which nothing has come
        self._open = False  # whether something was added since the sums were last read

    def forward(self, call: Call) -> None:
        """Add a call's inputs or outputs."""
        side = self.what.side
        if side == "outputs" or (side == "inputs" and call.x is not None):
            self._add(call.rows(side, self.what.max_positions))

    def backward(self, call: Call, gradient: Tensor) -> None:
        """Add the gradients of a call."""
        if self.what.uses_gradients:
            self._add(call.gradient_rows(gradient, self.what.side, self.what.max_positions))

    def _add(self, rows: Rows) -> None:
        self._open = True
        for half in rows.halves:
            if self.what.normalized:
                x_NK, scale = self._shifted(half), 1.0
            else:
                x_NK, scale = half.features(self.keep).to(self.counts.dtype), rows.scale
            fine = len(x_NK) if half.all_finite else int(half.finite_N.sum())
            self._count[half.number] += fine
            self._count[2] += len(x_NK) - fine
            self.first_HK[half.number].add_(x_NK.sum(dim=0), alpha=scale)  # near 0 where it is float32
            anew = half.number in self._empty
            self._empty.discard(half.number)
            add_gram(self.second_HKK[half.number], x_NK, scale=scale**2, anew=anew)

    def _shifted(self, half: Half) -> Tensor:
        """Return directions about a point near their mean, the same for all calls."""
        x_NK = half.directions(self.keep)
        if self._shift_K is None:
            self._shift_K = x_NK.mean(dim=0)
        return half.masked(x_NK.sub_(self._shift_K))

    def tensors(self) -> list[Tensor]:
        """Return counts and raw sums, of products the blocks that are not below the diagonal's."""
        for number in self._empty:
            self.second_HKK[number].zero_()
        self._empty = set()
        if self._open:
            self._open = False
            self.counts.copy_(torch.tensor(self._count))
            if self._ranks > 1 and self._shift_K is not None:
                self._take_back()  # another rank's point is another one
        return [self.counts, self.first_HK, *upper(self.second_HKK)]

    def _take_back(self) -> None:
        """Make the sums those about 0."""
        shift_K, self._shift_K = self._shift_K.to(self.counts.dtype), None  # type: ignore[union-attr]
        self.second_HKK += about_zero(self.counts[:2], self.first_HK, shift_K)
        self.first_HK += self.counts[:2, None] * shift_K

    def result(self) -> SampleMoments | None:
        """Return the moments, or None if no sample came."""
        if not self.counts.sum() > 0:
            return None
        mirror(self.second_HKK)
        return SampleMoments(self)


def about_zero(n_H: Tensor, first_HK: Tensor, shift_K: Tensor) -> Tensor:
    """Return what sums of squares about a point lack to be those about 0, ``[H, K, K]``."""
    half_HKK = (first_HK + n_H[:, None] * shift_K / 2)[
        :, :, None
    ] * shift_K  # n s s^T is in both of its sides
    return half_HKK + half_HKK.mT


class SampleMoments:
    """Moments of one stream: lazily computed, each thing once.

    Attributes:
        n: samples that went in, over all ranks.
        nonfinite: share of samples left out because of a NaN or Inf, in ``[0, 1]``.
        width: D.
        keep: indices of the K features that the moments cover, or None if they cover all.
    """

    def __init__(self, tally: MomentTally) -> None:
        self._n_H = tally.counts[:2]
        shift_K = tally._shift_K
        self._shift_K = None if shift_K is None else shift_K.to(tally.counts.dtype)
        self._first_HK, self._second_HKK = tally.first_HK, tally.second_HKK
        nonfinite = float(tally.counts[2])
        self.n = int(self._n_H.sum())
        self.nonfinite = nonfinite / max(self.n + nonfinite, 1.0)
        self.width, self.keep = tally.width, tally.keep

    @cached_property
    def mean(self) -> Tensor:
        """The mean sample ``[K]``."""
        mean_K = self._mean_K
        return mean_K if self._shift_K is None else mean_K + self._shift_K

    @cached_property
    def _mean_K(self) -> Tensor:
        """The mean about the point that sums are about."""
        return self._first_HK.sum(0) / max(self.n, 1)

    @cached_property
    def _sums_HKK(self) -> Tensor:
        """Sums of squares about 0."""
        if self._shift_K is None:
            return self._second_HKK
        return self._second_HKK + about_zero(self._n_H, self._first_HK, self._shift_K)

    @cached_property
    def second(self) -> Tensor:
        """The raw second moment ``E[x x^T]``, ``[K, K]``."""
        first_KK, second_KK = self._sums_HKK
        return (first_KK + second_KK).div_(max(self.n, 1))

    @cached_property
    def covariance(self) -> Tensor:
        """The covariance ``[K, K]``, divided by n."""
        first_KK, second_KK = self._second_HKK
        n, mean_K = max(self.n, 1), self._mean_K
        return (first_KK + second_KK).addr_(mean_K, mean_K, beta=1 / n, alpha=-1.0)

    @cached_property
    def second_halves(self) -> tuple[Tensor, Tensor]:
        """Raw second moments ``[K, K]`` of each half of the samples; NaN of an empty one."""
        first, second = self._sums_HKK / self._n_H[:, None, None]
        return first, second

    @cached_property
    def covariance_halves(self) -> tuple[Tensor, Tensor]:
        """Covariances ``[K, K]`` of each half about its own mean, unbiased (n - 1); NaN below 2 samples."""
        found = []
        for n, first_K, second_KK in zip(self._n_H.tolist(), self._first_HK, self._second_HKK, strict=True):
            if n > 1:
                found.append(second_KK.addr(first_K, first_K, beta=1 / (n - 1), alpha=-1 / (n * (n - 1))))
            else:
                found.append(torch.full_like(second_KK, torch.nan))
        return found[0], found[1]

    @cached_property
    def participation_ratio(self) -> float:
        """Participation ratio of the covariance, from both halves; NaN where noise alone is seen."""
        return float(split_participation_ratio(*self.covariance_halves))

    @cached_property
    def variance_share(self) -> float:
        """Share of the mean square that is variance, in [0, 1]; NaN of samples that are all zero."""
        square_K = self._sums_HKK.diagonal(dim1=1, dim2=2).sum(0) / max(self.n, 1)
        total = float(square_K.sum())
        return float((square_K - self.mean.square()).sum()) / total if total > 0 else float("nan")

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of the covariance, ``[K]``, descending, rounding below zero clamped."""
        return low_rank_eigvalsh(self.covariance, rank=max(self.n - 1, 1)).flip(0).clamp_min(0.0)
