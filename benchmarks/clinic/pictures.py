"""Pictures for ``docs/monitors.md``: healthy runs of the clinic beside sick ones, as monitors read them.

    python -m benchmarks.clinic.pictures

Fits each pair (seed 0) and writes ``docs/pictures/monitor_<quantity>.png``, overviews of two sick runs and
what is said of each run (``docs/results/pictures.json``).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from matplotlib.figure import Figure

from lightning_sym.callbacks import Monitor, SharpnessMonitor
from lightning_sym.diagnosis import diagnose_run
from lightning_sym.plots import overview
from lightning_sym.plots.readings import layer_colours, layer_legend, layer_styles

from ..common import write_json
from .cases import all_cases
from .fitting import EVERY_N_STEPS, QUIET, quiet, watchers

DOCS = Path(__file__).resolve().parents[2] / "docs"
Rows = list[dict[str, float]]


@dataclass(frozen=True)
class Panel:
    """One reading of the pair.

    Args:
        key: ``<quantity>/<what>`` of the network, or of each layer where ``layers``.
        title: what it is.
        layers: whether it is read by layer.
        logarithmic: whether its axis is.
        line: a level to draw.
        chance: key of the level that chance gives, drawn in grey.
    """

    key: str
    title: str
    layers: bool = True
    logarithmic: bool = False
    line: float | None = None
    chance: str = ""


@dataclass(frozen=True)
class Pair:
    """A healthy and a sick case, and what to show of them."""

    healthy: str
    sick: str
    panels: tuple[Panel, ...]
    more: tuple[type[Monitor], ...] = ()


PAIRS: Mapping[str, Pair] = {
    "collapse": Pair(
        "mlp/plain",
        "mlp/rank_by_decay",
        (
            Panel("collapse/effective_rank", "effective rank of the output"),
            Panel("collapse/score", "score (0: nothing lost)", layers=False),
        ),
    ),
    "plasticity": Pair(
        "mlp/plain",
        "mlp/dead_by_rate",
        (
            Panel("plasticity/dead_units", "dead units that feed the layer"),
            Panel("plasticity/relative_update", "relative update of the weight", logarithmic=True),
        ),
    ),
    "alignment": Pair(
        "mlp/plain",
        "mlp/rank_by_decay",
        (
            Panel("alignment/mean", "six relations (grey: chance)", layers=False, chance="alignment/null"),
            Panel("alignment/out/rga", "representation and gradient"),
        ),
    ),
    "signal": Pair(
        "mlp/tanh",
        "mlp/vanish_in_sigmoids",
        (
            Panel("signal/gradient", "size of the output gradient", logarithmic=True),
            Panel("signal/distance", "distance of the weight from its start"),
        ),
    ),
    "sharpness": Pair(
        "mlp/full_batch_stable",
        "mlp/edge",
        (
            Panel("sharpness/ratio", "largest curvature over the line", layers=False, line=1.0),
            Panel("signal/loss", "loss", layers=False, logarithmic=True),
        ),
        (SharpnessMonitor,),
    ),
    "eigenmodes": Pair(
        "ssl/mlp_vicreg",
        "ssl/mlp_no_variance",
        (
            Panel("eigenmodes/embedding/variance", "variance", layers=False, logarithmic=True),
            Panel("eigenmodes/embedding/collapse", "collapse (2: complete)", layers=False),
        ),
    ),
}


#: Pairs of whose sick run the overview is drawn as well, and its name.
OVERVIEWS = {"collapse": "collapse", "plasticity": "dead_units"}


def fitted(name: str, more: Sequence[type[Monitor]] = (), *, logger: Any = False) -> Rows:
    """Fit a case with the clinic's monitors and some more; return all their rows."""
    torch.manual_seed(1000)
    task = all_cases()[name].build(0)
    callbacks = [*watchers(task), *(kind(every_n_steps=EVERY_N_STEPS) for kind in more)]
    torch.manual_seed(2000)
    with quiet():
        for loader in task.loaders:
            settings = {**QUIET, **task.trainer, "logger": logger}
            Trainer(max_steps=task.steps, max_epochs=-1, callbacks=callbacks, **settings).fit(
                task.module, loader
            )
    return [row for monitor in callbacks for row in monitor.history]


def curves(rows: Rows, panel: Panel) -> dict[str, dict[float, float]]:
    """Return a panel's values by layer and step, what is not finite left out."""
    first, _, last = panel.key.partition("/")
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        for key, value in row.items():
            parts = key.split("/")
            of_layer = panel.layers and len(parts) > 2 and (parts[0], "/".join(parts[2:])) == (first, last)
            if (of_layer or key == panel.key) and math.isfinite(value):
                found.setdefault(parts[1] if of_layer else "", {})[row["step"]] = value
    return found


def draw(pair: Pair, healthy: Rows, sick: Rows) -> Figure:
    """Draw a pair: a row a reading, healthy on the left, both on one scale."""
    figure = Figure(figsize=(7.6, 2.1 * len(pair.panels) + 0.4), layout="constrained")
    axes: Any = figure.subplots(len(pair.panels), 2, squeeze=False, sharex="col", sharey="row")
    layers: dict[str, None] = {}
    for panel in pair.panels:
        layers |= {name: None for rows in (healthy, sick) for name in curves(rows, panel) if name}
    colours, styles = layer_colours(layers), layer_styles(layers)
    for line, panel in zip(axes, pair.panels, strict=True):
        for axis, rows in zip(line, (healthy, sick), strict=True):
            for name, curve in curves(rows, panel).items():
                steps = sorted(curve)
                axis.plot(
                    steps,
                    [curve[s] for s in steps],
                    color=colours.get(name, "black"),
                    ls=styles.get(name, "-"),
                    lw=1.4,
                )
            if chance := curves(rows, Panel(panel.chance, "", layers=False)).get(""):
                axis.plot(sorted(chance), [chance[s] for s in sorted(chance)], color="0.7", lw=1.4)
            if panel.line is not None:
                axis.axhline(panel.line, color="0.5", lw=0.8, ls=":")
            if panel.logarithmic:
                axis.set_yscale("log")
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=7)
        line[0].set_ylabel(panel.title, fontsize=8)
        if not panel.logarithmic:
            low, high = line[0].get_ylim()
            line[0].set_ylim(min(low, 0.0), high)
    for axis, name, word in zip(axes[0], (pair.healthy, pair.sick), ("healthy", "sick"), strict=True):
        axis.set_title(f"{word}: {name.partition('/')[2].replace('_', ' ')}", fontsize=9)
    figure.supxlabel("optimizer step", fontsize=8)
    if colours:
        layer_legend(figure, colours)
    return figure


def main() -> None:
    """Fit and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=list(PAIRS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    told: dict[str, Any] = {}
    done: dict[tuple[str, tuple[type[Monitor], ...]], Rows] = {}
    for quantity in options.only or PAIRS:
        pair = PAIRS[quantity]
        rows = []
        for name in (pair.healthy, pair.sick):
            if (name, pair.more) not in done:
                done[name, pair.more] = fitted(name, pair.more)
            rows.append(done[name, pair.more])
            told[name] = [str(f) for f in diagnose_run(rows[-1]) if f.level != "note"]
        draw(pair, *rows).savefig(DOCS / "pictures" / f"monitor_{quantity}.png", dpi=90)
        if quantity in OVERVIEWS:
            overview(rows[1]).savefig(DOCS / "pictures" / f"overview_{OVERVIEWS[quantity]}.png", dpi=90)
        print(quantity, {name: len(found) for name, found in told.items()}, flush=True)
    if not options.only:
        config = {"seed": 0}
        write_json(DOCS / "results" / "pictures.json", config=config, results={"findings": told})


if __name__ == "__main__":
    main()
