"""The course of one fit: every reading by layer and name, in the order of steps."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Readings that a lasting state needs at the end.
LAST = 3
Row = Mapping[str, float]


@dataclass
class Series:
    """One reading over time."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def first(self) -> float:
        """The first value."""
        return self.values[0]

    @property
    def last(self) -> float:
        """The last value."""
        return self.values[-1]

    def insert(self, step: int, value: float) -> bool:
        """Add a value in the order of steps; return whether the step was new."""
        at = bisect.bisect_left(self.steps, step)
        if at < len(self.steps) and self.steps[at] == step:
            return False
        self.steps.insert(at, step)
        self.values.insert(at, value)
        return True

    @property
    def finite(self) -> Series:
        """The same without NaN and Inf."""
        if all(map(math.isfinite, self.values)):
            return self
        kept = [(s, v) for s, v in zip(self.steps, self.values, strict=True) if math.isfinite(v)]
        return Series([s for s, _ in kept], [v for _, v in kept])

    def since(self, holds: Callable[[float], bool], *, last: int = LAST) -> int | None:
        """Return the step from which on a condition holds to the end; None unless of the last readings."""
        if len(self) < last or not all(holds(value) for value in self.values[-last:]):
            return None
        began = len(self) - last
        while began and holds(self.values[began - 1]):
            began -= 1
        return self.steps[began]

    def falls_since(self, step: int, *, share: float = 0.5) -> int:
        """Return from when on it is below a share of its first value, at the latest the step given."""
        for at in range(len(self) - 1, -1, -1):
            if self.steps[at] < step and not self.values[at] < share * self.first:
                return min(step, self.steps[at + 1])
        return min(step, self.steps[0])


class Course:
    """One fit.

    Args:
        number: which of the fits, from 1.
        fits: how many there are.

    Attributes:
        layers: names in the order in which they first had readings, those of the signal first: then the
            order in which they run.
    """

    def __init__(self, number: int = 1, fits: int = 1) -> None:
        self.number, self.fits = number, fits
        self._series: dict[str, dict[str, Series]] = {}
        self._order: dict[str, None] = {}
        self._signal: dict[str, None] = {}
        self._steps: dict[int, None] = {}
        #: Layer (``""``: the network) and step of each reading that shows something not finite.
        self.broken: list[tuple[int, str]] = []

    def add(self, key: str, step: int, value: float) -> None:
        """Add a reading; of two of one name and step the first counts."""
        if "/" not in key:
            return  # a metric of the user's own
        _, *middle, what = key.split("/")
        layer = "/".join(middle)
        series = self._series.setdefault(what, {}).setdefault(layer, Series())
        if not series.insert(step, value):
            return
        self._steps.setdefault(step)
        if layer:
            self._order.setdefault(layer)
            if what in ("trained", "gradient", "output_share"):
                self._signal.setdefault(layer)
        if (what == "nonfinite" and value > 0) or (
            what in ("loss", "weight_norm", "score") and not math.isfinite(value)
        ):
            self.broken.append((step, layer))

    @property
    def layers(self) -> list[str]:
        """Names of layers."""
        return list({**self._signal, **self._order})

    def get(self, what: str, layer: str = "") -> Series:
        """Return a series, empty if it was never read."""
        return self._series.get(what, {}).get(layer) or Series()

    def of(self, what: str) -> dict[str, Series]:
        """Return a reading of every layer that has it, in the order of layers."""
        found = self._series.get(what, {})
        return {layer: found[layer] for layer in self.layers if layer in found}

    def every(self) -> Iterator[tuple[str, str, Series]]:
        """Return all readings: what, layer, series."""
        for what, layers in self._series.items():
            for layer, series in layers.items():
                yield what, layer, series

    @property
    def steps(self) -> list[int]:
        """All steps that were read."""
        return sorted(self._steps)

    @property
    def loss(self) -> Series:
        """The loss."""
        return self.get("loss")

    @property
    def kept_loss(self) -> float | None:
        """The lowest of the last three losses as a share of the first; None where it is not known."""
        loss = self.loss.finite
        if len(loss) < 2 or loss.first == 0:
            return None
        return 1 - (loss.first - min(loss.values[-LAST:])) / abs(loss.first)

    @property
    def learns(self) -> bool:
        """Whether the loss has fallen by half or more: what looks sick works."""
        kept = self.kept_loss
        return kept is not None and kept <= 0.5

    @property
    def adversarial(self) -> bool:
        """Whether two networks play against each other: then the loss says little."""
        return "spread" in self._series


def courses(history: Any) -> list[Course]:
    """Sort rows into fits.

    A fit is told by its number, or begins where a reading's step does not grow any more.

    Args:
        history: rows, or several lists of them, or monitors with a ``history``.

    Raises:
        TypeError: if a row is no mapping.
        ValueError: if a row has no ``step``.
    """
    last: dict[tuple[Any, str], tuple[int, int]] = {}  # of a fit and key: restarts and step
    found: dict[tuple[Any, int], list[tuple[str, int, float]]] = {}
    for row in _rows(history):
        if not isinstance(row, Mapping):
            raise TypeError(f"history must hold rows, lists of rows or monitors, got {type(row).__name__}")
        if "step" not in row:
            raise ValueError(f"a row of history must have a step, got the keys {list(row)[:5]}")
        step, fit = int(row["step"]), row.get("fit", 1)
        for key, value in row.items():
            if key in ("step", "fit") or not isinstance(value, int | float):
                continue
            restarts, before = last.get((fit, key), (0, -1))
            restarts += step <= before
            last[fit, key] = restarts, step
            found.setdefault((fit, restarts), []).append((key, step, float(value)))
    made = []
    for number, where in enumerate(sorted(found, key=lambda pair: (float(pair[0]), pair[1])), 1):
        course = Course(number, len(found))
        for key, step, value in found[where]:
            course.add(key, step, value)
        made.append(course)
    return made


def _rows(history: Any) -> Iterable[Any]:
    own = getattr(history, "history", None)
    if isinstance(own, Sequence):
        history = own
    for each in [history] if isinstance(history, Mapping) else history:
        if isinstance(each, Mapping):
            yield each
        elif hasattr(each, "history") or (isinstance(each, Sequence) and not isinstance(each, str)):
            yield from _rows(each)
        else:
            yield each
