r"""Self-supervised learning one dimension at a time, solved for linear models.

Simon et al., "On the stepwise nature of self-supervised learning" (2023, arXiv:2303.15438): an
embedding :math:`f(x) = W x` of pairs of views :math:`(x_i, x'_i)`, trained by gradient flow on
:math:`\lVert C - I \rVert_F^2` (:func:`~lightning_sym.losses.cross_covariance_loss`), where
:math:`C = W \Gamma W^\top`. With eigenvalues :math:`\gamma_1 \ge \gamma_2 \ge \dots` of
:math:`\Gamma` and a start aligned with its eigenvectors every mode learns by itself:

.. math:: \dot s_j = 4 \gamma_j s_j (1 - \gamma_j s_j^2).

Time is learning rate times steps, for a loss that is not divided by anything.

Shape letters: N pairs, M input features, D embedding dimensions, J modes, T times, P points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def pair_correlation(x: Tensor, *, x_other: Tensor) -> Tensor:
    r"""Cross-correlation of two views' inputs, :math:`\Gamma`.

    .. math:: \Gamma = \frac{1}{2N} \sum_i (x_i {x'_i}^\top + x'_i x_i^\top),

    not centred: centre the inputs first if the model sees them centred.

    Args:
        x: inputs of the first view, ``[N, M]``.
        x_other: inputs of the second view, row by row of the same samples, ``[N, M]``.

    Returns:
        Symmetric ``[M, M]`` in float64; its eigenvalues may be negative.

    Raises:
        ValueError: if the two are not non-empty matrices of one shape.
    """
    if x.ndim != 2 or x.shape != x_other.shape or not x.numel():
        raise ValueError(
            f"x and x_other must be [N >= 1, M >= 1] alike, got {tuple(x.shape)} and {tuple(x_other.shape)}"
        )
    product_MM = x.double().mT @ x_other.double() / x.shape[0]
    return (product_MM + product_MM.mT) / 2


def modes(gamma: Tensor, *, count: int | None = None) -> tuple[Tensor, Tensor]:
    r"""Eigenvalues of :math:`\Gamma`, largest first, and their eigenvectors.

    Args:
        gamma: symmetric ``[M, M]``.
        count: how many to return; None is all M.

    Returns:
        ``gamma_J`` in float64 and the eigenvectors as columns, ``[M, J]``.

    Raises:
        ValueError: if ``gamma`` is not a finite square matrix or ``count`` is not in ``[1, M]``.
    """
    if gamma.ndim != 2 or gamma.shape[0] != gamma.shape[1] or not gamma.numel():
        raise ValueError(f"gamma must be a square matrix [M >= 1, M], got {tuple(gamma.shape)}")
    _check_finite(gamma, "gamma")
    count = gamma.shape[0] if count is None else count
    if not 1 <= count <= gamma.shape[0]:
        raise ValueError(f"count must be in [1, {gamma.shape[0]}], got {count}")
    values_M, vectors_MM = torch.linalg.eigh(gamma.double())
    return values_M.flip(0)[:count], vectors_MM.flip(1)[:, :count]


def kernel_correlation(kernel: Tensor, *, rtol: float = 1e-10) -> Tensor:
    r"""The operator of a kernel that has the eigenvalues of :math:`\Gamma`.

    With the kernel of both views, one below the other, and the exchange of views :math:`\Pi`,

    .. math:: K_\Gamma = \frac{1}{2N} K^{1/2}\, \Pi\, K^{1/2}.

    For the linear kernel its nonzero eigenvalues are those of :func:`pair_correlation`; for any
    other kernel they take their place: for a network's tangent kernel on both views,
    ``tangent_kernel(model, parameters, both, most_outputs=None, sketch=None)`` of
    :mod:`lightning_sym.functional`.

    Args:
        kernel: positive semi-definite ``[2N, 2N]``: rows and columns are the N samples' first
            views, then their second views.
        rtol: eigenvalues of the kernel below this share of the largest count as zero.

    Returns:
        Symmetric ``[2N, 2N]`` in float64.

    Raises:
        ValueError: if ``kernel`` is not a finite square matrix of even size.
    """
    root, _ = _kernel_roots(kernel, rtol)
    half = kernel.shape[0] // 2
    return root @ root.roll(half, dims=0) / (2 * half)


def singular_values(t: Tensor | float, gamma: Tensor, s0: Tensor | float) -> Tensor:
    r"""Singular values of the weight over time, in closed form.

    .. math:: s_j(t) = \frac{e^{4 \gamma_j t}}{\sqrt{s_j(0)^{-2} + (e^{8 \gamma_j t} - 1) \gamma_j}},

    which tends to :math:`\gamma_j^{-1/2}` for positive :math:`\gamma_j` and to zero for negative
    ones. It is evaluated without overflow at any time.

    Args:
        t: times ``[T]`` (learning rate times steps), or one time.
        gamma: eigenvalues ``[J]``.
        s0: initial singular values, at least 0: ``[J]``, or one for all.

    Returns:
        ``[T, J]``, or ``[J]`` for one time, in float64; a mode that starts at zero stays there.

    Raises:
        ValueError: if ``gamma`` is not a finite vector, ``s0`` does not fit it or is negative.
    """
    gamma_J, s0_J = _as_modes(gamma, s0)
    t_T1 = torch.as_tensor(t, dtype=torch.float64, device=gamma_J.device).unsqueeze(-1)
    square_J = s0_J.square()
    decay = torch.exp(-8 * gamma_J.abs() * t_T1)  # in (0, 1]
    # Numerator and denominator times exp(-8 gamma t) for growing modes, as they stand for the rest.
    growing = square_J / (decay + gamma_J.abs() * square_J * (1 - decay))
    shrinking = square_J * decay / (1 + gamma_J.abs() * square_J * (1 - decay))
    square = torch.where(gamma_J > 0, growing, shrinking)
    return torch.where(square_J > 0, square, 0.0).sqrt()


def embedding_eigenvalues(t: Tensor | float, gamma: Tensor, s0: Tensor | float) -> Tensor:
    r"""Eigenvalues of the embeddings' cross-covariance over time, :math:`\gamma_j s_j(t)^2`.

    A logistic from (almost) zero to one for every positive :math:`\gamma_j`.

    Args:
        t: times ``[T]``, or one time.
        gamma: eigenvalues ``[J]``.
        s0: initial singular values ``[J]``, or one for all.

    Returns:
        ``[T, J]``, or ``[J]`` for one time, in float64.

    Raises:
        ValueError: as :func:`singular_values`.
    """
    square = singular_values(t, gamma=gamma, s0=s0).square()
    return gamma.double() * square


def learning_times(gamma: Tensor, s0: Tensor | float, *, exact: bool = False) -> Tensor:
    r"""Time at which each mode is half learned.

    .. math:: \tau_j = -\frac{\ln (\gamma_j s_j(0)^2)}{8 \gamma_j},

    the paper's. The eigenvalue :math:`\gamma_j s_j^2` passes one half at
    :math:`\ln[(1 - q_j) / q_j] / (8 \gamma_j)` with :math:`q_j = \gamma_j s_j(0)^2`, which differs
    by the order of :math:`s_j(0)^2`.

    Args:
        gamma: eigenvalues ``[J]``.
        s0: initial singular values ``[J]``, or one for all.
        exact: the passing of one half instead of the paper's.

    Returns:
        ``[J]`` in float64; infinite for modes that are never learned (an eigenvalue not positive,
        or a start at zero). Negative for modes that start past one half, if exact.

    Raises:
        ValueError: as :func:`singular_values`.

    Example:
        >>> learning_times(torch.tensor([1.0, 0.5]), s0=0.1)
        tensor([0.5756, 1.3246], dtype=torch.float64)
    """
    gamma_J, s0_J = _as_modes(gamma, s0)
    learned = (gamma_J > 0) & (s0_J > 0)
    start_J = torch.where(learned, gamma_J * s0_J.square(), 1.0)
    odds_J = start_J / (1 - start_J) if exact else start_J
    return torch.where(learned, -odds_J.log() / (8 * gamma_J), torch.inf)


def staircase_loss(t: Tensor | float, gamma: Tensor, s0: Tensor | float) -> Tensor:
    r"""Loss over time, :math:`\sum_j (1 - \gamma_j s_j(t)^2)^2`: a staircase from J down.

    Args:
        t: times ``[T]``, or one time.
        gamma: eigenvalues ``[J]`` of the embedding's J = D modes.
        s0: initial singular values ``[J]``, or one for all.

    Returns:
        ``[T]``, or ``[]`` for one time, in float64.

    Raises:
        ValueError: as :func:`singular_values`.
    """
    return (1 - embedding_eigenvalues(t, gamma=gamma, s0=s0)).square().sum(dim=-1)


def aligned_scales(weight: Tensor, *, vectors: Tensor) -> Tensor:
    r"""Initial singular values of the aligned start that a generic small start behaves like.

    Later modes are held back until earlier ones are learned, in the directions these leave free:
    Gram-Schmidt. With :math:`W(0) V = Q R`, :math:`s_j(0) = |R_{jj}|`.

    Args:
        weight: ``[D, M]``.
        vectors: eigenvectors of :math:`\Gamma`, largest eigenvalue first, as columns
            ``[M, J >= 1]``; the first ``min(D, J)`` are used.

    Returns:
        ``[min(D, J)]`` in float64, at least 0.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> aligned_scales(torch.tensor([[2.0, 5.0], [0.0, -3.0]]), vectors=torch.eye(2))
        tensor([2., 3.], dtype=torch.float64)
    """
    empty = not weight.numel() or not vectors.numel()
    if weight.ndim != 2 or vectors.ndim != 2 or weight.shape[1] != vectors.shape[0] or empty:
        raise ValueError(
            "weight and vectors must be [D, M] and [M, J] and not empty, "
            f"got {tuple(weight.shape)} and {tuple(vectors.shape)}"
        )
    count = min(weight.shape[0], vectors.shape[1])
    projected_DJ = weight.detach().double() @ vectors[:, :count].double()
    return torch.linalg.qr(projected_DJ).R.diagonal().abs()


def final_weight(gamma: Tensor, *, vectors: Tensor) -> Tensor:
    r"""The weight a small start ends in, up to a rotation from the left.

    .. math:: W = \Gamma_{\le d}^{-1/2} V_{\le d}^\top

    Compare :math:`W^\top W`, which knows no rotation.

    Args:
        gamma: the d largest eigenvalues ``[J]``, all positive.
        vectors: their eigenvectors as columns, ``[M, J]``.

    Returns:
        ``[J, M]`` in float64.

    Raises:
        ValueError: if an eigenvalue is not positive (that dimension is never learned) or shapes do
            not fit.
    """
    if gamma.ndim != 1 or vectors.ndim != 2 or len(gamma) != vectors.shape[1] or not vectors.numel():
        raise ValueError(
            "gamma and vectors must be [J >= 1] and [M, J], "
            f"got {tuple(gamma.shape)} and {tuple(vectors.shape)}"
        )
    if not (gamma > 0).all():
        raise ValueError(f"gamma must be positive to be learned, got {gamma.min().item()}")
    return (vectors.double() * gamma.double().rsqrt()).mT


def final_embedding(kernel_points: Tensor, *, kernel: Tensor, dimensions: int, rtol: float = 1e-10) -> Tensor:
    r"""The embedding a kernel machine ends in from a small start, up to a rotation.

    .. math:: f(x) = \Gamma_{\le d}^{-1/2} B_{\le d}^\top K^{-1/2} k(x)

    with eigenpairs :math:`(\gamma_j, b_j)` of :func:`kernel_correlation`.

    Args:
        kernel_points: kernel between P points and both views of the N samples, ``[P, 2N]``.
        kernel: kernel of the samples, ``[2N, 2N]``, see :func:`kernel_correlation`.
        dimensions: embedding dimensions d.
        rtol: eigenvalues of the kernel below this share of the largest count as zero.

    Returns:
        ``[P, D]`` in float64.

    Raises:
        ValueError: if the shapes do not fit, or the kernel has fewer than ``dimensions`` positive
            modes.
    """
    root, inverse_root = _kernel_roots(kernel, rtol)
    if kernel_points.ndim != 2 or kernel_points.shape[1] != kernel.shape[0]:
        raise ValueError(f"kernel_points must be [P, {kernel.shape[0]}], got {tuple(kernel_points.shape)}")
    half = kernel.shape[0] // 2
    gamma_J, vectors = modes(root @ root.roll(half, dims=0) / (2 * half), count=dimensions)
    if not gamma_J[-1] > rtol * gamma_J[0]:
        raise ValueError(
            f"dimensions={dimensions} is more than the kernel can learn: its positive modes number "
            f"{int((gamma_J > rtol * gamma_J[0]).sum())}"
        )
    return kernel_points.double() @ inverse_root @ vectors * gamma_J.rsqrt()


@dataclass(frozen=True)
class Staircase:
    r"""What the theory says of one run, in the run's own steps.

    Args:
        gamma: eigenvalues ``[J]``, largest first.
        s0: initial singular values ``[J]``.
        time_per_step: time that passes in one optimizer step: the learning rate, for gradient
            descent on the cross-covariance loss.

    Raises:
        ValueError: if ``gamma`` and ``s0`` do not fit or ``time_per_step`` is not positive.
    """

    gamma: Tensor
    s0: Tensor
    time_per_step: float

    def __post_init__(self) -> None:
        _as_modes(self.gamma, self.s0)
        if not self.time_per_step > 0:
            raise ValueError(f"time_per_step must be positive, got {self.time_per_step!r}")

    @classmethod
    def from_pairs(cls, x: Tensor, *, x_other: Tensor, weight: Tensor, lr: float) -> Staircase:
        """Return the prediction for a linear model on fixed pairs.

        Args:
            x: inputs of the first view, ``[N, M]``.
            x_other: inputs of the second view, ``[N, M]``.
            weight: the initial weight, ``[D, M]``.
            lr: learning rate of full-batch gradient descent.
        """
        count = min(weight.shape)
        gamma_J, vectors_MJ = modes(pair_correlation(x, x_other=x_other), count=count)
        return cls(gamma_J, aligned_scales(weight, vectors=vectors_MJ), lr)

    def eigenvalues(self, steps: Tensor | float) -> Tensor:
        """Return the embedding's eigenvalues after ``steps`` steps, ``[T, J]`` or ``[J]``."""
        t = torch.as_tensor(steps, dtype=torch.float64) * self.time_per_step
        return embedding_eigenvalues(t, gamma=self.gamma, s0=self.s0)

    def dates(self) -> Tensor:
        """Return the step at which each mode is half learned, ``[J]``; infinite for never."""
        return learning_times(self.gamma, s0=self.s0, exact=True) / self.time_per_step

    def summary(self) -> Mapping[str, list[float]]:
        """Return gamma, the initial scales and the dates as plain lists."""
        return {"gamma": self.gamma.tolist(), "s0": self.s0.tolist(), "dates": self.dates().tolist()}


def _as_modes(gamma: Tensor, s0: Tensor | float) -> tuple[Tensor, Tensor]:
    gamma_J = torch.as_tensor(gamma).double()
    if gamma_J.ndim != 1 or not len(gamma_J):
        raise ValueError(f"gamma must be a non-empty vector [J], got {tuple(gamma_J.shape)}")
    _check_finite(gamma_J, "gamma")  # NaN would read as a mode that is never learned
    s0_J = torch.as_tensor(s0, device=gamma_J.device).double()
    if s0_J.ndim and s0_J.shape != gamma_J.shape:
        raise ValueError(f"s0 must be one number or {tuple(gamma_J.shape)}, got {tuple(s0_J.shape)}")
    if not (s0_J >= 0).all():
        raise ValueError(f"s0 must be at least 0, got {s0_J.min().item()}")
    return gamma_J, s0_J.expand_as(gamma_J)


def _check_finite(matrix: Tensor, name: str) -> None:
    if not bool(matrix.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def _kernel_roots(kernel: Tensor, rtol: float) -> tuple[Tensor, Tensor]:
    """Return the square root of the kernel and the pseudo-inverse of that root."""
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1] or kernel.shape[0] % 2 or not kernel.numel():
        raise ValueError(f"kernel must be [2N, 2N] over both views, got {tuple(kernel.shape)}")
    _check_finite(kernel, "kernel")
    values, vectors = torch.linalg.eigh(kernel.double())
    kept = values > rtol * values[-1]
    root = torch.where(kept, values, 0.0).sqrt()
    inverse = torch.where(kept, torch.where(kept, values, 1.0).rsqrt(), 0.0)
    return (vectors * root) @ vectors.mT, (vectors * inverse) @ vectors.mT
