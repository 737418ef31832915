"""Fits on several forked ranks, which end if they hang, and what each of them read and said."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_sym.callbacks import Monitor
from tests.promises.every import fit

#: Seconds after which a rank that hangs is ended.
PATIENCE = 60


class Keep(Callback):
    """Writes what a rank's monitors read, what it has said and which keys it has."""

    def __init__(self, folder: Path, monitors: list[Monitor]) -> None:
        self.folder, self.monitors = folder, monitors

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin to listen; an alarm ends a rank that hangs."""
        if trainer.world_size > 1:
            signal.alarm(PATIENCE)
        self.listening = warnings.catch_warnings(record=True)
        self.caught = self.listening.__enter__()
        warnings.simplefilter("always")

    def write(self, trainer: Any, pl_module: Any, error: Any = None) -> None:
        """Write."""
        signal.alarm(0)
        if self.listening is None:
            return
        self.listening.__exit__(None, None, None)
        self.listening = None
        found = {
            "rows": [monitor.history for monitor in self.monitors],
            "said": [str(warning.message) for warning in self.caught],
            "metrics": sorted(trainer.callback_metrics),
            "steps": trainer.global_step,
            "error": "" if error is None else f"{type(error).__name__}: {error}",
        }
        torch.save(found, self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write what the fit ended with."""
        self.write(trainer, pl_module, exception)

    on_fit_end = write


def on_ranks(
    ranks: int, folder: Path, make: Callable[[], Any], monitors: list[Monitor], *others: Any, **settings: Any
) -> list[Any]:
    """Fit on so many ranks; return what each of them wrote, and end with its error where there was one.

    Args:
        ranks: their number; one is this process.
        folder: where they write.
        make: makes the module.
        monitors: what reads.
        *others: more callbacks.
        **settings: of the trainer, and of :func:`~tests.promises.every.fit`.
    """
    torch.manual_seed(0)
    module = make()
    strategy = settings.pop("strategy", "ddp_fork" if ranks > 1 else "auto")
    fails = settings.pop("fails", False)
    options = {"devices": ranks, "strategy": strategy, "use_distributed_sampler": False, **settings}
    callbacks = [*others, *monitors, Keep(folder, monitors)]
    try:
        fit(module, *callbacks, **options)
    except BaseException:
        if not fails:
            raise
    else:
        assert not fails, "expected the fit to end with an error"
    paths = [folder / f"{ranks}-{rank}.pt" for rank in range(ranks)]
    return [torch.load(path, weights_only=True) for path in paths if path.exists()]


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
