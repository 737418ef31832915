"""A monitor's place in a fit: the first part of its keys, its layers, and when it reads next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_sym.observe.layers import Layer
from lightning_sym.observe.statistics.statistic import Statistic


@dataclass
class Seat:
    """A monitor in this fit."""

    monitor: Any
    quantity: str  # the first part of its keys, where readings of all monitors meet
    layers: list[Layer] = field(default_factory=list)
    due: float = 1  # the next due step, infinite if there is none
    read_at: int = -1  # the step of its last reading
    started: bool = False
    failure: Exception | None = None  # while its optimizer stepped, to be told with its reading

    @property
    def defers(self) -> bool:
        """Whether what it reads of a step is computed in a thread."""
        may = getattr(self.monitor, "deferred", False) and getattr(self.monitor, "defers", False)
        return bool(may) and self.failure is None


def is_monitor(callback: Any) -> bool:
    """Return whether a callback is one that the engine lets read."""
    kind = type(callback)  # mocks have every attribute, and their classes none
    return hasattr(kind, "needs") and hasattr(kind, "read") and hasattr(kind, "begin_run")


def wanted_by(seats: list[Seat]) -> tuple[dict[str, list[Statistic]], dict[str, Layer]]:
    """Return what is kept of which layer: equal needs once, unequal ones side by side."""
    wanted: dict[str, list[Statistic]] = {}
    layers: dict[str, Layer] = {}
    for seat in seats:
        for statistic in seat.monitor.needs:
            for layer in statistic.where(seat.layers):
                kept = wanted.setdefault(layer.name, [])
                kept += [statistic] if statistic not in kept else []
                layers.setdefault(layer.name, layer)
    return wanted, layers


def seated(monitors: list[Any]) -> list[Seat]:
    """Give each monitor the first part of its keys.

    Raises:
        ValueError: if two of them would write the same keys at the same steps.
    """
    seats: list[Seat] = []
    for monitor in monitors:
        same = [seat.monitor for seat in seats if seat.monitor.prefix == monitor.prefix]
        if any(other.schedule == monitor.schedule for other in same):
            raise ValueError(
                f"{type(same[0]).__name__} and {type(monitor).__name__} would both log under "
                f"{monitor.prefix}/...; give one of them a name of its own, such as name='{monitor.prefix}_b'"
            )
        if any(_file(other) == _file(monitor) is not None for other in same):
            raise ValueError(
                f"two monitors would keep their history in {_file(monitor)}; give one of them a name of its "
                f"own, such as name='{monitor.prefix}_b'"
            )
        seats.append(Seat(monitor, monitor.prefix + (f"_{len(same) + 1}" if same else "")))
    return seats


def _file(monitor: Any) -> Any:
    return getattr(monitor.history, "path", None)
