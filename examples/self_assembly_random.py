"""A circuit from random lateral synapses: does it wire itself, and does it learn as well as backprop?

In the four-synapse rule (a reconstruction, see ``self_assembly.py``) random laterals diverge for a reason:
one
output weight and its lateral follow W' = R g and R' = W g, so that W + R and W - R never change sign, and a
lateral below -|W| leads away from the target for ever. With ten outputs a random output lateral almost never
lies in the right cone. Hence the assumption made here: **the output's lateral is held at the identity** (the
error comes with a sign). Hidden laterals are random, and must find their alignment by themselves.

Arms: ``assembled`` (random hidden laterals that learn) over decay gamma, initial scale and learning rate eta;
``frozen``, the control, whose laterals stay random; ``identity``, whose laterals begin aligned; ``sign``: all
laterals random, the output's too, and every ascending neuron takes what it is taught by the sign of its
running agreement with the descending neuron beside it (after the local sign of arXiv 2505.02248, in our
reading); ``plain``, the same without signs; feedback alignment; backprop.

    python examples/self_assembly_random.py
    python examples/self_assembly_random.py --data MNIST

Shape letters: B samples, I inputs.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from pathlib import Path
from typing import Any

import torch
from _circuits import Circuits, Setting
from _report import save, spread, table
from self_assembly import tensors
from torch import Tensor

READINGS = ("laterals", "feedback", "update")
Data = tuple[Tensor, Tensor]


def settings(options: Any) -> list[Setting]:
    """Return every circuit that is trained."""
    found = []
    seeds = range(options.seeds)
    shared = {"lateral_rate": options.lateral_rate}
    for arm in options.arms:
        random = arm in ("assembled", "frozen", "sign", "sign_pairs", "plain")
        wired = arm not in ("backprop", "feedback_alignment")
        etas = options.etas if wired else [options.lr]
        gammas = options.gammas if wired else [options.decay]
        if wired and arm != "assembled":  # the grid is of what is to be shown; its controls need one rate
            etas = etas[:1]
        if arm in ("sign", "sign_pairs", "plain"):
            gammas = gammas[len(gammas) // 2 :][:1]
        scales = options.scales if arm == "assembled" else [1.0 if random else 0.0]
        for eta, gamma, scale, seed in itertools.product(etas, gammas, scales, seeds):
            found.append(Setting(arm, eta, gamma, scale, seed=seed, **shared))
    return found


def train(parts: tuple[Data, Data], options: Any) -> list[dict[str, Any]]:
    """Train all circuits side by side; return for each its setting and its course."""
    (x, y), test = parts
    circuits = Circuits([x.shape[1], *options.hidden, 10], settings(options))
    seeds = torch.tensor([setting.seed for setting in circuits.settings])
    order = [torch.Generator().manual_seed(setting) for setting in range(options.seeds)]
    probe = (x[: options.probe], y[: options.probe])
    per_epoch = len(x) // options.batch
    total, done = options.epochs * per_epoch, 0
    rows: list[dict[str, Any]] = [{**vars(s), "course": []} for s in circuits.settings]

    def read(epoch: int) -> None:
        circuits.clear()
        seen, right = circuits.readings(*probe), circuits.accuracy(*test)
        for k, row in enumerate(rows):
            row["diverged"] = bool(circuits.diverged[k])
            if not row["diverged"]:
                values = {name: seen[name][k] for name in READINGS}
                row["course"].append({"epoch": epoch, "accuracy": right[k], **values})

    read(0)
    for epoch in range(1, options.epochs + 1):
        index = torch.stack([torch.randperm(len(x), generator=g) for g in order])
        for part in index[:, : per_epoch * options.batch].split(options.batch, dim=1):
            chosen = part[seeds]
            circuits.learn(x[chosen], y[chosen], share=1 - done / total)
            done += 1
            if done % 20 == 0:
                circuits.clear()
        if epoch in options.read_at or epoch == options.epochs:
            read(epoch)
            print(f"epoch {epoch}, {int(circuits.diverged.sum())} of {len(rows)} diverged", flush=True)
    return rows


def hidden(point: dict[str, Any], name: str) -> float:
    """Return the mean of a reading over the hidden layers."""
    return sum(point[name]) / len(point[name])


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return by arm and setting accuracy and readings at the end, over the seeds that did not diverge."""
    found: dict[str, Any] = {}
    for row in rows:
        name = f"{row['arm']}, eta {row['eta']:g}, gamma {row['gamma']:g}, scale {row['scale']:g}"
        found.setdefault(name, []).append(row)
    result: dict[str, Any] = {}
    for name, members in found.items():
        kept = [row["course"] for row in members if not row["diverged"]]
        cell: dict[str, Any] = {
            key: members[0][key] for key in ("arm", "eta", "gamma", "scale", "lateral_rate")
        }
        cell |= {"seeds": len(members), "diverged": len(members) - len(kept)}
        if kept:
            cell["accuracy"] = spread([course[-1]["accuracy"] for course in kept])
            for key in READINGS:
                cell[key] = spread([hidden(course[-1], key) for course in kept])
                cell[f"{key}_start"] = spread([hidden(course[0], key) for course in kept])
            cell["course"] = [
                {"epoch": points[0]["epoch"]}
                | {"accuracy": spread([point["accuracy"] for point in points])["median"]}
                | {key: spread([hidden(point, key) for point in points])["median"] for key in READINGS}
                for points in zip(*kept, strict=True)
            ]
        result[name] = cell
    return result


def against(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Hold assembled circuits, decay by decay and seed by seed, against frozen ones and against backprop.

    At scale 1 and the first learning rate, where there are frozen ones; NaN for a seed that diverged.
    """

    def ends(arm: str, read: Any, **wanted: float) -> list[float]:
        chosen = [r for r in rows if r["arm"] == arm and all(r[k] == v for k, v in wanted.items())]
        return [read(row["course"][-1]) if not row["diverged"] else math.nan for row in chosen]

    result: dict[str, Any] = {}
    for eta, gamma in dict.fromkeys((r["eta"], r["gamma"]) for r in rows if r["arm"] == "frozen"):
        at = {"eta": eta, "gamma": gamma, "scale": 1.0}
        cell: dict[str, Any] = {"eta": eta}
        for name in ("accuracy", *READINGS):

            def read(point: dict[str, Any], name: str = name) -> float:
                return float(point[name] if name == "accuracy" else hidden(point, name))

            cell[name], cell[f"{name}_frozen"] = (ends(arm, read, **at) for arm in ("assembled", "frozen"))
            if name == "accuracy":
                pairs = {"frozen": cell["accuracy_frozen"], "backprop": ends("backprop", read)}
                for arm, others in pairs.items():
                    points = [100 * (a - b) for a, b in zip(cell["accuracy"], others, strict=False)]
                    cell[f"points_over_{arm}"] = points
        cell["seeds_beyond_frozen"] = sum(points > 0 for points in cell["points_over_frozen"])
        result[f"{gamma:g}"] = cell
    return result


def draw(cells: dict[str, Any], options: Any) -> Any:
    """Draw the courses of the arms at one setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.3), layout="constrained")
    axes = figure.subplots(1, 3)
    at = {"eta": options.etas[0], "gamma": options.gammas[len(options.gammas) // 2], "scale": 1.0}
    shown = [
        cell
        for cell in cells.values()
        if "course" in cell
        and (
            cell["arm"] in ("backprop", "feedback_alignment")
            or (cell["eta"] == at["eta"] and cell["gamma"] == at["gamma"])
        )
        and (cell["arm"] != "assembled" or cell["scale"] == at["scale"])
    ]
    for k, cell in enumerate(shown):
        epochs = [point["epoch"] for point in cell["course"]]
        label = cell["arm"].replace("_", " ")
        if cell["diverged"]:
            label += f" ({cell['diverged']} of {cell['seeds']} diverged)"
        for axis, key in zip(axes, ("accuracy", "laterals", "update"), strict=True):
            if key == "laterals" and cell["arm"] in ("backprop", "feedback_alignment"):
                continue
            values = [point[key] for point in cell["course"]]
            axis.plot(epochs, values, "o-", color=f"C{k}", markersize=3, label=label)
    titles = ("test accuracy", "cos(R, $L^T$), hidden", "update and backprop's, cos, hidden")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xlabel="epoch", title=title)
    axes[0].set_ylim(0.5, 1)
    for axis in axes[1:]:
        axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes[0].legend(fontsize=7, loc="lower right")
    return figure


def main() -> None:
    """Train all, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/self_assembly_random"))
    parser.add_argument(
        "--data", type=Path, default=None, help="a torchvision root with MNIST; default: digits"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=None)
    parser.add_argument("--gammas", type=float, nargs="+", default=None)
    parser.add_argument("--scales", type=float, nargs="+", default=None, help="of the random laterals")
    parser.add_argument("--etas", type=float, nargs="+", default=None)
    parser.add_argument("--lateral-rate", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=0.1, help="of backprop and feedback alignment")
    parser.add_argument("--decay", type=float, default=1e-3, help="of these two")
    parser.add_argument("--hidden", type=int, nargs="+", default=None)
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--read-at", type=int, nargs="+", default=[1, 2, 4, 8, 15, 30, 45], help="epochs")
    parser.add_argument("--probe", type=int, default=500, help="samples on which updates are compared")
    parser.add_argument("--smoke", action="store_true", help="seconds: digits, two seeds, few epochs")
    options = parser.parse_args()
    every = [
        "backprop",
        "feedback_alignment",
        "identity",
        "assembled",
        "frozen",
        "sign",
        "sign_pairs",
        "plain",
    ]
    large = options.data is not None
    for key, small, big in (
        ("arms", every, ["backprop", "assembled", "frozen"]),
        ("gammas", [0.01, 0.03, 0.1], [0.01]),
        ("scales", [0.3, 1.0, 3.0], [1.0]),
        ("etas", [0.03, 0.1], [0.015]),
        ("hidden", [64, 64], [64, 64]),
        ("epochs", 60, 2),
        ("batch", 32, 64),
    ):
        if getattr(options, key) is None:
            setattr(options, key, big if large else small)
    if options.smoke:
        options.seeds, options.epochs, options.read_at = 2, 6, [1, 3]
        options.gammas, options.scales, options.etas, options.hidden = [0.03], [1.0], [0.03], [32, 32]
    options.images = "mnist"
    began = time.process_time()
    train_part, test, name = tensors(options)
    rows = train((train_part, test), options)
    cells = summary(rows)
    shown = [
        (
            cell["arm"],
            *(cell[key] for key in ("eta", "gamma", "scale")),
            *(cell[key]["median"] if key in cell else "" for key in ("accuracy", *READINGS)),
            cell["accuracy"]["low"] if "accuracy" in cell else "",
            f"{cell['diverged']}/{cell['seeds']}",
        )
        for cell in cells.values()
    ]
    header = ("arm", "eta", "gamma", "scale", "accuracy", *READINGS, "worst", "diverged")
    print(table(shown, header))
    compared = against(rows)
    for gamma, cell in compared.items():
        keys = ("points_over_frozen", "points_over_backprop", "laterals", "laterals_frozen")
        print(f"gamma {gamma}, scale 1:", {key: [round(v, 2) for v in cell[key]] for key in keys})
    config = {k: v for k, v in vars(options).items() if k not in ("out", "data")}
    config |= {"images": name, "train": len(train_part[0]), "test": len(test[0])}
    result = {
        "config": config,
        "assumed": "the output's lateral is held at the identity in all arms but sign and plain",
        "cpu_seconds": time.process_time() - began,
        "compared": compared,
        "cells": cells,
    }
    save(options.out, f"self_assembly_random_{name}", result, draw(cells, options))


if __name__ == "__main__":
    main()
