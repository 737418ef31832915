"""What the bump decoders ask of their numbers."""

from __future__ import annotations

import math


def check_count(value: int, name: str) -> None:
    """Raise ValueError unless ``value`` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_weight(value: float, name: str) -> None:
    """Raise ValueError unless ``value`` is a finite number that is not negative."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")
