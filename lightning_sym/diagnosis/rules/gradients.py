"""Gradients that vanish or explode on their way back."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_sym.diagnosis.course import Course, Series
from lightning_sym.diagnosis.finding import Finding

#: Ratio of the first layer's output gradient over the last's: healthy .007 to 4.3 at the first reading,
#: sick below 2.3e-6 or above 3.8e3.
VANISHING, EXPLODING = 1e-4, 1e2
_CAUSE = "the initialisation for this depth: a layer passes on too {} a share of its gradient"


def ratio(course: Course) -> tuple[str, Series]:
    """Return the first layer that has gradients, and the ratio over the last one that has."""
    found = {
        layer: s
        for layer, s in course.of("gradient").items()
        if course.get("trained", layer).values[:1] != [0.0]
    }
    if len(found) < 2:
        return "", Series()
    names = list(found)
    first, last = found[names[0]], dict(zip(found[names[-1]].steps, found[names[-1]].values, strict=True))
    pairs = [(s, v / last[s]) for s, v in zip(first.steps, first.values, strict=True) if last.get(s, 0) > 0]
    return names[0], Series([s for s, _ in pairs], [v for _, v in pairs]).finite


def vanishing_gradients(course: Course) -> Iterator[Finding]:
    """The first layer's output gradient is less than 1e-4 of the last's, at the first and last readings.

    Of a recurrent module: the same of its first and last input. Not where the loss has halved. Exactly 0
    at the first reading alone is a branch that begins at zero.
    """
    if course.learns:
        return
    layer, series = ratio(course)
    yield from _told(
        course, "vanishing_gradients", layer, series, VANISHING, lambda v: v < VANISHING, "small"
    )
    for name, reach in course.of("reach").items():
        yield from _told(
            course, "vanishing_gradients", name, reach.finite, VANISHING, lambda v: v < VANISHING, "small"
        )


def exploding_gradients(course: Course) -> Iterator[Finding]:
    """The first layer's output gradient is more than 100 times the last's at the first reading.

    Of a recurrent module: the same of its first and last input.
    """
    layer, series = ratio(course)
    for name, each in ((layer, series), *((n, s.finite) for n, s in course.of("reach").items())):
        if len(each) and each.steps[0] == course.steps[0] and each.first > EXPLODING:
            yield _finding("exploding_gradients", name, each.steps[0], each.first, EXPLODING, "large")
            return


def _told(course, kind, layer, series, limit, holds, much) -> Iterator[Finding]:  # type: ignore[no-untyped-def]
    if len(series) >= 3 and holds(series.first) and series.since(holds) is not None:
        yield _finding(kind, layer, series.steps[0], series.first, limit, much)


def _finding(kind: str, layer: str, step: int, value: float, limit: float, much: str) -> Finding:
    verb = "vanishes" if much == "small" else "explodes"
    return Finding(
        kind,
        "alarm",
        layer,
        step,
        value,
        limit,
        f"The gradient {verb} on its way back to {layer}: there it is {value:.1e} times what it "
        "is at the end.",
        _CAUSE.format(much),
        "Scale the initial weights for the depth (Xavier, He), or add residual connections or normalisation.",
    )
