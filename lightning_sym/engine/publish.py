"""From readings to the history, the loggers and what callbacks may watch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


def draw(experiment: Any, media: dict[str, Any], step: int) -> None:
    """Send what is not a scalar to a logger's experiment, where it is able to take it."""
    for key, value in media.items():
        if isinstance(value, str):
            if hasattr(experiment, "add_text"):
                experiment.add_text(key, value, step)
        elif isinstance(value, Tensor):
            flat = value.detach().flatten()
            flat = flat[flat.isfinite()]
            if hasattr(experiment, "add_histogram") and flat.numel():
                experiment.add_histogram(key, flat.cpu().double(), step)
        elif hasattr(experiment, "add_figure"):
            figure: Callable[[], Any] = value
            experiment.add_figure(key, figure(), step, close=True)
