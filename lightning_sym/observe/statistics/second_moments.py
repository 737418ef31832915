"""First and second moments of one stream of samples, in two halves.

Shape letters: B samples of a call, P positions, N rows, D features, K <= D features kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_sym.observe.statistics.statistic import Statistic, Tally
from lightning_sym.observe.weights import accumulation_dtype, kept_features

if TYPE_CHECKING:
    from lightning_sym.observe.call import Call, Rows
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
        return MomentTally(self, width, keep=kept_features(width, most, watch.device), device=watch.device)


class Nothing(Tally):
    """The tally of a statistic that a layer does not have."""

    def result(self) -> None:
        """Return None."""
        return None


class MomentTally(Tally):
    """Sums of one stream; a sample with a NaN or Inf is counted and left out.

    Moments of samples as they are are formed in float64: their spectra are read, and float32 loses
    singular values below 3e-4 of the largest. Those of directions are compared entry by entry: products are
    formed in float32 (of no wider samples), about a point near their mean, and added in float64.
    """

    def __init__(self, what: SecondMoments, width: int, *, keep: Tensor | None, device: torch.device) -> None:
        self.what, self.width, self.keep = what, width, keep
        dtype = accumulation_dtype(device)
        k = width if keep is None else len(keep)
        self.counts = torch.zeros(3, dtype=dtype, device=device)  # rows of each half, rows not finite
        self.first_HK = torch.zeros(2, k, dtype=dtype, device=device)
        self.second_HKK = torch.zeros(2, k, k, dtype=dtype, device=device)
        self._shift_K: Tensor | None = None

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
        finite_BP = rows.finite_BP
        if self.what.normalized:
            x_BPK = self._shifted(rows.directions(self.keep), finite_BP, whole=rows.all_finite)
        else:
            x_BPK = rows.features(self.keep).to(self.counts.dtype)
        for half in (0, 1):
            x_NK = rows.half(x_BPK, half)
            fine_N = rows.half(finite_BP, half)
            n = fine_N.sum()
            self.counts[half] += n
            self.counts[2] += len(fine_N) - n
            self.first_HK[half] += x_NK.sum(dim=0)  # near 0 where it is float32
            self.second_HKK[half] += x_NK.mT @ x_NK

    def _shifted(self, x_BPK: Tensor, finite_BP: Tensor, *, whole: bool) -> Tensor:
        if self._shift_K is None:
            n = finite_BP.sum().clamp_min(1)
            self._shift_K = (x_BPK.sum(dim=(0, 1), dtype=self.counts.dtype) / n).to(x_BPK.dtype)
        x_BPK = x_BPK - self._shift_K
        return x_BPK if whole else torch.where(finite_BP[..., None], x_BPK, 0.0)

    def tensors(self) -> list[Tensor]:
        """Return counts and raw sums."""
        if self._shift_K is not None:
            shift_K, self._shift_K = self._shift_K.to(self.counts.dtype), None
            for n, first_K, second_KK in zip(self.counts, self.first_HK, self.second_HKK, strict=False):
                second_KK.addr_(first_K + n * shift_K, shift_K).addr_(shift_K, first_K)
            self.first_HK += self.counts[:2, None] * shift_K
        return [self.counts, self.first_HK, self.second_HKK]

    def result(self) -> SampleMoments | None:
        """Return the moments, or None if no sample came."""
        return SampleMoments(self) if self.counts.sum() > 0 else None


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
        self._first_HK, self._second_HKK = tally.first_HK, tally.second_HKK
        nonfinite = float(tally.counts[2])
        self.n = int(self._n_H.sum())
        self.nonfinite = nonfinite / max(self.n + nonfinite, 1.0)
        self.width, self.keep = tally.width, tally.keep

    @cached_property
    def mean(self) -> Tensor:
        """The mean sample ``[K]``."""
        return self._first_HK.sum(0) / max(self.n, 1)

    @cached_property
    def second(self) -> Tensor:
        """The raw second moment ``E[x x^T]``, ``[K, K]``."""
        return self._second_HKK.sum(0) / max(self.n, 1)

    @cached_property
    def covariance(self) -> Tensor:
        """The covariance ``[K, K]``, divided by n."""
        return self.second - torch.outer(self.mean, self.mean)

    @cached_property
    def second_halves(self) -> tuple[Tensor, Tensor]:
        """Raw second moments ``[K, K]`` of each half of the samples; NaN of an empty one."""
        first, second = self._second_HKK / self._n_H[:, None, None]
        return first, second

    @cached_property
    def covariance_halves(self) -> tuple[Tensor, Tensor]:
        """Covariances ``[K, K]`` of each half about its own mean, unbiased (n - 1); NaN below 2 samples."""
        found = []
        for n, first_K, second_KK in zip(self._n_H.tolist(), self._first_HK, self._second_HKK, strict=True):
            if n > 1:
                found.append(second_KK.addr(first_K, first_K, alpha=-1 / n).div_(n - 1))
            else:
                found.append(torch.full_like(second_KK, torch.nan))
        return found[0], found[1]

    @cached_property
    def variance_share(self) -> float:
        """Share of the mean square that is variance, in [0, 1]; NaN of samples that are all zero."""
        total = float(self.second.diagonal().sum())
        return float(self.covariance.diagonal().sum()) / total if total > 0 else float("nan")

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of the covariance, ``[K]``, descending, rounding below zero clamped."""
        return torch.linalg.eigvalsh(self.covariance).flip(0).clamp_min(0.0)
