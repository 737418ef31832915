"""Gradients that vanish or explode on their way back."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from lightning_sym.diagnosis.course import LAST, Course, Series
from lightning_sym.diagnosis.finding import Finding

#: Ratio of the first layer's output gradient over the last's: healthy .007 to 4.3 at the first reading,
#: sick below 2.3e-6 or above 3.8e3.
VANISHING, EXPLODING = 1e-4, 1e2
#: So many layers one after another, each with a larger gradient than the next: healthy 5 and fewer, sick 9
#: and more.
CHAIN = 6
#: Share of the first loss that is left where a network has learned, a recurrent one has, and none has.
HALF, SOLVED, STUCK = 0.5, 0.4, 0.9
_REMEDY = {
    False: "Scale the initial weights for the depth (Xavier, He), or add residual connections or "
    "normalisation.",
    True: "Initialise recurrent weights orthogonally, take gates (LSTM, GRU), or shorten sequences.",
}


def ratio(course: Course) -> tuple[str, Series]:
    """Return the first layer that has gradients, and the ratio over the last one that has.

    Of the first reading that has both, and of the last three.
    """
    found = {
        layer: s
        for layer, s in course.of("gradient").items()
        if course.get("trained", layer).values[:1] != [0.0]
    }
    if len(found) < 2:
        return "", Series()
    names, series = list(found), Series()
    first, top = found[names[0]].finite, found[names[-1]]

    def known(step: int) -> bool:
        return 0 < (top.at(step) or 0.0) < math.inf

    start = next((step for step in first.steps if known(step)), None)
    for step in [] if start is None else [start, *first.steps[-LAST:]]:
        if known(step):
            series.insert(step, (first.at(step) or 0.0) / (top.at(step) or 1.0))
    return names[0], series


def vanishing_gradients(course: Course) -> Iterator[Finding]:
    """The first layer's output gradient is less than 1e-4 of the last's, at the first and last readings.

    Of a recurrent layer: the same of its first and last position; or at the first reading and at half of
    all, where the loss has not fallen by a tenth. Not where the loss has halved (of a recurrent layer, which
    may do a part of its task by the last positions alone: fallen to 40 %; and not where early positions have
    uses of their own). Exactly 0 at the first reading alone is a branch that begins at zero.
    """
    kept = 1.0 if course.kept_loss is None else course.kept_loss
    reaches = [each for each in course.of("reach").items() if not course.get("early", each[0]).high > 0]
    for recurrent, (layer, series) in ((False, ratio(course)), *((True, each) for each in reaches)):
        series = series.finite
        if len(series) < LAST or series.first >= VANISHING or kept <= (SOLVED if recurrent else HALF):
            continue
        most = recurrent and kept > STUCK and statistics.median(series.values) < VANISHING
        if most or series.since(lambda v: v < VANISHING) is not None:
            yield _finding("vanishing_gradients", layer, series, VANISHING, recurrent=recurrent)


def exploding_gradients(course: Course) -> Iterator[Finding]:
    """The first layer's output gradient is more than 100 times the last's at the first reading.

    And of the one before the last: over a large vocabulary the last one's is small by itself. Of a recurrent
    layer: the same of its first and last position. Or it grows so from layer to layer on a stretch of six or
    more: before the last layer positions may be pooled, which makes what is before it small.
    """
    reaches = course.of("reach").items()
    for recurrent, (layer, series) in ((False, ratio(course)), *((True, each) for each in reaches)):
        series = series.finite
        large = len(series) and series.steps[0] == course.steps[0] and series.first > EXPLODING
        if large and (recurrent or _over_hidden(course) > EXPLODING):
            yield _finding("exploding_gradients", layer, series, EXPLODING, recurrent=recurrent)
            return
    first, last, growth = _stretch(course)
    if growth > EXPLODING:
        series = Series(course.steps[:1], [growth])
        yield _finding("exploding_gradients", first, series, EXPLODING, recurrent=False, last=last)


def _sizes(course: Course) -> dict[str, float]:
    """Return the gradient of each trained layer at the first reading; 0 where there is none."""
    return {
        layer: series.at(course.steps[0]) or 0.0
        for layer, series in course.of("gradient").items()
        if course.get("trained", layer).values[:1] != [0.0]
    }


def _over_hidden(course: Course) -> float:
    """Return the first layer's gradient over that of the one before the last; of two layers, of the last."""
    first, *rest = [size for size in _sizes(course).values() if size > 0]
    return first / rest[-2 if len(rest) > 1 else -1]


def _stretch(course: Course) -> tuple[str, str, float]:
    """Return where gradients grow from layer to layer on their way back, and how much, at the first reading.

    Of stretches of six layers or more the one with the largest growth: its first layer, its last, the ratio.
    """
    sizes = _sizes(course)
    best, stretch = ("", "", 0.0), list[str]()
    for layer, size in sizes.items():
        stretch = [*stretch, layer] if stretch and 0 < size < sizes[stretch[-1]] < math.inf else [layer]
        if len(stretch) >= CHAIN and (growth := sizes[stretch[0]] / size) > best[2]:
            best = (stretch[0], layer, growth)
    return best


def _finding(
    kind: str, layer: str, series: Series, limit: float, *, recurrent: bool, last: str = "the last layer"
) -> Finding:
    verb, much = ("vanishes", "small") if kind == "vanishing_gradients" else ("explodes", "large")
    step, value = series.steps[0], series.first
    if recurrent:
        where = (
            f"through the positions of {layer}: at the first it is {value:.1e} times what it is at the last"
        )
        cause = f"the initialisation: each position passes on too {much} a share of its gradient"
    else:
        where = f"to {layer}: there it is {value:.1e} times what it is at {last}"
        cause = f"the initialisation for this depth: a layer passes on too {much} a share of its gradient"
    message = f"At the first reading the gradient {verb} on its way back {where}."
    return Finding(kind, "alarm", layer, step, value, limit, message, cause, _REMEDY[recurrent])
