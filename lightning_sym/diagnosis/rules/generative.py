"""Codes that are not used, and generators that make little."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from lightning_sym.diagnosis.course import Course
from lightning_sym.diagnosis.finding import Finding

#: Largest variance of a code's mean: sick below 1e-4, healthy .5 to 1, .0055 early.
CODE, CODE_STEP = 1e-3, 100
#: Before that step, the same over its first: sick .03 to .34, healthy 2 and more.
OF_FIRST = 0.5
#: Deviation of what is generated over the data's: sick .02 to .15, healthy .41 and more, .22 early.
SPREAD, SPREAD_READINGS = 0.2, 10
#: Samples of data that are nearest to what is generated, over those nearest to data: sick .05 to .17, healthy
#: .68 and more; a factor by which it rises while a generator still learns.
COVER, RISES = 0.2, 1.5


def posterior_collapse(course: Course) -> Iterator[Finding]:
    """No unit of a code varies over samples, from step 100 on: the decoder gets noise alone.

    Before, where the little that there was at the first reading has halved, too, and stays so.
    """
    for layer, series in course.of("code").items():
        since = series.from_step(CODE_STEP).since(lambda value: value < CODE)
        if since is None:
            limit = min(CODE, OF_FIRST * series.first)
            since = series.since(lambda value, limit=limit: value < limit)  # type: ignore[misc]
        if since is not None:
            yield Finding(
                "posterior_collapse",
                "alarm",
                layer,
                since,
                series.last,
                CODE,
                f"The code after {layer} is unused: no unit's variance over samples exceeds "
                f"{series.last:.1e}.",
                "the objective weighs the prior too much, or the wiring lets the decoder do without the code",
                "Lower or warm up the weight of the KL term, and see that the decoder needs the code.",
            )


def mode_collapse(course: Course) -> Iterator[Finding]:
    """What a generator makes is nearly one thing, or near few samples of the data, after ten readings.

    One thing: it spreads over less than a fifth of the data's deviation at the last three readings. Few: by
    the median of the last five readings it is near a fifth at most of what samples of data are near, and that
    does not rise. Can't see: single modes that are lost while most are hit; a generator whose noise is not
    drawn in the step.
    """
    for layer, series in course.of("spread").items():
        since = series.since(lambda value: value < SPREAD)
        if since is not None and len(series) >= SPREAD_READINGS:
            words = f"what {layer} gets of it deviates {series.last:.2f} times as much as data"
            yield _collapsed(course, layer, since, series.last, SPREAD, f"nearly one thing: {words}")
            continue
        cover = course.get("cover", layer).finite
        if len(cover) < SPREAD_READINGS:
            continue
        late, before = (statistics.median(cover.values[at]) for at in (slice(-5, None), slice(-10, -5)))
        if late < COVER and late < RISES * before:
            since = cover.since(lambda value: value < 2 * COVER) or cover.steps[-5]
            words = f"what {layer} gets of it is near {late:.0%} of the data that data themselves are near"
            yield _collapsed(course, layer, since, late, COVER, f"few things: {words}")


def _collapsed(course: Course, layer: str, step: int, value: float, limit: float, words: str) -> Finding:
    """Return the finding, on the last layer of another part of the module than the one that sees both."""
    part = layer.split(".")[0]
    makers = [name for name in course.ran if name.split(".")[0] != part]
    return Finding(
        "mode_collapse",
        "alarm",
        makers[-1] if makers else layer,
        step,
        value,
        limit,
        f"The generator makes {words}.",
        "the balance of the two networks' steps and learning rates",
        "Let the discriminator learn faster than the generator, or show it several samples at once.",
    )
