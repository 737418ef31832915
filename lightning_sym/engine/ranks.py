"""What the ranks of a fit say to each other; the same code path for one rank.

Every collective begins with a status that all ranks agree on: where one rank has failed, all of them
learn of it there, instead of waiting for it. A failure is announced once, by the outermost
:meth:`Ranks.attempt` of the rank that failed.

Shape letters: N rows of this rank, M rows of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class RankError(RuntimeError):
    """Something failed on one rank, and all of them know.

    Attributes:
        rank: the first rank on which it failed.
        said: the error's type and text.
        error: the error itself, on a rank on which it was raised.
        place: where that rank was, if it said so.
    """

    def __init__(self, rank: int, said: str, error: Exception | None = None, place: str = "") -> None:
        super().__init__(said)
        self.rank, self.said, self.error, self.place = rank, said, error, place

    def own(self) -> Exception:
        """Return the failure's own error on the rank that raised it, and one that names it on the others."""
        return self.error or RuntimeError(f"{self.said} (on rank {self.rank})")


class Ranks:
    """The ranks of a process group, or the only rank there is.

    Args:
        device: where tensors must live to be sent (NCCL sends those of its GPU only).
        size, rank: of the group; by default those of ``torch.distributed``.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        there = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if there else 1
        self.rank = dist.get_rank() if there else 0
        self.device = device or torch.device("cpu")

    def attempt(self, compute: Callable[[], T], place: Callable[[], str] = str) -> T:
        """Return what ``compute`` returns, if it succeeds on all ranks.

        Args:
            compute: what may fail on one rank.
            place: says where, for the error.

        Raises:
            RankError: on every rank, if it fails on one.
        """
        try:
            found = compute()
        except RankError:
            raise  # announced already, by this rank or another one
        except Exception as error:
            rank, said, where = self._agree(error, place())
            raise RankError(rank, said, error, where) from error
        self._check()
        return found

    def require(self, check: Callable[[], Any]) -> None:
        """Check what the user has asked for; what is wrong on one rank is raised on all.

        Args:
            check: raises what is wrong.
        """
        try:
            self.attempt(check)
        except RankError as failure:
            raise failure.own() from None

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all ranks in place, in one packed all-reduce; the caller has agreed."""
        if self.size == 1 or not tensors:
            return
        packed = torch.cat([tensor.flatten() for tensor in tensors])
        sent = packed.to(self.device)
        dist.all_reduce(sent)
        parts = sent.to(packed.device).split([t.numel() for t in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks."""
        self._check()
        found = tensor.clone()
        self.sum([found])
        return found

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on all ranks; tensors must be on the CPU."""
        self._check()
        return self._broadcast(value, 0)

    def gather(self, value: T) -> list[T]:
        """Return all ranks' values, in the order of ranks."""
        self._check()
        return self._gather(value)

    def gather_rows(self, x: Tensor) -> Tensor:
        """Return all ranks' rows ``[M, ...]``, one of each rank in turn; their numbers may differ.

        So a distributed sampler deals samples out: the first so many rows are those of one rank alone.

        Args:
            x: ``[N, ...]``, of one type and one trailing shape on all ranks.

        Raises:
            ValueError: on all ranks, if types or trailing shapes differ.
        """
        self._check()
        if self.size == 1:
            return x
        shapes = self._gather((len(x), tuple(x.shape[1:]), str(x.dtype)))
        if len({shape[1:] for shape in shapes}) > 1:  # sent like this they would come out wrong, or never
            raise ValueError(f"rows must have one shape and type on all ranks, got {shapes}")
        rows = [shape[0] for shape in shapes]
        padded = torch.zeros(max(rows), *x.shape[1:], dtype=x.dtype, device=self.device)
        padded[: len(x)] = x.to(self.device)
        parts = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(parts, padded)
        turns = torch.stack([torch.arange(max(rows)) < n for n in rows], dim=1).to(self.device)
        return torch.stack(parts, dim=1)[turns].to(x.device)

    def explain(self, mine: T) -> list[T]:
        """Return all ranks' words on what a packed sum has shown to have failed; all ranks call it."""
        return self._gather(mine)

    # -- the status ---------------------------------------------------------------------------

    def _check(self) -> None:
        rank, said, place = self._agree(None)
        if rank < self.size:
            raise RankError(rank, said, place=place)

    def _agree(self, error: Exception | None, place: str = "") -> tuple[int, str, str]:
        """Return the first rank that failed, with what, and where; ``size`` if none did."""
        said = "" if error is None else f"{type(error).__name__}: {error}"
        if self.size == 1:
            return (0 if error is not None else 1), said, place
        first = torch.tensor([self.size if error is None else self.rank], device=self.device)
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
        rank = int(first)
        return rank, *(self._broadcast((said, place), rank) if rank < self.size else ("", ""))

    def _broadcast(self, value: T, source: int) -> T:
        if self.size == 1:
            return value
        box = [value if self.rank == source else None]
        dist.broadcast_object_list(box, src=source, device=self.device)
        return box[0]  # type: ignore[return-value]

    def _gather(self, value: T) -> list[T]:
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found
