"""Rules on one weight's facts: each a small pure function, from facts to findings.

A *share* of units is over the layer's units. What the rules can't see: units that are copies of each other
but for a factor of other sign, copies in scale of linear layers spread over several weights, and anything
that only the data tells (a ReLU that never fires though its weights are in order).
"""

from __future__ import annotations

from collections.abc import Iterator

from lightning_sym.diagnosis.finding import Finding, Level
from lightning_sym.diagnosis.weight_facts import WeightFacts

#: Share of a layer's units from which dead, zero or equal ones impair learning; below it: a warning. Trained
#: networks of the usual libraries carry a few per cent of zero filters and work.
UNITS_LIMIT = 0.1
#: Share of the possible rank below which a layer has lost rank; a random matrix is at 1.
RANK_WARNING, RANK_ALARM = 0.9, 0.5
#: Share of a random matrix's effective rank below which a full numerical rank is worth a warning; what
#: trained layers reach is .3 to .9, and nets in the feature-learning regime on low-rank tasks go lower.
EFFECTIVE_LIMIT = 0.1
#: Least rank of which a loss means something. One direction of a square matrix is lost by chance: two count.
LEAST_RANK = 4
#: Root mean square entry times sqrt(fan-in) below which weights have vanished: initialisations are near 1,
#: the smallest in use (a standard deviation of 1e-3 for a head) above 1e-2.
SIZE_LIMIT = 1e-4
#: The same for a head or the end of a residual branch; initialisations of these are zero or above 1e-4.
HEAD_LIMIT = 1e-6


def level_of(share: float) -> Level:
    """Return the level of a share of lost units."""
    return "alarm" if share >= UNITS_LIMIT else "warning"


def count(number: int, total: int, what: str) -> str:
    """Return ``"3 of 64 units are"`` with the verb in number."""
    return f"{number} of {total} {what} {'is' if number == 1 else 'are'}"


def not_finite(facts: WeightFacts) -> Iterator[Finding]:
    """NaN and infinite entries: any is an alarm."""
    if facts.not_finite:
        yield Finding(
            kind="divergence",
            level="alarm",
            layer=facts.name,
            step=0,
            value=float(facts.not_finite),
            limit=0.0,
            message=f"{count(facts.not_finite, facts.entries, 'entries')} NaN or infinite.",
            cause="not known: weights alone don't tell what diverged first",
            remedy="Go back to a checkpoint without them, and lower the learning rate or clip gradients.",
        )


def equal_units(facts: WeightFacts) -> Iterator[Finding]:
    """Units whose incoming weights and bias have the same direction (within 8 degrees, less if few)."""
    if not facts.redundant:
        return
    share = facts.redundant / facts.units
    copies, groups = int(facts.equal.sum()), int(facts.group[facts.equal].unique().numel())
    yield Finding(
        kind="equal_units",
        level=level_of(share),
        layer=facts.name,
        step=0,
        value=share,
        limit=UNITS_LIMIT,
        message=(
            f"{count(copies, facts.units, 'units')} copies of others ({groups} distinct among them): the "
            f"layer computes with {facts.units - facts.redundant} different ones."
        ),
        remedy="Initialise the copies anew.",
    )


def lost_rank(facts: WeightFacts) -> Iterator[Finding]:
    """Fewer directions than a random matrix of the shape uses, equal and zero units apart."""
    if facts.possible < LEAST_RANK:
        return
    share = facts.rank / facts.possible
    effective = facts.effective_rank / facts.random_effective_rank
    whole = facts.possible / max(facts.random_rank, 1)
    remedy = "Lower the weight decay or the learning rate of this layer, or initialise it anew."
    if share < RANK_WARNING and facts.possible - facts.rank >= 2:
        yield Finding(
            kind="rank_collapse",
            level="alarm" if share < RANK_ALARM else "warning",
            layer=facts.name,
            step=0,
            value=share,
            limit=RANK_ALARM if share < RANK_ALARM else RANK_WARNING,
            message=(
                f"Its weight uses {facts.rank} directions where a random one of its shape with as many "
                f"distinct units uses {facts.possible}."
            ),
            remedy=remedy,
        )
    elif effective < EFFECTIVE_LIMIT * whole and facts.possible >= 2 * LEAST_RANK:
        yield Finding(
            kind="rank_collapse",
            level="warning",
            layer=facts.name,
            step=0,
            value=effective,
            limit=EFFECTIVE_LIMIT * whole,
            message=(
                f"Its weight has an effective rank of {facts.effective_rank:.1f} where a random one of its "
                f"shape has {facts.random_effective_rank:.1f}; a task of few directions can ask for that."
            ),
            remedy=remedy,
        )


def vanished(facts: WeightFacts, *, excused: bool = False, known: bool = True) -> Iterator[Finding]:
    """Weights far smaller than any initialisation, though not zero.

    Args:
        facts: of the layer.
        excused: it is a head or ends a residual branch, and so are all as small as it is.
        known: whether the graph could be asked.
    """
    if not 0 < facts.size < SIZE_LIMIT:
        return
    where = "It ends a residual branch or is a head, which may start so." if excused else ""
    if not known:
        where = "The graph could not be asked whether it is a residual branch's end, which may start so."
    level: Level = (
        ("note" if facts.size > HEAD_LIMIT else "warning") if excused else "alarm" if known else "warning"
    )
    yield Finding(
        kind="weights_vanish",
        level=level,
        layer=facts.name,
        step=0,
        value=facts.size,
        limit=SIZE_LIMIT,
        message=(
            f"Its weights are {facts.size:.1e} of what keeps a signal's size (root mean square times the "
            f"root of the fan-in). {where}"
        ).strip(),
        cause="not known: decay that nothing works against is the usual one",
        remedy="Lower the weight decay, exclude the layer from it, or initialise it anew.",
    )


def zero_units(facts: WeightFacts, number: int, *, excused: str = "") -> Iterator[Finding]:
    """Units whose incoming weights are zero, where not the whole layer is.

    Args:
        facts: of the layer.
        number: how many, those certified dead apart.
        excused: why it may be in order, for a layer read without its graph.
    """
    if not number:
        return
    share = number / facts.units
    yield Finding(
        kind="zero_units",
        level=level_of(share),
        layer=facts.name,
        step=0,
        value=share,
        limit=UNITS_LIMIT,
        message=(
            f"{count(number, facts.units, 'units')} without incoming weights: constant, whatever the input. "
            f"{excused}"
        ).strip(),
        remedy="Initialise them anew, or lower the weight decay.",
    )


def dead_units(name: str, number: int, units: int) -> Iterator[Finding]:
    """Units that are certified to be zero after their ReLU whatever the input."""
    if number:
        yield Finding(
            kind="dead_units",
            level=level_of(number / units),
            layer=name,
            step=0,
            value=number / units,
            limit=UNITS_LIMIT,
            message=(
                f"{count(number, units, 'units')} certified dead: no incoming weights, a bias of at most 0, "
                "and a ReLU that follows in the graph."
            ),
            remedy="Initialise them anew: no gradient reaches them, so neither data nor learning rate will.",
        )


def stuck_at_zero(name: str, why: str) -> Iterator[Finding]:
    """A whole parameter that is zero and gets no gradient, whatever the others do."""
    yield Finding(
        kind="zero_units",
        level="alarm",
        layer=name,
        step=0,
        value=1.0,
        limit=UNITS_LIMIT,
        message=f"All of it is zero, and no gradient reaches it: {why}.",
        remedy="Initialise one of the factors that are zero together at random.",
    )
