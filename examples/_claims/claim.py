"""What the papers claim, where our number of it stands, and the rule that makes a verdict of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from _report import spread

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """One row of the table.

    Args:
        paper: arXiv number.
        claim: in one sentence.
        setting: of ours.
        theirs: the paper's number, or how it puts it.
        source: name of the JSON.
        read: the numbers that matter, from the JSON.
        judge: the verdict, from these numbers.
        cause: why it falls short, where known by an experiment; shown unless reproduced.
        note: what else must be said.
    """

    paper: str
    claim: str
    setting: str
    theirs: str
    source: str
    read: Callable[[dict[str, Any]], Numbers]
    judge: Callable[[Numbers], str]
    cause: str = ""
    note: str = ""


def middle(cell: dict[str, float]) -> float:
    """Return the median, or the mean where an older result has none."""
    return cell.get("median", cell["mean"])


def grades(reproduced: bool, direction: bool) -> str:
    """Return the verdict of two questions."""
    return "reproduced" if reproduced else "direction only" if direction else "not seen"


def over(values: list[float | None]) -> dict[str, float]:
    """Return the spread of values by seed, None being one that diverged."""
    return spread([float("nan") if value is None else value for value in values])
