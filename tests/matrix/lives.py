"""What a run may live through: tuners, stages, interruptions, resumption, and loggers."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from lightning_sym.callbacks import Every, Monitor
from tests.matrix.rows import Cell, Column, Outcome, batches, fitted, name_of, outcome, plain, watching
from tests.models import trainer
from tests.promises.every import BATCH, Module, dataset


def fit(callbacks: Sequence[Any], *_: Any, **settings: Any) -> Outcome:
    """Fit for four epochs, without a break."""
    return fitted(callbacks, plain(), **{"max_epochs": 4, **settings})


class Forgets(Callback):
    """Has the optimizer begin anew after two epochs, as Lightning makes new ones for a second fit."""

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 2:
            for optimizer in trainer.optimizers:
                optimizer.state.clear()


def forgetful(callbacks: Sequence[Any], *_: Any) -> Outcome:
    """Fit for four epochs, with a new state of the optimizer after two."""
    return fit([Forgets(), *callbacks])


class Tunable(Module):
    """Has the attributes that tuners change."""

    def __init__(self) -> None:
        super().__init__("mlp")
        self.lr, self.batch_size = 0.05, 4
        self.net[4].p = 0.0
        self.double()

    def train_dataloader(self) -> DataLoader:
        return batches(self.batch_size)

    val_dataloader = train_dataloader

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), **{**self.settings, "lr": self.lr})


def tuned(how: str, callbacks: Sequence[Any], folder: Path, *, tune: bool) -> Outcome:
    """Tune, then fit; or fit with what a tuner found."""
    torch.manual_seed(0)
    module = Tunable()
    run = trainer(callbacks=list(callbacks), max_epochs=2, default_root_dir=folder)
    if tune:
        torch.manual_seed(1)
        if how == "lr_find":
            Tuner(run).lr_find(module, num_training=5, min_lr=1e-3, max_lr=0.1, update_attr=True)
        else:
            Tuner(run).scale_batch_size(module, max_trials=2, init_val=4, steps_per_trial=2)
        (folder.parent / how).write_text(json.dumps([module.lr, module.batch_size]))
    else:
        module.lr, module.batch_size = json.loads((folder.parent / how).read_text())
    run.fit(module)
    return outcome(module, run.optimizers, callbacks)


def staged(callbacks: Sequence[Any], *_: Any) -> Outcome:
    """Fit, validate, test, predict, and go on."""

    def more(run: Trainer, module: Any) -> None:
        loader = batches()
        run.validate(module, loader, verbose=False)
        run.test(module, loader, verbose=False)
        run.predict(module, [x for x, *_ in loader])
        run.fit_loop.max_epochs = 4
        run.fit(module, loader)

    return fitted(callbacks, plain(), then=more)


def twice(callbacks: Sequence[Any], *_: Any) -> Outcome:
    """Fit twice with one Trainer, which goes on."""

    def more(run: Trainer, module: Any) -> None:
        run.fit_loop.max_epochs = 4
        run.fit(module, batches())

    return fitted(callbacks, plain(), then=more)


def in_threads(callbacks: Sequence[Any], folder: Path) -> Outcome:
    """Fit beside another thread that fits another module with monitors of its own."""
    found: list[Outcome] = []
    module, other = plain(), plain("attention")
    chosen = [each for each in watching("attention") if each.needs]
    data = DataLoader(dataset("attention", double=True), BATCH)
    jobs = [
        threading.Thread(target=lambda: found.append(fitted(callbacks, module))),
        threading.Thread(target=lambda: fitted(chosen, other, loader=data)),
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
    (done,) = found
    return Outcome(done.rows, done.weights, done.state[:3], done.error)


class Nests(Callback):
    """Fits another module with monitors in the middle of a batch."""

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step in (1, 3):
            state = torch.get_rng_state()
            chosen = [each for each in watching() if each.needs]
            fitted(chosen, plain(), max_epochs=1)
            torch.set_rng_state(state)


def nested(callbacks: Sequence[Any], *_: Any) -> Outcome:
    """Fit with another fit inside."""
    return fitted([Nests(), *callbacks], plain())


class Breaks(Callback):
    """Ends a fit in its eighth batch."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def on_before_backward(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 7:
            raise self.error("mine")


def saving(folder: Path) -> ModelCheckpoint:
    """Return what saves at the end of every epoch."""
    return ModelCheckpoint(
        folder, save_last=True, every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True
    )


def resumed(
    error: type[BaseException],
    callbacks: Sequence[Any],
    folder: Path,
    *,
    other: bool = False,
    **settings: Any,
) -> Outcome:
    """Break off, and go on from the last checkpoint in new objects; ``other``: before at other steps."""
    first = [type_of(each) for each in callbacks]
    for monitor in first if other else ():
        if isinstance(monitor, Monitor) and isinstance(monitor.schedule, Every):
            monitor.schedule = Every(3 * monitor.schedule.n)
    with contextlib.suppress(SystemExit, KeyboardInterrupt):
        broken = fitted(
            [*first, Breaks(error), saving(folder)], plain(), max_epochs=4, enable_checkpointing=True
        )
        assert "mine" in broken.error or error is KeyboardInterrupt
    return go_on(callbacks, folder / "last.ckpt", **settings)


def go_on(callbacks: Sequence[Any], path: Path, **settings: Any) -> Outcome:
    """Go on from a checkpoint."""
    return fitted(callbacks, plain(), max_epochs=4, ckpt_path=path, **settings)


def type_of(callback: Any) -> Any:
    """Return another callback of the same settings: nothing of the first one's process is left."""
    if isinstance(callback, Monitor):
        return next(each for each in watching() if type(each) is type(callback))
    return type(callback)(sigma=callback.sigma, seed=callback.seed)


def killed(callbacks: Sequence[Any], folder: Path) -> Outcome:
    """Be killed in the middle of writing a checkpoint and a row, and go on in new objects."""
    kept = folder / "kept"
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            _be_killed([_in_folder(type_of(each), kept) for each in callbacks], folder)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        return Outcome(error=f"the process was to be killed, and ended with status {status}")
    chosen = [_in_folder(type_of(each), kept) for each in callbacks]
    return go_on(chosen, folder / "epoch=1-step=6.ckpt")


def _in_folder(callback: Any, folder: Path) -> Any:
    """Return a monitor that keeps its history in a folder."""
    if not isinstance(callback, Monitor):
        return callback
    from lightning_sym.engine.history import FileHistory

    callback.history = FileHistory(folder, callback.prefix)
    callback.held.file = folder / f"{callback.prefix}.samples.pt"
    return callback


def _be_killed(callbacks: list[Any], folder: Path) -> None:
    class Kills(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 8:
                for path in (folder / "kept").glob("*.jsonl"):
                    with path.open("ab") as file:
                        file.write(b'{"step": 9, "fit"')
                whole = (folder / "epoch=1-step=6.ckpt").read_bytes()
                (folder / "last.ckpt").write_bytes(whole[: len(whole) // 2])
                os.kill(os.getpid(), signal.SIGKILL)

    fitted([*callbacks, Kills(), saving(folder)], plain(), max_epochs=4, enable_checkpointing=True)


def late(way: Callable[..., Outcome], callbacks: Sequence[Any], folder: Path) -> Outcome:
    """Return what was read after the resumption alone."""
    found = way(callbacks, folder)
    found.rows = {name: [row for row in rows if row["step"] > 6] for name, rows in found.rows.items()}
    return found


# -- loggers ----------------------------------------------------------------------------------


class Log(Column):
    """A logger beside which a fit is what it is with none; every reading is in it, at its step."""

    def cells(self, folder: Path) -> dict[str, Cell]:
        found = super().cells(folder)
        loggers = LOGGERS[self.name][0](folder / "loggers")
        chosen = watching()
        fitted(chosen, plain(), logger=loggers, log_every_n_steps=1)
        for logger in loggers:
            logged = LOGGERS[self.name][1][type(logger).__name__](logger)
            for monitor in chosen:
                missing = [
                    (key, row["step"])
                    for row in monitor.history
                    for key, value in row.items()
                    if key not in ("step", "fit") and not _among(logged.get(key, []), value)
                ]
                if missing:
                    at = f"{missing[0][0]} of step {missing[0][1]} is not in {type(logger).__name__}"
                    found[name_of(monitor)] = Cell("red", at)
        return found


def _among(values: list[float], value: float) -> bool:
    return any(
        math.isclose(each, value, rel_tol=1e-5, abs_tol=1e-7) or each != each != value for each in values
    )


def of_tensorboard(logger: Any) -> dict[str, list[float]]:
    """Return what TensorBoard has."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(logger.log_dir).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def of_csv(logger: Any) -> dict[str, list[float]]:
    """Return what the table has."""
    import csv

    logger.save()
    found: dict[str, list[float]] = {}
    with open(logger.experiment.metrics_file_path, newline="") as file:
        for row in csv.DictReader(file):
            for key, text in row.items():
                if text:
                    found.setdefault(key, []).append(float(text))
    return found


def of_mlflow(logger: Any) -> dict[str, list[float]]:
    """Return what MLflow has."""
    client, run = logger.experiment, logger.run_id
    keys = client.get_run(run).data.metrics
    return {key: [metric.value for metric in client.get_metric_history(run, key)] for key in keys}


def of_wandb(logger: Any) -> dict[str, list[float]]:
    """Return what W&B has written for later."""
    from wandb.proto.wandb_internal_pb2 import Record

    directory = Path(logger.experiment.dir).parent
    logger.experiment.finish()
    (file,) = directory.glob("run-*.wandb")
    found: dict[str, list[float]] = {}
    for data in _records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        for item in record.history.item:
            value = json.loads(item.value_json)
            if isinstance(value, int | float):
                found.setdefault(item.key or "/".join(item.nested_key), []).append(float(value))
    return found


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a LevelDB log, whose parts fill blocks of 32 KiB, each with a head of 7 bytes."""
    block, head, place, parts = 2**15, 7, 7, b""
    while place + head <= len(data):
        if block - place % block < head:
            place += block - place % block
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + head : place + head + size]
        place += head + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def _mlflow(folder: Path) -> list[Any]:
    from lightning.pytorch.loggers import MLFlowLogger

    place = {"tracking_uri": f"sqlite:///{folder}/mlflow.db", "artifact_location": str(folder / "artifacts")}
    return [MLFlowLogger("matrix", **place)]


def _wandb(folder: Path) -> list[Any]:
    from lightning.pytorch.loggers import WandbLogger

    return [WandbLogger("matrix", save_dir=folder, offline=True)]


READ = {
    "TensorBoardLogger": of_tensorboard,
    "CSVLogger": of_csv,
    "MLFlowLogger": of_mlflow,
    "WandbLogger": of_wandb,
}
LOGGERS: dict[str, Any] = {
    "TensorBoard": (lambda folder: [TensorBoardLogger(folder, name="")], READ),
    "CSV": (lambda folder: [CSVLogger(folder, name="")], READ),
    "several loggers": (
        lambda folder: [TensorBoardLogger(folder / "a", name=""), CSVLogger(folder / "b", name="")], READ,
    ),
    "MLflow": (_mlflow, READ),
    "W&B, offline": (_wandb, READ),
}  # fmt: skip


def logging(name: str, callbacks: Sequence[Any], folder: Path) -> Outcome:
    """Fit with loggers."""
    folder.mkdir(parents=True, exist_ok=True)
    return fitted(callbacks, plain(), logger=LOGGERS[name][0](folder), log_every_n_steps=1)


def quiet(callbacks: Sequence[Any], *_: Any) -> Outcome:
    """Fit without a logger."""
    return fitted(callbacks, plain())


UNBROKEN = "a run that is not broken off"
ONE_FIT = "one fit whose optimizer begins anew"
COLUMNS = [
    Column(
        "`lr_find` first", partial(tuned, "lr_find", tune=True), partial(tuned, "lr_find", tune=False),
        "a fit at the rate found",
    ),
    Column(
        "`scale_batch_size` first", partial(tuned, "batch", tune=True), partial(tuned, "batch", tune=False),
        "a fit at the size found",
    ),
    Column("fit, validate, test, predict, fit on", staged, forgetful, ONE_FIT),
    Column("two fits with one Trainer", twice, forgetful, ONE_FIT),
    Column("two Trainers in two threads", in_threads, quiet, "a fit alone"),
    Column("a fit inside a callback", nested, quiet, "a fit alone"),
    Column("resumed after an exception", partial(resumed, ArithmeticError), fit, UNBROKEN),
    Column("resumed after Ctrl-C", partial(resumed, KeyboardInterrupt), fit, UNBROKEN),
    Column("killed in the middle of a write, resumed", killed, fit, UNBROKEN),
    Column(
        "resumed with `weights_only=True`", partial(resumed, ArithmeticError, weights_only=True), fit,
        UNBROKEN,
    ),
    Column(
        "resumed with other intervals", partial(late, partial(resumed, ArithmeticError, other=True)),
        partial(late, fit), f"{UNBROKEN}, from there on", unread="flow|law_error|hierarchy/(broken|restored)",
        note="what is counted since the reading before is not compared",
    ),
    Column("no logger", quiet, quiet, "another such fit"),
    *(
        Log(name, partial(logging, name), quiet, "a fit without one", needs=needs)
        for name, needs in (
            ("TensorBoard", ""), ("CSV", ""), ("several loggers", ""), ("MLflow", "mlflow"),
            ("W&B, offline", "wandb"),
        )
    ),
]  # fmt: skip
