"""Weights that vanish."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_sym.diagnosis.course import Course
from lightning_sym.diagnosis.finding import Finding
from lightning_sym.diagnosis.rules.common import others

#: Healthy runs, normalised and under strong decay, keep .43 and more; sick ones .001 and less.
VANISHED = 0.1
#: It began to vanish where it fell below this share for good.
FELL = 0.9


def weights_vanish(course: Course) -> Iterator[Finding]:
    """A layer's weight has less than a tenth of its first norm, and falls.

    Can't see: a weight that was zero from the start.
    """
    found = {}
    for layer, series in course.of("weight_norm").items():
        series = series.finite
        if len(series) < 2 or series.first <= 0:
            continue
        limit = VANISHED * series.first
        last = min(len(series) - 1, 3)
        since = series.since(lambda value, limit=limit: value < limit, last=last)  # type: ignore[misc]
        if since is not None and series.last <= series.values[-last]:
            found[layer] = (series.last / series.first, series.falls_since(since, share=FELL))
    if found:
        layer = min(found, key=lambda name: found[name][0])
        share, since = found[layer]
        names = [layer, *(name for name in found if name != layer)]
        yield Finding(
            "weights_vanish",
            "alarm",
            layer,
            since,
            share,
            VANISHED,
            f"The weight of {layer}{others(names)} has vanished: its norm fell to {share:.1e} of its start.",
            "weight decay, or an objective that asks nothing of the layer",
            "Lower the weight decay, or leave the layer out of it.",
        )
