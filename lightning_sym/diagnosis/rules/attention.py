"""Attention that looks at everything alike, or at one thing."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_sym.diagnosis.course import Course
from lightning_sym.diagnosis.finding import Finding
from lightning_sym.diagnosis.rules.common import began, others

#: Entropy over its most. Flat: healthy heads reach .993 early; sharp: a healthy layer's flattest has .69.
FLAT, SHARP = 0.999, 0.1
#: Flat attention must also be the same for every sample.
VARIES = 1e-4


def attention_collapse(course: Course) -> Iterator[Finding]:
    """All heads of a layer look at every position alike, whatever the sample, or each at one position.

    One sharp head is healthy. Can't see: fused kernels other than ``scaled_dot_product_attention``.
    """
    least, most, varies = (course.of(f"attention_{w}") for w in ("least", "most", "varies"))
    for words, series, limit in (("at all positions alike", least, FLAT), ("at one position", most, SHARP)):
        flat = series is least
        found = {}
        for layer, each in series.items():
            since = each.since((lambda v: v > FLAT) if flat else (lambda v: v < SHARP))
            same = layer in varies and varies[layer].last < VARIES
            if since is not None and (same or not flat):
                found[layer] = since
        if found:
            layer = next(iter(found))
            yield Finding(
                "attention_collapse",
                "alarm",
                layer,
                found[layer],
                series[layer].last,
                limit,
                f"Every head of the attention after {layer}{others(list(found))} looks {words}: "
                "its entropy is "
                f"{series[layer].last:.4f} of the most.",
                began(course, found[layer]),
                "Scale queries and keys (or normalise them) so that the scores differ, but not by tens.",
            )
            return
