"""What every monitor shares. A subclass says what it needs and reads it; the engine does the rest."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_sym.engine.batch import check_place
from lightning_sym.engine.history import LAST_ROWS, FileHistory, Keep, Row, packed, unpacked
from lightning_sym.engine.lightning import attach
from lightning_sym.engine.probe import Held
from lightning_sym.engine.run import Run
from lightning_sym.engine.schedule import EpochEnds, Schedule, as_schedule
from lightning_sym.observe.layers import Layer, choose_layers
from lightning_sym.observe.observation import Observation
from lightning_sym.observe.reading import Reading
from lightning_sym.observe.statistics.statistic import Statistic


class Monitor(Callback):
    """A callback that reads what a due optimizer step, or an epoch's end, shows.

    A subclass names its ``quantity`` (the first part of its keys) and what it ``needs`` observed, and
    implements :meth:`read`. Hooks, precision, ranks, loggers, checkpoints and failures are the engine's
    (:mod:`lightning_sym.engine`). It may override any of Lightning's hooks for itself, with or without
    ``super()``.

    Readings go to every logger of the Trainer under the step of the batch they were taken from,
    into ``trainer.callback_metrics`` on every rank and into :attr:`history`. An ``EarlyStopping`` that
    watches one is asked once for each new one, and a ``ModelCheckpoint`` only where it is of the weights to
    be stored: it is then read at such steps, too.

    Args:
        every_n_steps: an interval in optimizer steps, a schedule
            (:class:`~lightning_sym.engine.schedule.LogSpaced`), of which step 1 is always due, or
            :class:`~lightning_sym.engine.schedule.EpochEnds`, where parameters alone can be read.
        layers: a glob, or a list of globs, on module names. ``None``: all watchable layers that are
            trained, at most ``max_layers`` of them: of each role (query, output, first convolution of a
            block, ...), spread over depth.
        max_layers: how many layers to watch when ``layers`` is ``None``.
        keep: how much of :attr:`history` a checkpoint holds. A number: its last rows, 8 bytes a reading; a
            resumed run goes on with these, while a run that is not interrupted has all rows in memory.
            ``None``: all rows, with which every checkpoint grows. Or a folder of this run: each row is
            written to ``<folder>/<name>.jsonl`` when it is read, where a run that is resumed with the
            same folder finds all of them; memory and checkpoints hold none. Samples of the user's data that
            some monitors look at again and again are in no checkpoint, but in the folder if there is one.
        deferred: compute readings in a thread while training goes on, if the monitor is one that can. They
            are the same numbers under the same step, but published 4 optimizer steps later or, if that comes
            first, before the next reading, validation, a checkpoint, the epoch's end and the fit's end.
            ``callback_metrics`` has them from then on. Of several ranks all must call ``state_dict``.
        name: first part of its keys instead of ``quantity``; tells two monitors of one kind apart.
        strict: raise what goes wrong in here instead of warning once and going on.

    Attributes:
        history: one dict a reading: ``step`` (optimizer steps made), ``fit`` (which of the fits of this
            monitor, counted from 1) and every scalar by its key. ``pandas.DataFrame(monitor.history)``
            is a table. A list, or where ``keep`` is a folder a sequence that reads its file.
        state: what it keeps from reading to reading; stored in checkpoints, begun anew with a new run.

    Raises:
        ValueError: if an argument is out of its range; at fit start, if a glob matches no layer.
        TypeError: if ``every_n_steps`` is no schedule, or ``keep`` neither a number nor a folder.
    """

    quantity: ClassVar[str] = ""
    needs: tuple[Statistic, ...] = ()
    #: Whether it runs the module outside of its step, which needs parameters whole on every rank.
    runs_module: bool = False
    #: Which of its readings do, if not all.
    module_readings: str = ""
    #: Whether its argument ``inputs`` says what of a training batch its passes through the module take.
    takes_inputs: bool = False
    #: Whether it reads what other monitors have read (``seen.others``): then it reads after them.
    reads_monitors: bool = False
    #: Whether :meth:`read` is of the observed layers alone (not of the module, the run, the state or other
    #: monitors), so that it may be computed in a thread while training goes on.
    defers: bool = False
    #: Whether :meth:`read_epoch` is called at the end of every epoch.
    reads_epochs: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let the engine know of a monitor whose own ``setup`` does not call ``super()``."""
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("setup")
        if own is not None:

            def setup(self: Monitor, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
                Monitor.setup(self, trainer, pl_module, stage)
                own(self, trainer, pl_module, stage)

            cls.setup = setup  # type: ignore[method-assign]

    def __init__(
        self,
        *,
        every_n_steps: int | Schedule | EpochEnds = 100,
        layers: str | list[str] | None = None,
        max_layers: int = 12,
        keep: Keep = LAST_ROWS,
        deferred: bool = False,
        name: str | None = None,
        strict: bool = False,
    ) -> None:
        self.schedule = as_schedule(every_n_steps)
        if layers is not None and not (
            isinstance(layers, str) or (isinstance(layers, list | tuple) and layers)
        ):
            raise ValueError(f"layers must be a glob, a non-empty list of globs or None, got {layers!r}")
        at_least("max_layers", max_layers, 1)
        if name is not None and (not isinstance(name, str) or not name or "/" in name):
            raise ValueError(f"name must be a word without '/', got {name!r}")
        if isinstance(keep, bool) or not isinstance(keep, int | str | Path | None):
            raise TypeError(f"keep must be a number of rows, a folder or None, got {keep!r}")
        if isinstance(keep, int):
            at_least("keep", keep, 0)
        self.layers = layers if layers is None or isinstance(layers, str) else list(layers)
        self.max_layers, self.keep, self.deferred = max_layers, keep, deferred
        self.name, self.strict = name, strict
        folder = keep if isinstance(keep, str | Path) else None
        self.history: list[Row] | FileHistory = [] if folder is None else FileHistory(folder, self.prefix)
        self.state: dict[str, Any] = {}
        self.held = Held(None if folder is None else Path(folder, f"{self.prefix}.samples.pt"))
        self.fit, self.last = 1, 0

    # -- what a subclass says -----------------------------------------------------------------

    def read(self, seen: Observation) -> Iterable[Reading]:
        """Yield the readings of one observation; a function of it and of ``seen.state``."""
        raise NotImplementedError

    def read_epoch(self, seen: Observation) -> Iterable[Reading]:
        """Yield readings of an epoch's end, beside those of steps; if ``reads_epochs``."""
        return ()

    def start(self, seen: Observation) -> None:
        """Look at the module before the first step of a fit; what is kept goes into ``seen.state``."""

    def prepare(self, seen: Observation) -> None:
        """Look at the module before a due step."""

    def prepare_batch(self, seen: Observation) -> None:
        """Look at the module before each batch of a due step: several where gradients are accumulated."""

    def optimizer_stepped(self, run: Run, optimizer: Any) -> None:
        """Look at parameters and gradients right after an optimizer's due step; no collective in here."""

    def check(self, run: Run) -> None:
        """Raise what is wrong with arguments, before the first step."""
        if self.deferred and not self.defers:
            raise ValueError(
                f"deferred must be False for {type(self).__name__}, which reads more than the observed layers"
            )
        if isinstance(self.schedule, EpochEnds) and any(need.of_step for need in self.needs):
            names = [type(need).__name__ for need in self.needs if need.of_step]
            raise ValueError(
                f"every_n_steps={self.schedule!r} reads parameters alone; {', '.join(names)} of "
                f"{type(self).__name__} is of a step: give an interval in steps"
            )

    def check_batch(self, batch: Any) -> None:
        """Raise where ``targets`` or ``inputs`` is no place in the fit's first batch, before its step."""
        for need in self.needs:
            check_place(batch, getattr(need, "targets", None), "targets")
        if self.takes_inputs and getattr(self, "data", None) is None:
            check_place(batch, getattr(self, "inputs", None), "inputs")

    def choose(self, module: nn.Module) -> list[Layer]:
        """Return the layers to watch."""
        if not self.needs:
            return []
        return choose_layers(module, self.layers, max_layers=self.max_layers)[0]

    def fit_rows(self, start: int = 0) -> list[dict[str, float]]:
        """Return the rows of this fit, from a place in the history on."""
        return [row for row in self.history[start:] if row.get("fit") == self.fit]

    def settings(self) -> dict[str, Any]:
        """Return what tells its state in a checkpoint from that of another monitor of its kind."""
        return {"layers": self.layers}

    # -- what the engine asks -----------------------------------------------------------------

    @property
    def prefix(self) -> str:
        """The first part of its keys."""
        return self.name or self.quantity or type(self).__name__.lower()

    def overrides(self, method: str) -> bool:
        """Return whether a subclass does something there."""
        return getattr(type(self), method) is not getattr(Monitor, method)

    def begin_run(self) -> None:
        """Begin anew: no step of the run has been made."""
        if self.history:
            self.fit = int(self.history[-1]["fit"]) + 1
        self.state, self.last, self.held.samples = {}, 0, None

    def end_run(self) -> None:
        """Let go of what belongs to the fit."""

    def settle(self) -> None:
        """Wait until what was observed has been read; during a fit, the engine puts its own here."""

    # -- Lightning's side ---------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: what the engine put into a monitor is of its fit."""
        return {name: value for name, value in vars(self).items() if name != "settle"}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            attach(trainer, pl_module)

    def _identity(self) -> dict[str, Any]:
        return {"kind": type(self).__qualname__, "name": self.name, **self.settings()}

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(every_n_steps=repr(self.schedule), name=self.name, **self.settings())

    @override
    def state_dict(self) -> dict[str, Any]:
        self.settle()
        return {
            "identity": repr(self._identity()),
            "history": self._packed(),
            "state": copy.deepcopy(self.state),
            "fit": self.fit,
            "last": self.last,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._unpack(state_dict["history"])
        self.state = copy.deepcopy(state_dict["state"])
        self.fit, self.last = int(state_dict["fit"]), int(state_dict["last"])

    def _packed(self) -> dict[str, Any]:
        if isinstance(self.history, FileHistory):
            return {"rows": len(self.history)}
        return packed(self.history, self.keep if isinstance(self.keep, int) else None)

    def _unpack(self, state: dict[str, Any]) -> None:
        """Go on from the rows that there were, as far as they are still there."""
        found = unpacked(state) if "values" in state else []
        if isinstance(self.history, FileHistory):
            self.history.cut(int(state["rows"]))
            if not len(self.history):
                for row in found:
                    self.history.append(row)
        else:
            self.history = found
        if len(self.history) < state["rows"]:
            kept, made = len(self.history), state["rows"]
            rank_zero_info(f"{type(self).__name__}: {kept} of the {made} rows of its history were kept.")

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up a state that was saved under another schedule, or in another list of callbacks."""
        if self.state_key not in (checkpoint.get("callbacks") or {}):
            self.take_up(stored_states(checkpoint))

    def take_up(self, states: Mapping[str, Any]) -> None:
        """Go on from its own state among several, or from that of one like it under another schedule."""
        mine = repr(self._identity())
        alike = [s for s in states.values() if isinstance(s, dict) and s.get("identity") == mine]
        found = [states[self.state_key]] if self.state_key in states else alike
        if len(found) == 1:
            self.load_state_dict(found[0])


def stored_states(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the states of callbacks in a checkpoint by key, those of monitors in a list of them too."""
    states = dict(checkpoint.get("callbacks") or {})
    for state in list(states.values()):
        if isinstance(state, dict):
            states |= state.get("members", {})
    return states


def at_least(name: str, value: float | None, least: float) -> None:
    """Refuse a number below the least one; ``None`` passes.

    Raises:
        ValueError: naming the argument.
    """
    if value is not None and not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def within(name: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside of ``[low, high)``.

    Raises:
        ValueError: naming the argument.
    """
    if not low <= value < high:
        raise ValueError(f"{name} must be in [{low}, {high}), got {value}")


def named(how: Any) -> Any:
    """Return what tells a function given as an argument from another, the same in every process."""
    return how if isinstance(how, int | str | None) else getattr(how, "__qualname__", type(how).__name__)
