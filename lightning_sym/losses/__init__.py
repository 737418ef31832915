"""Joint-embedding losses that see the global batch: pure functions, and modules above them."""

from lightning_sym.losses.barlow_twins import BarlowTwinsLoss, barlow_twins_loss, cross_correlation
from lightning_sym.losses.cross_covariance import (
    CrossCovarianceLoss,
    cross_covariance,
    cross_covariance_loss,
)
from lightning_sym.losses.simclr import SimCLRLoss, nt_xent_loss
from lightning_sym.losses.vicreg import (
    VICRegLoss,
    covariance_term,
    invariance_term,
    variance_term,
    vicreg_loss,
)

__all__ = [
    "BarlowTwinsLoss",
    "CrossCovarianceLoss",
    "SimCLRLoss",
    "VICRegLoss",
    "barlow_twins_loss",
    "covariance_term",
    "cross_correlation",
    "cross_covariance",
    "cross_covariance_loss",
    "invariance_term",
    "nt_xent_loss",
    "variance_term",
    "vicreg_loss",
]
