"""VICReg with its hinge on the variance: what does the hinge do to the staircase?

Shape letters: B batch, D dimensions.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from lightning_sym.losses import covariance_term, invariance_term
from lightning_sym.losses._pairs import PairLoss


def variance_hinge_loss(z_a: Tensor, z_b: Tensor, *, invariance: float = 25.0) -> Tensor:
    """Return VICReg with weights (invariance, 25, 25) and its hinge on the variance, without the root.

    Near zero the push of the usual hinge does not shrink with the embedding, this one's does.

    Args:
        z_a: embeddings of the first view, ``[B >= 2, D]``.
        z_b: embeddings of the second view, of the same samples, ``[B, D]``.
        invariance: weight of the mean squared difference.

    Returns:
        Scalar ``[]``, at least 0.
    """
    hinge = (F.relu(1 - z_a.var(dim=0)).mean() + F.relu(1 - z_b.var(dim=0)).mean()) / 2
    redundancy = covariance_term(z_a) + covariance_term(z_b)
    return invariance * invariance_term(z_a, z_b) + 25 * (hinge + redundancy)


class VarianceHingeLoss(PairLoss):
    """:func:`variance_hinge_loss` of the global batch, with an invariance of 12.5.

    A small dimension of variance v and covariance c between views then changes the loss in proportion to
    -c, as it does the theory's: it grows at the rate of its covariance. At 25 that is v - 2 c, and what
    the views share by less than one half shrinks to nothing.

    Args:
        sync: gather the embeddings of all ranks first. False: each rank's loss is of its own batch.
        group: the process group to gather over; None is the default group.
    """

    whitening = True

    def loss(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Return the loss of the (global) batch."""
        return variance_hinge_loss(z_a, z_b, invariance=12.5)
