"""From what a monitor yields to scalars and media by key."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lightning_sym.observe.reading import Reading


def sorted_out(readings: Iterable[Any], quantity: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the scalars and all else that was read, by key.

    Raises:
        TypeError: if one is no reading, or its value can't be logged.
    """
    values: dict[str, float] = {}
    media: dict[str, Any] = {}
    if not isinstance(readings, Iterable):
        raise TypeError(f"read must yield Reading(layer, what, value), got {readings!r}")
    for reading in readings:
        if not isinstance(reading, Reading):
            raise TypeError(f"read must yield Reading(layer, what, value), got {reading!r}")
        key = reading.key(quantity)
        if reading.is_scalar:
            values[key] = reading.scalar
        elif isinstance(reading.value, Tensor | str) or callable(reading.value):
            media[key] = reading.value
        else:
            raise TypeError(
                f"the value of {key!r} must be a number, a tensor, a string or a function that draws a "
                f"figure, got {type(reading.value).__name__}"
            )
    return values, media
