"""Barlow Twins: make the cross-correlation of two views' embeddings the identity.

Shape letters: N samples, D embedding dimensions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_sym.losses._pairs import PairLoss, as_pair, check_batch, exactly, nonnegative


def cross_correlation(z_a: Tensor, z_b: Tensor, *, eps: float = 1e-5) -> Tensor:
    r"""Cross-correlation of two views' embeddings over the batch.

    .. math:: C_{ij} = \frac1N \sum_n
              \frac{(z^a_{ni} - \bar z^a_i)(z^b_{nj} - \bar z^b_j)}
                   {\sqrt{(v^a_i + \epsilon)(v^b_j + \epsilon)}}

    with biased variances v: a batch normalisation without affine part, then a product.

    Args:
        z_a: ``[N, D]``; half types are computed in float32.
        z_b: ``[N, D]``.
        eps: added to the variances. Embeddings of a variance near it (small initialisation) give
            correlations well below one: lower it there.

    Returns:
        ``[D, D]`` with entries in ``[-1, 1]``; rows and columns of constant dimensions are zero.

    Raises:
        TypeError: if an embedding is not a floating-point tensor.
        ValueError: if the embeddings are not two ``[N >= 2, D]`` of one shape, or a weight
            or ``eps`` is negative or not finite.
    """
    nonnegative(eps=eps)
    z_a, z_b = as_pair(z_a, z_b)
    check_batch(z_a)
    with exactly(z_a):
        return _standardised(z_a, eps).mT @ _standardised(z_b, eps) / z_a.shape[0]


def barlow_twins_loss(z_a: Tensor, z_b: Tensor, *, off_diagonal: float = 5e-3, eps: float = 1e-5) -> Tensor:
    r"""Barlow Twins loss (Zbontar et al., 2021, arXiv:2103.03230, eq. 1).

    .. math:: L = \sum_i (1 - C_{ii})^2 + \lambda \sum_{i \neq j} C_{ij}^2

    with C of :func:`cross_correlation`.

    Args:
        z_a: embeddings of the first view, ``[N, D]``; half types are computed in float32.
        z_b: embeddings of the second view, ``[N, D]``.
        off_diagonal: the paper's :math:`\lambda`.
        eps: see :func:`cross_correlation`.

    Returns:
        Scalar ``[]``, at least 0; D for constant embeddings.

    Raises:
        TypeError: if an embedding is not a floating-point tensor.
        ValueError: if the embeddings are not two ``[N >= 2, D]`` of one shape, or a weight
            or ``eps`` is negative or not finite.

    Example:
        >>> import torch
        >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> barlow_twins_loss(z, z, eps=0.0)
        tensor(0.)
        >>> barlow_twins_loss(z, -z, eps=0.0)
        tensor(8.)
    """
    nonnegative(off_diagonal=off_diagonal)
    c_DD = cross_correlation(z_a, z_b, eps=eps)
    diagonal_D = c_DD.diagonal()
    redundancy = c_DD.square().sum() - diagonal_D.square().sum()
    return (diagonal_D - 1).square().sum() + off_diagonal * redundancy


class BarlowTwinsLoss(PairLoss):
    """Barlow Twins loss of the global batch, see :func:`barlow_twins_loss`.

    Args:
        off_diagonal: weight of the off-diagonal entries, the paper's lambda.
        eps: added to the variances.
        sync: gather the embeddings of all ranks first.
        group: the process group to gather over; None is the default group.

    Raises:
        ValueError: if a weight is negative or not finite.
    """

    whitening = True

    def __init__(
        self, *, off_diagonal: float = 5e-3, eps: float = 1e-5, sync: bool = True, group: Any = None
    ) -> None:
        super().__init__(sync=sync, group=group)
        nonnegative(off_diagonal=off_diagonal, eps=eps)
        self.off_diagonal = off_diagonal
        self.eps = eps

    def loss(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Return the loss of the (global) batch."""
        return barlow_twins_loss(z_a, z_b, off_diagonal=self.off_diagonal, eps=self.eps)


def _standardised(z_ND: Tensor, eps: float) -> Tensor:
    z_ND = z_ND - z_ND.mean(dim=0)
    variance_D = z_ND.square().mean(dim=0) + eps
    return z_ND * variance_D.where(variance_D > 0, 1.0).rsqrt()
