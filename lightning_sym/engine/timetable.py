"""When each monitor of a fit reads next: its schedule, and what a budget leaves of it."""

from __future__ import annotations

import math

from lightning_sym.engine.budget import Budget
from lightning_sym.engine.reader import Reader
from lightning_sym.engine.run import Run
from lightning_sym.engine.schedule import EpochEnds, Every, LogSpaced, Schedule
from lightning_sym.engine.seats import Seat


class Timetable:
    """The next due step of every monitor, on all ranks the same.

    Args:
        run: the fit.
        seats: its monitors.
        reader: tells what goes wrong.
        budget: what readings have cost.
    """

    def __init__(self, run: Run, seats: list[Seat], reader: Reader, budget: Budget) -> None:
        self.run, self._seats, self._reader, self._budget = run, seats, reader, budget
        self._said = False

    def plan(self, seat: Seat, step: int) -> None:
        """Set a monitor's next due step after this one; a schedule of the user's own is rank 0's."""
        schedule = seat.monitor.schedule
        if isinstance(schedule, EpochEnds):
            return
        earliest = self._earliest(seat)
        asked: float
        due: float
        if isinstance(schedule, Every | LogSpaced):
            asked, due = _next(schedule, step, earliest)
        else:
            found = self._reader.attempt(
                seat.monitor,
                lambda: "its schedule",
                lambda: self.run.ranks.broadcast(_next(schedule, step, earliest)),
            )
            asked, due = found or (math.inf, math.inf)
        seat.due = due
        if due > asked and not self._said:
            self._say(seat, asked)

    def put_off(self) -> None:
        """After a reading: leave out due steps that its cost does not allow."""
        if not self._budget.on:
            return
        for seat in self._seats:
            if seat.share is not None:
                seat.monitor.spent = self._budget.spent
            if seat.due < self._earliest(seat):
                self.plan(seat, int(seat.due) - 1)

    def _earliest(self, seat: Seat) -> int:
        return 0 if seat.share is None else self._budget.spent.earliest(seat.share)

    def _say(self, seat: Seat, asked: float) -> None:
        """Say once that a due step is left out."""
        self._said, spent = True, self._budget.spent
        self.run.tell(
            f"lightning_sym leaves out due steps to stay within max_overhead={seat.share:g}: a reading costs "
            f"{spent.reading_seconds / spent.step_seconds:.2g} steps. {type(seat.monitor).__name__} reads "
            f"next at step {seat.due:.0f} instead of {asked:.0f}, and so on."
        )


def _next(schedule: Schedule, step: int, earliest: int) -> tuple[int, int]:
    """Return the next due step, and the first one that is not before the earliest.

    Raises:
        TypeError: if a schedule of the user's returns no step.
    """
    asked = schedule.next(step)
    due = schedule.next(earliest - 1) if isinstance(asked, int) and asked < earliest else asked
    for each in (asked, due):
        if not isinstance(each, int):
            raise TypeError(f"next must return a step, got {each!r}")
    return asked, due
