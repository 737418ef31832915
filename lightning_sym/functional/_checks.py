"""What every quantity asks of its input, said once."""

from __future__ import annotations

import torch
from torch import Tensor


def as_real(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in the precision it is computed in: float64 is kept, all else is float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def as_matrix(tensor: Tensor, *, name: str, min_rows: int = 1) -> Tensor:
    """Return ``tensor`` as a real matrix.

    Raises:
        ValueError: if it is not a non-empty matrix of at least ``min_rows`` rows.
    """
    if tensor.ndim != 2 or tensor.shape[0] < min_rows or tensor.shape[1] < 1:
        raise ValueError(f"{name} must be [N >= {min_rows}, D >= 1], got {tuple(tensor.shape)}")
    return as_real(tensor)


def as_square(tensor: Tensor, *, name: str) -> Tensor:
    """Return ``tensor`` as a real square matrix.

    Raises:
        ValueError: if it is not square.
    """
    if tensor.ndim != 2 or tensor.shape[0] != tensor.shape[1] or tensor.shape[0] < 1:
        raise ValueError(f"{name} must be a square matrix [D, D], got {tuple(tensor.shape)}")
    return as_real(tensor)


def nan_like(tensor: Tensor) -> Tensor:
    """Return a scalar NaN on the device and in the dtype of ``tensor``."""
    return tensor.new_full((), torch.nan)
