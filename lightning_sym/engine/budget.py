"""A share of the fit's time that readings may take, and the first step at which the next one is within it.

Ours is the time that the engine, its hooks and the monitors spend in the thread that trains; what is computed
in a thread of its own is none of it, waiting for that thread is. Ranks go by rank 0's clock: what it shows
travels with the readings that rank 0 sends anyway, and the next step follows from these numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from time import perf_counter
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, Self, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Spent(NamedTuple):
    """What a fit's clock shows, on all ranks the same.

    Attributes:
        own: seconds that were ours.
        elapsed: seconds since the fit began, ours among them.
        readings: steps that were observed.
        steps: optimizer steps made in that time.
        step: optimizer steps made in the run, which may have begun without a clock.
    """

    own: float = 0.0
    elapsed: float = 0.0
    readings: int = 0
    steps: int = 0
    step: int = 0

    @property
    def reading_seconds(self) -> float:
        """What a reading costs, all that is ours included."""
        return self.own / max(self.readings, 1)

    @property
    def step_seconds(self) -> float:
        """What a step costs without us, all that is not ours included; 0 if it is not known."""
        return max(self.elapsed - self.own, 0.0) / self.steps if self.steps else 0.0

    def earliest(self, share: float) -> int:
        """Return the first step whose reading leaves ours within a share of the time.

        It is reckoned from what a reading and a step have cost so far: with it ours is ``own + reading``, of
        ``elapsed + steps * step_seconds + reading``.
        """
        reading = self.reading_seconds
        others = (self.own + reading) / share - self.elapsed - reading
        if others <= 0 or not self.step_seconds > 0:
            return 0
        return self.step + math.ceil(others / self.step_seconds)


class Budget:
    """The clock of a fit: it runs for us from :meth:`__enter__` to :meth:`__exit__`, and in hooks.

    Args:
        seconds: time spent in our code, by section, of which ``moments`` is booked in hooks.
        on: whether anybody keeps to a share; else no clock is read.

    Attributes:
        spent: what all ranks know.
        readings: steps observed.
    """

    def __init__(self, seconds: Mapping[str, float], *, on: bool) -> None:
        self.on, self._seconds = on, seconds
        self._depth, self._entered, self._outside = 0, 0.0, 0.0
        self.begin(Spent(), 0)

    def begin(self, spent: Spent, step: int) -> None:
        """Begin to count, or go on from what was stored some steps before an interruption."""
        self.spent, self.readings = spent, spent.readings
        if self.on:
            since = max(step - spent.step, 0) if spent.steps else 0
            self._first = step - spent.steps - since
            self._began = perf_counter() - spent.elapsed - since * spent.step_seconds
            self._own = spent.own - self._seconds["moments"] - (self._inside() if self._depth else 0.0)

    def __enter__(self) -> Self:
        if self.on:
            self._depth += 1
            if self._depth == 1:
                self._entered, self._outside = perf_counter(), self._seconds["moments"]
        return self

    def __exit__(self, *_: Any) -> None:
        if self.on:
            self._depth -= 1
            if not self._depth:
                self._own += self._inside()

    def _inside(self) -> float:
        """Return the seconds since we were entered, but those that hooks have booked meanwhile."""
        return perf_counter() - self._entered - (self._seconds["moments"] - self._outside)

    def measure(self, step: int) -> Spent | None:
        """Return what this rank's clock shows; None if nobody wants to know."""
        if not self.on:
            return None
        own = self._own + self._seconds["moments"] + (self._inside() if self._depth else 0.0)
        return Spent(own, perf_counter() - self._began, self.readings, step - self._first, step)

    def agree(self, spent: Spent | None) -> None:
        """Take up what rank 0's clock shows."""
        self.spent = self.spent if spent is None else spent


class _Counts(Protocol):
    budget: Budget


S = TypeVar("S", bound=_Counts)


def counted(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """Return a method whose time is ours."""

    @wraps(method)
    def call(self: S, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.budget:
            return method(self, *args, **kwargs)

    return call
