"""When to read: schedules in optimizer steps, which all include step 1, and epoch ends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class Schedule(Protocol):
    """Anything that says which optimizer step is due next."""

    def next(self, step: int) -> int:
        """Return the smallest due step that is larger than ``step``."""
        ...


@dataclass(frozen=True)
class Every:
    """Steps 1, n, 2n, 3n, ...

    Args:
        n: interval in optimizer steps, at least 1.

    Raises:
        ValueError: if ``n`` is not a positive integer.

    Example:
        >>> schedule = Every(50)
        >>> schedule.next(0), schedule.next(1), schedule.next(50)
        (1, 50, 100)
    """

    n: int

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"every_n_steps must be a positive integer, got {self.n!r}")

    def next(self, step: int) -> int:
        """Return the smallest due step that is larger than ``step``."""
        return 1 if step < 1 else (step // self.n + 1) * self.n


@dataclass(frozen=True)
class LogSpaced:
    """Steps that are evenly spaced in the logarithm: early phase transitions are not missed.

    Args:
        per_decade: due steps in each factor of ten, at least 1.

    Raises:
        ValueError: if ``per_decade`` is not a positive integer.

    Example:
        >>> schedule, step, steps = LogSpaced(3), 0, []
        >>> for _ in range(7):
        ...     step = schedule.next(step)
        ...     steps.append(step)
        >>> steps
        [1, 2, 5, 10, 22, 46, 100]
    """

    per_decade: int = 8

    def __post_init__(self) -> None:
        if isinstance(self.per_decade, bool) or not isinstance(self.per_decade, int) or self.per_decade < 1:
            raise ValueError(f"per_decade must be a positive integer, got {self.per_decade!r}")

    def next(self, step: int) -> int:
        """Return the smallest due step that is larger than ``step``."""
        if step < 1:
            return 1
        k = math.floor(self.per_decade * math.log10(step)) - 1
        while (due := round(10 ** (k / self.per_decade))) <= step:
            k += 1
        return due


@dataclass(frozen=True)
class EpochEnds:
    """The ends of epochs n, 2n, 3n, ... counted from 1.

    Args:
        n: interval in epochs, at least 1.
        at_start: read before the first step of a new run, too.

    Raises:
        ValueError: if ``n`` is not a positive integer.

    Example:
        >>> [epoch for epoch in range(6) if EpochEnds(2).due(epoch)]
        [1, 3, 5]
    """

    n: int = 1
    at_start: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"every_n_epochs must be a positive integer, got {self.n!r}")

    def due(self, epoch: int) -> bool:
        """Return whether the end of an epoch, counted from 0, is due."""
        return (epoch + 1) % self.n == 0


def as_schedule(every_n_steps: int | Schedule | EpochEnds) -> Schedule | EpochEnds:
    """Return ``every_n_steps`` as a schedule: an integer ``n`` means ``Every(n)``.

    Raises:
        ValueError: if the integer is not positive.
        TypeError: if it is neither an integer nor a schedule.
    """
    if isinstance(every_n_steps, int):
        return Every(every_n_steps)
    if isinstance(every_n_steps, Schedule | EpochEnds):
        return every_n_steps
    raise TypeError(
        f"every_n_steps must be a positive integer, a Schedule or EpochEnds, got {every_n_steps!r}"
    )
