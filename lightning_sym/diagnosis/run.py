"""From the histories of monitors to findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_sym.diagnosis.course import Course, courses
from lightning_sym.diagnosis.finding import Finding
from lightning_sym.diagnosis.rules import RULES
from lightning_sym.diagnosis.rules.loss import BLOWN_UP
from lightning_sym.diagnosis.rules.trained import NO_GRADIENT

#: Kinds of alarm a run: more would hide what is to be done first.
MOST_KINDS = 3
_INITIAL = "the initialisation"
_SILENT = {"rank_collapse", "vanishing_gradients", "frozen", "lazy_training", "attention_collapse"}
#: What a finding entails: where the first is, the others follow from it and are notes.
ENTAILS: dict[str, set[str]] = {
    "exploding_gradients": {"divergence", "dead_units", "dead_block", "plasticity_loss", *_SILENT},
    "saturation": {"plasticity_loss", "divergence", *_SILENT},
    "weights_vanish": {"dead_units", "dead_block", "equal_units", "posterior_collapse", *_SILENT},
    "dead_block": {"dead_units", "equal_units", *_SILENT},
    # Weights that are zero for good are equal; that they never move, or that all looks alike, is told, too.
    "equal_units": {"dead_units", *_SILENT} - {"frozen", "attention_collapse"},
    "dead_units": {"equal_units", *_SILENT},
    "attention_collapse": {"rank_collapse", "vanishing_gradients", "frozen"},
    "posterior_collapse": {"dead_units", "rank_collapse", "weights_vanish", "equal_units", "plasticity_loss"},
    "mode_collapse": {"rank_collapse", "dead_units", "divergence", "plasticity_loss"},
    "embedding_collapse_complete": {"embedding_collapse_dimensional", "weights_vanish", *_SILENT},
    "embedding_collapse_dimensional": {"rank_collapse", "equal_units"},
    "frozen": {"rank_collapse", "vanishing_gradients", "attention_collapse"},
    "rank_collapse": {"attention_collapse", "frozen"},
    "plasticity_loss": {"dead_units", "rank_collapse"},
    "vanishing_gradients": {"lazy_training", "frozen"},
}


def diagnose_run(history: Any) -> list[Finding]:
    """Say what is wrong with a run, from what any monitors read of it.

    The order of precedence is that of :data:`lightning_sym.diagnosis.rules.RULES`: a finding that entails
    others (:data:`ENTAILS`) makes notes of them; what is wired wrongly goes first. After divergence
    everything that was not there at the first reading follows from it. At most three kinds of alarm remain;
    further ones are warnings.

    Args:
        history: rows (``monitor.history``), several lists of rows, a monitor, or several. Rows have a
            ``step`` and, if there was more than one fit, a ``fit``; each fit is judged by itself, and that
            many fits learn worse and worse is judged over all of them.

    Returns:
        Findings, alarms first, each kind and layer once with the step it began.

    Raises:
        TypeError: if a row is no mapping.
        ValueError: if a row has no ``step``.
    """
    found: dict[tuple[str, str], Finding] = {}
    fits = courses(history)
    for course in fits:
        for finding in _of_fit(course):
            if course.fits > 1:
                finding = replace(finding, message=f"Fit {course.number} of {course.fits}: {finding.message}")
            if course.number > 1:  # what is there at its first reading may come from the fit before
                cause = finding.cause.replace(_INITIAL, f"{_INITIAL} or what the fit before left", 1)
                finding = replace(finding, cause=cause)
            found.setdefault((finding.kind, finding.layer), finding)
    if len(fits) > 1:
        for finding in _of_fit(_joined(fits)):
            if finding.kind == "plasticity_loss":
                found.setdefault((finding.kind, finding.layer), finding)
    return _limited(list(found.values()))


def diagnose_course(course: Course) -> list[Finding]:
    """Return the findings of one fit, as :func:`diagnose_run` does of all; none before its first reading."""
    return _limited(_of_fit(course))


def _of_fit(course: Course) -> list[Finding]:
    if not course.steps:
        return []
    return _primary([finding for rule in RULES for finding in rule(course)], course)


def _joined(fits: Sequence[Course]) -> Course:
    """Return several fits as one, their steps one after another."""
    whole, before = Course(), 0
    for course in fits:
        for what, layer, series in course.every():
            for step, value in zip(series.steps, series.values, strict=True):
                whole.add("/".join(part for part in ("fits", layer, what) if part), before + step, value)
        before += course.steps[-1]
    return whole


def _primary(found: list[Finding], course: Course) -> list[Finding]:
    """Make notes of what follows from another finding."""
    kept: list[Finding] = []
    explained: dict[str, Finding] = {}
    # Weights that blew up say what drives the rest, and yet not what is wrong with it.
    diverged = next((f for f in found if f.kind == "divergence" and f.limit != BLOWN_UP), None)
    # What is wired wrongly follows from nothing that training does; a dead block lets no gradient in, either.
    blocked = any(finding.kind == "dead_block" for finding in found)
    found = sorted(
        found, key=lambda f: not f.cause.startswith("wiring") or (blocked and f.cause.endswith(NO_GRADIENT))
    )
    for finding in _by_depth(found, course):
        cause = explained.get(finding.kind)
        by = None if cause is None or _was_before(finding, cause, course) else cause.kind
        late = diverged is not None and finding.step > course.steps[0]
        if by == "posterior_collapse" and finding.kind == "dead_units" and finding.step <= course.steps[0]:
            by = None  # then it is the other way round
        if finding.kind == "frozen" and course.get("weight_norm", finding.layer).zero:
            by = None  # a weight that is zero keeps itself and others from moving
        if by is None and late and finding.kind != "divergence":
            by = "divergence"
        if by is not None:
            kept.append(replace(finding, level="note", cause=f"it follows from {by}"))
            continue
        kept.append(finding)
        for kind in ENTAILS.get(finding.kind, ()):
            explained.setdefault(kind, finding)
    return kept


def _was_before(finding: Finding, cause: Finding, course: Course) -> bool:
    """Return whether a finding was there at the first reading, and what would explain it came later."""
    return finding.step <= course.steps[0] < cause.step


def _by_depth(found: list[Finding], course: Course) -> list[Finding]:
    """Put lost rank before flat attention that comes after it: of inputs that are alike none stands out."""
    depth = {layer: at for at, layer in enumerate(course.ran)}
    first = {f.kind: depth.get(f.layer, 0) for f in reversed(found)}
    if first.get("rank_collapse", len(depth)) >= first.get("attention_collapse", -1):
        return found
    return sorted(found, key=lambda f: f.kind == "attention_collapse")


def _limited(found: list[Finding]) -> list[Finding]:
    kinds = list(dict.fromkeys(f.kind for f in found if f.level == "alarm"))[:MOST_KINDS]
    limited = [
        replace(f, level="warning") if f.level == "alarm" and f.kind not in kinds else f for f in found
    ]
    order = {"alarm": 0, "warning": 1, "note": 2}
    return sorted(limited, key=lambda finding: order[finding.level])
