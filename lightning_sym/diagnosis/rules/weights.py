"""Weights that vanish."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from lightning_sym.diagnosis.course import LAST, Course, Series
from lightning_sym.diagnosis.finding import Finding
from lightning_sym.diagnosis.rules.common import others

#: Healthy runs, normalised and under strong decay, keep .43 and more; sick ones .001 and less.
VANISHED = 0.1
#: It began to vanish where it fell below this share for good.
FELL = 0.9
#: What a norm keeps from reading to reading where it falls; a fall that slows down keeps more and more.
KEEPS, SLOWS = 0.8, 1.02
#: A loss that keeps more than this share of its first has not fallen.
STUCK = 0.95


def weights_vanish(course: Course) -> Iterator[Finding]:
    """A layer's weight has less than a tenth of its first norm, and falls; or most are on their way there.

    On their way: over three readings most weights lose a fifth or more of their norm each time, without
    slowing down, while the loss has not fallen. Can't see: a weight that was zero from the start.
    """
    norms = {layer: series.finite for layer, series in course.of("weight_norm").items()}
    norms = {layer: series for layer, series in norms.items() if len(series) > 1 and series.first > 0}
    found = {}
    for layer, series in norms.items():
        limit = VANISHED * series.first
        last = min(len(series) - 1, LAST)
        since = series.since(lambda value, limit=limit: value < limit, last=last)  # type: ignore[misc]
        if since is not None and series.last <= series.values[-last]:
            found[layer] = (series.last / series.first, series.falls_since(since, share=FELL))
    limit, words = VANISHED, "has vanished: its norm fell"
    kept = course.kept_loss
    if not found and kept is not None and kept > STUCK:
        limit, words = KEEPS, "is vanishing, and the loss does not fall: its norm fell without slowing down"
        falling = {layer: series for layer, series in norms.items() if _falls(series)}
        if len(falling) > len(norms) / 2:
            found = {
                layer: (series.last / series.first, series.falls_since(series.steps[-1], share=FELL))
                for layer, series in falling.items()
            }
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
            limit,
            f"The weight of {layer}{others(names)} {words} to {share:.1e} of its start.",
            "weight decay, or an objective that asks nothing of the layer",
            "Lower the weight decay, or leave the layer out of it.",
        )


def _falls(series: Series) -> bool:
    """Return whether the last three readings each keep little of the one before, and no more than it did."""
    kept = [b / a if a > 0 else 1.0 for a, b in itertools.pairwise(series.values[-LAST - 1 :])]
    steady = all(later < SLOWS * earlier for earlier, later in itertools.pairwise(kept))
    return len(kept) == LAST and max(kept) < KEEPS and steady
