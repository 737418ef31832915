"""Divergence."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_sym.diagnosis.course import Course
from lightning_sym.diagnosis.finding import Finding

#: A healthy loss is never more than 1.32 of its first in the clinic, adversarial ones aside.
GROWTH = 4.0
LAST = 2


def divergence(course: Course) -> Iterator[Finding]:
    """The loss, or what a layer puts out, is not finite; or the loss is four times its first, twice in a row.

    Can't see: a loss that is not told (a plain loop without ``watching.loss``) and stays finite.
    """
    if course.broken:
        step, layer = min(
            course.broken, key=lambda pair: (pair[0], course.layers.index(pair[1]) if pair[1] else -1)
        )
        where = f"readings of {layer}" if layer else "the loss or a summary of the network"
        verb = "are" if layer else "is"
        yield _finding(layer, step, math.inf, f"Training has diverged: {where} {verb} not finite.")
        return
    loss = course.loss.finite
    if len(loss) <= LAST or loss.first <= 0 or course.adversarial:
        return
    since = loss.since(lambda value: value > GROWTH * loss.first, last=LAST)
    if since is not None:
        ratio = loss.last / loss.first
        yield _finding("", since, ratio, f"Training has diverged: the loss is {ratio:.3g} times its first.")


def _finding(layer: str, step: int, value: float, message: str) -> Finding:
    return Finding(
        "divergence",
        "alarm",
        layer,
        step,
        value,
        GROWTH,
        message,
        "the learning rate is too high, as far as readings tell",
        "Lower the learning rate, warm it up, or clip gradients.",
    )
