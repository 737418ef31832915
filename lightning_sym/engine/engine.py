"""The engine: arms hooks on a due step, sums once over ranks, lets every due monitor read, publishes.

It is driven by a Trainer (:mod:`lightning_sym.engine.lightning`) or a plain training loop
(:mod:`lightning_sym.engine.loop`), which say when a batch begins, when the module is run for it, and when
an optimizer has stepped.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from lightning_sym.engine.batch import find_targets
from lightning_sym.engine.budget import Budget, Spent, counted
from lightning_sym.engine.reader import Reader, place
from lightning_sym.engine.reduction import reduce
from lightning_sym.engine.run import Run
from lightning_sym.engine.schedule import EpochEnds
from lightning_sym.engine.seats import Seat, seated, wanted_by
from lightning_sym.engine.timetable import Timetable
from lightning_sym.observe.coverage import announced, coverage
from lightning_sym.observe.functions import FunctionCalls, FunctionWatch
from lightning_sym.observe.gains import gains
from lightning_sym.observe.hooks import LayerWatch, has_compiled
from lightning_sym.observe.layers import Layer, readers, watchable_layers
from lightning_sym.observe.observation import LayerObservation, Observation
from lightning_sym.observe.statistics.statistic import Statistic
from lightning_sym.observe.step import Step, Targets

SECTIONS = ("hooks", "moments", "reduction", "spectra", "logging", "waiting", "thread")


class Engine:
    """One fit, observed.

    Args:
        run: the fit.
        monitors: what reads it.

    Attributes:
        seconds: time spent in our code, by section: ``hooks`` (registering, snapshots), ``moments``,
            ``reduction``, ``spectra`` (the monitors' arithmetic), ``logging``, ``waiting`` (for arithmetic
            that is done in a thread) and ``thread``, which is that one's and no time of the fit's.
        probes: steps observed.
        held_bytes: memory that the last step's sums took.
        stride: optimizer steps of the last batch: several optimizers make several.
    """

    def __init__(self, run: Run, monitors: Iterable[Any]) -> None:
        self.run = run
        self.seconds = dict.fromkeys(SECTIONS, 0.0)
        self.probes, self.held_bytes = 0, 0
        # Who reads other monitors reads after them, wherever it stands in the user's list.
        last = sorted(monitors, key=lambda monitor: bool(monitor.reads_monitors))
        self._seats = seated(last)
        on = any(seat.share is not None for seat in self._seats)
        self.budget = Budget(self.seconds, on=on)
        self._reader = Reader(run, self._seats, self.seconds, self.budget)
        self._timetable = Timetable(run, self._seats, self._reader, self.budget)
        self._watches: dict[str, LayerWatch] = {}
        self._due: list[Seat] = []
        self._armed_at: int | None = None
        self._handles: list[Any] = []
        self._stance: Any = None
        self._looks: list[FunctionWatch] = []
        self._calls: FunctionCalls | None = None
        self._step = Step()
        self._inside: int | None = None  # the thread that runs the training step now
        self._previous: int | None = None
        self.stride = 1
        self._agreed: set[str] = set()
        self._batch_checked = False
        self._lazy = False  # whether layers have no shape yet

    @property
    def monitors(self) -> list[Any]:
        """The monitors of the fit."""
        return [seat.monitor for seat in self._seats]

    def of_epochs(self) -> dict[str, bool]:
        """Return whether a monitor reads at epochs' ends alone, by the first part of its keys."""
        return {seat.quantity: isinstance(seat.monitor.schedule, EpochEnds) for seat in self._seats}

    @property
    def armed(self) -> bool:
        """Whether a step is being observed."""
        return self._armed_at is not None

    @property
    def thread(self) -> int | None:
        """The thread that runs the training step now, if it is run."""
        return self._inside

    # -- the life of a fit --------------------------------------------------------------------

    def start(self) -> None:
        """Check arguments and choose layers; user errors are raised here, before the first batch."""
        self.run.ranks.require(self._check)
        if any(seat.defers for seat in self._seats):
            for monitor in self.monitors:
                monitor.settle = self.flush  # before its state is taken
        self._announce()

    def check_batch(self, batch: Any) -> None:
        """Check what arguments say of a batch, before the first of a fit; user errors are raised here."""
        if not self._batch_checked:
            self._batch_checked = True
            self.run.ranks.require(lambda: [monitor.check_batch(batch) for monitor in self.monitors])

    def _check(self) -> None:
        self.run.check(self.monitors)
        for monitor in self.monitors:
            monitor.check(self.run)
        self._choose()

    def _choose(self) -> None:
        for seat in self._seats:
            seat.layers = seat.monitor.choose(self.run.module)

    def _announce(self) -> None:
        """Say once for all monitors what is read."""
        layers = {layer.name for seat in self._seats for layer in seat.layers}
        self._lazy = bool(coverage(self.run.module).lazy)
        if any(seat.monitor.needs for seat in self._seats):
            said, warning = announced(self.run.module, layers)
            self.run.tell(said)
            if warning is not None:
                self._reader.warn(*warning)

    @counted
    def begin(self) -> None:
        """Begin a run, or go on with one: the steps that were made tell which."""
        step = self.run.step
        self._previous = None
        stored = [seat.monitor.spent for seat in self._seats if seat.share is not None and step]
        self.budget.begin(max(stored, key=lambda spent: spent.step, default=Spent()), step)
        for seat in self._seats:
            if step == 0:
                self._reader.attempt(seat.monitor, lambda: "begin_run", seat.monitor.begin_run)
            self._timetable.plan(seat, min(seat.monitor.last, step))
        if step == 0:
            at_start = [s for s in self._seats if getattr(s.monitor.schedule, "at_start", False)]
            self._read(at_start, self._parameters_of(at_start), self.run.logger_step)

    @counted
    def flush(self) -> None:
        """Publish readings that are computed in a thread; all ranks call it together."""
        self._reader.flush()
        self._timetable.put_off()

    def close(self, *, ended: bool = False) -> None:
        """Take every hook off and let go of everything; harmless if that was done.

        Args:
            ended: whether the fit has come to its end: a strict monitor that fails here then raises.
        """
        self._disarm()
        failure: Exception | None = None
        try:
            self._reader.flush() if ended else self._reader.break_off()
        except Exception as error:
            failure = error
        self.run.batch = None
        for monitor in self.monitors:
            try:
                monitor.__dict__.pop("settle", None)
                monitor.end_run()
            except Exception as error:  # on this rank alone, maybe: the others are not asked
                failure = error if monitor.strict else failure
                said = f"{type(monitor).__name__} failed in end_run: {type(error).__name__}: {error}"
                warnings.warn(said, stacklevel=2)
        if ended and failure is not None:
            raise failure

    def leave_out(self, monitors: Iterable[Any]) -> None:
        """Let some monitors read no more."""
        left_out = list(monitors)
        self._seats[:] = [seat for seat in self._seats if not any(seat.monitor is each for each in left_out)]

    # -- a step -------------------------------------------------------------------------------

    @counted
    def batch_start(self, batch: Any, *, also: Collection[str] = ()) -> None:
        """Arm the hooks if the coming optimizer step is due for a monitor.

        Args:
            batch: the step's first, or a further one.
            also: first parts of the keys of monitors for which it is due in any case.
        """
        run = self.run
        step = run.step
        if self.armed:
            self._end_batch()
        else:
            if self._previous is not None:
                self.stride = max(1, step - self._previous)
            self._previous = step
            run.batch = batch
            if self._lazy and not any(map(is_lazy, run.module.parameters())):
                self._choose()  # lazy layers have got their shapes
                self._announce()
            for seat in self._seats:
                if not seat.started:
                    seat.started = True
                    self._call(seat, "start")
            self._due = self._due_at(step + self.stride, also)
            if self._due and self.budget.on and self._reader.waits:
                self.flush()  # what that cost may put this one off
                self._due = self._due_at(step + self.stride, also)
            if not self._due:
                return
            for seat in self._due:
                self._call(seat, "prepare")
            self._arm()
            self._show_calls()  # a plain loop is inside from first to last
        self.set_batch(batch)
        with self._unseen():
            for seat in self._due:
                self._call(seat, "prepare_batch")

    def _due_at(self, step: int, also: Collection[str]) -> list[Seat]:
        seats = [seat for seat in self._seats if not isinstance(seat.monitor.schedule, EpochEnds)]
        return [seat for seat in seats if step >= seat.due or seat.quantity in also]

    def set_batch(self, batch: Any) -> None:
        """Say which micro-batch is run from now on."""
        run = self.run
        run.batch = batch
        self._step.samples = samples = run.samples(batch)
        self._step.scale = (samples or 1) * run.accumulated / run.loss_scale

    def drop_step(self) -> None:
        """Forget the step that is observed: it did not come to its end."""
        self._disarm()

    def _arm(self) -> None:
        began = time.perf_counter()
        run = self.run
        self._armed_at, self._logger_step = run.step, run.logger_step
        run.losses = []
        self._step = Step(rank=run.ranks.rank, ranks=run.ranks.size, labels=self._labels)
        wanted, layers = wanted_by(self._due)
        if wanted:
            if has_compiled(run.module):
                self._stance = torch.compiler.set_stance("force_eager")
            self._watch(layers, wanted)
        for optimizer in run.optimizers if not run.reports_steps else ():
            if hasattr(optimizer, "register_step_post_hook"):
                self._handles.append(optimizer.register_step_post_hook(self.stepped))
        self.seconds["hooks"] += time.perf_counter() - began

    def _watch(self, layers: dict[str, Layer], wanted: dict[str, list[Statistic]]) -> None:
        every = watchable_layers(self.run.module)
        by_module = {layer.module: layer for layer in every if layer.part is None}
        reads = {layer: by_module.get(reader) for layer, reader in readers(self.run.module).items()}
        for name in self._in_order(wanted, every):
            layer = layers[name]
            watch = LayerWatch(
                layer,
                wanted[name],
                step=self._step,
                looking=self._looking,
                seconds=self.seconds,
                reader=reads.get(layer.module) if layer.part is None else None,
                agreed=self._agreed,
            )
            watch.attach()
            self._watches[name] = watch

    def _in_order(self, wanted: Collection[str], layers: list[Layer]) -> list[str]:
        """Return the names of what is wanted in the network's order."""
        return [layer.name for layer in [*layers, *gains(self.run.module)] if layer.name in wanted]

    def _labels(self, targets: Targets) -> torch.Tensor:
        found = find_targets(self.run.batch, targets)
        if found is None:
            raise ValueError("targets must say where the labels are, got None")
        return found.to(self.run.device)

    def _looking(self) -> bool:
        """Return whether what runs now is the training step, not validation, a callback or another thread."""
        return self._inside == threading.get_ident()

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Run the module for the step: what passes through it in here, in this thread, is observed."""
        before, self._inside = self._inside, threading.get_ident()
        self._show_calls()
        try:
            yield
        finally:
            self._hide_calls()
            self._inside = before

    def _show_calls(self) -> None:
        """Have torch's functions seen: never where nobody looks, since that shuts torch's fast paths."""
        if self._looks and self._looking() and self._calls is None:
            self._calls = FunctionCalls(lambda: self._looks, self.seconds)
            self._calls.attach()

    @contextlib.contextmanager
    def _unseen(self) -> Iterator[None]:
        """Let monitors compute, and run the module apart, in the middle of a plain loop's step."""
        self._hide_calls()
        try:
            yield
        finally:
            self._show_calls()

    def _hide_calls(self) -> None:
        if self._calls is not None and self._calls.detach():
            self._calls = None

    @counted
    def stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Let the layers of an optimizer that has stepped read their parameters, and look no more."""
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        others = {
            id(p)
            for other in self.run.optimizers
            if other is not optimizer
            for group in other.param_groups
            for p in group["params"]
        }
        for watch in self._watches.values():
            sources = {id(p) for p in watch.layer.sources()}
            if sources & owned:
                watch.own_step()
            elif sources & others:
                watch.other_step()
        with self._unseen():
            for seat in self._due:
                try:
                    seat.monitor.optimizer_stepped(self.run, optimizer)
                except Exception as error:  # the user's step is under way
                    seat.failure = seat.failure or error

    def _end_batch(self) -> None:
        for watch in self._watches.values():
            if not watch.closed:
                watch.end_batch()
        self.run.end_batch()
        self._step.before += self._step.samples or 0

    @counted
    def batch_end(self) -> None:
        """After the armed optimizer step: sum, let the due monitors read, take the hooks off."""
        if self._reader.overdue:
            self.flush()
        if self._armed_at is None or self.run.step == self._armed_at:
            return
        self._end_batch()
        watches, due, logger_step = list(self._watches.values()), self._due, self._logger_step
        for watch in watches:
            watch.own_step()
        self._disarm()
        layers = self._reduce(watches, due)
        self.probes += 1
        self.budget.readings += 1
        ran = {layer.name for layer in layers}
        # An expert that got no token is nothing to speak of where another got one.
        stacks = {layer.layer.holder for layer in layers if not layer.layer.in_order}
        silent = [
            watch
            for watch in watches
            if watch.layer.name not in ran and (watch.layer.in_order or watch.layer.holder not in stacks)
        ]
        for transformed, why in ((False, "that never ran"), (True, "that only torch.func's transforms ran")):
            if names := [watch.layer.name for watch in silent if watch.transformed == transformed]:
                said = f"layers {why} have no readings: {', '.join(names)}"
                self._reader.warn(said, f" (in step {self.run.step})")
        self._read(due, layers, logger_step)

    def _disarm(self) -> None:
        """Take every hook off; harmless if there are none."""
        for watch in self._watches.values():
            watch.detach()
        while self._handles:
            self._handles.pop().remove()
        self._watches, self._due, self._armed_at, self._looks = {}, [], None, []
        self._hide_calls()
        if self._stance is not None:
            stance, self._stance = self._stance, None
            stance.__exit__(None, None, None)

    def _reduce(self, watches: list[LayerWatch], due: list[Seat]) -> list[LayerObservation]:
        """Sum over ranks: what failed on one of them has no result on any."""
        began = time.perf_counter()
        layers, failures = reduce(self.run.ranks, watches)
        self.seconds["reduction"] += time.perf_counter() - began
        sums = [tensor for watch in watches for each in watch.statistics for tensor in watch.sums(each)]
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in sums}
        self.held_bytes = sum(storages.values())
        self._reader.report(failures, due)
        return layers

    # -- reading ------------------------------------------------------------------------------

    @counted
    def epoch_end(self) -> None:
        """Let monitors read that are due at an epoch's end."""
        self._reader.flush()
        also = [seat for seat in self._seats if seat.monitor.reads_epochs]
        with self._unseen():
            self._reader.read(also, [], self._epoch_step, method="read_epoch")
            self._read_rested(self._of_epochs())
        self._timetable.put_off()

    @counted
    def validated(self, *, ends_epoch: bool, watched: set[str]) -> None:
        """After validation, before callbacks save or stop by what was read: let it be of these weights.

        Args:
            ends_epoch: whether the epoch ends here; what is due then is read now, not after them.
            watched: keys by which callbacks decide; they are read anew in the middle of an epoch, too.
        """
        self.flush()
        due = self._of_epochs()
        if not ends_epoch:
            due = [seat for seat in due if any(key.startswith(f"{seat.quantity}/") for key in watched)]
        self._read_rested(due)

    @property
    def _epoch_step(self) -> int:
        """The step of the last batch, as Lightning logs epochs."""
        return self.run.logger_step - 1

    def _of_epochs(self) -> list[Seat]:
        """Return who is due at this epoch's end and has not read these weights yet."""
        ends = [seat for seat in self._seats if isinstance(seat.monitor.schedule, EpochEnds)]
        due = [seat for seat in ends if seat.monitor.schedule.due(self.run.epoch)]
        return [seat for seat in due if seat.read_at != self.run.step]

    def _read_rested(self, due: list[Seat]) -> None:
        if due:
            self._read(due, self._parameters_of(due), self._epoch_step)

    def _parameters_of(self, due: list[Seat]) -> list[LayerObservation]:
        """Return what parameters alone show: no step is observed at an epoch's end."""
        wanted, layers = wanted_by(due)
        found = []
        for name in self._in_order(wanted, watchable_layers(self.run.module)):
            watch = LayerWatch(
                layers[name], wanted[name], step=Step(), looking=self._looking, seconds=self.seconds
            )
            watch.at_rest()
            found.append(LayerObservation(watch, failed=set(watch.errors), fed_by_data=False))
        return found

    def _read(self, due: list[Seat], layers: list[LayerObservation], logger_step: int) -> None:
        self._reader.read(due, layers, logger_step)
        for seat in due:
            self._timetable.plan(seat, self.run.step)
        self._timetable.put_off()

    def _call(self, seat: Seat, method: str) -> None:
        """Call a monitor's method before a step; what it keeps goes into its state."""
        if not seat.monitor.overrides(method):
            return
        seen = Observation(self.run.step, run=self.run, state=seat.monitor.state)
        self._reader.attempt(
            seat.monitor, partial(place, method, seen), partial(getattr(seat.monitor, method), seen)
        )
        if seen.watch is not None:
            seat.layers = seen.watch
        if seen.look is not None:
            self._looks.append(seen.look)
