"""Data for what the callbacks watch."""

from lightning_sym.datamodules.gaussian_bumps import (
    GaussianBumpsDataModule as GaussianBumpsDataModule,
    gaussian_bumps as gaussian_bumps,
)
from lightning_sym.datamodules.multi_view import MultiViewDataModule as MultiViewDataModule
