"""What was observed, summed over ranks: first what failed on any of them, then what is whole on all."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sym.engine.ranks import Ranks
from lightning_sym.observe.hooks import LayerWatch
from lightning_sym.observe.observation import LayerObservation
from lightning_sym.observe.statistics.statistic import Statistic, Tally

#: A layer and one of its statistics.
Kept = tuple[LayerWatch, Statistic]


class Failure(NamedTuple):
    """A statistic that has no result for a layer, the first rank that lacks it, and why.

    Attributes:
        fault: whether something went wrong, rather than there being nothing to observe.
    """

    watch: LayerWatch
    statistic: Statistic
    rank: int
    fault: bool
    said: str


def reduce(ranks: Ranks, watches: Sequence[LayerWatch]) -> tuple[list[LayerObservation], list[Failure]]:
    """Return the layers that ran on some rank, and what has no result: on all ranks the same."""
    kept = [(watch, statistic) for watch in watches for statistic in watch.statistics]
    marks = [torch.cat([watch.calls, watch.calls.new_tensor([not watch.fed_by_data])]) for watch in watches]
    failed = _sum(ranks, kept, LayerWatch.sums, marks)
    for watch, mark in zip(watches, marks, strict=True):
        watch.calls = mark[:1]
    again = [pair for pair in kept if pair not in failed and _passes_again(*pair)]
    if again:
        failed |= _sum(ranks, again, LayerWatch.more_sums)
    layers = [
        LayerObservation(
            watch,
            failed={statistic for statistic in watch.statistics if (watch, statistic) in failed},
            fed_by_data=not float(mark[1]),
        )
        for watch, mark in zip(watches, marks, strict=True)
        if float(watch.calls) > 0
    ]
    return layers, _explained(ranks, [pair for pair in kept if pair in failed])


def _sum(
    ranks: Ranks,
    kept: list[Kept],
    sums: Callable[[LayerWatch, Statistic], list[Tensor]],
    marks: Sequence[Tensor] = (),
) -> set[Kept]:
    """Sum over ranks, in place, what is whole on all of them, and the marks; return what is not whole.

    The status is summed first: of what failed on one rank, or has other shapes there, nothing is sent,
    since a packed sum of unequal lengths would never end.
    """
    parts = [sums(*pair) for pair in kept]
    status = [_status(watch, s, tensors) for (watch, s), tensors in zip(kept, parts, strict=True)]
    ranks.sum([*marks, *status])
    failed, whole = set(), []
    for pair, state, tensors in zip(kept, status, parts, strict=True):
        lacking, number, square = state.tolist()
        if not lacking and number * number != ranks.size * square:  # equal on all ranks only then
            watch, statistic = pair
            watch.errors.setdefault(statistic, ValueError("the sums have other shapes on other ranks"))
            lacking = 1
        if lacking:
            failed.add(pair)
        else:
            whole += tensors
    ranks.sum(whole)
    return failed


def _status(watch: LayerWatch, statistic: Statistic, tensors: list[Tensor]) -> Tensor:
    """Return ``[3]``: whether this rank lacks it, a number that stands for the shapes, and its square."""
    number = zlib.crc32(repr([tuple(tensor.shape) for tensor in tensors]).encode()) % 4093
    return watch.calls.new_tensor([watch.lacks(statistic), number, number * number])


def _passes_again(watch: LayerWatch, statistic: Statistic) -> bool:
    return type(watch.tallies[statistic]).second_pass is not Tally.second_pass


def _explained(ranks: Ranks, failed: list[Kept]) -> list[Failure]:
    """Return, on all ranks, what failed with its reason."""
    if not failed:
        return []
    every = ranks.explain([watch.reason(statistic) for watch, statistic in failed])
    found = []
    for i, (watch, statistic) in enumerate(failed):
        rank, (fault, said) = next((r, words[i]) for r, words in enumerate(every) if words[i][1])
        found.append(Failure(watch, statistic, rank, fault, said))
    return found
