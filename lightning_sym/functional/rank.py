"""Rank measures: how many directions does a set of features, or a matrix, still use?

Each measure of features has a twin that starts from a covariance or its eigenvalues, which is what
is left when features were reduced over batches or ranks.

Non-finite input gives NaN in all of them; it is never an exception.

Shape letters: N samples, D features, K = min(N, D).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sym.functional._checks import as_matrix, as_square, as_vector, check_rtol, nan_like


def effective_rank(features: Tensor, *, center: bool = True) -> Tensor:
    r"""Entropy-based effective rank of a batch of features (Roy & Vetterli, 2007).

    With singular values :math:`\sigma_k` and :math:`p_k = \sigma_k / \sum_j \sigma_j`,

    .. math:: \operatorname{erank}(X) = \exp\bigl(-\textstyle\sum_k p_k \log p_k\bigr).

    A batch of n samples shows at most n directions: compare readings of equal n only.

    Args:
        features: float tensor ``[N, D]`` with ``N >= 2``; half types are computed in float32.
        center: subtract the batch mean first. The paper does not; a constant offset otherwise
            counts as one used direction. Singular values below the rounding of that subtraction
            count as zero.

    Returns:
        Scalar ``[]`` in ``[1, K]``, ``0`` when every singular value is zero, NaN for non-finite
        features.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if ``features`` is not ``[N >= 2, D]``.

    Example:
        >>> effective_rank(torch.eye(4), center=False)
        tensor(4.)
    """
    x_ND = as_matrix(features, name="features", min_rows=2)
    if not x_ND.isfinite().all():
        return nan_like(x_ND)
    sigma_K = torch.linalg.svdvals(_centered(x_ND) if center else x_ND)
    if center:
        sigma_K = torch.where(sigma_K > _centering_error(x_ND), sigma_K, torch.zeros_like(sigma_K))
    return _exp_entropy(sigma_K)


def effective_rank_from_eigenvalues(eigenvalues: Tensor) -> Tensor:
    r"""Effective rank of features, from the eigenvalues of their covariance.

    Singular values of the features are, up to a common factor that cancels, the square roots of the
    eigenvalues of their covariance (or Gram matrix): the value equals :func:`effective_rank` of the
    centred features.

    Args:
        eigenvalues: float tensor ``[D]``, any order and scale. Those below ``D * eps`` of the
            largest are rounding (the small ones of a covariance come out slightly negative) and
            count as zero.

    Returns:
        Scalar ``[]`` in ``[1, D]``, ``0`` when no eigenvalue is positive, NaN for non-finite input.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if ``eigenvalues`` is not a non-empty vector.

    Example:
        >>> effective_rank_from_eigenvalues(torch.tensor([9.0, 9.0, 0.0]))
        tensor(2.)
    """
    lambda_D = _clean(eigenvalues)
    if not lambda_D.isfinite().all():
        return nan_like(lambda_D)
    positive_D = lambda_D > 0
    sigma_D = torch.where(positive_D, torch.where(positive_D, lambda_D, 1.0).sqrt(), 0.0)
    return _exp_entropy(sigma_D)


def participation_ratio(features: Tensor, *, center: bool = True) -> Tensor:
    r"""Participation ratio of the feature covariance.

    With eigenvalues :math:`\lambda_i` of the covariance :math:`C`,

    .. math:: \operatorname{PR} = \frac{(\sum_i \lambda_i)^2}{\sum_i \lambda_i^2}
              = \frac{(\operatorname{tr} C)^2}{\lVert C \rVert_F^2},

    which the right-hand side gives without a decomposition.

    Args:
        features: float tensor ``[N, D]`` with ``N >= 2``; half types are computed in float32.
        center: subtract the batch mean first.

    Returns:
        Scalar ``[]`` in ``[1, K]``, ``0`` when the features have no variance, NaN for non-finite
        features.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if ``features`` is not ``[N >= 2, D]``.

    Example:
        >>> participation_ratio(torch.diag(torch.tensor([1.0, 1.0, 0.0])), center=False)
        tensor(2.)
    """
    x_ND = as_matrix(features, name="features", min_rows=2)
    if not x_ND.isfinite().all():
        return nan_like(x_ND)
    c_ND = _centered(x_ND) if center else x_ND
    if center and not c_ND.norm() > _centering_error(x_ND):
        return torch.zeros_like(x_ND[0, 0])
    c_ND = c_ND / c_ND.detach().abs().max().clamp_min(torch.finfo(c_ND.dtype).tiny)
    gram = c_ND @ c_ND.mT if c_ND.shape[0] < c_ND.shape[1] else c_ND.mT @ c_ND
    return participation_ratio_from_covariance(gram)


def participation_ratio_from_covariance(covariance: Tensor) -> Tensor:
    r"""Participation ratio :math:`(\operatorname{tr} C)^2 / \lVert C \rVert_F^2` of a covariance.

    Args:
        covariance: symmetric positive semi-definite float tensor ``[D, D]``, any scale.

    Returns:
        Scalar ``[]`` in ``[1, D]``, ``0`` for the zero matrix, NaN for non-finite input.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if ``covariance`` is not square.

    Example:
        >>> participation_ratio_from_covariance(torch.diag(torch.tensor([2.0, 1.0, 1.0])))
        tensor(2.6667)
    """
    c_DD = as_square(covariance, name="covariance")
    if not c_DD.isfinite().all():
        return nan_like(c_DD)
    scale = c_DD.detach().abs().max()
    c_DD = c_DD / torch.where(scale > 0, scale, torch.ones_like(scale))
    squared = c_DD.square().sum()
    return torch.where(squared > 0, c_DD.trace().square() / torch.where(squared > 0, squared, 1.0), 0.0)


def stable_rank(matrix: Tensor) -> Tensor:
    r"""Stable rank :math:`\lVert A \rVert_F^2 / \lVert A \rVert_2^2` (Rudelson & Vershynin, 2007).

    Args:
        matrix: float tensor ``[N, D]``; half types are computed in float32.

    Returns:
        Scalar ``[]`` in ``[1, K]``, ``0`` for the zero matrix, NaN for non-finite input.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if ``matrix`` is not a non-empty matrix.

    Example:
        >>> stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0])))
        tensor(1.5000)
    """
    a_ND = as_matrix(matrix, name="matrix")
    if not a_ND.isfinite().all():
        return nan_like(a_ND)
    sigma_K = torch.linalg.svdvals(a_ND)
    top = sigma_K[0]
    return (sigma_K / torch.where(top > 0, top, torch.ones_like(top))).square().sum()


def numerical_rank(matrix: Tensor, *, rtol: float = 1e-3) -> Tensor:
    r"""Count the singular values above ``rtol`` times the largest.

    A piecewise constant quantity: it has no gradient.

    Args:
        matrix: float tensor ``[N, D]``; half types are computed in float32.
        rtol: cut relative to the largest singular value, in ``[0, 1)``. The default is coarse
            enough for :func:`numerical_rank_from_eigenvalues` of a float64 covariance to agree.

    Returns:
        Integer scalar ``[]`` as a float (it may be NaN) in ``[1, K]``, ``0`` for the zero matrix,
        NaN for non-finite input.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if ``matrix`` is not a non-empty matrix or ``rtol`` is out of range.

    Example:
        >>> numerical_rank(torch.diag(torch.tensor([1.0, 0.1, 1e-6])))
        tensor(2.)
    """
    a_ND = as_matrix(matrix, name="matrix").detach()
    check_rtol(rtol)
    if not a_ND.isfinite().all():
        return nan_like(a_ND)
    sigma_K = torch.linalg.svdvals(a_ND)
    return (sigma_K > rtol * sigma_K[0]).sum().to(a_ND.dtype)


def numerical_rank_from_eigenvalues(eigenvalues: Tensor, *, rtol: float = 1e-3) -> Tensor:
    r"""Count the covariance eigenvalues whose square root is above ``rtol`` times the largest.

    Args:
        eigenvalues: float tensor ``[D]``, any order and scale; those below ``D * eps`` of the largest
            count as zero.
        rtol: cut on singular values (square roots of eigenvalues), in ``[0, 1)``. Eigenvalues of a
            float32 matrix resolve singular values down to ``sqrt(D * eps)`` of the largest only
            (0.008 at D = 512): give float64 ones.

    Returns:
        Integer scalar ``[]`` as a float in ``[1, D]``, ``0`` when no eigenvalue is positive, NaN for
        non-finite input.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if ``eigenvalues`` is not a non-empty vector or ``rtol`` is out of range.

    Example:
        >>> numerical_rank_from_eigenvalues(torch.tensor([1.0, 1e-2, 1e-12]))
        tensor(2.)
    """
    check_rtol(rtol)
    lambda_D = _clean(eigenvalues).detach()
    if not lambda_D.isfinite().all():
        return nan_like(lambda_D)
    sigma_D = lambda_D.sqrt()
    return (sigma_D > rtol * sigma_D.max()).sum().to(lambda_D.dtype)


def _centered(x_ND: Tensor) -> Tensor:
    return x_ND - x_ND.mean(dim=0, keepdim=True)


def _centering_error(x_ND: Tensor) -> Tensor:
    """Return a bound on the Frobenius norm that rounding leaves when the mean is subtracted."""
    return x_ND.detach().abs().max() * torch.finfo(x_ND.dtype).eps * (x_ND.numel() ** 0.5)


def _exp_entropy(sigma_K: Tensor) -> Tensor:
    top = sigma_K.detach().max()
    sigma_K = sigma_K / torch.where(top > 0, top, torch.ones_like(top))  # so that no sum underflows
    total = sigma_K.sum()
    p_K = sigma_K / torch.where(total > 0, total, torch.ones_like(total))
    p_K = torch.where(p_K > 0, p_K, torch.ones_like(p_K))  # entr(1) = 0 with a finite gradient
    return torch.where(total > 0, torch.special.entr(p_K).sum().exp(), torch.zeros_like(total))


def _clean(eigenvalues: Tensor) -> Tensor:
    lambda_D = as_vector(eigenvalues, name="eigenvalues")
    top = lambda_D.detach().max()
    floor = (top * torch.finfo(lambda_D.dtype).eps * lambda_D.numel()).clamp_min(0)
    lambda_D = lambda_D / torch.where(top > 0, top, torch.ones_like(top))
    floor = floor / torch.where(top > 0, top, torch.ones_like(top))
    # What is not finite must survive the cut: NaN compares false, and 0 * -inf is NaN.
    return torch.where(lambda_D <= floor, 0 * lambda_D, lambda_D)
