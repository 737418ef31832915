"""Histories of monitors as one figure: a panel a quantity, a line a layer."""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_sym._extras import need
from lightning_sym.observe.layers import evenly

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What belongs to a fit and not into a picture, unless it is asked for.
DETAILS = ("_low", "_high", "_r2", "_off_diagonal", "_directions", "_decades", "_residual", "phase_distance")

_COLUMNS = 4
_DECADES = 50.0  # ratio of large to small values from which on their axis is logarithmic
_SOLID = 6  # up to so many layers colours alone tell them apart
_MOST_NAMES = 16  # layers named one by one; more of them get a scale from first to last


@dataclass
class _Panel:
    """What is drawn into one panel: per layer (``""`` is the network as a whole) steps and values."""

    quantity: str
    what: str
    lines: dict[str, dict[float, float]] = field(default_factory=dict)
    chance: dict[float, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.quantity}/{self.what}"

    @property
    def values(self) -> list[float]:
        found = [value for line in self.lines.values() for value in line.values()]
        return found + [value for level in self.chance.values() for value in level]


def summary(
    history: Iterable[Mapping[str, Any]],
    *,
    keys: str | Sequence[str] | None = None,
    columns: int = _COLUMNS,
) -> Figure:
    """Draw the readings of one or several monitors.

    One panel for each quantity and what of it, one line for each layer, coloured by depth. What is
    read of the network as a whole is a black line. Chance levels (``.../null``) become a grey band
    in the panels that they are levels for. Steps are on a logarithmic axis if they are spaced so, and
    so are values that are positive and spread over a factor of 50, the outermost twentieths aside.

    Args:
        history: rows as in ``callback.history``: ``step`` and scalars by their keys
            (``<quantity>/<layer>/<what>``, ``<quantity>/<what>``). Histories of several monitors are
            added: ``summary(collapse.history + alignment.history)``. Several fits are drawn one after
            another.
        keys: a glob, or several, on ``<quantity>/<what>``; ``None``: everything but details of fits.
        columns: panels a row.

    Returns:
        A matplotlib figure; it is no part of pyplot's state.

    Raises:
        ValueError: if nothing is there to draw, or ``columns`` is below 1.
    """
    need("matplotlib", what="A figure")
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    panels, layers = _panels(_one_after_another(list(history)), [keys] if isinstance(keys, str) else keys)
    rows = _rows(panels, columns)
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(2.7 * columns + 1.9, 1.9 * len(rows) + 0.5), layout="constrained")
    grid: Any = figure.subplots(len(rows), columns, squeeze=False, sharex=True)
    colours = layer_colours(layers)
    logarithmic = log_spaced({step for panel in panels for line in panel.lines.values() for step in line})
    for i, row in enumerate(rows):
        for j in range(columns):
            axis = grid[i, j]
            if j >= len(row):
                axis.set_visible(False)
                continue
            _draw(axis, row[j], colours, logarithmic=logarithmic)
            below = i + 1 < len(rows) and j < len(rows[i + 1])
            axis.tick_params(labelsize=7, labelbottom=not below)
    figure.supxlabel("optimizer step", fontsize=8)
    more: list[Any] = []
    if any("" in panel.lines for panel in panels):
        more.append(Line2D([], [], color="black", linewidth=1.6, label="network"))
    if any(panel.chance for panel in panels):
        more.append(Patch(color="0.8", label="chance"))
    layer_legend(figure, colours, more=more)
    return figure


def log_spaced(steps: Iterable[float]) -> bool:
    """Return whether steps are spaced evenly in the logarithm rather than evenly.

    Args:
        steps: any order; steps below 1 are ignored.

    Returns:
        False for fewer than four steps.

    Example:
        >>> log_spaced([1, 2, 4, 8, 16, 32]), log_spaced([1, 100, 200, 300, 400])
        (True, False)
    """
    ordered = sorted({step for step in steps if step >= 1})
    if len(ordered) < 4:
        return False
    return _unevenness([math.log(step) for step in ordered]) < _unevenness(ordered)


def _unevenness(values: Sequence[float]) -> float:
    gaps = [b - a for a, b in itertools.pairwise(values)]
    mean = sum(gaps) / len(gaps)
    return math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) / mean


def _one_after_another(history: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return rows whose steps go on from fit to fit, so that a later fit does not hide an earlier one."""
    last: dict[float, float] = {}
    for row in history:
        fit = float(row.get("fit", 1))
        last[fit] = max(last.get(fit, 0), row["step"])
    before, offset = {}, 0.0
    for fit in sorted(last):
        before[fit], offset = offset, offset + last[fit]
    if len(last) < 2:
        return history
    return [{**row, "step": row["step"] + before[float(row.get("fit", 1))]} for row in history]


def _panels(
    history: list[Mapping[str, Any]], globs: Sequence[str] | None
) -> tuple[list[_Panel], dict[str, None]]:
    """Sort all readings into panels; return them and the layers, both in order of appearance."""
    panels: dict[tuple[str, str], _Panel] = {}
    levels: list[tuple[str, str, float, float]] = []
    layers: dict[str, None] = {}
    for row in history:
        for key, value in row.items():
            parts = key.split("/")
            if len(parts) < 2 or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            quantity, layer, what = parts[0], "", parts[-1]
            if len(parts) > 2:
                layer, what = parts[1], "/".join(parts[2:])
            step = float(row["step"])
            if parts[-1] == "null":
                levels.append((quantity, "" if not layer else what.removesuffix("null"), step, float(value)))
            elif _wanted(f"{quantity}/{what}", globs):
                panel = panels.setdefault((quantity, what), _Panel(quantity, what))
                panel.lines.setdefault(layer, {})[step] = float(value)
                if layer:
                    layers.setdefault(layer)
    if not panels:
        asked = "" if globs is None else f" among keys that match {list(globs)}"
        raise ValueError(f"history holds no finite reading{asked}")
    for quantity, prefix, step, value in levels:
        for panel in panels.values():
            of_network = set(panel.lines) == {""}
            if panel.quantity == quantity and (
                (panel.what == "mean" and prefix == "")
                if of_network
                else (prefix and panel.what.startswith(prefix) and "/" not in panel.what[len(prefix) :])
            ):
                panel.chance.setdefault(step, []).append(value)
    return list(panels.values()), layers


def _wanted(name: str, globs: Sequence[str] | None) -> bool:
    if globs is None:
        return not name.endswith(DETAILS)
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _rows(panels: list[_Panel], columns: int) -> list[list[_Panel]]:
    """Break panels into rows: every quantity starts a new one and ends with what is of the network."""
    rows = []
    for quantity in dict.fromkeys(panel.quantity for panel in panels):
        own = [panel for panel in panels if panel.quantity == quantity and set(panel.lines) != {""}]
        whole = [panel for panel in panels if panel.quantity == quantity and set(panel.lines) == {""}]
        own += sorted(whole, key=lambda panel: panel.what)
        rows += [own[start : start + columns] for start in range(0, len(own), columns)]
    return rows


def layer_colours(layers: Iterable[str]) -> dict[str, Any]:
    """Return a colour for each layer, from dark to bright with depth.

    Args:
        layers: names in the network's order.

    Returns:
        RGBA tuples by name.
    """
    need("matplotlib", what="A figure")
    from matplotlib import colormaps

    names = list(layers)
    ramp = colormaps["viridis"]
    return {name: ramp(0.92 * i / max(len(names) - 1, 1)) for i, name in enumerate(names)}


def _draw(axis: Axes, panel: _Panel, colours: Mapping[str, Any], *, logarithmic: bool) -> None:
    if panel.chance:
        steps = sorted(panel.chance)
        least, most = [min(panel.chance[s]) for s in steps], [max(panel.chance[s]) for s in steps]
        axis.fill_between(steps, least, most, color="0.8", linewidth=1.5, zorder=0)
    styles = {**layer_styles(colours), "": "-" if set(panel.lines) == {""} else "--"}
    for layer, line in panel.lines.items():
        steps = sorted(line)
        axis.plot(
            steps,
            [line[step] for step in steps],
            color=colours[layer] if layer else "black",
            linewidth=1.2 if layer else 1.6,
            linestyle=styles[layer],
            marker="." if len(steps) < 3 else None,
        )
    if logarithmic:
        axis.set_xscale("log")
    values = sorted(panel.values)
    low, high = values[0], values[-1]
    bulk = values[len(values) // 20], values[-1 - len(values) // 20]  # a few outliers decide nothing
    if low > 0 and bulk[1] / bulk[0] >= _DECADES:
        axis.set_yscale("log")
    elif high - low < 0.02 * max(abs(low), abs(high)) or high == low:  # jitter is no trend
        middle = (low + high) / 2
        half = 0.02 * abs(middle) or 0.05
        axis.set_ylim(middle - half, middle + half)
        axis.ticklabel_format(axis="y", useOffset=False)
    axis.set_title(f"{panel.quantity}: {panel.what.replace('_', ' ')}", fontsize=8)
    axis.grid(visible=True, color="0.92", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def layer_styles(layers: Iterable[str]) -> dict[str, Any]:
    """Return a line style for each layer: neighbours of many layers differ in it, being of like colours.

    Args:
        layers: names in the network's order.
    """
    names = list(layers)
    every_second = (0, (5, 1.5)) if len(names) > _SOLID else "-"
    return {name: every_second if i % 2 else "-" for i, name in enumerate(names)}


def layer_legend(
    figure: Figure,
    colours: Mapping[str, Any],
    *,
    more: Sequence[Any] = (),
    title: str = "layers by depth",
) -> None:
    """Put one legend of the layers beside the panels.

    Args:
        figure: with a constrained layout.
        colours: by name; of many layers an evenly spread choice is named.
        more: further handles.
        title: of the legend.
    """
    need("matplotlib", what="A figure")
    from matplotlib.lines import Line2D

    names, styles = list(colours), layer_styles(colours)
    if len(names) > _MOST_NAMES:  # the ends included
        names = [names[i] for i in evenly(len(names), _MOST_NAMES)]
        title += f"\n({len(names)} of {len(colours)})"
    handles = [
        Line2D([], [], color=colours[name], linestyle=styles[name], label=_short(name)) for name in names
    ]
    figure.legend(
        handles=[*handles, *more],
        loc="outside right upper",
        fontsize=7,
        title=title if names else None,
        title_fontsize=7,
        frameon=False,
    )


def _short(name: str, most: int = 26) -> str:
    """Return a layer's name, cut in its middle if it is long; the ends tell layers apart."""
    if len(name) <= most:
        return name
    return f"{name[: most // 2 - 1]}…{name[len(name) - most // 2 :]}"
