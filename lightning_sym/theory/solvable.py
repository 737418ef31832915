r"""The one-hidden-layer linear model, solved: when does it learn features, and by which mechanism?

:math:`f(x) = \gamma \sum_i u_i w_i x` under gradient flow on :math:`E(f - y)^2` with a learning rate
for each layer (Xu and Ziyin, 2024, arXiv 2401.07085; worked out here for the squared error).
With :math:`\beta_1 = E[x^2]`, :math:`\beta_2 = E[xy]`, :math:`b = \gamma\sqrt{\eta_u\eta_w}` and
:math:`p, q = u/\sqrt{\eta_u} \pm w/\sqrt{\eta_w}`, one function of time tells all:
:math:`p(t) = p(0)\sqrt{\xi}`, :math:`q(t) = q(0)/\sqrt{\xi}`.

Shape letters: D hidden units, T times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Solution(NamedTuple):
    """The model at some times, each ``[T]`` float64."""

    slope: Tensor  #: of f, the model's value at x = 1
    kernel: Tensor  #: the tangent kernel at x = 1, learning rates included
    alignment: Tensor  #: cosine of u and w, in [-1, 1]; NaN if one is zero
    norms: Tensor  #: product of the norms of u and w


@dataclass(frozen=True)
class SolvableModel:
    """The exact course of gradient flow from given weights.

    Args:
        u: outgoing weights ``[D]``.
        w: incoming weights along the data direction ``[D]``.
        beta1: E[x^2], positive.
        beta2: E[xy].
        output_scale: gamma, positive.
        lr_u: learning rate of u, positive.
        lr_w: learning rate of w, positive.

    Raises:
        ValueError: if shapes differ, a scale is not positive, or ``u / sqrt(lr_u) + w / sqrt(lr_w)``
            is zero for all units (the solution has no positive branch to grow on).
    """

    u: Tensor
    w: Tensor
    beta1: float = 1.0
    beta2: float = 1.0
    output_scale: float = 1.0
    lr_u: float = 1.0
    lr_w: float = 1.0

    def __post_init__(self) -> None:
        if self.u.ndim != 1 or self.u.shape != self.w.shape:
            raise ValueError(f"u and w must both be [D], got {tuple(self.u.shape)} and {tuple(self.w.shape)}")
        for name in ("beta1", "output_scale", "lr_u", "lr_w"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if self._sums()[0] == 0:
            raise ValueError("u / sqrt(lr_u) + w / sqrt(lr_w) must not be zero for all units")

    def _sums(self) -> tuple[float, float, float]:
        u_D, w_D = self.u.double() / math.sqrt(self.lr_u), self.w.double() / math.sqrt(self.lr_w)
        p_D, q_D = u_D + w_D, u_D - w_D
        return float(p_D @ p_D), float(q_D @ q_D), float(p_D @ q_D)

    def at(self, t: Tensor) -> Solution:
        """Return the model at times ``[T]``, at least 0; infinity is the end."""
        P, Q, S = self._sums()
        b = self.output_scale * math.sqrt(self.lr_u * self.lr_w)
        root = math.sqrt(4 * self.beta2**2 + (b * self.beta1) ** 2 * P * Q)
        scale = b * self.beta1 * P
        high, low = (2 * self.beta2 + root) / scale, (2 * self.beta2 - root) / scale
        decay_T = torch.exp(-2 * b * root * t.double())
        # (xi - high) / (xi - low) = (1 - high) / (1 - low) exp(-omega t), free of a division by 1 - low.
        xi_T = (high * (1 - low) - low * (1 - high) * decay_T) / ((1 - low) - (1 - high) * decay_T)
        up_T, down_T = P * xi_T, Q / xi_T
        u2_T = self.lr_u / 4 * (up_T + 2 * S + down_T)
        w2_T = self.lr_w / 4 * (up_T - 2 * S + down_T)
        norms_T = (u2_T * w2_T).clamp_min(0).sqrt()
        product_T = math.sqrt(self.lr_u * self.lr_w) / 4 * (up_T - down_T)
        return Solution(
            slope=b * (up_T - down_T) / 4,
            kernel=b**2 * (up_T + down_T) / 2,
            alignment=(product_T / norms_T).clamp(-1, 1),
            norms=norms_T,
        )


def kernel_growth(v_star: float, *, size: float) -> float:
    r"""Return :math:`K_\infty / K_0 = \sqrt{1 + (2 v^* / r)^2}` for a model that starts near zero.

    Args:
        v_star: the slope to be learned, beta2 / beta1.
        size: r, see :func:`initial_size`, positive.

    Returns:
        At least 1: 1 in the kernel regime, large in the rich one.

    Raises:
        ValueError: if ``size`` is not positive.

    Example:
        >>> round(kernel_growth(1.0, size=2.0), 4)
        1.4142
    """
    if not size > 0:
        raise ValueError(f"size must be positive, got {size!r}")
    return math.hypot(1.0, 2 * v_star / size)


def initial_size(
    width: int, *, output_scale: float, var_u: float, var_w: float, lr_u: float = 1.0, lr_w: float = 1.0
) -> float:
    r"""Return the expected size r of a random start.

    .. math:: r = \gamma d\,[\sigma_u^2\sqrt{\eta_w/\eta_u} + \sigma_w^2\sqrt{\eta_u/\eta_w}]

    Kernel regime where it is much larger than the slope to be learned.
    """
    return output_scale * width * (var_u * math.sqrt(lr_w / lr_u) + var_w * math.sqrt(lr_u / lr_w))


def regime(
    *,
    output_scale: float,
    var_u: float,
    var_w: float,
    width: float = 1.0,
    lr_u: float = 0.0,
    lr_w: float = 0.0,
) -> str:
    r"""Name the regime of a scaling from exponents: each quantity grows as :math:`\kappa^c`.

    Args:
        output_scale: exponent of gamma.
        var_u: exponent of the variance of u at the start.
        var_w: exponent of the variance of w at the start.
        width: exponent of the width.
        lr_u: exponent of the learning rate of u.
        lr_w: exponent of the learning rate of w.

    Returns:
        ``"kernel"`` (r grows), ``"mixed"`` (r stays) or ``"rich"`` (r vanishes).

    Example:
        >>> regime(output_scale=-0.5, var_u=0, var_w=0), regime(output_scale=-1, var_u=0, var_w=0)
        ('kernel', 'mixed')
    """
    exponent = output_scale + width + max(var_u + (lr_w - lr_u) / 2, var_w + (lr_u - lr_w) / 2)
    if abs(exponent) < 1e-12:
        return "mixed"
    return "kernel" if exponent > 0 else "rich"


def mechanism(
    alignment_before: float, *, alignment_after: float, norm_ratio: float, tolerance: float = 0.1
) -> str:
    """Name the mechanism of feature learning between two times.

    Args:
        alignment_before: cosine of u and w, in [-1, 1].
        alignment_after: the same later.
        norm_ratio: product of the norms later over before, positive.
        tolerance: the least change of the alignment's size, or relative change of norms, that counts.

    Returns:
        ``"alignment"`` if the cosine's size rose, ``"disalignment"`` if it fell, ``"rescaling"`` if
        only norms changed, ``"none"`` if neither did.

    Raises:
        ValueError: if ``norm_ratio`` is not positive.
    """
    if not norm_ratio > 0:
        raise ValueError(f"norm_ratio must be positive, got {norm_ratio!r}")
    change = abs(alignment_after) - abs(alignment_before)
    if abs(change) > tolerance:
        return "alignment" if change > 0 else "disalignment"
    return "rescaling" if abs(norm_ratio - 1) > tolerance else "none"
