"""Outputs of one direction."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_sym.diagnosis.course import Course
from lightning_sym.diagnosis.finding import Finding
from lightning_sym.diagnosis.rules.common import decays, others

#: Participation ratio: sick 1.00 to 1.05. A trained binary head has it too; its loss has fallen.
DIRECTIONS = 1.15
#: The network's input must have more than that to lose.
INPUT = 2.0


def rank_collapse(course: Course) -> Iterator[Finding]:
    """A hidden layer of 8 outputs or more varies in one direction, in a network that does not learn.

    The input of the network must vary in more than two. Can't see: two directions where ten are needed.
    """
    if course.learns:
        return
    into = [s.finite.first for s in course.of("input_directions").values() if len(s.finite)]
    if not into or into[0] <= INPUT:
        return
    found = {}
    for layer in course.layers[:-1]:
        since = course.get("directions", layer).since(lambda value: value < DIRECTIONS)
        if since is not None:
            found[layer] = course.get("directions", layer).falls_since(since)
    if found:
        layer = next(iter(found))
        value = course.get("directions", layer).last
        early = found[layer] <= course.steps[0]
        cause = (
            "weight decay" if decays(course) else "the depth and its initialisation" if early else "not known"
        )
        yield Finding(
            "rank_collapse",
            "alarm",
            layer,
            found[layer],
            value,
            DIRECTIONS,
            f"The output of {layer}{others(list(found))} varies in one direction at most, and "
            "the loss has not "
            "halved.",
            cause,
            "Add residual connections or normalisation, or lower the weight decay.",
        )
