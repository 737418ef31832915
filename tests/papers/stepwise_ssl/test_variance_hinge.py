"""VICReg with its hinge on the variance: how small embeddings grow."""

import pytest
import torch

from lightning_sym.papers.stepwise_ssl import VarianceHingeLoss, variance_hinge_loss


def test_under_a_hinge_on_the_variance_small_embeddings_grow_by_their_covariance():
    z_a, z_b = torch.randn(2, 50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z_a, z_b = z_a - z_a.mean(), z_b - z_b.mean()
    covariance = ((z_a * z_b).sum() / 49).item()
    spread = sum((z * z).sum() / 49 for z in (z_a, z_b)).item() / 2
    small = 1e-4
    # the invariance divides by n, the variance by n - 1
    for change, expected in (
        (VarianceHingeLoss()(small * z_a, small * z_b), 25 * (0.98 * (spread - covariance) - spread)),
        (variance_hinge_loss(small * z_a, small * z_b), 25 * (1.96 * (spread - covariance) - spread)),
    ):
        assert (change.item() - 25) / small**2 == pytest.approx(expected, rel=1e-5)
