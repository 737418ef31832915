"""How a network learns: not any more, without features, or at the edge of stability."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator

from lightning_sym.diagnosis.course import LAST, Course, Series
from lightning_sym.diagnosis.finding import Finding

#: Lowest loss of the last 30 % of readings over that of the first: sick 9 to 59, healthy 2.7 and less.
WORSE, READINGS = 5.0, 10
#: Share of the first loss that counts; what late tasks lose of it over what early ones lose.
LOW, LESS = 0.1, 0.5
#: Largest relative distance of a weight from its start: sick .004, healthy .088 and more.
MOVED, HEAD_MOVED, FALLEN, LAZY_STEP = 0.02, 0.1, 0.8, 100
#: Alignment of representation and weight beyond chance at the first reading: sick at most .09, the one
#: network that was trained before .7.
FEATURES = 0.2
TURN, EDGE = -0.9, (1.7, 2.3)


def plasticity_loss(course: Course) -> Iterator[Finding]:
    """Late tasks of a stream are learned less well than early ones, by the lowest losses of late readings.

    Either five times the lowest of early readings, and above a tenth of the first loss; or what they lost of
    the first loss is less than half of what early ones lost, which is a tenth or more, in a loss that came
    back up twice or more (else nothing tells a stream from one task that went wrong). Early and late: the
    first and last 30 % of ten readings or more.
    Can't see: tasks of different difficulty; a loss that is not told.
    """
    loss = course.loss.finite
    part = int(0.3 * len(loss))
    if len(loss) < READINGS or course.adversarial or loss.first <= 0:
        return
    early, late = min(loss.values[:part]), min(loss.values[-part:])
    gained, lost = 1 - early / loss.first, 1 - late / loss.first
    multiple = early > 0 and late > WORSE * early and late > LOW * loss.first
    less = gained > LOW and lost < LESS * gained and _rises(loss) > 1
    if not multiple and not less:
        return
    bound = WORSE * early if multiple else loss.first * (1 - LESS * gained)
    step = next(s for s, v in zip(loss.steps[part:], loss.values[part:], strict=True) if v > bound)
    yield Finding(
        "plasticity_loss",
        "alarm",
        "",
        step,
        late / early if multiple else max(lost, 0.0) / gained,
        WORSE if multiple else LESS,
        "The network learns worse than it did: the lowest late loss "
        f"is {late:.3g}, the lowest early one was {early:.3g}.",
        "the stream: units died or features lost rank while tasks changed, or the tasks became harder",
        "Regularise towards the start, reset dormant units, or normalise layers.",
    )


def _rises(loss: Series) -> int:
    """Return how often a loss rose from one reading to the next by half of what it ever lost."""
    half = (loss.first - loss.low) / 2
    return sum(b - a > half for a, b in itertools.pairwise(loss.values))


def lazy_training(course: Course) -> Iterator[Finding]:
    """The loss falls by a fifth or more while no weight moves by 2 % of its norm: the kernel regime.

    By the median of the last three losses, for one batch may be easier than another. The last layer may move
    by 10 %: it needs to fit, and no more than that. Not where features were there before: where, at the first
    reading, representations were already aligned with the weights that read them.
    """
    distances = {
        layer: s.finite
        for layer, s in course.of("distance").items()
        if course.get("moved", layer).high > 0 and len(s.finite)
    }
    loss = course.loss.finite
    if not distances or len(loss) < LAST or course.steps[-1] < LAZY_STEP or _has_features(course):
        return
    if loss.first - statistics.median(loss.values[-LAST:]) < (1 - FALLEN) * abs(loss.first):
        return
    head = list(distances)[-1]
    hidden = {layer: s.last for layer, s in distances.items() if layer != head} or {
        head: distances[head].last
    }
    layer = max(hidden, key=hidden.__getitem__)
    value = hidden[layer]
    if value < MOVED and distances[head].last < HEAD_MOVED:
        yield Finding(
            "lazy_training",
            "alarm",
            layer,
            course.steps[0],
            value,
            MOVED,
            f"The loss falls, and yet no hidden weight has moved further than {value:.2%} of its norm: "
            "features stay as they were.",
            "the scale of the initial weights or of the output is too large",
            "Make the output's scale or the initial weights smaller, or raise the learning rate.",
        )


def _has_features(course: Course) -> bool:
    """Return whether layers that are not fed by data read what is aligned with them from the start."""
    side = "/in"
    beyond = [
        series.first - course.get("null", layer).first
        for layer, series in course.of("rwa").items()
        if layer.endswith(side) and len(course.get("null", layer))
        if layer != course.ran[0] + side and series.steps[0] == course.steps[0]
    ]
    return bool(beyond) and statistics.median(beyond) > FEATURES


def edge_of_stability(course: Course) -> Iterator[Finding]:
    """Successive gradients point against each other and learning rate times curvature is near 2.

    Of plain full-batch SGD without momentum; medians of the last five readings.
    """
    turn, edge = course.get("turn").finite, course.get("sharpness").finite
    if len(turn) < 5 or len(edge) < 5:
        return
    value = statistics.median(edge.values[-5:])
    if statistics.median(turn.values[-5:]) < TURN and EDGE[0] < value < EDGE[1]:
        began = next(
            s
            for i, s in enumerate(turn.steps)
            if turn.values[i] < TURN and EDGE[0] < edge.values[i] < EDGE[1]
        )
        yield Finding(
            "edge_of_stability",
            "alarm",
            "",
            began,
            value,
            2.0,
            "Training is at the edge of stability: learning rate times curvature is "
            f"{value:.2f}, and each step "
            "turns the gradient round.",
            "the learning rate is as high as the curvature allows",
            "Lower the learning rate if the loss oscillates; otherwise it is no harm.",
        )
