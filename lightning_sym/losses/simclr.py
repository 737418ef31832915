"""SimCLR's NT-Xent: tell the other view of a sample from all other samples.

Shape letters: N samples, D embedding dimensions, V = 2N views.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_sym.losses._pairs import PairLoss, as_pair, check_batch, exactly, positive


def nt_xent_loss(z_a: Tensor, z_b: Tensor, *, temperature: float = 0.5) -> Tensor:
    r"""Normalised temperature-scaled cross entropy (Chen et al., 2020, arXiv:2002.05709, eq. 1).

    With all 2N embeddings :math:`u_i`, scaled to length one, and :math:`p(i)` the other view of i,

    .. math:: L = -\frac1{2N} \sum_i \log
              \frac{e^{u_i \cdot u_{p(i)} / \tau}}{\sum_{k \neq i} e^{u_i \cdot u_k / \tau}} .

    Args:
        z_a: embeddings of the first view, ``[N, D]``; half types are computed in float32. A zero
            embedding has similarity zero with everything.
        z_b: embeddings of the second view, ``[N, D]``.
        temperature: :math:`\tau`; the paper's 0.5 for CIFAR-10, 0.1 for ImageNet.

    Returns:
        Scalar ``[]``, at least 0; ``log(2 N - 1)`` when all embeddings are equal.

    Raises:
        TypeError: if an embedding is not a floating-point tensor.
        ValueError: if the embeddings are not two ``[N >= 2, D]`` of one shape, or the temperature
            is not positive and finite.

    Example:
        >>> nt_xent_loss(torch.ones(2, 3), torch.ones(2, 3))  # log 3
        tensor(1.0986)
    """
    positive(temperature=temperature)
    z_a, z_b = as_pair(z_a, z_b)
    check_batch(z_a)
    with exactly(z_a):
        u_VD = torch.cat([_unit(z_a), _unit(z_b)])
        logits_VV = u_VD @ u_VD.mT / temperature
        logits_VV = logits_VV.masked_fill(
            torch.eye(len(u_VD), dtype=torch.bool, device=u_VD.device), -torch.inf
        )
        other_V = torch.arange(len(u_VD), device=u_VD.device).roll(z_a.shape[0])
        return F.cross_entropy(logits_VV, other_V)


class SimCLRLoss(PairLoss):
    """NT-Xent loss of the global batch: negatives come from all ranks, see :func:`nt_xent_loss`.

    Args:
        temperature: divides the cosine similarities.
        sync: gather the embeddings of all ranks first.
        group: the process group to gather over; None is the default group.

    Raises:
        ValueError: if the temperature is not positive and finite.
    """

    def __init__(self, *, temperature: float = 0.5, sync: bool = True, group: Any = None) -> None:
        super().__init__(sync=sync, group=group)
        positive(temperature=temperature)
        self.temperature = temperature

    def loss(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Return the loss of the (global) batch."""
        return nt_xent_loss(z_a, z_b, temperature=self.temperature)


def _unit(z_ND: Tensor) -> Tensor:
    """Return rows of length one, and zero rows as they are, with a finite gradient there too."""
    largest_N1 = z_ND.detach().abs().amax(dim=1, keepdim=True)  # first: squares of 1e-30 underflow
    z_ND = z_ND / largest_N1.where(largest_N1 > 0, 1.0)
    norm_N1 = torch.linalg.vector_norm(z_ND, dim=1, keepdim=True)
    return z_ND / norm_N1.where(norm_N1 > 0, 1.0)
