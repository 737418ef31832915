"""Running a user's module on the side: nothing it keeps is changed, and ranks share what comes out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor


@contextlib.contextmanager
def quietly(trainer: Trainer, module: LightningModule, *, batch_statistics: bool | None) -> Iterator[None]:
    """Run forward passes in the fit's precision, without gradients, and put buffers back.

    Compiled modules run eagerly meanwhile: a pass in another mode would recompile them. Train/eval
    modes are the caller's to put back (:func:`~lightning_sym.callbacks.base.undisturbed`).

    Args:
        trainer: the running trainer.
        module: the module being trained.
        batch_statistics: normalise by the batch, as in training; else by running statistics. ``None``:
            each submodule as its mode is.
    """
    moved = batch_statistics is not False
    kept = [(buffer, buffer.detach().clone()) for buffer in module.buffers()] if moved else []
    if batch_statistics is not None:
        module.train(batch_statistics)
    try:
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            trainer.precision_plugin.forward_context(),
        ):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def gather_rows(x: Tensor) -> Tensor:
    """Return all ranks' rows in the order of ranks; their numbers may differ.

    Args:
        x: ``[N, ...]``, of one type and one trailing shape on all ranks.

    Returns:
        ``[M, ...]``; ``x`` itself outside a process group of two or more.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    size = torch.tensor([len(x)], device=x.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    rows = [int(s) for s in sizes]
    padded = x.new_zeros(max(rows), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)])


def rows_of(leaves: Sequence[Any]) -> int:
    """Return the number of samples if every leaf is a tensor with a row for each, else 0."""
    lengths = {len(leaf) if isinstance(leaf, Tensor) and leaf.ndim else 0 for leaf in leaves}
    return lengths.pop() if len(lengths) == 1 else 0


def cut(leaves: Sequence[Any], rows: slice) -> list[Any]:
    """Return some rows of tensors that have one for each sample, see :func:`rows_of`."""
    return [leaf[rows] for leaf in leaves]


def method(module: LightningModule, how: str | Callable[..., Any], *, argument: str) -> Callable[..., Any]:
    """Return a method of the module by name, or a function that is handed the module first.

    Raises:
        TypeError: if the module has no such method.
    """
    if not isinstance(how, str):
        return lambda x: how(module, x)
    found = getattr(module, how, None)
    if not callable(found):
        raise TypeError(
            f"{argument}={how!r} is not a method of {type(module).__name__}; pass the name of one, or a "
            "function of the module and its input"
        )
    return found
