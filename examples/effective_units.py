"""How many different units does a network keep, as it gets wider and its weights decay?

Ziyin et al. (2025, arXiv 2502.05300) conjecture that with weight decay the number of distinct neurons stays
bounded as the width grows. A two-layer ReLU student of a teacher of three ReLU units, at widths and
decays: units that are neither zero nor another one's twin (up to their rescaling) are counted by
``lightning_sym.symmetry.effective_units``, without a Trainer.

    python examples/effective_units.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table

from lightning_sym.papers.hierarchy import Student, problem
from lightning_sym.symmetry import effective_units, find_symmetries


def learn(width: int, decay: float, *, options: Any, seed: int) -> dict[str, float]:
    """Train one network; return the units that it keeps and its losses."""
    train, test = problem(options.inputs, options.samples, seed=seed)
    module = Student(width, train, scale=options.scale, weight_decay=decay, seed=seed)
    optimizer = module.configure_optimizers()
    for _ in range(options.steps):
        optimizer.zero_grad()
        module.loss(train).backward()
        optimizer.step()
    (symmetry,) = find_symmetries(module, train[0][:4], kinds=["permutation"])
    with torch.no_grad():
        losses = [float(module.loss(data)) for data in (train, test)]
    units = effective_units(symmetry, threshold=options.threshold, by_direction=True)
    return {"units": float(units), "train": losses[0], "test": losses[1]}


def draw(rows: dict[str, Any], *, options: Any) -> Any:
    """Draw units kept over width, a line a decay."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    widths = options.widths
    left.plot(widths, widths, color="black", linewidth=0.7, label="all")
    for decay in options.decays:
        cells = [rows[f"{width}, {decay}"] for width in widths]
        for axes, key in ((left, "units"), (right, "test")):
            mean, error = [c[key]["mean"] for c in cells], [c[key]["std"] for c in cells]
            axes.errorbar(widths, mean, yerr=error, marker="o", markersize=4, label=f"decay {decay:g}")
    for axes, name in ((left, "effective units"), (right, "test loss")):
        axes.set(xscale="log", yscale="log", xlabel="width", ylabel=name)
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.minorticks_off()
    left.legend(fontsize=7)
    return figure


def main() -> None:
    """Train all, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/effective_units"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--inputs", type=int, default=20)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 48, 144])
    parser.add_argument("--decays", type=float, nargs="+", default=[0.0, 0.01, 0.1])
    parser.add_argument("--scale", type=float, default=0.3, help="of the initial weights")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--threshold", type=float, default=0.1)
    parser.add_argument("--smoke", action="store_true", help="seconds: fewer steps, widths and decays")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.steps, options.widths, options.decays = 2, 1500, [16, 48], [0.0, 0.1]
    rows: dict[str, Any] = {}
    for decay in options.decays:
        for width in options.widths:
            seeds = [learn(width, decay, options=options, seed=seed) for seed in range(options.seeds)]
            rows[f"{width}, {decay}"] = {key: spread([s[key] for s in seeds]) for key in seeds[0]}
            cells = [rows[f"{width}, {decay}"][key] for key in ("units", "train", "test")]
            print(width, decay, *(f"{c['mean']:.4g}+-{c['std']:.2g}" for c in cells), flush=True)
    keys = ("units", "train", "test")
    shown = [(*name.split(", "), *(row[key]["mean"] for key in keys)) for name, row in rows.items()]
    print(table(shown, ("width", "decay", *keys)))
    config = {k: v for k, v in vars(options).items() if k != "out"}
    save(options.out, "effective_units", {"config": config, "rows": rows}, draw(rows, options=options))


if __name__ == "__main__":
    main()
