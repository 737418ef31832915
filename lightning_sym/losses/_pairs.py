"""What every joint-embedding loss does with its two embeddings first, said once.

Shape letters: N samples of this rank, M samples of all ranks, D embedding dimensions, R ranks.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def as_embeddings(z: Tensor, *, name: str, min_rows: int = 1) -> Tensor:
    """Return embeddings in the precision the loss is computed in.

    float64 is kept, everything else is computed in float32: squares of half-precision sums
    overflow (fp16) or lose the small differences from one that the losses are made of (bf16).

    Raises:
        TypeError: if they are not a floating-point tensor.
        ValueError: if they are not a matrix of at least ``min_rows`` rows.
    """
    _check_float(z, name=name)
    if z.ndim != 2 or z.shape[0] < min_rows or z.shape[1] < 1:
        raise ValueError(f"{name} must be [N >= {min_rows}, D >= 1], got {tuple(z.shape)}")
    return z if z.dtype == torch.float64 else z.float()


def as_pair(z_a: Tensor, z_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both embeddings in the precision the loss is computed in, see :func:`as_embeddings`.

    Raises:
        TypeError: if an embedding is not a floating-point tensor.
        ValueError: if the two are not matrices of one and the same shape.
    """
    for name, z in (("z_a", z_a), ("z_b", z_b)):
        _check_float(z, name=name)
    if z_a.ndim != 2 or z_a.shape != z_b.shape or z_a.shape[1] < 1:
        raise ValueError(
            "z_a and z_b must be two views' embeddings of one shape [N, D >= 1], "
            f"got {tuple(z_a.shape)} and {tuple(z_b.shape)}"
        )
    wide = torch.float64 if torch.float64 in (z_a.dtype, z_b.dtype) else torch.float32
    return z_a.to(wide), z_b.to(wide)


def _check_float(z: Tensor, *, name: str) -> None:
    if not isinstance(z, Tensor) or not z.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(z, 'dtype', type(z))}")
    if z.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {z.layout}; pass {name}.to_dense()")


def check_batch(z_a: Tensor) -> None:
    """Raise unless the batch has two samples at least.

    Raises:
        ValueError: if it has not: one sample has no variance to whiten and no negatives.
    """
    if z_a.shape[0] < 2:
        raise ValueError(
            f"a joint-embedding loss needs a batch of at least 2 samples, got {z_a.shape[0]}; "
            "raise batch_size, or drop_last the ragged last batch"
        )


def exactly(z: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context without autocast, in which a product of float32 stays float32."""
    return torch.autocast(z.device.type, enabled=False)


class _GatherRows(torch.autograd.Function):
    """All ranks' rows, one below the other; the backward pass adds all ranks' gradients up."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, group: Any) -> Tensor:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        size = torch.tensor([x_ND.shape[0]], device=x_ND.device)
        sizes = [torch.empty_like(size) for _ in range(ranks)]
        dist.all_gather(sizes, size, group=group)
        rows = [int(s) for s in sizes]
        padded = x_ND.new_zeros(max(rows), *x_ND.shape[1:])
        padded[: rows[rank]] = x_ND
        parts = [torch.empty_like(padded) for _ in range(ranks)]
        dist.all_gather(parts, padded, group=group)
        ctx.group, ctx.start, ctx.rows = group, sum(rows[:rank]), rows[rank]
        return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad_MD = grad_MD.contiguous().clone()
        dist.all_reduce(grad_MD, group=ctx.group)
        return grad_MD[ctx.start : ctx.start + ctx.rows], None


def gather_pair(z_a: Tensor, z_b: Tensor, *, group: Any = None) -> tuple[Tensor, Tensor]:
    """Return the embeddings of the global batch: every rank's rows, in the order of ranks.

    Every rank then evaluates one and the same loss L. Its gradient with respect to a rank's own rows
    is the sum over R equal losses, and DDP's mean over ranks divides by R again: parameters get
    the gradient of L, not of L / R. Ranks may hold different numbers of rows.

    Args:
        z_a: ``[N, D]``.
        z_b: ``[N, D]``.
        group: process group; None is the default group.

    Returns:
        Two tensors ``[M, D]``; the arguments themselves without an initialised process group or
        in a group of one.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return z_a, z_b
    gathered = _GatherRows.apply(torch.cat([z_a, z_b], dim=1), group)
    return gathered[:, : z_a.shape[1]], gathered[:, z_a.shape[1] :]


class PairLoss(torch.nn.Module):
    """A loss of two views' embeddings that sees the global batch under DDP.

    Args:
        sync: gather the embeddings of all ranks first. False: each rank's loss is of its own batch.
        group: the process group to gather over; None is the default group.
    """

    #: Whether the loss wants an identity cross-covariance, which a batch of rank below D cannot give.
    whitening: bool = False

    def __init__(self, *, sync: bool = True, group: Any = None) -> None:
        super().__init__()
        self.sync = sync
        self.group = group

    def loss(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Return the loss of the (global) batch."""
        raise NotImplementedError

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Return the loss of two views' embeddings.

        Args:
            z_a: embeddings of the first view, ``[N, D]``.
            z_b: embeddings of the second view, row by row of the same samples, ``[N, D]``.

        Returns:
            Scalar ``[]``, the same on every rank if ``sync``.

        Raises:
            TypeError: if an embedding is not a floating-point tensor.
            ValueError: if the shapes differ or the batch has fewer than two samples.
        """
        z_a, z_b = as_pair(z_a, z_b)
        if self.sync:
            z_a, z_b = gather_pair(z_a, z_b, group=self.group)
        return self.loss(z_a, z_b)


def nonnegative(**weights: float) -> None:
    """Raise if one of the named weights is negative, infinite or not a number.

    Raises:
        TypeError: if it is no real number.
        ValueError: if it is negative or not finite.
    """
    for name, value in weights.items():
        if isinstance(value, complex | str):
            raise TypeError(f"{name} must be a real number, got {value!r}")
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {value!r}")


def positive(**numbers: float) -> None:
    """Raise if one of the named numbers is not positive and finite.

    Raises:
        TypeError: if it is no real number.
        ValueError: if it is not positive or not finite.
    """
    for name, value in numbers.items():
        if isinstance(value, complex | str):
            raise TypeError(f"{name} must be a real number, got {value!r}")
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value!r}")
