"""Divergence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import replace

from lightning_sym.diagnosis.course import LAST, Course, Series
from lightning_sym.diagnosis.finding import Finding

#: A healthy loss is never more than 1.32 of its first in the clinic, adversarial ones aside.
GROWTH, FAR = 2.0, 10.0
#: A loss that was below the one share of its first and is back above the other lost what it learned.
LEARNED, LOST = 0.4, 0.8
#: Median over layers of a weight's norm over its first, where the loss keeps more than a share of its first.
BLOWN_UP, KEPT = 5.0, 0.95
#: What a loss or a weight's norm over its first shows of growth, before something is not finite.
GREW = 1.5
_SUDDEN = (
    "not known: nothing had grown at the readings before; it may be the learning rate, a bad sample, or a "
    "root, logarithm or division at zero"
)
_LOOK = "Find the operation with torch.autograd.detect_anomaly; lower the learning rate if it is none."


def divergence(course: Course) -> Iterator[Finding]:
    """The loss, or what a layer puts out, is not finite; or the loss has grown, or come back, and stays.

    Grown: more than twice its first at the last three readings, or ten times at two. Come back: above 0.8 of
    its first at the last three, after less than 0.4, at once and for the first time: where it comes back
    again and again, tasks change, and where it comes back slowly, :func:`plasticity_loss` judges. Or weights
    are five times their first, in most layers, and the loss has not fallen by 5 %.
    Can't see: a loss that is not told (a plain loop without ``watching.loss``) and stays finite.
    """
    if course.broken:
        step, layer = min(
            course.broken, key=lambda pair: (pair[0], course.layers.index(pair[1]) if pair[1] else -1)
        )
        where = f"readings of {layer}" if layer else "the loss or a summary of the network"
        verb = "are" if layer else "is"
        found = _finding(layer, step, math.inf, GROWTH, f"{where} {verb} not finite")
        yield found if _grew(course, step) else replace(found, cause=_SUDDEN, remedy=_LOOK)
        return
    loss = course.loss.finite
    if len(loss) < LAST or loss.first <= 0 or course.adversarial:
        return
    ratio = loss.last / loss.first
    since = loss.since(lambda value: value > GROWTH * loss.first)
    if since is None:
        since = loss.since(lambda value: value > FAR * loss.first, last=2)
    if since is not None:
        yield _finding("", since, ratio, GROWTH, f"the loss is {ratio:.3g} times its first")
        return
    since = loss.since(lambda value: value > LOST * loss.first)
    if since is not None and _returns(loss) == 1:
        words = f"the loss had come down to {loss.low:.3g} and is back at {loss.last:.3g}"
        yield _finding("", since, ratio, LOST, words)
        return
    yield from _blown_up(course)


def _grew(course: Course, step: int) -> bool:
    """Return whether the loss or a weight had grown at a reading before a step."""
    before = [course.loss, *course.of("weight_norm").values()]
    known = [[v for s, v in zip(each.steps, each.values, strict=True) if s < step] for each in before]
    return any(values and max(values) > GREW * abs(values[0]) for values in known)


def _blown_up(course: Course) -> Iterator[Finding]:
    """Weights are five times their first at the last three readings, and nothing has been learned."""
    kept = course.kept_loss
    norms = [s.finite for s in course.of("weight_norm").values() if len(s.finite) > LAST and s.first > 0]
    if not norms or kept is None or kept < KEPT:
        return
    grown = [s.since(lambda value, s=s: value > BLOWN_UP * s.first) for s in norms]  # type: ignore[misc]
    steps = [since for since in grown if since is not None]
    if len(steps) > len(norms) / 2:
        ratio = statistics.median(s.last / s.first for s in norms)
        words = f"weights are {ratio:.3g} times their first, and the loss has not fallen"
        yield _finding("", min(steps), ratio, BLOWN_UP, words)


def _returns(loss: Series) -> int:
    """Return how often a loss came back to its start after it had been low; a slow way back counts more."""
    times, between, low = 0, 0, False
    for value in loss.values:
        if value < LEARNED * loss.first:
            low, between = True, 0
        elif low and value <= LOST * loss.first:
            between += 1
        elif low:
            times, low = times + max(1, between), False
    return times


def _finding(layer: str, step: int, value: float, limit: float, what: str) -> Finding:
    return Finding(
        "divergence",
        "alarm",
        layer,
        step,
        value,
        limit,
        f"Training has diverged: {what}.",
        "the learning rate is too high, as far as readings tell",
        "Lower the learning rate, warm it up, or clip gradients.",
    )
