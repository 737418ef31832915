"""The solvable loss of stepwise self-supervised learning: an identity cross-covariance.

Shape letters: N samples, D embedding dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sym.losses._pairs import PairLoss, as_pair, check_batch, exactly


def cross_covariance(z_a: Tensor, z_b: Tensor) -> Tensor:
    r"""Symmetric second moment between two views, neither centred nor normalised.

    .. math:: C = \frac{1}{2N} \sum_n (z^a_n {z^b_n}^\top + z^b_n {z^a_n}^\top)

    Args:
        z_a: ``[N, D]``; half types are computed in float32.
        z_b: ``[N, D]``.

    Returns:
        Symmetric ``[D, D]``; eigenvalues may be negative.

    Raises:
        TypeError: if an embedding is not a floating-point tensor.
        ValueError: if the embeddings are not two ``[N >= 2, D]`` of one shape.
    """
    z_a, z_b = as_pair(z_a, z_b)
    check_batch(z_a)
    with exactly(z_a):
        c_DD = z_a.mT @ z_b / z_a.shape[0]
        return (c_DD + c_DD.mT) / 2


def cross_covariance_loss(z_a: Tensor, z_b: Tensor) -> Tensor:
    r"""Squared distance of the cross-covariance from the identity (Simon et al., 2023).

    .. math:: L = \lVert C - I \rVert_F^2

    with C of :func:`cross_covariance`: Barlow Twins without batch normalisation and with equal
    weights (arXiv:2303.15438). For a linear model from a small start it falls in steps of one,
    from D to 0, one for each eigenvalue of C that rises to one.

    Args:
        z_a: embeddings of the first view, ``[N, D]``; half types are computed in float32.
        z_b: embeddings of the second view, ``[N, D]``.

    Returns:
        Scalar ``[]``, at least 0; D for zero embeddings.

    Raises:
        TypeError: if an embedding is not a floating-point tensor.
        ValueError: if the embeddings are not two ``[N >= 2, D]`` of one shape.

    Example:
        >>> cross_covariance_loss(torch.zeros(4, 3), torch.zeros(4, 3))
        tensor(3.)
    """
    c_DD = cross_covariance(z_a, z_b)
    return (c_DD - torch.eye(len(c_DD), dtype=c_DD.dtype, device=c_DD.device)).square().sum()


class CrossCovarianceLoss(PairLoss):
    """Cross-covariance loss of the global batch, see :func:`cross_covariance_loss`.

    Args:
        sync: gather the embeddings of all ranks first.
        group: the process group to gather over; None is the default group.
    """

    whitening = True

    def loss(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Return the loss of the (global) batch."""
        return cross_covariance_loss(z_a, z_b)
