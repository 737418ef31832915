"""What rules share: naming several layers, and telling the start from later."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_sym.diagnosis.course import Course


def others(layers: Sequence[str]) -> str:
    """Return words on further layers.

    Example:
        >>> others(["a"]), others(["a", "b", "c"])
        ('', ' (and of b, c)')
    """
    if len(layers) < 2:
        return ""
    more = f" and {len(layers) - 4} more" if len(layers) > 4 else ""
    return f" (and of {', '.join(layers[1:4])}{more})"


def began(course: Course, step: int) -> str:
    """Return the cause as far as time tells it: what is there at the first reading training did not make."""
    if step <= course.steps[0]:
        return "the initialisation: it was so at the first reading"
    return "the learning rate, as far as readings tell: it was not so at the first reading"


def decays(course: Course, *, to: float = 0.5) -> bool:
    """Return whether most weights fall below a share of their start: weight decay's mark."""
    norms = [s.finite for s in course.of("weight_norm").values()]
    fallen = [s.last < to * s.first for s in norms if len(s) > 1 and s.first > 0]
    return len(fallen) > 0 and sum(fallen) > len(fallen) / 2
