"""Why do the two sides of the balance align less in a tanh network than in a linear one: curve or steps?

``representation_normalisation.py`` comes to a cosine of .94 between W Cov(x) W' and U' Cov(noise) U in a
two-layer tanh network, where theory, which is of linear networks, says 1. Two things could keep it there. The
same networks are trained with units ``tanh(a x) / a``, which are linear at ``a = 0`` and curve the more the
larger ``a``; and at smaller learning rates, with which what SGD's fluctuations do must shrink (the number of
steps grows as the inverse square of the rate). Three lopsided starts, as there.

    python examples/tanh_balance.py
"""

from __future__ import annotations

import argparse
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table
from representation_normalisation import STARTS, train
from torch import Tensor


def curved(gain: float) -> Any:
    """Return the activation ``tanh(gain x) / gain``, at a gain of 0 the identity."""

    def activation(x: Tensor) -> Tensor:
        return torch.tanh(gain * x) / gain if gain else x

    return activation


def draw(cells: dict[str, Any], options: Any) -> Any:
    """Draw the cosine over the gain, a line a learning rate, all starts and seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axis = figure.subplots()
    for k, rate in enumerate(options.rates):
        found = [cells[f"gain {gain:g}, rate {rate:g}"]["cosine"] for gain in options.gains]
        bars = [[c["median"] - c["low"] for c in found], [c["high"] - c["median"] for c in found]]
        middle = [c["median"] for c in found]
        label = f"learning rate {rate:g}"
        axis.errorbar(
            options.gains, middle, bars, fmt="o-", color=f"C{k}", capsize=3, markersize=4, label=label
        )
    axis.axhline(1, color="0.6", linewidth=0.8)
    axis.set(xlabel="a, units tanh(a x) / a", ylabel="cosine of the two sides of the balance")
    axis.legend(fontsize=8, loc="lower left")
    return figure


def main() -> None:
    """Train all, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tanh_balance"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--size", type=int, default=6, help="inputs, and outputs")
    parser.add_argument("--hidden", type=int, default=6)
    parser.add_argument("--uneven", type=float, default=0.6, help="decades between variances")
    parser.add_argument("--start", type=float, default=0.8, help="gain of the initial weights")
    parser.add_argument("--gains", type=float, nargs="+", default=[0, 0.25, 0.5, 1, 1.5])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.08, 0.04])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12_000, help="at the largest rate")
    parser.add_argument("--every", type=int, default=20, help="steps between two moments that are averaged")
    parser.add_argument("--smoke", action="store_true", help="seconds: smaller, fewer steps and seeds")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.size, options.hidden, options.steps = 2, 4, 4, 2000
        options.gains, options.rates = [0, 1.5], [0.08]
    began = time.process_time()
    cells: dict[str, Any] = {}
    for rate in options.rates:
        for gain in options.gains:
            steps = round(options.steps * (max(options.rates) / rate) ** 2)
            given = Namespace(**{**vars(options), "lr": rate, "steps": steps})
            rows = train("tanh", "SGD", given, activation=curved(gain))
            runs = [run for start in STARTS for run in rows[start]]
            cell = {key: spread([run[key] for run in runs]) for key in ("cosine", "norms")}
            cell["by_start"] = {start: spread([run["cosine"] for run in rows[start]]) for start in STARTS}
            cells[f"gain {gain:g}, rate {rate:g}"] = cell
            print(f"gain {gain:g}, rate {rate:g}: cosine {cell['cosine']['median']:.3f}", flush=True)
    shown = [(name, *(cell["cosine"][k] for k in ("median", "low", "high"))) for name, cell in cells.items()]
    print(table(shown, ("", "cosine", "low", "high")))
    config = {k: v for k, v in vars(options).items() if k != "out"}
    result = {"config": config, "cpu_seconds": time.process_time() - began, "cells": cells}
    save(options.out, "tanh_balance", result, draw(cells, options))


if __name__ == "__main__":
    main()
