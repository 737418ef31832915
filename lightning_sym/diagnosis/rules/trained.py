"""Layers that training does not move."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_sym.diagnosis.course import Course
from lightning_sym.diagnosis.finding import Finding
from lightning_sym.diagnosis.rules.common import others


def frozen(course: Course) -> Iterator[Finding]:
    """A layer that asks for gradients has not moved in any of three steps or more, or is switched off alone.

    Switched off (``requires_grad`` False) counts where layers before and after it are trained, and where
    two at most, and no more than a third, are: frozen backbones, and bases beside adapters, are meant.
    Can't see: whether a frozen first layer is meant.
    """
    stuck: list[Any] = []
    off: list[Any] = []
    moved = course.of("moved")
    read = len({step for series in moved.values() for step in series.steps})
    for layer, series in moved.items():
        asks = course.get("trained", layer)
        # Of layers that are not watched only steps that left them as they were are told.
        if len(series) == read >= 3 and not any(series.values):
            (stuck if asks.last else off).append(layer)
    if stuck and any(any(series.values) for series in moved.values()):
        left_out = [layer for layer in stuck if len(course.get("left_out", layer))]
        cause = "wiring: no optimizer has its parameters" if left_out else _why(course, stuck[0])
        yield _finding(course, left_out or stuck, "asks for gradients and has not moved", cause)
    trained = [i for i, layer in enumerate(moved) if any(moved[layer].values)]
    names = list(moved)
    between = [n for n in off if trained and trained[0] < names.index(n) < trained[-1]]
    if between and len(off) <= min(2, len(moved) / 3):
        yield _finding(
            course, between, "is frozen between trained layers", "wiring: requires_grad is switched off there"
        )


def _why(course: Course, layer: str) -> str:
    gradient = course.get("weight_gradient", layer)
    if not len(gradient):
        return "wiring: no gradient reaches it"
    if not any(gradient.values):
        return "the initialisation: its gradient is exactly 0"
    return "not known: its gradient is not 0, and yet it stays; the learning rate may be too small"


def _finding(course: Course, layers: list[str], words: str, cause: str) -> Finding:
    return Finding(
        "frozen",
        "alarm",
        layers[0],
        course.steps[0],
        0.0,
        1.0,
        f"The weight of {layers[0]}{others(layers)} {words} in any of "
        f"{len(course.get('moved', layers[0]))} steps."
        if "moved" in words
        else f"The weight of {layers[0]}{others(layers)} {words}.",
        cause,
        "Give it to the optimizer and see that gradients reach it, or freeze it on purpose.",
    )
