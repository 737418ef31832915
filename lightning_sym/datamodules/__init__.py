"""Data for what the callbacks watch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_sym.datamodules.gaussian_bumps import GaussianBumpsDataModule, gaussian_bumps

if TYPE_CHECKING:
    from lightning_sym.datamodules.multi_view import MultiViewDataModule

__all__ = ["GaussianBumpsDataModule", "MultiViewDataModule", "gaussian_bumps"]


def __getattr__(name: str) -> Any:
    if name == "MultiViewDataModule":  # when asked for: it decodes images, which needs an extra
        from lightning_sym.datamodules.multi_view import MultiViewDataModule

        return MultiViewDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
