"""How alike two tensors are: the angle between them, and their distance relative to their size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sym.functional._checks import as_real

Joined = Tensor | Sequence[Tensor]


def cosine(a: Joined, b: Joined) -> Tensor:
    r"""Cosine of the angle between two tensors, taken as vectors.

    .. math:: \cos(a, b) = \frac{\langle a, b \rangle}{\lVert a \rVert \lVert b \rVert}

    Several tensors count as one long vector, so that a layer's weight and bias make one direction.
    Independent Gaussian directions of n entries give 0 with a standard deviation of :math:`n^{-1/2}`.

    Args:
        a: a float tensor of any shape, or several.
        b: the same shapes in the same order.

    Returns:
        Scalar ``[]`` in ``[-1, 1]``, float64; NaN where one side is zero, empty or not finite.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if the shapes differ.

    Example:
        >>> cosine(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]))
        tensor(0.6000, dtype=torch.float64)
    """
    ab, aa, bb = _products(a, b)
    size = aa.sqrt() * bb.sqrt()
    known = size.isfinite() & (size > 0)
    return torch.where(known, ab / torch.where(known, size, 1.0), torch.nan).clamp(-1, 1)


def relative_distance(a: Joined, b: Joined) -> Tensor:
    r"""Distance of two tensors over the sum of their sizes.

    .. math:: d(a, b) = \frac{\lVert a - b \rVert}{\lVert a \rVert + \lVert b \rVert}

    Args:
        a: a float tensor of any shape, or several, which count as one long vector.
        b: the same shapes in the same order.

    Returns:
        Scalar ``[]`` in ``[0, 1]``, float64: 0 where they are equal (both zero included), 1 where they are
        opposite or one alone is zero; NaN where one is not finite.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if the shapes differ.

    Example:
        >>> relative_distance(torch.tensor([3.0]), torch.tensor([1.0]))
        tensor(0.5000, dtype=torch.float64)
    """
    _, aa, bb = _products(a, b)
    parts = [(x.double() - y.double()).square().sum() for x, y in zip(_list(a), _list(b), strict=True)]
    size = aa.sqrt() + bb.sqrt()
    distance = torch.stack(parts).sum().sqrt() if parts else size
    equal = size.isfinite() & (size == 0)
    return torch.where(equal, 0.0, distance / torch.where(equal, 1.0, size)).clamp(max=1)


def _list(a: Joined) -> list[Tensor]:
    return [a] if isinstance(a, Tensor) else list(a)


def _products(a: Joined, b: Joined) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inner products <a, b>, <a, a> and <b, b> in float64.

    Raises:
        ValueError: if the shapes differ.
    """
    left, right = _list(a), _list(b)
    for name, side in (("a", left), ("b", right)):
        for tensor in side:
            as_real(tensor, name=name)
    shapes = [[tuple(t.shape) for t in side] for side in (left, right)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"a and b must be of the same shapes, got {shapes[0]} and {shapes[1]}")
    zero = left[0].new_zeros((), dtype=torch.float64) if left else torch.zeros((), dtype=torch.float64)
    ab, aa, bb = zero, zero, zero
    for x, y in zip(left, right, strict=True):
        x, y = x.double(), y.double()
        ab, aa, bb = ab + (x * y).sum(), aa + x.square().sum(), bb + y.square().sum()
    return ab, aa, bb
