"""Composition, 2501.18797."""

from __future__ import annotations

from typing import Any

from _report import spread

from _claims.claim import Claim, Numbers, grades


def gains(stored: dict[str, Any]) -> Numbers:
    """Read how much forced factorisation lowers the error out of distribution."""
    summary = stored["summary"]
    return {"of medians": summary["gain_of_medians"], "by seed": spread(summary["gain_by_seed"])}


COMPOSITION = [
    Claim(
        "2501.18797",
        f"forced factorisation lowers the error out of distribution, {length}",
        "embedding model, three seeds: ratio of medians",
        "200 (one seed, last epoch)",
        source,
        gains,
        lambda o: grades(o["of medians"] > 100, o["of medians"] > 3),
        cause="the paper's is one seed at its last epoch; ours scatter by a factor of ten over seeds",
    )
    for length, source in (("reduced length", "compose_bumps"), ("full length", "compose_bumps_full"))
]
