"""Layers that training does not move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lightning_sym.diagnosis.course import LAST, Course
from lightning_sym.diagnosis.finding import Finding
from lightning_sym.diagnosis.rules.common import others

#: Share of layers that may be switched off by mistake; more are frozen on purpose.
MOST_OFF = 1 / 3
#: Said of a layer without a gradient; a dead block has this effect, too.
NO_GRADIENT = "no gradient reaches it"
_ONE_STEP = "wiring: only the last position is read, where the reverse direction has made one step from zero"
_READ_FIRST = "Read the reverse direction at the first position (its final state), or pool over positions."


def frozen(course: Course) -> Iterator[Finding]:
    """A layer that asks for gradients has not moved in any of three steps or more, or is switched off alone.

    Switched off (``requires_grad`` False) counts where layers before and after it are trained, in one stretch
    of no more than a third of the layers: frozen backbones, and bases beside adapters, are meant. And where
    it puts out the same for every sample, which nobody means. A warning where it is the recurrence of the
    reverse direction alone: of that, the last position shows one step.
    Can't see: whether a frozen first layer is meant.
    """
    stuck: list[str] = []
    off: list[str] = []
    moved = course.of("moved")
    read = max((len(series) for series in moved.values()), default=0)
    for layer, series in moved.items():
        # Of layers that are not watched only steps that left them as they were are told.
        if len(series) == read >= LAST and series.zero:
            (off if course.get("trained", layer).values[-1:] == [0.0] else stuck).append(layer)
    unread = [layer for layer in stuck if _shows_one_step(course, layer)]
    if unread:
        found = _finding(course, unread, "asks for gradients and has not moved", _ONE_STEP)
        yield replace(found, level="warning", remedy=_READ_FIRST)
    stuck = [layer for layer in stuck if layer not in unread]
    if stuck:
        left_out = [layer for layer in stuck if len(course.get("left_out", layer))]
        cause = "wiring: no optimizer has its parameters" if left_out else _why(course, stuck[0])
        yield _finding(course, left_out or stuck, "asks for gradients and has not moved", cause)
    names = list(moved)
    trained = [i for i, series in enumerate(moved.values()) if len(series) and not series.zero]
    between = [n for n in off if trained and trained[0] < names.index(n) < trained[-1]]
    share, runs = course.get("off"), course.get("off_runs")
    few = share.last <= MOST_OFF if len(share) else len(off) <= MOST_OFF * len(moved)
    alone = sum(n in off and (i == 0 or names[i - 1] not in off) for i, n in enumerate(names)) == 1
    wiring = "wiring: requires_grad is switched off there"
    if between and few and (runs.last == 1 if len(runs) else alone):
        yield _finding(course, between, "is frozen between trained layers", wiring)
        return
    mute = [n for n in off if course.get("output_share", n).zero or course.get("directions", n).zero]
    if mute and (trained or stuck):
        yield _finding(course, mute, "is frozen, and its output is the same for every sample", wiring)


def _shows_one_step(course: Course, layer: str) -> bool:
    """Return whether a layer is a reverse recurrence without gradient, whose forward twin is trained."""
    forward = course.get("moved", layer.removesuffix("_reverse"))
    trained = layer.endswith("_reverse") and len(forward) > 0 and not forward.zero
    return trained and course.get("weight_gradient", layer).zero


def _why(course: Course, layer: str) -> str:
    gradient = course.get("weight_gradient", layer)
    if not len(gradient):
        return f"wiring: {NO_GRADIENT}"
    if gradient.zero:
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
