"""Power laws: a straight line through the logarithms, and how far to believe it.

Shape letters: N points.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sym.functional._checks import as_real, promoted


class PowerLaw(NamedTuple):
    """A fit ``y = prefactor * x ** exponent``.

    Attributes:
        exponent: slope of ``log y`` over ``log x``.
        low, high: confidence interval of the exponent (Student's t with ``count - 2`` degrees of
            freedom: independent errors of equal size in ``log y``); infinite for two points.
        r2: share of the variance of ``log y`` that the line explains, in ``[0, 1]``; NaN if all ``y``
            are equal. Low by construction where the exponent is close to 0: look at ``residual`` there.
        residual: root mean square of ``log y`` minus the line, in units of the natural logarithm.
        prefactor: ``y`` at ``x = 1``.
        count: number of points used.
    """

    exponent: Tensor
    low: Tensor
    high: Tensor
    r2: Tensor
    residual: Tensor
    prefactor: Tensor
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks a fit for


def power_law(x: Tensor, y: Tensor, *, confidence: float = 0.95) -> PowerLaw:
    r"""Fit :math:`y = c\,x^\alpha` by least squares on the logarithms.

    Args:
        x: float tensor ``[N]``; half types are computed in float32.
        y: float tensor ``[N]``. Points where ``x`` or ``y`` is not positive and finite are left out.
        confidence: coverage of the interval, in ``(0, 1)``.

    Returns:
        A :class:`PowerLaw`; all NaN where fewer than two points are left or all ``x`` are equal.

    Raises:
        TypeError: if ``x`` or ``y`` is not a tensor of real floating-point numbers.
        ValueError: if ``x`` and ``y`` are not vectors of one length or ``confidence`` is out of range.

    Example:
        >>> fit = power_law(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([3.0, 12.0, 48.0, 192.0]))
        >>> fit.exponent, fit.prefactor, fit.count
        (tensor(2.), tensor(3.), 4)
    """
    x_N, y_N = promoted(as_real(x, name="x"), as_real(y, name="y"))
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(
            f"x and y must be vectors [N] of one length, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    used_N = (x_N > 0) & (y_N > 0) & x_N.isfinite() & y_N.isfinite()
    x_N, y_N = x_N[used_N].log(), y_N[used_N].log()
    count = x_N.numel()
    nan = x_N.new_full((), torch.nan)
    if count < 2 or bool(x_N.max() == x_N.min()):
        return PowerLaw(nan, nan, nan, nan, nan, nan, count)
    middle, height = x_N.mean(), y_N.mean()
    x_N, y_N = x_N - middle, y_N - height
    spread = x_N.square().sum()
    exponent = (x_N * y_N).sum() / spread
    squares = (y_N - exponent * x_N).square().sum()
    total = y_N.square().sum()
    r2 = (1 - squares / total).clamp(0, 1) if bool(total > 0) else nan
    if count > 2:
        half = student_t(confidence, count - 2) * (squares / (count - 2) / spread).sqrt()
    else:
        half = x_N.new_full((), torch.inf)
    prefactor = (height - exponent * middle).exp()
    return PowerLaw(
        exponent, exponent - half, exponent + half, r2, (squares / count).sqrt(), prefactor, count
    )


@functools.lru_cache(maxsize=4096)
def student_t(confidence: float, degrees: int) -> float:
    """Return the t with ``P(|T| < t) = confidence`` for Student's T.

    Bisection on the finite sums for whole degrees of freedom (Abramowitz & Stegun, 26.7.3 and
    26.7.4): the standard library and torch have no quantile.

    Args:
        confidence: in ``(0, 1)``.
        degrees: degrees of freedom, at least 1.

    Returns:
        The quantile, positive.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> round(student_t(0.95, 10), 4)
        2.2281
    """
    if not 0 < confidence < 1 or not degrees >= 1:
        raise ValueError(
            f"confidence must be in (0, 1) and degrees at least 1, got {confidence!r} and {degrees!r}"
        )
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if _inside(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _inside(theta: float, degrees: int) -> float:
    """Return ``P(|T| < sqrt(degrees) tan(theta))``."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):  # k = 2, 4, ... or 3, 5, ...
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (theta + sine * total) if odd else sine * total
