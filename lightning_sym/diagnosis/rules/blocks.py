"""Residual blocks that add nothing."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_sym.diagnosis.course import Course
from lightning_sym.diagnosis.finding import Finding
from lightning_sym.diagnosis.rules.common import began, others

#: Deviation of what is added over the stream's: sick 1e-7 and less, healthy .065 and more.
ADDED = 1e-3


def dead_block(course: Course) -> Iterator[Finding]:
    """What a block adds varies over samples by less than a thousandth of what it is added to.

    At the last three readings and not only at first: residual branches that begin at zero come alive. Left
    out are sums after the last layer.
    Can't see: a block that adds the same as another.
    """
    found = {}
    for layer, series in course.of("added").items():
        since = series.since(lambda value: value < ADDED)
        if since is not None and layer != course.ran[-1]:
            found[layer] = since
    if found:
        layer = next(iter(found))
        value = course.get("added", layer).last
        yield Finding(
            "dead_block",
            "alarm",
            layer,
            found[layer],
            value,
            ADDED,
            f"The block that ends in {layer}{others(list(found))} is dead: of the two tensors that "
            "are added there one is the same for every sample.",
            began(course, found[layer]),
            "Look at the block's gain, biases and activations; a block that gets no gradient does not come "
            "back by itself.",
        )
