"""Fits on several forked ranks, which end if they hang, and what each of them read and said."""

from __future__ import annotations

import os
import signal
import socket
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_sym.callbacks import Monitor
from tests.promises.every import fit

#: Seconds after which a rank that hangs is ended.
PATIENCE = 90


def on_ranks(
    ranks: int, folder: Path, make: Callable[[], Any], monitors: list[Monitor], *others: Any, **settings: Any
) -> list[Any]:
    """Fit on so many ranks; return what each of them read and said, and what it ended with.

    Args:
        ranks: their number; one is this process.
        folder: where they write.
        make: makes the module.
        monitors: what reads.
        *others: more callbacks.
        **settings: of the trainer, and of :func:`~tests.promises.every.fit`; ``strategy``, a function that
            makes one.
    """
    if ranks == 1:
        return [_fit(make, monitors, others, {**settings, "strategy": "auto"})]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank_of = partial(_rank, ranks, port, folder, make, monitors, others, settings)
    torch.multiprocessing.start_processes(rank_of, nprocs=ranks, start_method="fork")
    return [torch.load(folder / f"{ranks}-{rank}.pt", weights_only=True) for rank in range(ranks)]


def _rank(
    ranks: int,
    port: int,
    folder: Path,
    make: Callable[[], Any],
    monitors: list[Monitor],
    others: tuple[Any, ...],
    settings: dict[str, Any],
    rank: int,
) -> None:
    signal.alarm(PATIENCE)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0")
    os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    strategy = settings.get("strategy", lambda: DDPStrategy(process_group_backend="gloo"))
    options = {**settings, "strategy": strategy(), "devices": ranks, "use_distributed_sampler": False}
    torch.save(_fit(make, monitors, others, options), folder / f"{ranks}-{rank}.pt")
    if torch.distributed.is_initialized():
        signal.alarm(5)  # the others may have ended with an error
        torch.distributed.destroy_process_group()
    signal.alarm(0)


def _fit(make: Callable[[], Any], monitors: list[Monitor], others: Any, settings: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    error, module = "", make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit(module, *others, *monitors, **settings)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
    trainer = module._trainer
    return {
        "rows": [list(monitor.history) for monitor in monitors],
        "said": [str(warning.message) for warning in caught],
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "steps": trainer.global_step,
        "error": error,
        "notes": [getattr(other, "notes", None) for other in others],
    }


class Shares(Dataset[Any]):
    """Batches of which each rank has a share: of ``batch`` samples those whose number it is dealt.

    Args:
        data: the samples.
        batch: samples of all ranks in a batch.
        uneven: let rank 0 have one sample more of each batch, and the last rank one less.
    """

    def __init__(self, data: TensorDataset, batch: int, *, uneven: bool = False) -> None:
        self.data, self.batch, self.uneven = data, batch, uneven

    def __len__(self) -> int:
        return len(self.data) // self.batch

    def __getitem__(self, index: int) -> Any:
        """Return this rank's share of a batch."""
        there = torch.distributed.is_initialized()
        rank, size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)
        whole = [part[index * self.batch : (index + 1) * self.batch] for part in self.data.tensors]
        mine = [list(range(r, self.batch, size)) for r in range(size)]
        if self.uneven and size > 1:
            mine[0].append(mine[-1].pop())
        return [part[mine[rank]] for part in whole]


def shares(data: TensorDataset, batch: int, **settings: Any) -> DataLoader:
    """Return a loader of them."""
    return DataLoader(Shares(data, batch, **settings), batch_size=None)


def rows_by_key(rows: list[dict[str, float]]) -> Iterator[tuple[str, float]]:
    """Yield every key with its step and value."""
    for row in rows:
        for key, value in row.items():
            yield f"{key} at step {row['step']}", value
