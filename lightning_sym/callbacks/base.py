"""What every monitor shares: schedule, ranks, loggers, state and failure, said once.

Three classes, each adding one thing:

* :class:`ScheduledCallback`: is due at some optimizer steps, publishes readings, keeps a history.
* :class:`Probe`: takes a measurement of its own after a due step (a Hessian, a kNN accuracy).
* :class:`Monitor`: reads the one observation of a due step that all monitors share.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_sym.observe.observation import Observation
from lightning_sym.observe.observer import Observer
from lightning_sym.observe.reading import Reading
from lightning_sym.observe.recorder import unobserved
from lightning_sym.observe.schedule import Schedule, as_schedule
from lightning_sym.observe.wants import Wants


def logger_step(trainer: Trainer) -> int:
    """Return the step under which ``self.log`` of the current batch reaches the loggers."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


#: Bytes of metrics that processes which were forked or spawned can hand back: a pipe holds 64 KiB.
RETURNABLE = 40_000


class ScheduledCallback(Callback):
    """A callback that is due at some optimizer steps and publishes what it reads there.

    Readings go to every logger of the Trainer under the step of the batch they were taken from,
    into ``trainer.callback_metrics`` on every rank (``EarlyStopping`` and ``ModelCheckpoint`` can
    watch them) and into :attr:`history`.

    Args:
        every_n_steps: an interval in optimizer steps, or a schedule
            (:class:`~lightning_sym.observe.schedule.LogSpaced`). Step 1 is always due.
        strict: raise what goes wrong in here instead of warning once and going on.

    Attributes:
        history: one dict a due step: ``step`` (optimizer steps made) and every scalar by its key.
            ``pandas.DataFrame(callback.history)`` is a table.
    """

    quantity: ClassVar[str] = ""

    def __init__(self, *, every_n_steps: int | Schedule = 100, strict: bool = False) -> None:
        self.schedule = as_schedule(every_n_steps)
        self.strict = strict
        self.history: list[dict[str, float]] = []
        self._last = 0
        self._stride = 1  # optimizer steps of the last batch: several optimizers make several
        self._previous: int | None = None
        self._failed: set[str] = set()

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(every_n_steps=repr(self.schedule))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": [dict(row) for row in self.history], "last": self._last, "stride": self._stride}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [dict(row) for row in state_dict["history"]]
        self._last = int(state_dict["last"])
        self._stride = int(state_dict["stride"])

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here the step of a resumed run is known. An earlier one: a new run with an old callback.
        self._previous = None
        if trainer.global_step < self._last:
            self._last, self._stride = trainer.global_step, 1

    def due(self, trainer: Trainer) -> bool:
        """Return whether an optimizer step of the coming batch is one of the schedule's.

        To be asked once a batch: a batch is taken to make as many steps as the last one did.
        """
        step = trainer.global_step
        if self._previous is not None:
            self._stride = max(1, step - self._previous)
        self._previous = step
        return step + self._stride >= self.schedule.next(self._last)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no more in ``callback_metrics`` than forked or spawned processes can hand back.

        Their launcher reads what they put into a pipe when they have ended, and they don't end before it
        is read: metrics of hundreds of layers would stop both for ever.
        """
        launched = isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
        if stage != "fit" or not launched or _stored_size(trainer.callback_metrics) <= RETURNABLE:
            return
        ours = [each for each in trainer.callbacks if isinstance(each, ScheduledCallback)]  # type: ignore[attr-defined]
        read = {key for each in ours for row in each.history for key in row} - {"step"}
        read &= set(trainer.callback_metrics)
        single = {key for key in read if key.count("/") > 1}
        for keys in (single, read - single):
            if _stored_size(trainer.callback_metrics) > RETURNABLE:
                for key in keys:
                    del trainer.callback_metrics[key]
        rank_zero_info(
            "Readings of single layers are in the loggers and checkpoints; there are too many to hand back "
            "to the process that called fit."
        )

    @contextlib.contextmanager
    def guard(self, trainer: Trainer, where: str | Callable[[], str]) -> Iterator[None]:
        """Turn an exception of ours into one warning that names the place, unless ``strict``."""
        try:
            yield
        except Exception as error:
            if self.strict:
                raise
            where = where() if callable(where) else where
            if where not in self._failed:
                self._failed.add(where)
                rank_zero_warn(
                    f"{type(self).__name__} failed at step {trainer.global_step} in {where}: "
                    f"{type(error).__name__}: {error}. The fit goes on without this reading; "
                    "pass strict=True to raise instead."
                )

    def publish(self, trainer: Trainer, readings: Iterable[Reading], *, step: int) -> None:
        """Send readings to the history, ``callback_metrics`` and every logger.

        Args:
            trainer: the running trainer.
            readings: what was read; equal on every rank.
            step: the loggers' step, see :func:`logger_step`.
        """
        readings = list(readings)
        scalars = {reading.key: reading.scalar for reading in readings if reading.is_scalar}
        self.history.append({"step": trainer.global_step, **scalars})
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in scalars.items()})
        for logger in trainer.loggers:
            with self.guard(trainer, f"{type(logger).__name__}"):
                if scalars:
                    logger.log_metrics(scalars, step=step)
                if trainer.is_global_zero:
                    _log_media(getattr(logger, "experiment", None), readings, step)


def _stored_size(metrics: dict[str, Any]) -> int:
    """Return the bytes that metrics take where they are handed to another process."""
    buffer = io.BytesIO()
    torch.save(dict(metrics), buffer)
    return len(buffer.getvalue())


def _log_media(experiment: Any, readings: list[Reading], step: int) -> None:
    """Draw what is not a scalar, where the logger's experiment is able to."""
    for reading in readings:
        if reading.is_scalar:
            continue
        if isinstance(reading.value, str):
            if hasattr(experiment, "add_text"):
                experiment.add_text(reading.key, reading.value, step)
        elif isinstance(reading.value, Tensor):
            values = reading.value.detach().flatten()
            values = values[values.isfinite()]
            if hasattr(experiment, "add_histogram") and values.numel():
                experiment.add_histogram(reading.key, values.cpu().double(), step)
        elif callable(reading.value) and hasattr(experiment, "add_figure"):
            experiment.add_figure(reading.key, reading.value(), step, close=True)


@contextlib.contextmanager
def undisturbed(module: torch.nn.Module) -> Iterator[None]:
    """Put back the random state and every submodule's train/eval mode on leaving; stay unobserved.

    CPU and, where the module lives on CUDA, the devices' generators. Python's and numpy's random
    states are not used by this package and not touched.
    """
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
    modes = [(child, child.training) for child in module.modules()]
    with torch.random.fork_rng(devices=devices), unobserved():
        try:
            yield
        finally:
            for child, mode in modes:
                child.training = mode


class Probe(ScheduledCallback):
    """A callback that takes a measurement of its own after a due optimizer step.

    A subclass implements :meth:`measure`. It runs on every rank at the same step; random state
    and train/eval modes are put back around it. Gradients and buffers are the subclass's to
    leave alone.
    """

    def __init__(self, *, every_n_steps: int | Schedule = 100, strict: bool = False) -> None:
        super().__init__(every_n_steps=every_n_steps, strict=strict)
        self._armed: int | None = None

    def measure(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Iterable[Reading]:
        """Return the readings of this step; those of the first rank are published on all.

        Args:
            trainer: the running trainer; ``trainer.global_step`` steps have been made.
            pl_module: the module being trained.
            batch: the batch of the step just made.
        """
        raise NotImplementedError

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._armed = trainer.global_step if self.due(trainer) else None
        self._logger_step = logger_step(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._armed is None or trainer.global_step == self._armed:
            return  # not due, or gradients are still being accumulated
        self._armed = None
        self._last = trainer.global_step
        readings: list[Reading] | None = None
        with self.guard(trainer, "measure"), undisturbed(pl_module):
            readings = list(self.measure(trainer, pl_module, batch))
        readings = _of_first_rank(trainer, readings)
        if readings is not None:
            with self.guard(trainer, "measure"):
                self.publish(trainer, readings, step=self._logger_step)


def _of_first_rank(trainer: Trainer, readings: list[Reading] | None) -> list[Reading] | None:
    """Return the first rank's readings on all ranks, or None if it has none; others keep only numbers.

    Buffers such as running statistics differ between ranks, and machines round differently.
    """
    if trainer.world_size == 1:
        return readings
    numbers = None if readings is None else [(r.key, r.scalar) for r in readings if r.is_scalar]
    numbers = trainer.strategy.broadcast(numbers, 0)
    if trainer.is_global_zero or numbers is None:
        return readings if trainer.is_global_zero else None
    return [Reading(key, value) for key, value in numbers]


class Monitor(ScheduledCallback):
    """A callback that reads the one observation of a step that all monitors share.

    A subclass names its ``quantity``, what it ``wants`` observed, and implements :meth:`read` as a
    pure function of the observation. Hooks, precision, ranks, loggers, state and failures are
    seen to here.

    Args:
        every_n_steps: an interval in optimizer steps, or a schedule. Step 1 is always due.
        layers: a glob, or a list of globs, on module names. ``None``: all watchable layers, at
            most ``max_layers`` of them, evenly spread over depth.
        max_layers: how many layers to watch when ``layers`` is ``None``.
        strict: raise what goes wrong in here instead of warning once and going on.

    Raises:
        ValueError: if an argument is out of its range; at fit start, if a glob matches no layer or
            the module has none to watch.
    """

    wants: Wants = Wants()

    def __init__(
        self,
        *,
        every_n_steps: int | Schedule = 100,
        layers: str | list[str] | None = None,
        max_layers: int = 12,
        strict: bool = False,
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, strict=strict)
        if layers is not None and not (
            isinstance(layers, str) or (isinstance(layers, list | tuple) and layers)
        ):
            raise ValueError(f"layers must be a glob, a non-empty list of globs or None, got {layers!r}")
        if max_layers < 1:
            raise ValueError(f"max_layers must be at least 1, got {max_layers}")
        self.layers = layers if layers is None or isinstance(layers, str) else list(layers)
        self.max_layers = max_layers

    def prepare(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Get ready for a due step before anything of it is observed; does nothing here.

        What a monitor wants, and of which layers, may still change. Must not raise: use ``guard``.
        """

    def read(self, seen: Observation) -> Iterator[Reading]:
        """Yield the readings of one observation; a pure function of it."""
        raise NotImplementedError

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(every_n_steps=repr(self.schedule), layers=self.layers)

    # The rest is plumbing: the observer does the work once for all monitors of the trainer.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            Observer.of(trainer).join(self, pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Observer.of(trainer).start(self, trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        Observer.of(trainer).batch_start(self, trainer, pl_module, batch)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        Observer.of(trainer).before_optimizer_step(self)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        Observer.of(trainer).batch_end(self, trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Observer.of(trainer).pause(True)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Observer.of(trainer).pause(False)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        Observer.of(trainer).stop()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Observer.of(trainer).stop()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        Observer.of(trainer).leave(self)

    def take(self, trainer: Trainer, seen: Observation, *, step: int) -> None:
        """Read one observation and publish it; called by the observer at a due step."""
        self._last = trainer.global_step
        readings: list[Reading] = []
        began = time.perf_counter()
        with self.guard(trainer, lambda: f"the reading of layer {seen.current or 'all'}"):
            readings.extend(self.read(seen))
        seen.seconds["spectra"] += time.perf_counter() - began
        began = time.perf_counter()
        self.publish(trainer, readings, step=step)
        seen.seconds["logging"] += time.perf_counter() - began
