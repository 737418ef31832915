"""Histories of monitors in plain words: a thin form of the findings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from lightning_sym.diagnosis import diagnose_run
from lightning_sym.diagnosis.course import Course, courses


def in_words(history: Iterable[Mapping[str, float]]) -> list[str]:
    """Say in a few sentences what the monitors saw.

    Args:
        history: rows as in ``callback.history``; histories of several monitors are added.

    Returns:
        How much was read; one sentence a finding, alarms first
        (:func:`~lightning_sym.diagnosis.diagnose_run`), or that there is none; then what changed most.
        Empty for no history.
    """
    rows = list(history)
    fits = courses(rows)
    if not fits:
        return []
    steps = [step for course in fits for step in course.steps]
    during = f" in {len(fits)} fits" if len(fits) > 1 else ""
    words = [f"Read {len(steps)} times{during}, from step {min(steps)} to step {max(steps)}."]
    told = [finding for finding in diagnose_run(rows) if finding.level != "note"]
    words += [f"{finding.level.capitalize()}: {finding.message}" for finding in told]
    last = fits[-1]
    broken = _not_finite(last)
    if not told and not broken:
        words.append("No alarm: no rule finds anything wrong with what was read.")
    return words + broken + _ranks(last) + _weights(last) + _means(last)


def _not_finite(course: Course) -> list[str]:
    """Name what has readings that are no numbers; nothing else is said of it."""
    bad: dict[str, None] = {}
    for what, layer, series in course.every():
        if any(not math.isfinite(value) for value in series.values):
            bad.setdefault(layer or what)
    if not bad:
        return []
    named = ", ".join(list(bad)[:4]) + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
    return [f"Readings of {named} are not finite: nothing is concluded from them."]


def _ranks(course: Course) -> list[str]:
    ranks = {layer: s for layer, s in course.of("effective_rank").items() if len(s.finite) == len(s) > 0}
    if not ranks:
        return []
    empty = [layer for layer, series in ranks.items() if series.first == 0]
    words = []
    dead = [layer for layer in empty if ranks[layer].last == 0]
    alive = [layer for layer in empty if ranks[layer].last > 0]
    if dead:
        words.append(
            f"Ranks: the output of {', '.join(dead)} does not vary at all (rank 0), from first to last."
        )
    if alive:
        words.append(f"Ranks: the output of {', '.join(alive)} did not vary at first (rank 0); it does now.")
    changes = {layer: s.last / s.first for layer, s in ranks.items() if s.first > 0}
    if changes:
        name = min(changes, key=changes.__getitem__)
        series, verb = ranks[name], "fell" if changes[name] < 1 else "went"
        words.append(
            f"Ranks: of {len(ranks)} layers {name} lost most or gained least: its effective rank {verb} from "
            f"{series.first:.1f} to {series.last:.1f}."
        )
    return words


def _weights(course: Course) -> list[str]:
    norms = {layer: s for layer, s in course.of("weight_norm").items() if len(s.finite) == len(s) > 0}
    changes = {layer: s.last / s.first for layer, s in norms.items() if s.first > 0}
    if not changes:
        return []
    least, most = min(changes, key=changes.__getitem__), max(changes, key=changes.__getitem__)
    words = []
    if changes[least] < 1:
        words.append(
            f"Weights: the norm of {least} fell most, from {norms[least].first:.3g} to "
            f"{norms[least].last:.3g}."
        )
    if changes[most] > 1:
        words.append(
            f"Weights: the norm of {most} grew most, from {norms[most].first:.3g} to {norms[most].last:.3g}."
        )
    return words or ["Weights: no norm has changed."]


def _means(course: Course) -> list[str]:
    """Say how summaries of the whole network went, where they are finite."""
    sentences = (
        ("nc1", "Neural collapse: spread within classes over spread between them (NC1) went from {} to {}."),
        ("mean", "Alignment: the mean of the six relations went from {} to {}."),
        ("dormant_units", "Plasticity: dormant units went from {} to {} of a layer, on average."),
        ("trainability", "Trainability on random targets, of a fresh twin's, went from {} to {}."),
    )
    words = []
    for what, sentence in sentences:
        series = course.get(what)
        if len(series) and len(series.finite) == len(series):
            words.append(sentence.format(f"{series.first:.2g}", f"{series.last:.2g}"))
    return words
