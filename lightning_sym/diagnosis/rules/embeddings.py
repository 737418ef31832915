"""Embeddings of self-supervised learning that collapse."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_sym.diagnosis.course import Course, Series
from lightning_sym.diagnosis.finding import Finding

#: Variance over its start, and share of the square that is variance: sick runs are below .005 of the one
#: or the other, healthy ones above .5.
SHRUNK, SHARE = 0.01, 0.01
#: Effective rank of the embedding.
DIRECTIONS = 1.5


def _embedding(course: Course, what: str) -> Series:
    return course.get(what, "embedding").finite


def embedding_collapse_complete(course: Course) -> Iterator[Finding]:
    """The embedding is the same for every sample: its variance has shrunk to 1 % or is 1 % of its square."""
    variance, share = _embedding(course, "variance"), _embedding(course, "variance_share")
    found = []
    if len(variance) and variance.first > 0:
        since = variance.since(lambda value: value < SHRUNK * variance.first)
        since = since and variance.falls_since(since)
        found += [(since, variance.last / variance.first, SHRUNK, "of its start")] if since else []
    since = share.since(lambda value: value < SHARE)
    if since is not None:
        found.append((share.falls_since(since), share.last, SHARE, "of its mean square"))
    if found:
        step, value, limit, of = min(found)
        yield Finding(
            "embedding_collapse_complete",
            "alarm",
            "embedding",
            step,
            value,
            limit,
            f"The embedding has collapsed to a point: its variance is {value:.1e} {of}.",
            "the objective: nothing in it keeps embeddings of different samples apart",
            "Give the variance (or the negatives) more weight.",
        )


def embedding_collapse_dimensional(course: Course) -> Iterator[Finding]:
    """The embedding varies in one direction at the last three readings."""
    since = _embedding(course, "rank").since(lambda value: value < DIRECTIONS)
    if since is not None:
        value = _embedding(course, "rank").last
        yield Finding(
            "embedding_collapse_dimensional",
            "alarm",
            "embedding",
            _embedding(course, "rank").falls_since(since),
            value,
            DIRECTIONS,
            f"The embedding has collapsed to a line: its effective rank is {value:.2f}.",
            "the objective does not decorrelate its dimensions, or the views share too little",
            "Give decorrelation (covariance terms, negatives) more weight, or make the views milder.",
        )
