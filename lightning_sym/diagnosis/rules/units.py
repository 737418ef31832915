"""Units that say nothing, the same as another, or stand at the end of their range."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_sym.diagnosis.course import Course, Series
from lightning_sym.diagnosis.finding import Finding
from lightning_sym.diagnosis.rules.common import began, decays, others

#: Healthy networks of the clinic's tuning half stay below .67, sick ones are above .9.
DEAD = 0.85
#: Of a sample of samples and positions.
DEAD_UNWATCHED = 0.95
#: Variance over mean square of the network's inputs below which they differ by next to nothing.
OFFSET = 1e-3
#: Sick .02 to .12, healthy .97 and more.
DISTINCT = 0.3
#: A weight's norm over its first, where its units became equal under decay: .19 and .52.
SHRUNK = 0.6
#: Healthy activations stay below .65, sick tanh units are above .83, sick gates above .72.
SATURATED = 0.7
#: A loss that keeps more than this share of its first has not fallen.
STUCK = 0.9


def dead_units(course: Course) -> Iterator[Finding]:
    """Most units that feed a layer are 0 on every sample, at each of the last three readings; all: of two.

    Where no layer that is watched is fed so: most units of a ReLU after any other layer, of those samples
    that are looked at. Can't see: a few dead units; rare units, which look dead on a small batch, are why the
    limit is high.
    """
    for what, limit in (("dead_units", DEAD), ("dead", DEAD_UNWATCHED)):
        found = {}
        for layer, series in course.of(what).items():
            if what == "dead_units" and _reads_zeros(course, layer):
                continue
            since = series.since(lambda value, limit=limit: value >= limit)  # type: ignore[misc]
            if since is None and series.steps[0] == course.steps[0]:
                since = series.since(lambda value: value == 1, last=2)
            if since is not None:
                found[layer] = since
        if found:
            break
    else:
        return
    layer = next(iter(found))
    value, where = course.get(what, layer).last, f"{layer}{others(list(found))}"
    units = f"units that feed {where}" if what == "dead_units" else f"units of the ReLU after {where}"
    cause = "weight decay" if decays(course) else began(course, found[layer])
    remedy = "Lower the learning rate or the biases' shift, or use a leaky activation"
    share = course.get("input_share", course.ran[0]).finite if course.ran else Series()
    if len(share) and 0 < share.first < OFFSET:
        cause = f"inputs far from zero: their variance is {share.first:.1e} of their mean square"
        remedy = "Normalise the inputs"
    yield Finding(
        "dead_units",
        "alarm",
        layer,
        found[layer],
        value,
        limit,
        f"{value:.0%} of the {units} are dead: 0 on every sample.",
        cause,
        f"{remedy}; dead units get no gradient and do not come back by themselves.",
    )


def _reads_zeros(course: Course, layer: str) -> bool:
    """Return whether the layer before has a zero weight from first to last: then its units are equal."""
    at = course.ran.index(layer) if layer in course.ran else 0
    return at > 0 and course.get("weight_norm", course.ran[at - 1]).zero


def equal_units(course: Course) -> Iterator[Finding]:
    """Few of a layer's units have weights of their own; a permutation symmetry that they can't leave.

    Of layers of 8 inputs and outputs or more. Units without weights are left out where the weight moves: a
    branch that begins at zero.
    Can't see: units that compute the same with different weights.
    """
    found = {}
    wide = course.of("directions").keys() & course.of("input_directions").keys()
    for layer, series in course.of("distinct_units").items():
        zero, moved = course.get("zero_units", layer), course.get("moved", layer)
        if layer not in wide or (len(zero) and zero.last > 0.5 and not moved.zero):
            continue
        since = series.since(lambda value: value <= DISTINCT)
        if since is not None:
            found[layer] = since
    if found:
        layer = next(iter(found))
        value, norm = course.get("distinct_units", layer).last, course.get("weight_norm", layer).finite
        cause, remedy = began(course, found[layer]), "Initialise weights at random"
        if found[layer] > course.steps[0] and len(norm) and norm.last < SHRUNK * norm.first:
            cause = f"weight decay: the weight has come to {norm.last / norm.first:.0%} of its start"
            remedy = "Lower the weight decay"
        yield Finding(
            "equal_units",
            "alarm",
            layer,
            found[layer],
            value,
            DISTINCT,
            f"Only {value:.0%} of the units of {layer}{others(list(found))} differ from one another.",
            f"{cause}; equal units get equal gradients (permutation symmetry)",
            f"{remedy}, or let Syre break the symmetry.",
        )


def saturation(course: Course) -> Iterator[Finding]:
    """Most tanh, sigmoid or gate values lie within 0.01 of an end of their range, from first to last.

    What saturates in the course of a run is told where the loss has not fallen by a tenth: gates that stay
    open are a way to remember, and a confident output is no harm.
    """
    kept, last = course.kept_loss, course.ran[-1:]
    stuck = kept is not None and kept > STUCK and not course.adversarial
    found = {}
    for layer, series in course.of("saturated").items():
        since = series.since(lambda value: value >= SATURATED)
        if since is not None and (since == series.steps[0] or (stuck and [layer] != last)):
            found[layer] = since
    if found:
        layer = next(iter(found))
        value, early = course.get("saturated", layer).last, found[layer] == course.steps[0]
        yield Finding(
            "saturation",
            "alarm",
            layer,
            found[layer],
            value,
            SATURATED,
            f"{value:.0%} of the activations after {layer}{others(list(found))} are at the end of a range.",
            "the initialisation: weights or inputs are too large from the start"
            if early
            else "the learning rate, as far as readings tell: it was not so at the first reading",
            "Make the initial weights smaller, or normalise what goes into the activation."
            if early
            else "Lower the learning rate or warm it up, or normalise what goes into the activation.",
        )
