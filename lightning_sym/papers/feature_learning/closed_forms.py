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
        ValueError: if shapes differ, a scale is not positive, a number is not finite, or all weights are
            zero (where the flow stays).

    Example:
        >>> model = SolvableModel(torch.tensor([0.1, -0.1]), torch.tensor([0.1, 0.1]))
        >>> round(model.size, 6), round(model.growth, 2), round(kernel_growth(1.0, size=model.size), 2)
        (0.04, 50.01, 50.01)
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
        finite = self.u.isfinite().all() and self.w.isfinite().all() and math.isfinite(self.beta2)
        if not bool(finite):
            raise ValueError(f"u, w and beta2 must be finite, got NaN or infinity (beta2={self.beta2!r})")
        if not max(self._sums()[:2]) > 0:
            raise ValueError("u and w must hold a number that is not zero")

    @property
    def size(self) -> float:
        r"""Size r of these weights, :math:`\gamma\sqrt{\eta_u\eta_w}\,(P + Q) / 2`; positive."""
        P, Q, _ = self._sums()
        return self.output_scale * math.sqrt(self.lr_u * self.lr_w) * (P + Q) / 2

    @property
    def growth(self) -> float:
        r"""Exact :math:`K_\infty / K_0`, whatever the model's slope at the start; at least 0."""
        kernel_T = self.at(torch.tensor([0.0, math.inf])).kernel
        return float(kernel_T[1] / kernel_T[0])

    def _sums(self) -> tuple[float, float, float]:
        u_D, w_D = self.u.double() / math.sqrt(self.lr_u), self.w.double() / math.sqrt(self.lr_w)
        p_D, q_D = u_D + w_D, u_D - w_D
        return float(p_D @ p_D), float(q_D @ q_D), float(p_D @ q_D)

    def at(self, t: Tensor) -> Solution:
        """Return the model at times ``[T]``, at least 0; infinity is the end."""
        P, Q, S = self._sums()
        # Changing the sign of u and of the target exchanges P and Q: the larger of them is divided by.
        sign = 1.0 if P >= Q else -1.0
        P, Q, beta2 = max(P, Q), min(P, Q), sign * self.beta2
        b = self.output_scale * math.sqrt(self.lr_u * self.lr_w)
        xi_T = self._xi(t.double(), b, P, Q, beta2)
        up_T = P * xi_T
        down_T = Q / xi_T if Q > 0 else torch.zeros_like(xi_T)
        u2_T = self.lr_u / 4 * (up_T + 2 * S + down_T)
        w2_T = self.lr_w / 4 * (up_T - 2 * S + down_T)
        norms_T = (u2_T * w2_T).clamp_min(0).sqrt()
        product_T = sign * math.sqrt(self.lr_u * self.lr_w) / 4 * (up_T - down_T)
        return Solution(
            slope=sign * b * (up_T - down_T) / 4,
            kernel=b**2 * (up_T + down_T) / 2,
            alignment=(product_T / norms_T).clamp(-1, 1),
            norms=norms_T,
        )

    def _xi(self, t_T: Tensor, b: float, P: float, Q: float, beta2: float) -> Tensor:
        root = math.sqrt(4 * beta2**2 + (b * self.beta1) ** 2 * P * Q)
        scale = b * self.beta1 * P
        if root == 0:  # aligned, and nothing to learn: decays as 1 / t
            return 1 / (1 + b * scale * t_T)
        high, low = (2 * beta2 + root) / scale, (2 * beta2 - root) / scale
        decay_T = torch.exp(-2 * b * root * t_T)
        # (xi - high) / (xi - low) = (1 - high) / (1 - low) exp(-omega t), free of a division by 1 - low.
        return (high * (1 - low) - low * (1 - high) * decay_T) / ((1 - low) - (1 - high) * decay_T)


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

    Raises:
        ValueError: if an exponent is not finite.

    Example:
        >>> regime(output_scale=-0.5, var_u=0, var_w=0), regime(output_scale=-1, var_u=0, var_w=0)
        ('kernel', 'mixed')
    """
    exponent = _size_exponent(output_scale, var_u, var_w, width, lr_u, lr_w)
    return _sign_name(exponent, above="kernel", zero="mixed", below="rich")


def pace(
    *,
    output_scale: float,
    var_u: float,
    var_w: float,
    width: float = 1.0,
    lr_u: float = 0.0,
    lr_w: float = 0.0,
) -> str:
    r"""Say how fast a scaling learns at first: the exponent of :math:`K_0 = b r`.

    Args:
        output_scale: exponent of gamma, as in :func:`regime`.
        var_u: exponent of the variance of u at the start.
        var_w: exponent of the variance of w at the start.
        width: exponent of the width.
        lr_u: exponent of the learning rate of u.
        lr_w: exponent of the learning rate of w.

    Returns:
        ``"steady"`` (the speed stays), ``"unstable"`` (it grows: steps of one size diverge) or
        ``"frozen"`` (it vanishes; in the rich regime, a plateau).

    Raises:
        ValueError: if an exponent is not finite.

    Example:
        >>> pace(output_scale=-0.5, var_u=0, var_w=0), pace(output_scale=-1, var_u=0, var_w=0)
        ('steady', 'frozen')
    """
    exponent = output_scale + (lr_u + lr_w) / 2
    exponent += _size_exponent(output_scale, var_u, var_w, width, lr_u, lr_w)
    return _sign_name(exponent, above="unstable", zero="steady", below="frozen")


def _size_exponent(
    output_scale: float, var_u: float, var_w: float, width: float, lr_u: float, lr_w: float
) -> float:
    return output_scale + width + max(var_u + (lr_w - lr_u) / 2, var_w + (lr_u - lr_w) / 2)


def _sign_name(exponent: float, *, above: str, zero: str, below: str) -> str:
    if not math.isfinite(exponent):
        raise ValueError(f"exponents must be finite, got a sum of {exponent!r}")
    if abs(exponent) < 1e-12:
        return zero
    return above if exponent > 0 else below
