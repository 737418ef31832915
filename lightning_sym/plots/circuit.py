"""How a circuit comes to agree with backprop: angles over time, from what a monitor kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from lightning_sym._extras import need

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "feedback_cosine": "feedback and forward, cos($W^T$, $V$)",
    "update_cosine": "update and backprop's, cos",
}


def alignment_over_time(history: Iterable[Mapping[str, float]], *, quantity: str = "circuit") -> Figure:
    """Draw the cosines that a ``CircuitMonitor`` read, a line a layer, over optimizer steps.

    Args:
        history: the monitor's rows, with ``step`` and ``circuit/...`` keys; others are left out.
        quantity: the first part of its keys.

    Returns:
        A matplotlib figure with one panel for each of the two cosines that was read. The black dashed
        line is the whole network's.

    Raises:
        ValueError: if no row has either.
    """
    need("matplotlib", what="A figure")
    from matplotlib.figure import Figure  # not pyplot: no global state, no window

    rows = list(history)
    lines: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for what in TITLES:
        for row in rows:
            for key, value in row.items():
                first, _, rest = key.partition("/")
                layer, _, last = rest.rpartition("/")
                if first == quantity and last == what:
                    steps, values = lines.setdefault(what, {}).setdefault(layer, ([], []))
                    steps.append(row["step"])
                    values.append(value)
    if not lines:
        raise ValueError(
            f"history must have {quantity}/.../update_cosine or .../feedback_cosine, got neither"
        )
    figure = Figure(figsize=(4.2 * len(lines), 3.2), layout="constrained")
    panels = figure.subplots(1, len(lines), squeeze=False)[0]
    for axes, (what, by_layer) in zip(panels, lines.items(), strict=True):
        for k, (layer, (steps, values)) in enumerate(item for item in by_layer.items() if item[0]):
            axes.plot(steps, values, color=f"C{k % 10}", marker=".", label=layer)
        if "" in by_layer:
            axes.plot(*by_layer[""], color="black", linestyle="--", linewidth=1, label="all")
        axes.axhline(0, color="0.8", linewidth=0.7, zorder=0)
        low = min(value for _, values in by_layer.values() for value in [*values, 0.0] if value == value)
        axes.set(ylim=(min(-0.05, low - 0.05), 1.05), xlabel="optimizer steps", title=TITLES[what])
        axes.title.set_fontsize(9)
        axes.legend(fontsize=7)
    return figure
