"""The loss falls in steps where units leave their symmetries: small initial weights against large ones.

A two-layer ReLU network learns a teacher of three ReLU units by gradient descent, its initial weights
scaled by .01 to 100. Ziyin et al. (2025, arXiv 2502.05300) draw train and test loss over such scales
with the times of symmetry breaking: from small weights the loss goes down a staircase; from large ones
there are no steps, and the test loss stays. Their task and network are not known to us; this one is our
own.

The drops of the loss and the breakings of units are dated as ``HierarchyMonitor`` does. Of the drops, how
many begin within a factor in time (``window``) of a reading at which units broke? Chance is the share of
logarithmic time within the window of such a reading; p is how often drops do as well that are moved in
logarithmic time, each run's together and round the end, to a random place. What counts as a drop, as a
breaking and as near (:data:`FROZEN`) was settled on seeds 0 to 2 after a look at their curves, where 10 of 14
drops fell on a breaking. It is frozen since, and the test is on seeds 100 to 109, which nobody had seen.

    python examples/loss_staircase.py
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table
from _stacked import Stack
from torch import Tensor

from lightning_sym.functional import loss_phases
from lightning_sym.engine.schedule import LogSpaced
from lightning_sym.papers.hierarchy import Data, Student, problem
from lightning_sym.symmetry import breaking_distances, effective_units, find_symmetries

SCALES = (0.01, 0.1, 1.0, 10.0, 100.0)
FIRST_SEED = 100
#: What is counted, for good: a drop falls faster than 1 / t to the power of ``steep`` and follows a plateau
#: that falls slower than to ``flat``; a unit is broken above ``broken_above``; a breaking is a reading at
#: which at least ``least`` units broke; near is within a factor of ``window`` in time.
FROZEN: dict[str, Any] = {"steep": 1.5, "flat": 0.9, "broken_above": 0.1, "least": 2, "window": 1.5}
KINDS = ("permutation", "rescaling")


class Watched:
    """One student among many: its symmetries, which of their units are broken, and its losses."""

    def __init__(self, module: Student, train: Data, test: Data) -> None:
        self.module, self.data = module, (train, test)
        found = find_symmetries(module, train[0][:4], kinds=list(KINDS))
        self.symmetries = {symmetry.kind: symmetry for symmetry in found}
        self.curve: list[list[float]] = []  # [step, train, test]
        self.events: dict[str, list[list[int]]] = {kind: [] for kind in KINDS}  # [step, units]
        self.broken = {kind: self.distances(kind) > FROZEN["broken_above"] for kind in KINDS}
        self.broken_at_start: dict[str, float] = {}

    def distances(self, kind: str) -> Tensor:
        """Return how broken each unit is."""
        return breaking_distances(self.symmetries[kind])

    def take(self, weights: Sequence[Tensor]) -> None:
        """Take the weights ``[D, H], [H, 1]`` of this moment."""
        with torch.no_grad():
            for layer, weight in zip((self.module.first, self.module.second), weights, strict=True):
                layer.weight.copy_(weight.mT)

    def losses(self, step: int) -> None:
        """Read train and test loss."""
        with torch.no_grad():
            self.curve.append([step, *(float(self.module.loss(data)) for data in self.data)])

    def breakings(self, step: int) -> None:
        """Note which units have broken since the reading before."""
        for kind, was in self.broken.items():
            distance = self.distances(kind)
            now = (was | (distance > FROZEN["broken_above"])) & (distance >= FROZEN["broken_above"] / 2)
            if count := int((now & ~was).sum()):
                self.events[kind].append([step, count])
            self.broken[kind] = now
            self.broken_at_start.setdefault(kind, float(now.double().mean()))

    def result(self) -> dict[str, Any]:
        """Return course, events and the last readings."""
        units = effective_units(
            self.symmetries["permutation"], threshold=FROZEN["broken_above"], by_direction=True
        )
        run = {
            "curve": self.curve,
            "broken": self.events,
            "broken_at_start": self.broken_at_start,
            "effective_units": float(units),
            "train": self.curve[-1][1],
            "test": self.curve[-1][2],
        }
        return run | {"drops": drops(run)}


def learn(scale: float, *, options: Any, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Train a network a seed, side by side, by gradient descent; return what each did."""
    watched = []
    for seed in seeds:
        train, test = problem(options.inputs, options.samples, seed=seed)
        watched.append(Watched(Student(options.hidden, train, scale=scale, seed=seed), train, test))
    x, y = (torch.stack([each.data[0][part] for each in watched]) for part in range(2))
    lr = torch.tensor([each.module.lr for each in watched]).view(-1, 1, 1)
    stack = Stack([options.inputs, options.hidden, 1], seeds=seeds)
    stack.weights = [
        torch.stack([getattr(each.module, name).weight.detach().mT for each in watched]).requires_grad_()
        for name in ("first", "second")
    ]
    schedule, due = LogSpaced(options.per_decade), 1
    for step in range(1, options.steps + 1):
        if step == due:
            for k, each in enumerate(watched):
                each.take([weight[k] for weight in stack.weights])
                each.losses(step)
        outputs = stack.outputs(x).squeeze(2)
        stack.step((outputs - y).square().sum() / (2 * options.samples), lr=lr)
        if step == due:
            for k, each in enumerate(watched):
                each.take([weight[k] for weight in stack.weights])
                each.breakings(step)
            due = schedule.next(due)
    return [each.result() for each in watched]


def drops(run: dict[str, Any]) -> list[float]:
    """Return when the loss of a run's curve began to drop."""
    steps, losses, _ = zip(*run["curve"], strict=True)
    phases = loss_phases(steps, losses, steep=FROZEN["steep"], flat=FROZEN["flat"])
    return [steps[phase.seen] for phase in phases if phase.what == "drop"]


def dates(run: dict[str, Any]) -> list[float]:
    """Return the readings at which units broke, enough of them at once."""
    units: dict[float, int] = {}
    for found in run["broken"].values():
        for step, count in found:
            units[step] = units.get(step, 0) + count
    return sorted(step for step, count in units.items() if count >= FROZEN["least"])


def met(drops: Sequence[float], breaks: Sequence[float], *, window: float) -> int:
    """Return how many drops have a breaking within a factor ``window`` in time."""
    return sum(any(abs(math.log(d / b)) <= math.log(window) for b in breaks) for d in drops)


def coverage(breaks: Sequence[float], *, window: float, steps: int) -> float:
    """Return the share of logarithmic time, from step 1 to the last, within the window of a breaking."""
    covered, reached, reach = 0.0, 0.0, math.log(window)
    for at in sorted(math.log(b) for b in breaks):
        low, high = max(at - reach, reached), min(at + reach, math.log(steps))
        covered += max(0.0, high - low)
        reached = max(reached, high)
    return covered / math.log(steps)


def chance(runs: Sequence[dict[str, Any]], *, options: Any, draws: int = 10_000) -> dict[str, float]:
    """Hold drops against breakings, over runs together."""
    pairs, window = [(run["drops"], dates(run)) for run in runs], FROZEN["window"]
    total, whole = sum(len(found) for found, _ in pairs), math.log(options.steps)
    hits = sum(met(found, breaks, window=window) for found, breaks in pairs)
    expected = sum(len(d) * coverage(b, window=window, steps=options.steps) for d, b in pairs)
    rng, as_many = random.Random(0), 0
    for _ in range(draws):
        found = 0
        for begun, breaks in pairs:
            shift = rng.random() * whole
            moved = [math.exp((math.log(d) + shift) % whole) for d in begun]
            found += met(moved, breaks, window=window)
        as_many += found >= hits
    p = (as_many + 1) / (draws + 1) if total else math.nan
    return {"drops": total, "met": hits, "by_chance": expected, "p": p}


def draw(runs: dict[str, Any]) -> Any:
    """Draw the first seed's course at every scale; a dotted line is a reading at which units broke."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3), layout="constrained")
    for axes, (scale, row) in zip(figure.subplots(1, len(runs), sharey=True), runs.items(), strict=True):
        run = row["seeds"][0]
        steps, train, test = zip(*run["curve"], strict=True)
        for date in dates(run):
            axes.axvline(date, color="C2", linestyle=":", linewidth=0.8)
        for date in run["drops"]:
            axes.axvline(date, ymax=0.06, color="black", linewidth=2)
        axes.plot(steps, train, color="C0", label="train")
        axes.plot(steps, test, color="C1", label="test")
        axes.set(xscale="log", yscale="log", xlabel="step", title=f"initial scale {scale}")
    figure.axes[0].set_ylabel("loss")
    last = figure.axes[-1]
    last.plot([], [], color="C2", linestyle=":", label="units break")
    last.plot([], [], color="black", linewidth=2, label="drop begins")
    last.legend(fontsize=8, loc="lower left")
    return figure


def main() -> None:
    """Train all, print tables, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/loss_staircase"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--inputs", type=int, default=20)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=50)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--per-decade", type=int, default=16, help="readings")
    parser.add_argument("--smoke", action="store_true", help="seconds: fewer steps, two scales")
    options = parser.parse_args()
    scales: tuple[float, ...] = SCALES
    if options.smoke:
        options.seeds, options.steps, scales = 2, 1000, (0.01, 100.0)
    began = time.process_time()
    runs: dict[str, Any] = {}
    chosen = range(FIRST_SEED, FIRST_SEED + options.seeds)
    for scale in scales:
        seeds = learn(scale, options=options, seeds=chosen)
        keys = ("train", "test", "effective_units")
        numbers = {key: spread([run[key] for run in seeds]) for key in keys}
        runs[str(scale)] = {**numbers, **chance(seeds, options=options), "seeds": seeds}
        print(f"scale {scale} done", flush=True)
    every = chance([run for row in runs.values() for run in row["seeds"]], options=options)
    rows = [
        (
            scale,
            *(row[key]["mean"] for key in ("train", "test", "effective_units")),
            *(row[key] for key in ("drops", "met", "by_chance", "p")),
        )
        for scale, row in runs.items()
    ]
    rows.append(("all", "", "", "", *every.values()))
    print(table(rows, ("scale", "train", "test", "units", "drops", "met", "by chance", "p")))
    config = {k: v for k, v in vars(options).items() if k != "out"}
    config |= {"seeds": list(chosen), "frozen": FROZEN}
    seconds = time.process_time() - began
    figure = draw(runs)
    for row in runs.values():  # the courses are for the picture; the first seed's stays on record
        for run in row["seeds"][1:]:
            del run["curve"]
    save(
        options.out,
        "loss_staircase",
        {"config": config, "cpu_seconds": seconds, "all": every, "runs": runs},
        figure,
    )


if __name__ == "__main__":
    main()
