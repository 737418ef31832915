"""Units that say nothing, the same as another, or stand at the end of their range."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_sym.diagnosis.course import Course
from lightning_sym.diagnosis.finding import Finding
from lightning_sym.diagnosis.rules.common import began, decays, others

#: Healthy networks of the clinic's tuning half stay below .67, sick ones are above .9.
DEAD = 0.85
#: Sick .02 to .12, healthy .97 and more.
DISTINCT = 0.3
#: Healthy activations stay below .65, sick tanh units are above .83, sick gates above .72.
SATURATED = 0.7


def dead_units(course: Course) -> Iterator[Finding]:
    """Most units that feed a layer are 0 on every sample, at each of the last three readings.

    Can't see: a few dead units; rare units, which look dead on a small batch, are why the limit is high.
    """
    found = {}
    for layer, series in course.of("dead_units").items():
        since = series.since(lambda value: value >= DEAD)
        if since is not None:
            found[layer] = since
    if found:
        layer = next(iter(found))
        value = course.get("dead_units", layer).last
        cause = "weight decay" if decays(course) else began(course, found[layer])
        yield Finding(
            "dead_units",
            "alarm",
            layer,
            found[layer],
            value,
            DEAD,
            f"{value:.0%} of the units that feed {layer}{others(list(found))} are dead: 0 on every sample.",
            cause,
            "Lower the learning rate or the biases' shift, or use a leaky activation; dead units get no "
            "gradient and do not come back by themselves.",
        )


def equal_units(course: Course) -> Iterator[Finding]:
    """Few of a layer's units have weights of their own; a permutation symmetry that they can't leave.

    Of layers of 8 inputs and outputs or more; units without weights are left out.
    Can't see: units that compute the same with different weights.
    """
    found = {}
    wide = course.of("directions").keys() & course.of("input_directions").keys()
    for layer, series in course.of("distinct_units").items():
        zero = course.get("zero_units", layer)
        if layer not in wide or (len(zero) and zero.last > 0.5):
            continue
        since = series.since(lambda value: value <= DISTINCT)
        if since is not None:
            found[layer] = since
    if found:
        layer = next(iter(found))
        value = course.get("distinct_units", layer).last
        yield Finding(
            "equal_units",
            "alarm",
            layer,
            found[layer],
            value,
            DISTINCT,
            f"Only {value:.0%} of the units of {layer}{others(list(found))} differ from one another.",
            began(course, found[layer]) + "; equal units get equal gradients (permutation symmetry)",
            "Initialise weights at random, or let Syre break the symmetry.",
        )


def saturation(course: Course) -> Iterator[Finding]:
    """Most tanh, sigmoid or gate values lie within 0.01 of an end of their range, from first to last.

    What saturates in the course of a run that learns is not told: gates that stay open are a way to remember.
    """
    found = [
        layer
        for layer, series in course.of("saturated").items()
        if series.since(lambda value: value >= SATURATED) == series.steps[0]
    ]
    if found:
        value = course.get("saturated", found[0]).last
        yield Finding(
            "saturation",
            "alarm",
            found[0],
            course.steps[0],
            value,
            SATURATED,
            f"{value:.0%} of the activations after {found[0]}{others(found)} lie at an end of their range.",
            "the initialisation: weights or inputs are too large from the start",
            "Make the initial weights smaller, or normalise what goes into the activation.",
        )
