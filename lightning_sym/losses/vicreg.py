"""VICReg: equal views, a standard deviation of one, no covariance.

Shape letters: N samples, D embedding dimensions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lightning_sym.losses._pairs import (
    PairLoss,
    as_embeddings,
    as_pair,
    check_batch,
    exactly,
    nonnegative,
)


def invariance_term(z_a: Tensor, z_b: Tensor) -> Tensor:
    r"""Mean squared difference of the views, :math:`\frac{1}{ND}\lVert Z_a - Z_b \rVert_F^2`.

    The paper divides by N, its published code by N D; this is the code's, to which the paper's
    weights belong.

    Args:
        z_a: ``[N >= 1, D]``; half types are computed in float32.
        z_b: ``[N, D]``.

    Returns:
        Scalar ``[]``, at least 0.

    Raises:
        TypeError: if an embedding is not a floating-point tensor.
        ValueError: if the embeddings are not two ``[N >= 1, D]`` of one shape.
    """
    z_a, z_b = as_pair(z_a, z_b)
    as_embeddings(z_a, name="z_a")
    return (z_a - z_b).square().mean()


def variance_term(z: Tensor, *, eps: float = 1e-4) -> Tensor:
    r"""Hinge on each dimension's deviation, :math:`\frac1D \sum_i \max(0, 1 - \sqrt{v_i + \epsilon})`.

    Args:
        z: ``[N >= 2, D]``; v is its unbiased variance; half types are computed in float32.
        eps: at least 0; keeps the gradient of the root finite at zero variance.

    Returns:
        Scalar ``[]`` in ``[0, 1]``; ``1 - sqrt(eps)`` for constant embeddings.

    Raises:
        TypeError: if ``z`` is not a floating-point tensor.
        ValueError: if ``z`` is not ``[N >= 2, D]`` or ``eps`` is negative or not finite.
    """
    nonnegative(eps=eps)
    z = as_embeddings(z, name="z", min_rows=2)
    return F.relu(1 - (z.var(dim=0) + eps).sqrt()).mean()


def covariance_term(z: Tensor) -> Tensor:
    r"""Off-diagonal covariance, :math:`\frac1D \sum_{i \neq j} \operatorname{Cov}(z)_{ij}^2`.

    Args:
        z: ``[N >= 2, D]``; the covariance is the unbiased one; half types are computed in float32.

    Returns:
        Scalar ``[]``, at least 0.

    Raises:
        TypeError: if ``z`` is not a floating-point tensor.
        ValueError: if ``z`` is not ``[N >= 2, D]``.
    """
    z = as_embeddings(z, name="z", min_rows=2)
    with exactly(z):
        centred_ND = z - z.mean(dim=0)
        covariance_DD = centred_ND.mT @ centred_ND / (z.shape[0] - 1)
    off_diagonal = covariance_DD.square().sum() - covariance_DD.diagonal().square().sum()
    return off_diagonal / z.shape[1]


def vicreg_loss(
    z_a: Tensor,
    z_b: Tensor,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    eps: float = 1e-4,
) -> Tensor:
    r"""VICReg loss (Bardes et al., 2022, arXiv:2105.04906, eq. 6, in its published code's scale).

    .. math:: L = \lambda\, s(Z_a, Z_b) + \frac{\mu}{2} [v(Z_a) + v(Z_b)] + \nu\, [c(Z_a) + c(Z_b)]

    with :func:`invariance_term` s, :func:`variance_term` v and :func:`covariance_term` c.

    Args:
        z_a: embeddings of the first view, ``[N, D]``; half types are computed in float32.
        z_b: embeddings of the second view, ``[N, D]``.
        invariance: the paper's :math:`\lambda`.
        variance: the paper's :math:`\mu`.
        covariance: the paper's :math:`\nu`.
        eps: added to the variances.

    Returns:
        Scalar ``[]``, at least 0; ``variance * (1 - sqrt(eps))`` for constant embeddings.

    Raises:
        TypeError: if an embedding is not a floating-point tensor.
        ValueError: if the embeddings are not two ``[N >= 2, D]`` of one shape, or a weight
            or ``eps`` is negative or not finite.

    Example:
        >>> import torch
        >>> vicreg_loss(torch.zeros(4, 3), torch.zeros(4, 3), eps=0.0)
        tensor(25.)
    """
    nonnegative(invariance=invariance, variance=variance, covariance=covariance)
    z_a, z_b = as_pair(z_a, z_b)
    check_batch(z_a)
    with exactly(z_a):
        spread = (variance_term(z_a, eps=eps) + variance_term(z_b, eps=eps)) / 2
        redundancy = covariance_term(z_a) + covariance_term(z_b)
        return invariance * invariance_term(z_a, z_b) + variance * spread + covariance * redundancy


class VICRegLoss(PairLoss):
    """VICReg loss of the global batch, see :func:`vicreg_loss`.

    Args:
        invariance: weight of the views' squared difference.
        variance: weight of the hinge on the standard deviations.
        covariance: weight of the squared covariances.
        eps: added to the variances.
        sync: gather the embeddings of all ranks first.
        group: the process group to gather over; None is the default group.

    Raises:
        ValueError: if a weight is negative or not finite.
    """

    whitening = True

    def __init__(
        self,
        *,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        eps: float = 1e-4,
        sync: bool = True,
        group: Any = None,
    ) -> None:
        super().__init__(sync=sync, group=group)
        nonnegative(invariance=invariance, variance=variance, covariance=covariance, eps=eps)
        self.invariance = invariance
        self.variance = variance
        self.covariance = covariance
        self.eps = eps

    def loss(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Return the loss of the (global) batch."""
        return vicreg_loss(
            z_a,
            z_b,
            invariance=self.invariance,
            variance=self.variance,
            covariance=self.covariance,
            eps=self.eps,
        )
