"""Ways to train in several processes; one process on the joint batches is the reference."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_sym.callbacks import CollapseMonitor, Monitor, PlasticityMonitor, Syre
from tests.matrix.rows import Column, Outcome, batches, name_of, outcome, plain, watching
from tests.models import trainer
from tests.promises.every import BATCH, Module, dataset
from tests.promises.ranked import on_ranks, shares
from tests.promises.test_ranks import Sharded, model_parallel


class Ends(Callback):
    """Takes down the weights at the end."""

    notes: Any = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        found = outcome(pl_module, trainer.optimizers, [])
        self.notes = {"weights": found.weights, "state": _plain([found.state[0], found.state[3]])}


def _plain(state: Any) -> Any:
    return [[_plain(each) for each in part] if isinstance(part, list) else part for part in state]


def loader(*, uneven: bool = False) -> Any:
    """Return batches of which each rank has a share."""
    return shares(dataset("mlp", double=True), BATCH, uneven=uneven)


def ranks(
    count: int,
    callbacks: Sequence[Any],
    folder: Path,
    *,
    make: Callable[[], Any] = plain,
    data: Callable[[], Any] = loader,
    **settings: Any,
) -> Outcome:
    """Fit on so many forked ranks, which must agree."""
    monitors = [each for each in callbacks if isinstance(each, Monitor)]
    others = [each for each in callbacks if isinstance(each, Syre)]
    found = on_ranks(count, folder, make, monitors, *others, Ends(), loader=data(), **settings)
    first = found[0]
    error = next((each["error"] for each in found if each["error"]), "")
    if not error and any(repr(each["rows"]) != repr(first["rows"]) for each in found):
        error = "ranks read different numbers"
    rows = {name_of(monitor): read for monitor, read in zip(monitors, first["rows"], strict=True)}
    notes = first["notes"][-1] or {"weights": {}, "state": None}
    return Outcome(rows, notes["weights"], [each["notes"][-1] for each in found], error)


class Unused(Module):
    """Has a branch that is not used."""

    def __init__(self, kind: str = "mlp") -> None:
        super().__init__(kind)
        self.spare = nn.Linear(3, 3)


def unused() -> Module:
    """Return it."""
    torch.manual_seed(0)
    module = Unused().double()
    module.net[4].p = 0.0
    return module


def still() -> Module:
    """Return a module that is not moved: what is read is then of the same network, whatever DDP averages."""
    return plain(lr=0.0, momentum=0.0, weight_decay=0.0)


def find_unused() -> Any:
    """Return the strategy."""
    return DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)


class Report(Callback):
    """Writes what was read, and the weights, for each rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        found = outcome(pl_module, trainer.optimizers, trainer.callbacks)
        file = self.folder / f"rank{trainer.global_rank}"
        file.with_suffix(".json").write_text(json.dumps(found.rows))
        torch.save({"weights": found.weights, "state": found.state[0]}, file.with_suffix(".pt"))


def reported(folder: Path, count: int) -> Outcome:
    """Return what ranks have written."""
    rows = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(count)]
    kept = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(count)]
    error = "" if repr(rows[0]) == repr(rows[1]) else "ranks read different numbers"
    return Outcome(rows[0], kept[0]["weights"], [each["state"] for each in kept], error)


def spawned(callbacks: Sequence[Any], folder: Path) -> Outcome:
    """Fit on two spawned ranks."""
    run = trainer(
        callbacks=[*callbacks, Report(folder)], devices=2, strategy="ddp_spawn", max_epochs=2,
        use_distributed_sampler=False,
    )  # fmt: skip
    run.fit(plain(), loader())
    return reported(folder, 2)


def node(folder: Path, what: str) -> None:
    """Fit as one of two nodes of one process each; called by torchrun."""
    chosen: list[Any] = {"bare": [], "watched": watching(), "syre": [Syre(sigma=0.5, seed=1)]}[what]
    strategy = DDPStrategy(process_group_backend="gloo")
    run = trainer(
        callbacks=[*chosen, Report(folder)], devices=1, num_nodes=2, strategy=strategy, max_epochs=2,
        use_distributed_sampler=False,
    )  # fmt: skip
    run.fit(plain(), loader())


def nodes(callbacks: Sequence[Any], folder: Path) -> Outcome:
    """Fit on two nodes, which torchrun makes of this machine."""
    what = "bare" if not callbacks else "syre" if isinstance(callbacks[0], Syre) else "watched"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
                f"--node-rank={rank}", "--master-addr=127.0.0.1", f"--master-port={port}",
                "-m", "tests.matrix.several", str(folder), what,
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[1] for process in started]
    if any(process.returncode for process in started):
        return Outcome(error="".join(said)[-500:])
    return reported(folder, 2)


def two(callbacks: Sequence[Any], folder: Path, **settings: Any) -> Outcome:
    """Fit on two ranks."""
    return ranks(2, callbacks, folder, **settings)


def one(callbacks: Sequence[Any], folder: Path, **settings: Any) -> Outcome:
    """Fit in this process."""
    return ranks(1, callbacks, folder, **settings)


#: What is of the gradient that DDP averages over ranks, or dealt to samples by their number.
OF_DDP = (
    r"zero_gradients|relative_update|update_cosine|flow|law|hierarchy/(loss|phase)|signal/loss|moved|"
    r"weight_gradient|distance|participation_ratio|directions|alignment/(net|mean|null)|trainability|imbalance"
)
PARALLEL = dict.fromkeys(map(name_of, watching()), "layers are tensor-parallel")
sharded = partial(Sharded, "fully_shard")


def seeded(how: str) -> Callable[[], Any]:
    """Return what makes a module that may be sharded."""

    def make() -> Tensor:
        torch.manual_seed(0)
        return Sharded(how)

    return make


def in_pieces() -> list[Monitor]:
    """Return the monitors, those that need not run the module set so that they don't."""
    every = {"every_n_steps": 1, "strict": True}
    less = {
        "CollapseMonitor": CollapseMonitor(targets=1, histograms=True, **every),
        "PlasticityMonitor": PlasticityMonitor(**every),
    }
    return [less.get(name_of(monitor), monitor) for monitor in watching()]


WHOLE = "needs parameters whole on every rank"
RUN_APART = {name_of(m): WHOLE for m in in_pieces() if m.runs_module or name_of(m) == "CircuitMonitor"}
ONE = "one process on the joint batches"
COLUMNS = [
    Column("DDP, two forked ranks", two, one, ONE, places=1e-9),
    Column("DDP, two spawned ranks", spawned, one, ONE, places=1e-9, slow=True),
    Column("DDP, `torchrun`, two nodes", nodes, one, ONE, places=1e-9, slow=True),
    Column(
        "DDP, `find_unused_parameters`", partial(two, make=unused, strategy=find_unused),
        partial(one, make=unused), ONE, places=1e-9,
    ),
    Column(
        "DDP, ranks of uneven batches", partial(two, make=still, data=partial(loader, uneven=True)),
        partial(one, make=still), f"{ONE}, without moving", places=1e-9, unread=OF_DDP,
        note="what is of DDP's mean over ranks, or of halves of the samples, is not compared",
        none={"Syre": "it acts on the step alone, which DDP makes of its mean over ranks"},
    ),
    Column(
        "`ModelParallelStrategy`, `fully_shard`",
        partial(two, make=seeded("fully_shard"), strategy=model_parallel(2, 1)),
        partial(one, make=seeded("fully_shard")), ONE, places=1e-9, watch=in_pieces, refused=RUN_APART,
        unread=r"signal/(.*/)?(weight_gradient|distance|dead|off|off_runs)",
        note="norms of gradients, distances from the start and what functions show are not read of pieces",
    ),
    Column(
        "`ModelParallelStrategy`, tensor parallel",
        partial(two, make=seeded("tensor"), strategy=model_parallel(1, 2), data=batches),
        partial(one, make=seeded("tensor"), data=batches), "one process", places=1e-9, refused=PARALLEL,
    ),
]  # fmt: skip

if __name__ == "__main__":
    node(Path(sys.argv[1]), sys.argv[2])
