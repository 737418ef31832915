"""Which rows of unit vectors agree, without all pairs of them in memory or, for many rows, in time.

Shape letters: U units, D entries of a unit vector, C rows of a block, K entries compared first, P pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**21  # similarities, or entries of pairs, at a time: 8 MiB in float32
SMALL = 128  # rows: all entries of fewer are compared at once
HASHED_ABOVE = 8192  # rows: more are not compared pair by pair
MISSED = 1e-4  # the largest probability that a pair just within the tolerance is not compared
MOST_TABLES = 64  # beyond, hashing costs more than comparing all pairs
WINDOW = 8  # neighbours in the order of a table that a row is compared with
PAIRS_A_ROW = 4  # compared in one table, on average


def components(sides: list[Tensor], *, tolerance: float) -> Tensor:
    """Label the connected components of agreement: a cosine of at least ``1 - tolerance`` on every side.

    Up to ``HASHED_ABOVE`` rows all pairs are compared. More are hashed by the signs of random
    projections: two rows at an angle t share a sign with probability ``1 - t / pi``, and are compared where
    all signs of one of the tables agree. The number of tables makes the probability of missing a pair that
    is just within the tolerance ``MISSED``; it is less for closer pairs, and rows in one direction are
    neighbours in every table. Whatever is found was compared: no group is ever too large. Where rows are
    crowded in a narrow cone and share nearly all signs, each is compared with its neighbours in a random
    projection only, and more pairs are missed. A tolerance too large for hashing has all pairs compared.

    Args:
        sides: ``[U, D]`` each, rows of length one.
        tolerance: in ``[0, 1)``.

    Returns:
        ``[U]`` integers, the smallest index of each row's component.
    """
    units = len(sides[0])
    labels_U = torch.arange(units, device=sides[0].device)
    bits, tables = _tables(units, tolerance)
    if units > HASHED_ABOVE and tables <= MOST_TABLES:
        return _hashed(sides, labels_U, tolerance=tolerance, bits=bits, tables=tables)
    few_UK = _few_entries(sides[0], tolerance=tolerance)
    if units >= SMALL:  # rows in one direction are neighbours in any projection: join them first
        random_D = torch.randn(sides[0].shape[1], generator=torch.Generator().manual_seed(0))
        order_U = (sides[0] @ random_D.to(sides[0])).argsort()
        one_P, other_P = order_U[:-1], order_U[1:]
        if few_UK is not None:
            near_P = (few_UK[one_P, :-2] - few_UK[other_P, :-2]).square().sum(dim=1) / 2 <= _most(
                few_UK, tolerance
            )
            one_P, other_P = one_P[near_P], other_P[near_P]
        labels_U = _merge_agreeing(sides, labels_U, one_P, other_P, tolerance=tolerance)
    for start in range(0, units, max(1, BLOCK_ELEMENTS // units)):
        rows = slice(start, min(units, start + max(1, BLOCK_ELEMENTS // units)))
        if few_UK is not None:
            one_P, other_P = _close(few_UK, rows, labels_U, tolerance=tolerance)
            if len(one_P) <= 4 * (rows.stop - rows.start):
                labels_U = _merge_agreeing(sides, labels_U, one_P, other_P, tolerance=tolerance)
                continue
        agree_CU = labels_U[rows, None] != labels_U[start:]
        for side in sides:
            agree_CU &= side[rows] @ side[start:].mT >= _least_cosine(side, tolerance)
        one_P, other_P = agree_CU.nonzero(as_tuple=True)
        labels_U = _merge(labels_U, one_P + start, other_P + start)
    return labels_U


def _least_cosine(side: Tensor, tolerance: float) -> float:
    return 1 - tolerance - 8 * torch.finfo(side.dtype).eps  # a vector's cosine with itself, up to rounding


def _most(few_UK: Tensor, tolerance: float) -> float:
    """Return half the largest squared distance of rows that agree, with room for rounding."""
    return tolerance + 64 * torch.finfo(few_UK.dtype).eps


def _few_entries(side_UD: Tensor, *, tolerance: float) -> Tensor | None:
    """Return the K entries that hold most, or None where they would be no fewer.

    ``|u - v|^2 <= 2 tolerance`` for all entries of unit vectors that agree, hence for any of them: those
    further apart in a few entries need not be compared in all. Exact, whichever entries are taken.
    """
    units, width = side_UD.shape
    count = max(32, math.ceil(4 * tolerance * width))
    if 4 * count > width or units < SMALL:
        return None
    few_UK = side_UD[:, torch.linalg.vector_norm(side_UD, dim=0).topk(count).indices]
    half_U1 = few_UK.square().sum(dim=1, keepdim=True) / 2
    return torch.cat([few_UK, -half_U1, torch.ones_like(half_U1)], dim=1)


def _close(few_UK: Tensor, rows: slice, labels_U: Tensor, *, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return the pairs of a row of the block and a later row, not yet joined, whose few entries are close."""
    swapped_CK = torch.cat([few_UK[rows, :-2], few_UK[rows, -1:], few_UK[rows, -2:-1]], dim=1)
    closeness_CU = swapped_CK @ few_UK[rows.start :].mT  # minus half the squared distance
    close_CU = closeness_CU >= -_most(few_UK, tolerance)
    one_P, other_P = close_CU.nonzero(as_tuple=True)
    one_P, other_P = one_P + rows.start, other_P + rows.start
    apart_P = (other_P > one_P) & (labels_U[one_P] != labels_U[other_P])
    return one_P[apart_P], other_P[apart_P]


def _tables(units: int, tolerance: float) -> tuple[int, int]:
    """Return signs a table and the number of tables."""
    bits = max(1, math.ceil(math.log2(max(units, 2))))
    found = (1 - math.acos(1 - tolerance) / math.pi) ** bits
    return bits, 2 if found >= 1 else max(2, math.ceil(math.log(MISSED) / math.log1p(-found)))


def _hashed(sides: list[Tensor], labels_U: Tensor, *, tolerance: float, bits: int, tables: int) -> Tensor:
    side_UD = sides[0]
    units, width = side_UD.shape
    rng = torch.Generator().manual_seed(0)
    weights_B = 2 ** torch.arange(bits, device=side_UD.device)
    for _ in range(tables):
        # One more projection orders the rows of a bucket, so that rows in one direction are neighbours.
        projected_UB = side_UD @ torch.randn(width, bits + 1, generator=rng).to(side_UD)
        key_U = ((projected_UB[:, 1:] > 0) * weights_B).sum(dim=1)
        order_U = projected_UB[:, 0].argsort()
        order_U = order_U[key_U[order_U].argsort(stable=True)]
        key_U = key_U[order_U]
        left = PAIRS_A_ROW * units
        for apart in range(1, WINDOW + 1):
            same = key_U[apart:] == key_U[:-apart]
            one_P, other_P = order_U[:-apart][same], order_U[apart:][same]
            new = labels_U[one_P] != labels_U[other_P]
            one_P, other_P = one_P[new][:left], other_P[new][:left]
            left -= len(one_P)
            labels_U = _merge_agreeing(sides, labels_U, one_P, other_P, tolerance=tolerance)
            if not left or not same.any():
                break
    return labels_U


def _merge_agreeing(
    sides: list[Tensor], labels_U: Tensor, one_P: Tensor, other_P: Tensor, *, tolerance: float
) -> Tensor:
    """Join the components of those pairs that agree on every side."""
    for side in sides:
        parts = max(1, BLOCK_ELEMENTS // side.shape[1])
        cosine = [
            (side[one] * side[other]).sum(dim=1)
            for one, other in zip(one_P.split(parts), other_P.split(parts), strict=True)
        ]
        agree_P = torch.cat(cosine) >= _least_cosine(side, tolerance)
        one_P, other_P = one_P[agree_P], other_P[agree_P]
    return _merge(labels_U, one_P, other_P)


def _merge(labels_U: Tensor, one_P: Tensor, other_P: Tensor) -> Tensor:
    """Join the components of each pair; a component's label stays its smallest index."""
    while len(one_P):
        one_label_P, other_label_P = labels_U[one_P], labels_U[other_P]
        apart_P = one_label_P != other_label_P
        if not apart_P.any():
            break
        one_P, other_P = one_P[apart_P], other_P[apart_P]
        high_P = torch.maximum(one_label_P, other_label_P)[apart_P]
        low_P = torch.minimum(one_label_P, other_label_P)[apart_P]
        labels_U = labels_U.scatter_reduce(0, high_P, low_P, "amin")
        while not torch.equal(next_U := labels_U[labels_U], labels_U):
            labels_U = next_U
    return labels_U
