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
#: The same where half of the layers lost directions and the loss keeps more than a share of its first.
FEW, STUCK = 2.0, 0.8
#: Where weights shrink in training: about two directions in all layers, a quarter of what there were, and a
#: loss that keeps more than a share of its first; healthy runs under such decay keep less than a tenth.
TWO, QUARTER, HALFWAY = 2.2, 0.25, 0.3
#: Variance over mean square, and of how many layers.
SHARE, LEAST = 1e-6, 3


def rank_collapse(course: Course) -> Iterator[Finding]:
    """A hidden layer of 8 outputs or more varies in one direction or in none, and the loss has not halved.

    The input of the network must vary in more than two. In none: the variance is less than 1e-6 of the mean
    square in three layers or more. Where the last layer is narrow (fewer than 8 outputs) one direction may be
    all that is asked for, even if noise keeps the loss up: then it must be so from the first reading, or
    weights must decay. Where it is wide and the loss has not fallen by a fifth, two directions are few, too,
    in half of the layers. And where most weights shrink to 60 % and less of their start, two directions in
    all layers, where there were four times as many, are few while the loss keeps 30 % of its first.
    Can't see: a few directions where ten are needed, in some of the layers.
    """
    if not _varied(course):
        return
    fallen = _of_decay(course)
    yield from fallen
    if fallen or course.learns:
        return
    # A weight that begins at zero makes nothing yet, and loses nothing.
    hidden = [layer for layer in course.ran[:-1] if course.get("weight_norm", layer).values[:1] != [0.0]]
    what, limit = "directions", DIRECTIONS
    found = _below(course, hidden, DIRECTIONS)
    wide, kept = len(course.get("directions", course.ran[-1])) > 0, course.kept_loss
    if not wide and not decays(course):
        found = {layer: since for layer, since in found.items() if since <= course.steps[0]}
    if not found and wide and kept is not None and kept > STUCK:
        found, limit = _below(course, hidden, FEW), FEW
        read = [layer for layer in hidden if len(course.get("directions", layer))]
        found = found if len(found) >= max(LEAST, len(read) / 2) else {}
    if not found:
        what, limit = "output_share", SHARE
        alike = {name: course.get(what, name).since(lambda value: value < SHARE) for name in hidden}
        found = {name: since for name, since in alike.items() if since is not None}
        if len(found) < LEAST:
            return
    layer = next(iter(found))
    value = course.get(what, layer).last
    starts = {name: course.get("directions", name).values[:1] for name in hidden}
    lost = min((v for name in found for v in starts[name]), default=0.0)
    most = max((v for values in starts.values() for v in values), default=0.0)
    early = found[layer] <= course.steps[0] or lost < most / 4
    many = f"{value:.2f} directions" if value >= 1 else "less than one direction"  # an estimate of no bias
    where = f"The output of {layer}{others(list(found))}"
    yield Finding(
        "rank_collapse",
        "alarm",
        layer,
        found[layer],
        value,
        limit,
        f"{where} varies in {many}, and the loss keeps {kept:.0%} of its first."
        if what == "directions" and kept is not None
        else f"{where} varies in {many}."
        if what == "directions"
        else f"{where} is nearly the same for every sample: its variance is {value:.1e} of its square.",
        "weight decay" if decays(course) else "the depth and its initialisation" if early else "not known",
        "Add residual connections or normalisation, or lower the weight decay.",
    )


def _varied(course: Course) -> bool:
    """Return whether the network's input varies in more than two directions."""
    into = [s.finite.first for s in course.of("input_directions").values() if len(s.finite)]
    return bool(into) and into[0] > INPUT


def _of_decay(course: Course) -> list[Finding]:
    """Return that decay left two directions to all hidden layers, if it did and the loss is half-way."""
    kept, last = course.kept_loss, course.ran[-1]
    hidden = {layer: s for layer, s in course.of("directions").items() if layer != last and len(s) > 1}
    few = {layer: s.since(lambda value: value < TWO) for layer, s in hidden.items()}
    steps = [since for since in few.values() if since is not None]
    if kept is None or kept <= HALFWAY or len(steps) < max(LEAST, len(hidden)):
        return []
    if not len(course.get("directions", last)) or not decays(course, to=0.6):
        return []
    if not all(s.last < QUARTER * s.first for s in hidden.values() if s.first > TWO / QUARTER):
        return []
    layer = next(iter(hidden))
    words = f"The output of {layer}{others(list(hidden))} varies in {hidden[layer].last:.2f} directions"
    return [
        Finding(
            "rank_collapse",
            "alarm",
            layer,
            max(hidden[name].falls_since(since) for name, since in few.items() if since is not None),
            hidden[layer].last,
            TWO,
            f"{words}, and the loss keeps {kept:.0%} of its first.",
            "weight decay",
            "Lower the weight decay, or add residual connections or normalisation.",
        )
    ]


def _below(course: Course, layers: list[str], limit: float) -> dict[str, int]:
    """Return layers that vary in fewer directions at the last three readings, and since when they fall."""
    found = {}
    for layer in layers:
        series = course.get("directions", layer)
        since = series.since(lambda value: value < limit)
        if since is not None:
            found[layer] = series.falls_since(since)
    return found
