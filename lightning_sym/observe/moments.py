"""Sums over samples, the only thing that leaves a hook.

Shape letters: N samples, D features, K <= D features kept.
"""

from __future__ import annotations

import enum
from functools import cached_property

import torch
from torch import Tensor


class Moments(enum.IntFlag):
    """Which sums a stream of samples is reduced to."""

    NONE = 0
    SECOND = 1  #: n, sum x, sum x x^T
    NORMALIZED = 2  #: the same of x / ||x||


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on devices that have none (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def kept_features(width: int, most: int | None) -> Tensor | None:
    """Return the indices of the features kept of a wide layer, or None if all are.

    A fixed random subset: strides would alias with the kernel positions of a convolution's
    patches. Entries of the kept principal submatrix are exact; what is estimated is the rest.
    """
    if most is None or width <= most:
        return None
    generator = torch.Generator().manual_seed(width)
    return torch.randperm(width, generator=generator)[:most].sort().values


class Sums:
    """Running sums of one stream of samples.

    Args:
        width: D.
        moments: which sums to keep.
        keep: indices of the K features whose moments are kept; None keeps all.
        device: where the samples live.

    A sample with a NaN or Inf is counted in ``nonfinite`` and left out of every sum.
    """

    def __init__(self, width: int, moments: Moments, *, keep: Tensor | None, device: torch.device) -> None:
        dtype = accumulation_dtype(device)
        k = width if keep is None else len(keep)
        self.width, self.moments = width, moments
        self.keep = None if keep is None else keep.to(device)
        self.counts = torch.zeros(2, dtype=dtype, device=device)  # n, nonfinite
        self.sums: dict[Moments, tuple[Tensor, Tensor]] = {
            form: (
                torch.zeros(k, dtype=dtype, device=device),
                torch.zeros(k, k, dtype=dtype, device=device),
            )
            for form in (Moments.SECOND, Moments.NORMALIZED)
            if form & moments
        }

    def add(self, x_ND: Tensor, *, norm_N: Tensor | None = None) -> None:
        """Add samples.

        Args:
            x_ND: samples with all D features, or with the K kept ones if ``norm_N`` is given.
            norm_N: Euclidean norms over all D features, for samples already cut to the kept ones.
        """
        dtype = self.counts.dtype
        x_ND = x_ND.to(dtype)
        finite_N = x_ND.isfinite().all(dim=1)
        if norm_N is not None:
            norm_N = norm_N.to(dtype)
            finite_N = finite_N & norm_N.isfinite()
        x_ND = torch.where(finite_N[:, None], x_ND, 0.0)
        n = finite_N.sum()
        self.counts += torch.stack([n, len(x_ND) - n])
        if norm_N is None:
            norm_N = x_ND.norm(dim=1)
            x_NK = x_ND if self.keep is None else x_ND[:, self.keep]
        else:
            x_NK = x_ND
        for form, (first_K, second_KK) in self.sums.items():
            if form is Moments.NORMALIZED:
                # A zero sample has no direction: it stays zero instead of becoming NaN.
                safe_N = torch.where(finite_N & (norm_N > 0), norm_N, torch.ones_like(norm_N))
                x_NK = x_NK / safe_N[:, None]
            first_K += x_NK.sum(dim=0)
            second_KK.addmm_(x_NK.mT, x_NK)

    def tensors(self) -> list[Tensor]:
        """Return every tensor that is summed across ranks, in a fixed order."""
        return [self.counts, *(t for pair in self.sums.values() for t in pair)]


class Stream:
    """What one stream of samples came to: lazily computed, each thing once.

    Attributes:
        n: samples that went in, over all ranks.
        nonfinite: share of samples left out because of a NaN or Inf, in ``[0, 1]``.
        width: D; the moments below cover the K kept features.
    """

    def __init__(self, sums: Sums) -> None:
        self._sums = sums
        n, nonfinite = (float(v) for v in sums.counts)
        self.n = int(n)
        self.nonfinite = nonfinite / max(n + nonfinite, 1.0)
        self.width = sums.width
        self.keep = sums.keep

    def mean(self, form: Moments = Moments.SECOND) -> Tensor:
        """Return the mean sample ``[K]``."""
        return self._sums.sums[form][0] / max(self.n, 1)

    def second(self, form: Moments = Moments.SECOND) -> Tensor:
        """Return the raw second moment ``E[x x^T]``, ``[K, K]``."""
        return self._sums.sums[form][1] / max(self.n, 1)

    def covariance(self, form: Moments = Moments.SECOND) -> Tensor:
        """Return the covariance ``[K, K]``, divided by n."""
        mean_K = self.mean(form)
        return self.second(form) - torch.outer(mean_K, mean_K)

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of the covariance, ``[K]``, descending, rounding below zero clamped."""
        return torch.linalg.eigvalsh(self.covariance()).flip(0).clamp_min(0.0)
