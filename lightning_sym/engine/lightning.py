"""The engine driven by a Trainer, of ``lightning`` or of ``pytorch_lightning``."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_sym.engine.dashboard import FINAL, add_final_readings
from lightning_sym.engine.deciders import Deciders
from lightning_sym.engine.engine import Engine
from lightning_sym.engine.loggers import Loggers
from lightning_sym.engine.run import Run
from lightning_sym.engine.seats import is_monitor
from lightning_sym.sandbox import Sandbox

#: Bytes of metrics that processes which were forked or spawned can return: a pipe holds 64 KiB.
RETURNABLE = 40_000

#: Where a Trainer has its driver, which is none of its callbacks: they are the user's alone.
_DRIVER = "_lightning_sym_driver"


class TrainerRun(Run):
    """A Trainer's fit.

    Attributes:
        taken: the step at which each key was read, in optimizer steps made.
    """

    def __init__(self, trainer: Any, module: Any) -> None:
        super().__init__(module)
        self.trainer = trainer
        self.taken: dict[str, int] = {}
        self.automatic = bool(module.automatic_optimization)
        self.accumulated = trainer.accumulate_grad_batches if self.automatic else 1
        self.clipped = bool(trainer.gradient_clip_val)
        self.datamodule = getattr(trainer, "datamodule", None)
        self._loggers = Loggers(trainer.loggers, self.tell)
        precision = trainer.precision_plugin
        self.sandbox = Sandbox(
            module, precision=precision.forward_context, convert=precision.convert_input, trainer=trainer
        )

    @property
    @override
    def step(self) -> int:
        return int(self.trainer.global_step)

    @property
    def epoch(self) -> int:  # type: ignore[override]
        """The current epoch, counted from 0."""
        return int(self.trainer.current_epoch)

    @property
    @override
    def logger_step(self) -> int:
        """The step under which ``self.log`` of the current batch reaches the loggers."""
        return int(self.trainer.fit_loop.epoch_loop._batches_that_stepped)

    @property
    @override
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return list(self.trainer.optimizers)

    @property
    def loss_scale(self) -> float:  # type: ignore[override]
        """What a gradient scaler multiplies the loss by."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None else 1.0

    @override
    def sharding(self) -> str:
        config = getattr(self.trainer.strategy, "config", None)
        stage = config.get("zero_optimization", {}).get("stage") if isinstance(config, dict) else None
        if stage == 3:
            return "DeepSpeedStage3"
        name = type(self.trainer.strategy).__name__
        return name if name == "FSDPStrategy" else super().sharding()

    @override
    def stop(self) -> None:
        self.trainer.should_stop = True

    @override
    def metric(self, key: str) -> float | None:
        found = self.trainer.callback_metrics.get(key)
        return None if found is None else float(found)

    @override
    def tell(self, message: str) -> None:
        rank_zero_info(message)

    @override
    def send(
        self, values: Mapping[str, float], media: Mapping[str, Any], step: int, *, taken: int
    ) -> list[str]:
        # Not through callback_metrics, which computes the user's metrics: their errors would look like ours.
        results = self.trainer._logger_connector._callback_metrics
        results.update({key: torch.tensor(value) for key, value in values.items()})
        self.taken.update(dict.fromkeys(values, taken))
        if self._loggers.sinks != self.trainer.loggers:
            self._loggers = Loggers(self.trainer.loggers, self.tell)
        return self._loggers.send(values, media, step, lead=self.trainer.is_global_zero)

    def show_final_readings(self, monitors: Iterable[Any]) -> None:
        """Put the last value of summaries beside the hyperparameters that are about to be logged."""
        if not self.trainer.is_global_zero:
            return
        params: dict[str, Any] = {}
        holders: tuple[Any, ...] = (self.module, self.datamodule)
        for holder in holders:
            if getattr(holder, "_log_hyperparams", False):
                params |= holder.hparams_initial
        params.pop("_class_path", None)  # LightningCLI's own
        keys = [
            key.replace(monitor.quantity, monitor.prefix, 1)
            for key in FINAL
            for monitor in monitors
            if key.startswith(f"{monitor.quantity}/")
        ]
        for logger in self.trainer.loggers if keys else ():
            try:
                add_final_readings(logger, params, keys)
            except Exception as error:
                said = f"{type(logger).__name__}: {type(error).__name__}: {error}"
                warnings.warn(f"no final readings beside the hyperparameters: {said}", stacklevel=2)


class _Hook:
    """Calls the driver's hook and then the callback's own, which is all that a copy of the callback does."""

    def __init__(self, drive: Callable[..., None], own: Callable[..., Any]) -> None:
        self.drive, self.own = drive, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.drive(*args, **kwargs)
        return self.own(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self.own,)


def _same(own: Callable[..., Any]) -> Callable[..., Any]:
    return own


class Driver(Callback):
    """Drives the engine of a Trainer; one for all monitors, whatever these override.

    Lightning calls its hooks through the first monitor, whose own follow: callbacks are the user's alone.

    Attributes:
        engine: of the fit that is under way.
        taken: the step at which each key was read last in this fit.
        seconds, probes, held_bytes: see :class:`~lightning_sym.engine.engine.Engine`; of the last fit.
    """

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.deciders: Deciders | None = None
        self.seconds: dict[str, float] = {}
        self.probes = self.held_bytes = 0
        self.taken: dict[str, int] = {}
        self._first: Any = None  # the callback through which its hooks are called
        self._replaced: dict[str, Any] = {}  # what that one had in their places, if it had

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: it drives nothing."""
        return {**vars(self), "engine": None, "deciders": None, "_first": None, "_replaced": {}}

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.close(trainer)
        monitors = monitors_among(trainer.callbacks)
        run = TrainerRun(trainer, pl_module)
        engine = Engine(run, monitors)
        engine.start()
        run.show_final_readings(monitors)
        self.engine, self.taken = engine, run.taken
        self.deciders = Deciders(
            trainer,
            schedules=engine.of_epochs(),
            taken=run.taken,
            catch_up=lambda key: self._validated(trainer, {key}),
        )
        self.deciders.attach(trainer.callbacks)

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._drive(trainer, lambda engine: engine.begin())

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.engine is not None:
            self.engine.check_batch(batch)

        def begin(engine: Engine) -> None:
            run = engine.run
            step = {"batch": batch_idx, "step": run.step + engine.stride, "accumulated": run.accumulated}
            engine.batch_start(batch, also=self.deciders.wanted(**step) if self.deciders else ())
            if engine.armed:
                self._show_steps(trainer, engine)

        self._drive(trainer, begin)

    @override
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        _unwrap(trainer.strategy)

        def end(engine: Engine) -> None:
            engine.batch_end()
            if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
                engine.flush()  # whoever decides at the epoch's end may stand before the monitors

        self._drive(trainer, end)

    @override
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._drive(trainer, lambda engine: engine.flush())

    @override
    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self._validated(trainer, {str(getattr(each, "monitor", "")) for each in trainer.callbacks})

    def _validated(self, trainer: Any, watched: set[str]) -> None:
        ends = bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)
        self._drive(trainer, lambda engine: engine.validated(ends_epoch=ends, watched=watched))

    @override
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._drive(trainer, lambda engine: engine.epoch_end())

    @override
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._drive(trainer, lambda engine: engine.flush())

    @override
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.close(trainer)
        self._leave()

    @override
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.close(trainer, ended=True)

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.close(trainer)
        if stage == "fit":
            _return_few(trainer)
        self._leave()

    def join(self, trainer: Any) -> None:
        """Have the hooks called for one fit; harmless if they are."""
        first = next(each for each in trainer.callbacks if monitors_among([each]))
        if first is self._first:
            return
        self._leave()
        self._first = first
        for hook in _HOOKS:
            own = getattr(first, hook)
            while isinstance(own, _Hook):  # of a fit that came to no end
                own = own.own
            if hook in vars(first) and not isinstance(vars(first)[hook], _Hook):
                self._replaced[hook] = own
            setattr(first, hook, _Hook(getattr(self, hook), own))

    def _leave(self) -> None:
        first, self._first = self._first, None
        replaced, self._replaced = self._replaced, {}
        if first is not None:
            for hook in _HOOKS:
                vars(first).pop(hook, None)
            vars(first).update(replaced)

    def close(self, trainer: Any, *, ended: bool = False) -> None:
        """Take every hook off and let go of the fit, which has come to its end or is broken off."""
        _unwrap(trainer.strategy)
        if self.deciders is not None:
            self.deciders.detach()
            self.deciders = None
        if self.engine is not None:
            engine, self.engine = self.engine, None
            for each in (self._first, *engine.monitors):  # Lightning's, bound to the module
                each.__dict__.pop("log", None)
                each.__dict__.pop("log_dict", None)
            self.seconds, self.probes, self.held_bytes = engine.seconds, engine.probes, engine.held_bytes
            engine.close(ended=ended)

    def _drive(self, trainer: Any, act: Callable[[Engine], None]) -> None:
        """Act, unless there is nothing to drive; a fault of the engine's own ends the observation alone."""
        engine = self.engine
        if engine is None:
            return
        try:
            act(engine)
        except Exception as error:
            strict = any(monitor.strict for monitor in engine.monitors)
            self.close(trainer)
            if strict:
                raise
            warnings.warn(
                f"lightning_sym stopped observing at step {trainer.global_step}: {type(error).__name__}: "
                f"{error}. The fit goes on; pass strict=True to a monitor to raise instead.",
                stacklevel=2,
            )

    @staticmethod
    def _show_steps(trainer: Any, engine: Engine) -> None:
        """Tell the engine when the Trainer runs the training step: nothing else is taken for it."""
        strategy = trainer.strategy
        run_step = strategy.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            with engine.in_step():
                returned = run_step(*args, **kwargs)
            engine.run.saw_loss(returned)
            return returned

        training_step.shows = run_step  # type: ignore[attr-defined]
        strategy.training_step = training_step


def _unwrap(strategy: Any) -> None:
    while (step := strategy.__dict__.get("training_step")) is not None and hasattr(step, "shows"):
        del strategy.training_step
        if "training_step" in vars(step.shows):  # somebody else's, which was there before
            strategy.training_step = step.shows


#: The hooks of Lightning's that drive.
_HOOKS = [name for name in vars(Driver) if name in vars(Callback) and not name.startswith("__")]


def attach(trainer: Any, pl_module: Any) -> None:
    """Let a Trainer's monitors be driven; called from the setup of each, done once."""
    vars(trainer).setdefault(_DRIVER, Driver()).join(trainer)


def monitors_among(callbacks: Iterable[Any]) -> list[Any]:
    """Return the monitors of callbacks, of which one may stand for several."""
    found: list[Any] = []
    for each in callbacks:
        for one in each if isinstance(each, Sequence) else [each]:
            if is_monitor(one) and not any(one is other for other in found):
                found.append(one)
    return found


def driver_of(trainer: Any) -> Driver:
    """Return the driver of a Trainer that has fitted with monitors.

    Raises:
        ValueError: if it has not.
    """
    driver = vars(trainer).get(_DRIVER)
    if driver is None:
        raise ValueError("the Trainer has not fitted with monitors yet")
    return driver


def reading_age(trainer: Any, key: str) -> int | None:
    """Return how many optimizer steps ago a reading in ``trainer.callback_metrics`` was taken.

    Args:
        trainer: which fits with monitors, or has.
        key: of the reading, ``"knn/accuracy"`` say.

    Returns:
        0 for a reading of the present weights; None if nothing was read under the key in this fit.

    Raises:
        ValueError: if the Trainer has not fitted with monitors.
    """
    taken = driver_of(trainer).taken.get(key)
    return None if taken is None else int(trainer.global_step) - taken


def _return_few(trainer: Any) -> None:
    """Leave no more in ``callback_metrics`` than forked or spawned processes can return.

    Their launcher reads what they put into a pipe when they have ended, and they don't end before it
    is read: metrics of hundreds of layers would stop both for ever.
    """
    launcher = {kind.__name__ for kind in type(trainer.strategy.launcher).__mro__}
    if "_MultiProcessingLauncher" not in launcher or _stored_size(trainer.callback_metrics) <= RETURNABLE:
        return
    monitors = monitors_among(trainer.callbacks)
    read = {key for each in monitors for row in each.history for key in row}
    read &= set(trainer.callback_metrics)
    single = {key for key in read if key.count("/") > 1}
    for keys in (single, read - single):
        if _stored_size(trainer.callback_metrics) > RETURNABLE:
            for key in keys:
                del trainer._logger_connector._callback_metrics[key]
    rank_zero_info(
        "Readings of single layers are in the loggers and checkpoints; there are too many to return "
        "to the process that called fit."
    )


def _stored_size(metrics: dict[str, Any]) -> int:
    """Return the bytes that metrics take where they are sent to another process."""
    buffer = io.BytesIO()
    torch.save(dict(metrics), buffer)
    return len(buffer.getvalue())
