"""Lets due monitors read what was observed, now or in a thread of their own, and publishes what they read.

Readings that are computed in a thread are published when :data:`LAG` more optimizer steps have been made, the
same ones in every run and on every rank, or earlier, by :meth:`Reader.flush`: before the next observation, an
epoch's end, validation, a checkpoint and the fit's end.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

from lightning_sym.engine.deferred import Deferred
from lightning_sym.engine.publish import sorted_out
from lightning_sym.engine.ranks import RankError
from lightning_sym.engine.run import Run
from lightning_sym.engine.seats import Seat
from lightning_sym.observe.observation import LayerObservation, Observation
from lightning_sym.sandbox import NotApartError

#: Optimizer steps after which readings that were computed in a thread are published.
LAG = 4

Found = tuple[dict[str, float], dict[str, Any]]


@dataclass
class _Pending:
    """What one step's observation still owes."""

    work: Deferred
    step: int
    logger_step: int
    seats: list[tuple[Seat, Observation]]  # in the thread
    after: list[tuple[Seat, Observation]]  # who reads what these have read


class Reader:
    """The monitors of a fit, as they read.

    Args:
        run: the fit.
        seats: its monitors.
        seconds: where time is booked, by section.
    """

    def __init__(self, run: Run, seats: list[Seat], seconds: dict[str, float]) -> None:
        self.run, self._seats, self._seconds = run, seats, seconds
        self._said: set[str] = set()
        self._pending: _Pending | None = None

    # -- reading ------------------------------------------------------------------------------

    def read(
        self, due: list[Seat], layers: list[LayerObservation], logger_step: int, *, method: str = "read"
    ) -> None:
        """Let monitors read; those that may read later begin to, in a thread."""
        self.flush()  # in the order of steps
        now = [(seat, self._seen(seat, layers)) for seat in due]
        later, after = [], []
        if method == "read":
            for seat in due:
                seat.monitor.last = seat.read_at = self.run.step
            later = [each for each in now if each[0].defers]
            after = [each for each in now if later and each[0].monitor.reads_monitors]
        for each in now:
            if each not in later and each not in after:
                self._read_now(*each, logger_step, method=method)
        if later:
            self._begin(later, after, logger_step)

    def _seen(self, seat: Seat, layers: list[LayerObservation]) -> Observation:
        ran = {layer.name for layer in layers}
        mine = [layer.name for layer in seat.layers]
        return Observation(
            self.run.step,
            [layer for layer in layers if layer.name in mine],
            [name for name in mine if name not in ran],
            self.run,
            seat.monitor.state,
            others=[each.monitor for each in self._seats if not each.monitor.reads_monitors],
        )

    def _read_now(self, seat: Seat, seen: Observation, logger_step: int, *, method: str = "read") -> None:
        began = perf_counter()
        found = self.attempt(
            seat.monitor,
            partial(place, method, seen),
            partial(self._values, seat, getattr(seat.monitor, method), seen),
            step=seen.step,
        )
        self._seconds["spectra"] += perf_counter() - began
        if found is not None:
            self._publish(seat, found, seen.step, logger_step)

    def _values(self, seat: Seat, read: Callable[[Observation], Iterable[Any]], seen: Observation) -> Found:
        failure, seat.failure = seat.failure, None
        if failure is not None:
            raise failure
        return self._agreed(sorted_out(read(seen), seat.monitor.prefix))

    def _agreed(self, found: Found) -> Found:
        """Return what a monitor has read; the numbers are rank 0's, since machines round differently."""
        values, media = found
        return self.run.ranks.broadcast(values), media

    # -- in a thread --------------------------------------------------------------------------

    def _begin(
        self,
        later: list[tuple[Seat, Observation]],
        after: list[tuple[Seat, Observation]],
        logger_step: int,
    ) -> None:
        began = perf_counter()
        for seat, seen in later:
            for layer in seen.every:
                for statistic in seat.monitor.needs:
                    with contextlib.suppress(Exception):  # it is raised again where it is read
                        layer.get(statistic)  # now: the weights that it copies move on
        calls = {seat.quantity: partial(_sorted, seat.monitor, seen) for seat, seen in later}
        self._pending = _Pending(Deferred(calls), self.run.step, logger_step, later, after)
        self._seconds["spectra"] += perf_counter() - began

    def publish_due(self) -> None:
        """Publish what has waited for its steps; called at the end of each."""
        if self._pending is not None and self.run.step >= self._pending.step + LAG:
            self.flush()

    def flush(self) -> None:
        """Wait for readings that are still computed, and publish them; all ranks do that together."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        self._join(pending)
        try:
            for seat, seen in pending.seats:
                found = self.attempt(
                    seat.monitor,
                    partial(place, "read", seen),
                    partial(self._of_thread, pending, seat),
                    step=seen.step,
                )
                if found is not None:
                    self._publish(seat, found, seen.step, pending.logger_step)
        finally:  # a strict monitor's error ends the fit, not what the others have read
            for seat, seen in pending.after:
                self._read_now(seat, seen, pending.logger_step)

    def _of_thread(self, pending: _Pending, seat: Seat) -> Found:
        return self._agreed(pending.work.result(seat.quantity))

    def break_off(self) -> None:
        """Publish what was computed without a word to other ranks, of which one may have failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        self._join(pending)
        for seat, seen in pending.seats:
            with contextlib.suppress(Exception):  # another error ends the fit already
                self._publish(seat, pending.work.result(seat.quantity), seen.step, pending.logger_step)

    def _join(self, pending: _Pending) -> None:
        began = perf_counter()
        pending.work.join()
        self._seconds["waiting"] += perf_counter() - began
        self._seconds["thread"] += pending.work.seconds

    # -- what came of it ----------------------------------------------------------------------

    def _publish(self, seat: Seat, found: Found, step: int, logger_step: int) -> None:
        began = perf_counter()
        values, media = found
        wrong = []
        try:
            seat.monitor.history.append({"step": step, "fit": seat.monitor.fit, **values})
        except OSError as error:  # of its file
            wrong.append(f"{type(error).__name__}: {error}")
        own = len(seat.monitor.prefix)
        values = {seat.quantity + key[own:]: value for key, value in values.items()}
        media = {seat.quantity + key[own:]: value for key, value in media.items()}
        for said in [*wrong, *self.run.send(values, media, logger_step, taken=step)]:
            if seat.monitor.strict:
                raise RuntimeError(said)
            self.warn(f"{type(seat.monitor).__name__} could not log: {said}", "")
        self._seconds["logging"] += perf_counter() - began

    def attempt(
        self, monitor: Any, where: Callable[[], str], compute: Callable[[], Any], *, step: int | None = None
    ) -> Any:
        """Return what is computed, on all ranks or on none: then one warning, or an error if ``strict``."""
        try:
            return self.run.ranks.attempt(compute, where)
        except RankError as failure:
            if monitor.strict:
                raise failure.own() from None
            on = f" on rank {failure.rank}" if self.run.ranks.size > 1 else ""
            kind, _, reason = failure.said.partition(": ")
            if kind == NotApartError.__name__:  # nobody else could run it either
                self.warn(
                    reason,
                    f"{on}. Off are the readings of {', '.join(self._running_the_module())}. The fit goes on "
                    "without them; pass strict=True to raise instead.",
                )
                return None
            self.warn(
                f"{type(monitor).__name__} failed in {failure.place or where()}",
                f" at step {self.run.step if step is None else step}{on}: {failure.said}. The fit goes on "
                "without this reading; pass strict=True to raise instead.",
            )
            return None

    def _running_the_module(self) -> list[str]:
        """Return who runs the module outside of its step, and for which readings."""
        parts = {
            type(each).__name__: f" ({each.module_readings})" if each.module_readings else ""
            for each in (seat.monitor for seat in self._seats)
            if each.runs_module
        }
        return [name + part for name, part in parts.items()]

    def warn(self, kind: str, details: str) -> None:
        """Warn once of a kind, on rank 0."""
        if kind not in self._said:
            self._said.add(kind)
            if self.run.ranks.rank == 0:
                warnings.warn(kind + details, stacklevel=2)


def _sorted(monitor: Any, seen: Observation) -> Found:
    return sorted_out(monitor.read(seen), monitor.prefix)


def place(method: str, seen: Observation) -> str:
    """Return where a monitor is, for error messages."""
    return f"{method} of layer {seen.current}" if seen.current else method
