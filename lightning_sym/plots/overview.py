"""One picture of a run: the loss, layers by depth over time, and the findings."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_sym._extras import need
from lightning_sym.diagnosis import Finding, diagnose_run
from lightning_sym.diagnosis.course import Course, courses

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What is drawn: reading, title, whether its decimal logarithm is shown, and limits.
STRIPS: tuple[tuple[str, str, bool, tuple[float, float] | None], ...] = (
    ("dead_units", "dead input units (share)", False, (0.0, 1.0)),
    ("effective_rank", "effective rank of the output (log10)", True, None),
    ("gradient", "size of the output gradient (log10)", True, None),
    ("relative_update", "relative update of the weight (log10)", True, None),
)
COLOURS = {"alarm": "#c0392b", "warning": "#d98c00", "note": "#7f8c8d"}


def overview(history: Iterable[Mapping[str, float]], *, findings: Sequence[Finding] | None = None) -> Figure:
    """Draw the last fit of a history: loss and events, a strip of layers by depth for each reading, findings.

    Args:
        history: rows as in ``callback.history``; histories of several monitors are added.
        findings: what to write below; None: those of :func:`~lightning_sym.diagnosis.diagnose_run`.

    Returns:
        A figure; the first layer is on top of each strip.

    Raises:
        ValueError: if there is no row.
    """
    need("matplotlib", what="A figure")
    from matplotlib.figure import Figure

    rows = list(history)
    fits = courses(rows)
    if not fits:
        raise ValueError("history must hold a row, got none")
    course = fits[-1]
    told = [f for f in (diagnose_run(rows) if findings is None else findings) if f.level != "note"]
    strips = [strip for strip in STRIPS if course.of(strip[0])]
    lines = [line for finding in told for line in _lines(finding)] or [("", "No finding.")]
    heights = [1.6, *(0.5 + 0.2 * min(len(course.of(s[0])), 16) for s in strips), 0.4 + 0.2 * len(lines)]
    figure = Figure(figsize=(9, sum(heights) + 0.5), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    _draw_loss(axes[0], course, told)
    for axis, (what, title, logarithm, limits) in zip(axes[1:-1], strips, strict=True):
        _draw_strip(figure, axis, course, what, title, logarithm=logarithm, limits=limits)
    axes[-2].set_xlabel("optimizer step" + (" (grey: not read)" if strips else ""), fontsize=9)
    axes[-1].axis("off")
    for i, (level, line) in enumerate(lines):
        axes[-1].text(
            0.0, 1 - (i + 0.5) / len(lines), line, va="center", color=COLOURS.get(level, "black"), fontsize=9
        )
    return figure


def _lines(finding: Finding) -> list[tuple[str, str]]:
    whole = (
        f"{finding.level.capitalize()} since step {finding.step}: {finding.message} Cause: {finding.cause}."
    )
    parts = textwrap.wrap(whole, 120)
    return [(finding.level, part if i == 0 else f"    {part}") for i, part in enumerate(parts)]


def _draw_loss(axis: Any, course: Course, told: Sequence[Finding]) -> None:
    loss = course.loss.finite
    if len(loss):
        axis.plot(loss.steps, loss.values, color="black", lw=1.5)
        if min(loss.values) > 0 and max(loss.values) > 20 * min(loss.values):
            axis.set_yscale("log")
    else:
        axis.text(0.5, 0.5, "the loss is not known", ha="center", va="center", transform=axis.transAxes)
    for finding in told:
        axis.axvline(finding.step, color=COLOURS[finding.level], ls="--", lw=1)
        axis.annotate(
            finding.kind,
            (finding.step, 0.97),
            xycoords=("data", "axes fraction"),
            rotation=90,
            va="top",
            ha="left",
            fontsize=7,
            color=COLOURS[finding.level],
        )
    axis.set(xlim=_limits(course), title="loss")
    axis.title.set_fontsize(10)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_strip(
    figure: Any,
    axis: Any,
    course: Course,
    what: str,
    title: str,
    *,
    logarithm: bool,
    limits: tuple[float, float] | None,
) -> None:
    series = course.of(what)
    steps = sorted({step for each in series.values() for step in each.steps})
    table = [[math.nan] * len(steps) for _ in series]
    at = {step: i for i, step in enumerate(steps)}
    positive = [v for each in series.values() for v in each.values if math.isfinite(v) and v > 0]
    least = min(positive, default=1.0)  # a 0 has no logarithm: it gets the darkest colour
    for row, each in zip(table, series.values(), strict=True):
        for step, value in zip(each.steps, each.values, strict=True):
            if math.isfinite(value):
                row[at[step]] = math.log10(max(value, least)) if logarithm else value
    low, high = limits or (None, None)
    edges = [
        steps[0] - 0.5 if len(steps) == 1 else steps[0],
        *((a + b) / 2 for a, b in itertools.pairwise(steps)),
    ]
    edges.append(steps[-1] + (0.5 if len(steps) == 1 else 0))
    axis.set_facecolor("#dddddd")  # what was not read
    drawn = axis.pcolormesh(
        edges, range(len(series) + 1), table, vmin=low, vmax=high, cmap="viridis", rasterized=True
    )
    axis.invert_yaxis()
    axis.set_yticks([i + 0.5 for i in range(len(series))], [name[-24:] for name in series], fontsize=7)
    axis.set(xlim=_limits(course), title=title)
    axis.title.set_fontsize(10)
    figure.colorbar(drawn, ax=axis, pad=0.01)


def _limits(course: Course) -> tuple[float, float]:
    first, last = course.steps[0], course.steps[-1]
    return (first, last) if last > first else (first - 0.5, first + 0.5)
