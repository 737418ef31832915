"""Codes that are not used, and generators that make little."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_sym.diagnosis.course import Course, Series
from lightning_sym.diagnosis.finding import Finding

#: Largest variance of a code's mean: sick below 1e-4, healthy .5 to 1, .0055 early.
CODE, CODE_STEP = 1e-3, 100
#: Deviation of what is generated over the data's: sick .02 to .15, healthy .41 and more, .22 early.
SPREAD, SPREAD_READINGS = 0.2, 10


def posterior_collapse(course: Course) -> Iterator[Finding]:
    """No unit of a code varies over samples, from step 100 on: the decoder gets noise alone."""
    for layer, series in course.of("code").items():
        late = [(s, v) for s, v in zip(series.steps, series.values, strict=True) if s >= CODE_STEP]
        since = Series([s for s, _ in late], [v for _, v in late]).since(lambda value: value < CODE)
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
    """What a generator makes spreads over less than a fifth of the data's deviation, after ten readings.

    Can't see: modes that are lost while the rest spreads as wide as the data.
    """
    for layer, series in course.of("spread").items():
        since = series.since(lambda value: value < SPREAD)
        if since is not None and len(series) >= SPREAD_READINGS:
            yield Finding(
                "mode_collapse",
                "alarm",
                layer,
                since,
                series.last,
                SPREAD,
                f"The generator makes nearly one thing: what {layer} gets of it deviates "
                f"{series.last:.2f} times "
                "as much as data.",
                "the balance of the two networks' steps and learning rates",
                "Let the discriminator learn faster than the generator, or show it several samples at once.",
            )
