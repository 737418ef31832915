"""Dimensions of traced tensors as products of *legs*, the things that a group can act on.

A leg is one index that means the same wherever it turns up. Reshaping splits it into factors (the
heads of an attention layer and the width of a head), chunking cuts it into segments (the gates of an
LSTM); both are learnt late, after other tensors already carry the leg, so a leg refines itself and
whoever looks next sees its parts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence


class Mismatch(Exception):  # noqa: N818 - it is caught, never shown
    """Two dimensions have no common refinement."""


class Leg:
    """An index of a tensor's dimension, until it turns out to be several."""

    _count = itertools.count()

    def __init__(self, size: int, *, factors: Dim = (), segments: tuple[Leg, ...] = ()) -> None:
        self.size = size
        self.factors = factors
        self.segments = segments
        self.number = next(self._count)

    @property
    def whole(self) -> bool:
        """Whether the leg hasn't been refined."""
        return not self.factors and not self.segments

    def cut(self, sizes: Sequence[int]) -> tuple[Leg, ...]:
        """Refine into segments of these sizes."""
        if sum(sizes) != self.size:
            raise Mismatch
        if len(sizes) == 1:
            return (self,)
        if self.whole:
            self.segments = tuple(Leg(size) for size in sizes)
            return self.segments
        if self.segments:
            return _cut_segments(self, sizes)
        # A product: cut along its outermost factor, each piece keeps the inner ones.
        outer, *inner = expand((self,))
        width = self.size // outer.size
        if any(size % width for size in sizes):
            raise Mismatch
        pieces = outer.cut([size // width for size in sizes])
        return tuple(Leg(size, factors=(piece, *inner)) for size, piece in zip(sizes, pieces, strict=True))

    def atoms(self) -> list[Leg]:
        """Return the unrefined legs that this one consists of."""
        if self.whole:
            return [self]
        return [atom for part in (*self.factors, *self.segments) for atom in part.atoms()]


Dim = tuple[Leg, ...]


def size_of(dim: Dim) -> int:
    """Return the number of positions along a dimension."""
    return math.prod(leg.size for leg in dim)


Chain = tuple[int, list[tuple[int, int, int]]]


def chains_of(dim: Dim) -> list[Chain]:
    """Return a dimension as segments: ``(offset, [(atom, size, stride), ...])``."""
    chains: list[Chain] = [(0, [])]
    stride = size_of(dim)
    if not stride:
        return []  # no entries
    for leg in dim:
        stride //= leg.size
        if leg.whole:
            own: list[Chain] = [(0, [(leg.number, leg.size, 1)])]
        elif leg.factors:
            own = chains_of(leg.factors)
        else:
            own, start = [], 0
            for segment in leg.segments:
                own += [(start + offset, chain) for offset, chain in chains_of((segment,))]
                start += segment.size
        chains = [
            (offset + more * stride, [*chain, *[(n, size, step * stride) for n, size, step in tail]])
            for offset, chain in chains
            for more, tail in own
        ]
    return chains


def expand(dim: Dim) -> Dim:
    """Return a dimension with products written out."""
    out: list[Leg] = []
    for leg in dim:
        out += expand(leg.factors) if leg.factors else [leg]
    return tuple(out)


def take(legs: list[Leg], sizes: Sequence[int]) -> list[Dim]:
    """Group a row-major list of legs into dimensions of the given sizes, splitting where needed."""
    rest = [leg for leg in legs if leg.size != 1]
    ones = [leg for leg in legs if leg.size == 1]
    dims: list[Dim] = []
    for size in sizes:
        if size == 1:
            dims.append((ones.pop(0),) if ones else (Leg(1),))
            continue
        taken: list[Leg] = []
        while size > 1:
            if not rest:
                raise Mismatch
            leg = rest.pop(0)
            if size % leg.size == 0:
                taken.append(leg)
                size //= leg.size
            elif leg.size % size == 0:
                if not leg.whole:
                    raise Mismatch
                leg.factors = (Leg(size), Leg(leg.size // size))
                taken.append(leg.factors[0])
                rest.insert(0, leg.factors[1])
                size = 1
            else:
                raise Mismatch
        dims.append(tuple(taken))
    if rest:
        raise Mismatch
    return dims


def _cut_segments(leg: Leg, sizes: Sequence[int]) -> tuple[Leg, ...]:
    """Cut a leg that has segments already; boundaries inside a segment cut the segment."""
    parts = list(leg.segments)
    pieces: list[Leg] = []
    for size in sizes:
        taken: list[Leg] = []
        missing = size
        while missing:
            part = parts.pop(0)
            if part.size > missing:
                first, second = part.cut([missing, part.size - missing])
                taken.append(first)
                parts.insert(0, second)
                missing = 0
            else:
                taken.append(part)
                missing -= part.size
        pieces.append(taken[0] if len(taken) == 1 else Leg(size, segments=tuple(taken)))
    return tuple(pieces)


def flat_segments(leg: Leg) -> list[Leg]:
    """Return a leg's segments, nested ones written out."""
    if not leg.segments:
        return [leg]
    return [part for segment in leg.segments for part in flat_segments(segment)]


def align(a: Dim, b: Dim) -> list[tuple[Leg, Leg]]:
    """Refine two dimensions until they have the same structure; return the atoms in pairs.

    Raises:
        Mismatch: if they can't.
    """
    if size_of(a) != size_of(b):
        raise Mismatch
    left, right = list(expand(a)), list(expand(b))
    pairs: list[tuple[Leg, Leg]] = []
    if len(left) != 1 or len(right) != 1:
        left = [leg for leg in left if leg.size != 1]
        right = [leg for leg in right if leg.size != 1]
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if x.size == y.size:
            pairs += _pair(x, y)
        elif x.size > y.size:
            left = [*_halve(x, y.size), *left]
            right.insert(0, y)
        else:
            right = [*_halve(y, x.size), *right]
            left.insert(0, x)
    return pairs


def _halve(leg: Leg, size: int) -> Dim:
    if not leg.whole or leg.size % size:
        raise Mismatch
    leg.factors = (Leg(size), Leg(leg.size // size))
    return leg.factors


def _pair(x: Leg, y: Leg) -> list[tuple[Leg, Leg]]:
    if x is y or (x.whole and y.whole):
        return [(atom, other) for atom, other in zip(x.atoms(), y.atoms(), strict=True)]
    if x.factors or y.factors:
        whole, split = (x, y) if x.whole else (y, x)
        if whole.whole:
            whole.factors = tuple(Leg(leg.size) for leg in expand((split,)))
        return align((x,), (y,))
    # Segments: cut both at all boundaries.
    edges = {0}
    for leg in (x, y):
        total = 0
        for part in flat_segments(leg):
            total += part.size
            edges.add(total)
    marks = sorted(edges)
    sizes = [b - a for a, b in itertools.pairwise(marks)]
    return [pair for p, q in zip(x.cut(sizes), y.cut(sizes), strict=True) for pair in align((p,), (q,))]
