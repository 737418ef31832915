"""The loss and the symmetry breakings of one run, on one axis of steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_sym._extras import need
from lightning_sym.plots.readings import log_spaced

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def course(
    history: Sequence[Mapping[str, float]],
    *,
    events: Iterable[Mapping[str, Any]],
    title: str = "",
    quantity: str = "hierarchy",
) -> Figure:
    """Draw the loss with its drops shaded, and below the share of each symmetry's units that is broken.

    A dotted line, in its symmetry's colour, marks a reading at which units broke; a dashed one, that
    units were restored. Steps are logarithmic if they are spaced so.

    Args:
        history: rows as in ``HierarchyMonitor.history``, of one run.
        events: as in ``HierarchyMonitor.events``; those of other steps than the history's are left out.
        title: of the figure.
        quantity: the first part of its keys: the monitor's ``name``, where it has one.

    Returns:
        A matplotlib figure; it is no part of pyplot's state.

    Raises:
        ValueError: if the history is empty.
    """
    need("matplotlib", what="A figure")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not history:
        raise ValueError("history must hold a row, got none")
    first, last = history[0]["step"], history[-1]["step"]
    shown = [event for event in events if first <= event["step"] <= last]
    labels = [
        key.partition("/")[2] for key in history[-1] if key.startswith(f"{quantity}/") and _is_share(key)
    ]
    colours = {label: f"C{k % 10}" for k, label in enumerate(labels)}
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    points = [(row["step"], row[f"{quantity}/loss"]) for row in history if f"{quantity}/loss" in row]
    if points:
        above.plot(*zip(*points, strict=True), color="black", linewidth=1.4)
        if min(loss for _, loss in points) > 0:
            above.set_yscale("log")
    phases = [event for event in shown if event["where"] == "loss"]
    for k, phase in enumerate(phases):
        if phase["event"] == "drop":
            end = phases[k + 1]["after"] if k + 1 < len(phases) else last
            above.axvspan(max(phase["after"], first), max(end, phase["step"]), color="0.9", zorder=0)
    for event in shown:
        if event["where"] in colours:
            style = ":" if event["event"] == "broken" else "--"
            for axes in (above, below):
                axes.axvline(event["step"], color=colours[event["where"]], linestyle=style, linewidth=0.8)
    for label, colour in colours.items():
        rows = [(row["step"], row[f"{quantity}/{label}"]) for row in history if f"{quantity}/{label}" in row]
        below.plot(*zip(*rows, strict=True), color=colour, linewidth=1.3, label=label)
    if log_spaced(row["step"] for row in history):
        below.set_xscale("log")
    below.yaxis.set_major_locator(MaxNLocator(3))
    below.set(ylim=(-0.05, 1.05), ylabel="share broken", xlabel="optimizer steps")
    above.set(ylabel="loss (grey: drops)", title=title)
    if labels:
        below.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _is_share(key: str) -> bool:
    """Return whether a reading is the share of a symmetry's units that is broken."""
    kind = key.rpartition("/")[2].partition("_")[0]
    return key.count("/") >= 2 and kind in ("permutation", "rescaling", "signflip", "rotation")
