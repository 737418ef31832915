"""Histories of monitors in plain words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def in_words(history: Iterable[Mapping[str, float]]) -> list[str]:
    """Say in a few sentences what the monitors saw, first against last reading.

    Args:
        history: rows as in ``callback.history``; histories of several monitors are added.

    Returns:
        One sentence a finding, the network as a whole before single layers; empty for no history.
    """
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    steps: list[float] = []
    for row in history:
        steps.append(row["step"])
        for key, value in row.items():
            first.setdefault(key, value)
            last[key] = value
    if not steps:
        return []
    words = [f"Read {len(set(steps))} times, from step {min(steps):.0f} to step {max(steps):.0f}."]
    words += _collapse(first, last)
    words += _alignment(first, last)
    words += _plasticity(first, last)
    return words


def _layers(readings: Mapping[str, float], quantity: str, what: str) -> dict[str, float]:
    """Return a reading by layer."""
    prefix, suffix = f"{quantity}/", f"/{what}"
    return {
        key[len(prefix) : -len(suffix)]: value
        for key, value in readings.items()
        if key.startswith(prefix) and key.endswith(suffix) and len(key) > len(prefix) + len(suffix)
    }


def _collapse(first: Mapping[str, float], last: Mapping[str, float]) -> list[str]:
    words = []
    if "collapse/score" in last:
        score = last["collapse/score"]
        verdict = "no sign of collapse" if score < 0.1 else "some collapse" if score < 0.5 else "collapse"
        words.append(f"Collapse: score {first['collapse/score']:.2f} -> {score:.2f} of 1: {verdict}.")
    ranks, before = _layers(last, "collapse", "effective_rank"), _layers(first, "collapse", "effective_rank")
    shrunk = {name: ranks[name] / before[name] for name in ranks if before.get(name, 0) > 0}
    if shrunk:
        name = min(shrunk, key=shrunk.__getitem__)
        verb = "fell" if shrunk[name] < 1 else "grew"
        words.append(
            f"Ranks: of {len(shrunk)} layers {name} lost most or gained least: its effective rank {verb} "
            f"from {before[name]:.1f} to {ranks[name]:.1f}."
        )
    doubled = {n: v for n, v in _layers(last, "collapse", "distinct_units").items() if v < 1}
    if doubled:
        name = min(doubled, key=doubled.__getitem__)
        words.append(f"Units: in {name} only {doubled[name]:.0%} of the units differ from one another.")
    if "collapse/nc1" in first and "collapse/nc1" in last:
        words.append(
            f"Neural collapse: spread within classes over spread between them (NC1) "
            f"{first['collapse/nc1']:.3g} -> {last['collapse/nc1']:.3g}."
        )
    return words


def _alignment(first: Mapping[str, float], last: Mapping[str, float]) -> list[str]:
    if "alignment/mean" not in last:
        return []
    chance = f", where chance gives {last['alignment/null']:.2f}" if "alignment/null" in last else ""
    words = [
        f"Alignment: the six relations' mean went from {first['alignment/mean']:.2f} to "
        f"{last['alignment/mean']:.2f}{chance}."
    ]
    sides = {
        f"{name}/{side}/{relation}": value
        for side in ("in", "out")
        for relation in ("rga", "rwa", "gwa")
        for name, value in _layers(last, "alignment", f"{side}/{relation}").items()
    }
    if sides:
        name = max(sides, key=sides.__getitem__)
        words.append(f"Best aligned: {name} at {sides[name]:.2f}.")
    return words


def _plasticity(first: Mapping[str, float], last: Mapping[str, float]) -> list[str]:
    words = []
    if "plasticity/dormant_units" in last:
        words.append(
            f"Plasticity: dormant units {first['plasticity/dormant_units']:.1%} -> "
            f"{last['plasticity/dormant_units']:.1%} of a layer, on average."
        )
    norms, before = _layers(last, "plasticity", "weight_norm"), _layers(first, "plasticity", "weight_norm")
    growth = {name: norms[name] / before[name] for name in norms if before.get(name, 0) > 0}
    if growth:
        name = max(growth, key=growth.__getitem__)
        words.append(f"Weights: {name} changed its norm most upwards, by a factor of {growth[name]:.2f}.")
    if "plasticity/trainability" in last:
        words.append(
            f"Trainability: on random targets a copy gets {last['plasticity/trainability']:.2f} times as far "
            "as a freshly initialised twin."
        )
    return words
