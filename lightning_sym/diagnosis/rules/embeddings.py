"""Embeddings of self-supervised learning that collapse."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_sym.diagnosis.course import LAST, Course, Series
from lightning_sym.diagnosis.finding import Finding

#: Variance over its start, and share of the square that is variance: sick runs are below .005 of the one
#: or the other, healthy ones above .5.
SHRUNK, SHARE = 0.01, 0.01
#: Where most directions are gone, too, this share is little: sick .14 and less, healthy .43 and more.
LITTLE = 0.25
#: Effective rank of the embedding, and over its first: sick .17 and less, healthy .22 and more.
DIRECTIONS, OF_FIRST = 1.5, 0.18
#: Modes that two views share, after so many readings, where the loss keeps more than a share of its first:
#: sick 2 and 3 and .976 and more, healthy .73 and less.
SHARED, READINGS, UNLEARNED = 3.0, 10, 0.95
#: Effective rank of the embedding over that of the representation: sick .20 and less, healthy .27 and more.
OF_REPRESENTATION = 0.23


def _embedding(course: Course, what: str) -> Series:
    return course.get(what, "embedding").finite


def _few(course: Course) -> tuple[int | None, float]:
    """Return since when the embedding varies in few directions, and how many are few."""
    rank = _embedding(course, "rank")
    limit = max(DIRECTIONS, OF_FIRST * rank.first) if len(rank) else DIRECTIONS
    return rank.since(lambda value: value < limit), limit


def embedding_collapse_complete(course: Course) -> Iterator[Finding]:
    """The embedding is the same for every sample: its variance is 1 % of its start, or of its square.

    A quarter of its square is little as well where most directions are gone: under losses of angles
    embeddings keep their size, and crowd around one direction.
    """
    variance, share = _embedding(course, "variance"), _embedding(course, "variance_share")
    found = []
    if len(variance) and variance.first > 0:
        since = variance.since(lambda value: value < SHRUNK * variance.first)
        since = since and variance.falls_since(since)
        found += [(since, variance.last / variance.first, SHRUNK, "of its start")] if since else []
    for limit in (SHARE,) if _few(course)[0] is None else (SHARE, LITTLE):
        since = share.since(lambda value, limit=limit: value < limit)  # type: ignore[misc]
        if since is not None:
            found.append((share.falls_since(since), share.last, limit, "of its mean square"))
    if found:
        step, value, limit, of = min(found)
        yield Finding(
            "embedding_collapse_complete",
            "alarm",
            "embedding",
            step,
            value,
            limit,
            f"The embedding crowds around one direction: {value:.0%} of its mean square is variance."
            if limit == LITTLE
            else f"The embedding has collapsed to a point: its variance is {value:.1e} {of}.",
            "the objective: nothing in it keeps embeddings of different samples apart",
            "Give the variance (or the negatives) more weight.",
        )


def embedding_collapse_dimensional(course: Course) -> Iterator[Finding]:
    """The embedding varies in few directions at the last three readings: below 1.5, or 18 % of the first.

    Or it learns few: after ten readings the two views share three modes at most, and the loss has not fallen
    by 5 %: what directions there are follow what differs between views. Or they share as few, and the
    embedding has less than 23 % of the representation's directions: the projector loses them.
    """
    rank, (since, limit) = _embedding(course, "rank"), _few(course)
    if since is not None:
        yield Finding(
            "embedding_collapse_dimensional",
            "alarm",
            "embedding",
            rank.falls_since(since),
            rank.last,
            limit,
            f"The embedding has collapsed to few directions: its effective rank is {rank.last:.2f}, "
            f"and was {rank.first:.3g}.",
            "the objective does not decorrelate its dimensions, or the views share too little",
            "Give decorrelation (covariance terms, negatives) more weight, or make the views milder.",
        )
        return
    shared, kept = _embedding(course, "learned"), course.kept_loss
    since = shared.since(lambda value: value <= SHARED, last=READINGS)
    if since is None:
        return
    whole = course.get("rank", "representation").finite
    lost = [e / r for e, r in zip(rank.values[-LAST:], whole.values[-LAST:], strict=False) if r > 0]
    if len(lost) == LAST and max(lost) < OF_REPRESENTATION:
        yield Finding(
            "embedding_collapse_dimensional",
            "alarm",
            "embedding",
            since,
            lost[-1],
            OF_REPRESENTATION,
            f"The embedding has {rank.last:.2f} directions where the representation has {whole.last:.3g}, "
            f"and two views of a sample share {shared.last:.0f} of them.",
            "the objective does not decorrelate its dimensions, or the projector is too narrow inside",
            "Give decorrelation (covariance terms, negatives) more weight, or widen the projector.",
        )
    elif kept is not None and kept > UNLEARNED:
        yield Finding(
            "embedding_collapse_dimensional",
            "alarm",
            "embedding",
            since,
            shared.last,
            SHARED,
            f"The embedding learns few directions: the two views of a sample share {shared.last:.0f}, "
            f"and the loss keeps {kept:.0%} of its first.",
            "the views share too little, or the objective hardly asks for more (a high temperature, say)",
            "Make the views milder, or raise the learning rate.",
        )
