"""Is the number of units in use bounded once training has ended? The course of it, over many more steps.

``effective_units.py`` counts the units of a ReLU student after 6,000 steps and finds more of them in wider
networks. Units that the task does not need shrink, and units in one direction draw together, at the pace of
weight decay. The same networks, from the same weights, are trained on here and counted as they go.
``unrest`` is the size of a step's change over that of weight decay alone: zero where training has ended.

    python examples/effective_units_course.py

Shape letters: K networks, B samples, D inputs, H hidden units.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table
from _stacked import Stack
from torch import Tensor

from lightning_sym.papers.hierarchy import Student, problem
from lightning_sym.symmetry import effective_units, find_symmetries

KEYS = ("units", "train", "test", "unrest")


def count(student: Student, x: Tensor, *, threshold: float) -> float:
    """Return the units that are neither zero nor another one's twin."""
    (symmetry,) = find_symmetries(student, x[:4], kinds=["permutation"])
    return float(effective_units(symmetry, threshold=threshold, by_direction=True))


def course(width: int, decay: float, options: Any) -> dict[int, list[dict[str, float]]]:
    """Train all seeds side by side; return by step what each network shows."""
    parts = [problem(options.inputs, options.samples, seed=seed) for seed in range(options.seeds)]
    students = [
        Student(width, train, scale=options.scale, weight_decay=decay, seed=seed)
        for seed, (train, _) in enumerate(parts)
    ]
    stack = Stack([options.inputs, width, 1], seeds=range(options.seeds))
    stack.weights = [
        torch.stack([layer.weight.detach().mT for layer in layers]).requires_grad_()
        for layers in ([s.first for s in students], [s.second for s in students])
    ]
    x_KBD = torch.stack([train[0] for train, _ in parts])
    y_KB = torch.stack([train[1] for train, _ in parts])
    lr = torch.tensor([student.lr for student in students]).view(-1, 1, 1)
    rows: dict[int, list[dict[str, float]]] = {}
    for step in range(1, max(options.read_at) + 1):
        loss = (stack.outputs(x_KBD).squeeze(2) - y_KB).square().mean(1).sum() / 2
        before = [weight.detach().clone() for weight in stack.weights] if step in options.read_at else []
        stack.step(loss, lr=lr, decay=decay)
        if not before:
            continue
        pairs = list(zip(stack.weights, before, strict=True))
        with torch.no_grad():
            moved = sum(((new - old) / lr).square().flatten(1).sum(1) for new, old in pairs)
            pulled = sum((decay * new).square().flatten(1).sum(1) for new, _ in pairs)
        rows[step] = []
        for k, (student, (train, test)) in enumerate(zip(students, parts, strict=True)):
            with torch.no_grad():
                student.first.weight.copy_(stack.weights[0][k].mT)
                student.second.weight.copy_(stack.weights[1][k].mT)
                found = [float(student.loss(data)) for data in (train, test)]
            units = count(student, train[0], threshold=options.threshold)
            unrest = float((moved[k] / pulled[k]).sqrt())
            rows[step].append(dict(zip(KEYS, (units, *found, unrest), strict=True)))
    return rows


def draw(rows: dict[str, Any], options: Any) -> Any:
    """Draw units in use over steps, a panel a decay and a line a width; and what a step still changes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(options.decays), 5.6), layout="constrained")
    panels = figure.subplots(2, len(options.decays), sharex=True, squeeze=False)
    for k, decay in enumerate(options.decays):
        for i, width in enumerate(options.widths):
            found = rows[f"{width}, {decay}"]
            at = [int(step) * 1.04**i for step in found]  # bars of two widths side by side
            for axis, key in zip(panels[:, k], ("units", "unrest"), strict=True):
                cells = [cell[key] for cell in found.values()]
                bars = [[c["median"] - c["low"] for c in cells], [c["high"] - c["median"] for c in cells]]
                middle = [c["median"] for c in cells]
                axis.errorbar(at, middle, bars, fmt="o-", color=f"C{i}", markersize=4, label=f"width {width}")
        panels[0, k].set(xscale="log", yscale="log", title=f"decay {decay:g}", ylabel="units in use")
        panels[1, k].set(yscale="log", xlabel="step", ylabel="change of a step / weight decay's")
        panels[1, k].set_xticks([int(step) for step in found], [f"{int(step):,}" for step in found])
        panels[1, k].xaxis.set_minor_formatter("")
        for axis in panels[:, k]:
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
            axis.tick_params(axis="x", which="minor", bottom=False)
            axis.tick_params(axis="y", which="both", labelsize=7)
    panels[0, 0].legend(fontsize=8)
    return figure


def main() -> None:
    """Train all, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/effective_units_course"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--inputs", type=int, default=20)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 48, 144])
    parser.add_argument("--decays", type=float, nargs="+", default=[0.01, 0.1])
    parser.add_argument("--scale", type=float, default=0.3, help="of the initial weights")
    parser.add_argument("--read-at", type=int, nargs="+", default=[3000, 6000, 12_000, 24_000, 48_000])
    parser.add_argument("--threshold", type=float, default=0.1)
    parser.add_argument("--smoke", action="store_true", help="seconds: fewer steps, widths and decays")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.widths, options.decays, options.read_at = 2, [16, 48], [0.1], [500, 1500]
    began = time.process_time()
    rows: dict[str, Any] = {}
    for decay in options.decays:
        for width in options.widths:
            rows[f"{width}, {decay}"] = {
                str(step): {key: spread([run[key] for run in runs]) for key in KEYS}
                for step, runs in course(width, decay, options).items()
            }
            print(
                width,
                decay,
                {s: r["units"]["median"] for s, r in rows[f"{width}, {decay}"].items()},
                flush=True,
            )
    shown = [
        (*name.split(", "), step, *(cell[key]["median"] for key in KEYS))
        for name, found in rows.items()
        for step, cell in found.items()
    ]
    print(table(shown, ("width", "decay", "step", *KEYS)))
    config = {k: v for k, v in vars(options).items() if k != "out"}
    result = {"config": config, "cpu_seconds": time.process_time() - began, "rows": rows}
    save(options.out, "effective_units_course", result, draw(rows, options))


if __name__ == "__main__":
    main()
