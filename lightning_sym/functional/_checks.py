"""What every quantity asks of its input, said once.

Wrong types raise ``TypeError``, wrong shapes and numbers ``ValueError``; both name the argument, what
was given and what would be right. What is not finite is no error: it gives NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def as_real(tensor: Tensor, *, name: str) -> Tensor:
    """Return ``tensor`` in the precision it is computed in: float64 is kept, half types become float32.

    Raises:
        TypeError: if it is not a tensor of real floating-point numbers.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a real floating-point tensor, got {kind}")
    _check_dense(tensor, name=name)
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def as_counts(tensor: Tensor, *, name: str) -> Tensor:
    """Return numbers that may be whole (steps, counts) in float64.

    Raises:
        TypeError: if it is not a tensor of real numbers.
    """
    if not isinstance(tensor, Tensor) or tensor.is_complex() or tensor.dtype == torch.bool:
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a tensor of real numbers, got {kind}")
    _check_dense(tensor, name=name)
    return tensor.double()


def _check_dense(tensor: Tensor, *, name: str) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}; pass {name}.to_dense()")


def as_filled(tensor: Tensor, *, name: str) -> Tensor:
    """Return a real tensor of any shape that is not empty.

    Raises:
        TypeError: if it is not a tensor of real floating-point numbers.
        ValueError: if it is empty.
    """
    real = as_real(tensor, name=name)
    if real.numel() < 1:
        raise ValueError(f"{name} must not be empty, got {tuple(real.shape)}")
    return real


def as_vector(tensor: Tensor, *, name: str) -> Tensor:
    """Return ``tensor`` as a real vector.

    Raises:
        TypeError: if it is not a tensor of real floating-point numbers.
        ValueError: if it is not a non-empty vector.
    """
    real = as_real(tensor, name=name)
    if real.ndim != 1 or real.numel() < 1:
        raise ValueError(f"{name} must be a non-empty vector [N], got {tuple(real.shape)}")
    return real


def as_matrix(tensor: Tensor, *, name: str, min_rows: int = 1) -> Tensor:
    """Return ``tensor`` as a real matrix.

    Raises:
        TypeError: if it is not a tensor of real floating-point numbers.
        ValueError: if it is not a non-empty matrix of at least ``min_rows`` rows.
    """
    real = as_real(tensor, name=name)
    if real.ndim != 2 or real.shape[0] < min_rows or real.shape[1] < 1:
        raise ValueError(f"{name} must be [N >= {min_rows}, D >= 1], got {tuple(real.shape)}")
    return real


def as_square(tensor: Tensor, *, name: str) -> Tensor:
    """Return ``tensor`` as a real square matrix.

    Raises:
        TypeError: if it is not a tensor of real floating-point numbers.
        ValueError: if it is not square or empty.
    """
    real = as_real(tensor, name=name)
    if real.ndim != 2 or real.shape[0] != real.shape[1] or real.shape[0] < 1:
        raise ValueError(f"{name} must be a square matrix [D, D], got {tuple(real.shape)}")
    return real


def promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return real tensors in one precision: float64 where one of them has it."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return tuple(tensor.double() for tensor in tensors) if wide else tensors


def check_same_dtype(tensors: dict[str, Tensor]) -> None:
    """Raise unless named tensors are of one precision.

    Raises:
        TypeError: if they are not.
    """
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        words = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise TypeError(f"{' and '.join(tensors)} must be of one dtype, got {words}")


def check_same_shape(a: Tensor, b: Tensor, *, names: str) -> None:
    """Raise unless two tensors are of one shape.

    Raises:
        ValueError: if they are not.
    """
    if a.shape != b.shape:
        raise ValueError(f"{names} must be of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")


def as_labels(labels: Tensor, *, classes: int | None = None) -> Tensor:
    """Return class labels as an int64 vector.

    Raises:
        TypeError: if they are not whole numbers.
        ValueError: if they are not a non-empty vector, or one is not in ``[0, classes)``.
    """
    kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
    if not isinstance(labels, Tensor) or kind.is_floating_point or kind.is_complex or kind == torch.bool:
        raise TypeError(f"labels must be integers, got {kind}")
    if labels.ndim != 1 or labels.numel() < 1:
        raise ValueError(f"labels must be a non-empty vector [N], got {tuple(labels.shape)}")
    least, most = (int(end) for end in labels.aminmax())
    if least < 0 or (classes is not None and most >= classes):
        end = "inf" if classes is None else classes
        raise ValueError(f"labels must be in [0, {end}), got {least} to {most}")
    return labels.long()


def check_number(name: str, value: Any, *, least: float = -math.inf, above: float = -math.inf) -> None:
    """Raise unless a number is finite, at least ``least`` and greater than ``above``.

    Raises:
        TypeError: if it is not a real number.
        ValueError: if it is out of its range.
    """
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex()):
        raise TypeError(f"{name} must be a real number, got {value.dtype} {tuple(value.shape)}")
    if isinstance(value, str | bytes | bool):
        raise TypeError(f"{name} must be a real number, got {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a real number, got {value!r}") from None
    if not (math.isfinite(number) and number >= least and number > above):
        words = "finite"
        if above > -math.inf:
            words = "positive" if above == 0 else f"above {above:g}"
        elif least > -math.inf:
            words = f"at least {least:g}"
        if math.isinf(number) and words != "finite":
            words += " and finite"
        raise ValueError(f"{name} must be {words}, got {value!r}")


def check_count(name: str, value: Any, *, least: int = 1) -> None:
    """Raise unless ``value`` is a whole number of at least ``least``.

    Raises:
        TypeError: if it is not a whole number.
        ValueError: if it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_rtol(rtol: float, *, name: str = "rtol") -> None:
    """Raise unless a relative tolerance is in ``[0, 1)``.

    Raises:
        TypeError: if it is not a real number.
        ValueError: if it is out of its range.
    """
    if isinstance(rtol, bool) or not isinstance(rtol, int | float):
        raise TypeError(f"{name} must be a real number, got {rtol!r}")
    if not 0 <= rtol < 1:
        raise ValueError(f"{name} must be in [0, 1), got {rtol}")


def nan_like(tensor: Tensor) -> Tensor:
    """Return a scalar NaN on the device and in the dtype of ``tensor``."""
    return tensor.new_full((), torch.nan)
