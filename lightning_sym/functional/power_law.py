"""Power laws: the slope of a straight line through logarithms.

Shape letters: N points, R bootstrap resamples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sym.functional._checks import as_real


class PowerLaw(NamedTuple):
    """A fitted power law ``y = prefactor * x ** exponent``.

    Attributes:
        exponent: slope in log-log coordinates.
        prefactor: value of the fit at ``x = 1``.
        r2: share of the variance of ``log y`` explained, in [0, 1]; NaN if ``y`` does not vary.
        low, high: bounds of the exponent's 95 % interval (pairs bootstrap).
        points: points used.
    """

    exponent: float
    prefactor: float
    r2: float
    low: float
    high: float
    points: int


def power_law(x: Tensor, y: Tensor, *, resamples: int = 200, seed: int = 0) -> PowerLaw:
    r"""Fit :math:`y = c\,x^p` by least squares on logarithms.

    Args:
        x: ``[N]``.
        y: ``[N]``. Points where ``x`` or ``y`` is not finite and positive are left out.
        resamples: bootstrap resamples of the points for the interval.
        seed: of the resampling; the global random state is not used.

    Returns:
        The fit. Every number is NaN when fewer than two distinct ``x`` are left; the interval is
        NaN with fewer than four points.

    Raises:
        ValueError: if the shapes differ or ``resamples`` is below 2.

    Example:
        >>> fit = power_law(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, 12.0, 48.0]))
        >>> round(fit.exponent, 6), round(fit.prefactor, 6), round(fit.r2, 6)
        (2.0, 3.0, 1.0)
    """
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"x and y must be [N] of equal length, got {tuple(x.shape)} and {tuple(y.shape)}")
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2, got {resamples}")
    x_N, y_N = as_real(x.detach()).double().cpu(), as_real(y.detach()).double().cpu()
    fine_N = x_N.isfinite() & y_N.isfinite() & (x_N > 0) & (y_N > 0)
    log_x_N, log_y_N = x_N[fine_N].log(), y_N[fine_N].log()
    n = len(log_x_N)
    nan = float("nan")
    if n < 2 or not log_x_N.var() > 0:
        return PowerLaw(nan, nan, nan, nan, nan, n)
    exponent = _slope(log_x_N[None], log_y_N[None])[0]
    intercept = log_y_N.mean() - exponent * log_x_N.mean()
    residual = (log_y_N - intercept - exponent * log_x_N).square().sum()
    total = (log_y_N - log_y_N.mean()).square().sum()
    r2 = float(1 - residual / total) if total > 0 else nan
    low = high = nan
    if n >= 4:
        draw_RN = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
        slopes_R = _slope(log_x_N[draw_RN], log_y_N[draw_RN])
        slopes_R = slopes_R[slopes_R.isfinite()]
        if len(slopes_R):
            low, high = torch.quantile(slopes_R, torch.tensor([0.025, 0.975]).double()).tolist()
    return PowerLaw(float(exponent), float(intercept.exp()), r2, low, high, n)


def _slope(x_RN: Tensor, y_RN: Tensor) -> Tensor:
    dx_RN = x_RN - x_RN.mean(dim=1, keepdim=True)
    return (dx_RN * y_RN).sum(dim=1) / dx_RN.square().sum(dim=1)
