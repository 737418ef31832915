"""Plasticity on a stream of random labels: does training lose the ability to fit, and what keeps it?

The same images get new random labels in every task; a ReLU network goes on from where it is, by Adam. Its
accuracy on them at the end of a task says how well it still can fit. Arms differ in the decay alone: none;
towards zero, at several strengths; towards a frozen random point (syre, Ziyin et al., 2024, arXiv
2408.15495) of several sizes relative to ordinary initial weights; towards the start. Every kind of decay is
tuned over the same strengths, and compared at its own best. Rank is the effective rank of the last hidden
layer's activations, dormant the share of units that hardly ever answer.

Inputs are the leading principal components of the images, which keeps the network small; no biases. With
``--convolutional`` two convolutions see the images themselves, MNIST's at half their side.

    python examples/plasticity_random_labels.py                # scikit-learn's digits
    python examples/plasticity_random_labels.py --data MNIST
    python examples/plasticity_random_labels.py --data MNIST --convolutional --images-used 300 --tasks 8 \
        --steps 300 --sigmas 1 --late 3

Shape letters: K networks, N images, D inputs.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table
from _stacked import ConvolutionStack, Stack
from self_assembly import tensors
from torch import Tensor
from torch.nn import functional as F

from lightning_sym.functional import dormant_fraction, effective_rank

KEYS = ("accuracy", "rank", "dormant", "norm")


class Adam:
    """Adam with decay added to the gradient, of strengths and towards points of each network's own."""

    def __init__(self, stack: Stack, *, lr: float, decay: Tensor, points: list[Tensor]) -> None:
        self.stack, self.lr, self.decay, self.points = stack, lr, decay, points
        self.first = [torch.zeros_like(w) for w in stack.weights]
        self.second = [torch.zeros_like(w) for w in stack.weights]
        self.steps = 0

    def step(self, loss: Tensor) -> None:
        """Make a step down the sum of the networks' losses."""
        self.steps += 1
        scale = self.lr * (1 - 0.999**self.steps) ** 0.5 / (1 - 0.9**self.steps)
        floor = 1e-8 * (1 - 0.999**self.steps) ** 0.5
        gradients = torch.autograd.grad(loss, self.stack.weights)
        with torch.no_grad():
            for weight, gradient, point, m, v in zip(
                self.stack.weights, gradients, self.points, self.first, self.second, strict=True
            ):
                gradient = gradient + self.decay * (weight - point)
                m.lerp_(gradient, 0.1)
                v.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                weight.addcdiv_(m, v.sqrt().add_(floor), value=-scale)


def arms(options: Any) -> list[dict[str, Any]]:
    """Return what each network of a seed does."""
    found: list[dict[str, Any]] = [{"arm": "plain", "decay": 0.0, "sigma": 0.0}]
    for decay in options.decays:
        found.append({"arm": "decay", "decay": decay, "sigma": 0.0})
        found += [{"arm": f"syre, sigma {s:g}", "decay": decay, "sigma": s} for s in options.sigmas]
        found.append({"arm": "towards the start", "decay": decay, "sigma": 0.0})
    return found


def inputs(options: Any) -> tuple[Tensor, str]:
    """Return the images' leading principal components ``[N, D]``, of unit variance on average.

    For convolutions the images themselves, of half the side where that is above 8.
    """
    (x, _), _, name = tensors(options)
    index = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: options.images_used]
    if options.convolutional:
        side = math.isqrt(x.shape[1])
        images = x[index].reshape(-1, 1, side, side)
        x = (F.avg_pool2d(images, 2) if side > 8 else images).flatten(1)
        return (x - x.mean()) / x.std(), name
    x = x[index] - x[index].mean(dim=0)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    x = (u * s)[:, : options.components]
    return x / x.square().mean().sqrt(), name


def networks(inputs: int, *, seeds: list[int], options: Any) -> Stack:
    """Return networks of the seeds: two hidden layers, or two convolutions and a hidden layer."""
    if options.convolutional:
        return ConvolutionStack(
            math.isqrt(inputs), (8, 16), hidden=options.hidden, outputs=10, seeds=seeds, gain=2**0.5
        )
    return Stack([inputs, options.hidden, options.hidden, 10], seeds=seeds, gain=2**0.5)


def stream(x_ND: Tensor, options: Any) -> list[dict[str, Any]]:
    """Run the stream for all arms and seeds side by side."""
    chosen = [each | {"seed": seed} for seed in range(options.seeds) for each in arms(options)]
    stack = networks(x_ND.shape[1], seeds=[each["seed"] for each in chosen], options=options)
    sigma = torch.tensor([each["sigma"] for each in chosen]).view(-1, 1, 1)
    start = torch.tensor([each["arm"] == "towards the start" for each in chosen]).view(-1, 1, 1)
    points = [
        torch.where(start, weight.detach(), sigma * other.detach())
        for weight, other in zip(
            stack.weights,
            networks(x_ND.shape[1], seeds=[5000 + e["seed"] for e in chosen], options=options).weights,
            strict=True,
        )
    ]
    decay = torch.tensor([each["decay"] for each in chosen]).view(-1, 1, 1)
    optimizer = Adam(stack, lr=options.lr, decay=decay, points=points)
    labels = [torch.Generator().manual_seed(100 + seed) for seed in range(options.seeds)]
    order = torch.Generator().manual_seed(7)
    seeds = torch.tensor([each["seed"] for each in chosen])
    rows: list[dict[str, Any]] = [each | {"course": []} for each in chosen]
    for task in range(options.tasks):
        y = torch.stack([torch.randint(10, (len(x_ND),), generator=g) for g in labels])[seeds]
        for _ in range(options.steps):
            index = torch.randint(len(x_ND), (options.batch,), generator=order)
            outputs = stack.outputs(x_ND[index].expand(len(chosen), -1, -1))
            losses = F.cross_entropy(outputs.flatten(0, 1), y[:, index].flatten(), reduction="sum")
            optimizer.step(losses / options.batch)
        with torch.no_grad():
            below, above = stack.forward(x_ND.expand(len(chosen), -1, -1))
            right = (above[-1].argmax(dim=2) == y).double().mean(dim=1)
            for k, row in enumerate(rows):
                row["course"].append(
                    {
                        "accuracy": float(right[k]),
                        "rank": float(effective_rank(below[-1][k])),
                        "dormant": float(dormant_fraction(below[-1][k])),
                        "norm": float(sum(w[k].square().sum() for w in stack.weights) ** 0.5),
                    }
                )
        if task % 5 == 4:
            print(f"task {task + 1} of {options.tasks}", flush=True)
    return rows


def summary(rows: list[dict[str, Any]], *, late: int) -> dict[str, Any]:
    """Return by arm and decay the first task and the mean of the last ones."""
    cells: dict[str, Any] = {}
    for name in dict.fromkeys(f"{row['arm']}, decay {row['decay']:g}" for row in rows):
        mine = [row for row in rows if f"{row['arm']}, decay {row['decay']:g}" == name]
        cells[name] = {key: mine[0][key] for key in ("arm", "decay", "sigma")}
        cells[name]["first"] = spread([row["course"][0]["accuracy"] for row in mine])
        for key in KEYS:
            values = [sum(task[key] for task in row["course"][-late:]) / late for row in mine]
            cells[name][key] = spread(values)
            if key == "accuracy":
                cells[name]["by_seed"] = values
        tasks = zip(*(row["course"] for row in mine), strict=True)
        cells[name]["course"] = [spread([task["accuracy"] for task in each])["median"] for each in tasks]
    return cells


def best(cells: dict[str, Any]) -> dict[str, Any]:
    """Return each kind of decay at its best strength, and what it gains over plain decay, seed by seed."""
    found: dict[str, Any] = {}
    for name, cell in cells.items():
        kind = cell["arm"]
        if kind not in found or cell["accuracy"]["median"] > cells[found[kind]]["accuracy"]["median"]:
            found[kind] = name
    reference = cells[found["decay"]]["by_seed"]
    return {
        kind: {
            "cell": name,
            "points_over_decay": [
                100 * (a - b) for a, b in zip(cells[name]["by_seed"], reference, strict=True)
            ],
        }
        for kind, name in found.items()
    }


def draw(cells: dict[str, Any], chosen: dict[str, Any]) -> Any:
    """Draw accuracy over tasks of each kind at its best, and rank against accuracy of all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, (kind, row) in enumerate(chosen.items()):
        cell = cells[row["cell"]]
        left.plot(range(1, len(cell["course"]) + 1), cell["course"], color=f"C{k}", label=row["cell"])
        mine = [other for other in cells.values() if other["arm"] == kind]
        right.plot(
            [other["rank"]["median"] for other in mine],
            [other["accuracy"]["median"] for other in mine],
            "o",
            color=f"C{k}",
        )
    left.set(xlabel="task", ylabel="accuracy at its end", ylim=(0, 1))
    left.legend(fontsize=6)
    right.set(xlabel="effective rank, last tasks", ylabel="accuracy, last tasks")
    return figure


def main() -> None:
    """Run the streams, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/plasticity_random_labels"))
    parser.add_argument(
        "--data", type=Path, default=None, help="a torchvision root with MNIST; default: digits"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=12)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--components", type=int, default=64)
    parser.add_argument("--images-used", type=int, default=800)
    parser.add_argument("--decays", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.3, 1.0])
    parser.add_argument("--late", type=int, default=5, help="last tasks that are averaged over")
    parser.add_argument(
        "--convolutional", action="store_true", help="two convolutions before the last layers"
    )
    parser.add_argument("--smoke", action="store_true", help="seconds: few short tasks, two seeds")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.tasks, options.steps, options.late = 2, 3, 120, 1
        options.images_used, options.decays, options.sigmas = 200, [1e-3], [1.0]
    options.images = "mnist"
    began = time.process_time()
    x, name = inputs(options)
    cells = summary(stream(x, options), late=options.late)
    chosen = best(cells)
    rows = [
        (n, c["first"]["median"], *(c[key]["median"] for key in KEYS), c["accuracy"]["low"])
        for n, c in cells.items()
    ]
    print(table(rows, ("arm", "first task", "last tasks", "rank", "dormant", "norm", "worst seed")))
    for kind, row in chosen.items():
        print(kind, row["cell"], [round(points, 1) for points in row["points_over_decay"]])
    config = {k: v for k, v in vars(options).items() if k not in ("out", "data")} | {"images": name}
    result = {"config": config, "cpu_seconds": time.process_time() - began, "best": chosen, "cells": cells}
    kind = "plasticity_convolutional" if options.convolutional else "plasticity_random_labels"
    save(options.out, f"{kind}_{name}", result, draw(cells, chosen))


if __name__ == "__main__":
    main()
