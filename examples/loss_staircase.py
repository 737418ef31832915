"""The loss falls in steps where units leave their symmetries: small initial weights against large ones.

A two-layer ReLU network learns a teacher of three ReLU units by gradient descent, its initial weights
scaled by .01 to 100. Ziyin et al. (2025, arXiv 2502.05300) draw train and test loss over such scales
with the times of symmetry breaking: from small weights the loss goes down a staircase; from large ones
there are no steps, and the test loss stays. Their task and network are not known to us; this one is our
own.

``HierarchyMonitor`` dates the drops of the loss and the breakings. Of the drops, how many begin within a
factor ``--window`` in time of a reading at which units broke? Chance is the share of logarithmic time
within the window of such a reading; p is how often drops do as well that are moved in logarithmic time,
each run's together and round the end, to a random place. ``--steep`` and ``--flat`` were set after a look at
the curves, so that what the eye takes for steps counts as drops: p describes, it does not test.

    python examples/loss_staircase.py
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table
from _trainer import quiet_trainer
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_sym.callbacks import HierarchyMonitor
from lightning_sym.engine.schedule import LogSpaced
from lightning_sym.functional import loss_phases
from lightning_sym.papers.hierarchy import Data, Student, problem

SCALES = (0.01, 0.1, 1.0, 10.0, 100.0)
KINDS = ("permutation", "rescaling")


class Losses(Callback):
    """Reads train and test loss before a due step, as the loss of the step itself is."""

    def __init__(self, test: Data, *, schedule: LogSpaced) -> None:
        self.test, self.schedule, self.due = test, schedule, 1
        self.curve: list[list[float]] = []  # [step, train, test]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Read, if the coming step is due."""
        if trainer.global_step + 1 == self.due:
            with torch.no_grad():
                losses = [float(pl_module.loss(data)) for data in (batch, self.test)]
            self.curve.append([self.due, *losses])
            self.due = self.schedule.next(self.due)


def learn(scale: float, *, options: Any, seed: int) -> dict[str, Any]:
    """Train one network; return its course, its events and the last readings."""
    train, test = problem(options.inputs, options.samples, seed=seed)
    schedule = LogSpaced(options.per_decade)
    losses = Losses(test, schedule=schedule)
    monitor = HierarchyMonitor(
        every_n_steps=schedule,
        broken_above=options.broken_above,
        restored_below=options.broken_above / 2,
        steep=options.steep,
        flat=options.flat,
        strict=True,
    )
    module = Student(options.hidden, train, scale=scale, seed=seed)
    trainer = quiet_trainer(max_steps=options.steps, callbacks=[losses, monitor])
    # Gradient descent: every step is on all of the data.
    trainer.fit(module, DataLoader([train] * options.steps, batch_size=None))  # type: ignore[arg-type]
    broken = [e for e in monitor.events if e["event"] == "broken"]
    first, last = monitor.history[0], monitor.history[-1]
    return {
        "curve": losses.curve,
        "drops": [e["step"] for e in monitor.events if e["event"] == "drop"],
        "broken": {
            kind: [[e["step"], len(e["units"])] for e in broken if e["where"] == f"first/{kind}"]
            for kind in KINDS
        },
        "broken_at_start": {kind: first[f"hierarchy/first/{kind}"] for kind in KINDS},
        "effective_units": last["hierarchy/first/effective_units"],
        "train": losses.curve[-1][1],
        "test": losses.curve[-1][2],
    }


def again(run: dict[str, Any], *, options: Any) -> dict[str, Any]:
    """Return a run with its drops as these options see them."""
    steps, losses, _ = zip(*run["curve"], strict=True)
    phases = loss_phases(steps, losses, steep=options.steep, flat=options.flat)
    return run | {"drops": [steps[phase.seen] for phase in phases if phase.what == "drop"]}


def dates(run: dict[str, Any], *, least: int) -> list[float]:
    """Return the readings at which at least so many units broke."""
    units: dict[float, int] = {}
    for found in run["broken"].values():
        for step, count in found:
            units[step] = units.get(step, 0) + count
    return sorted(step for step, count in units.items() if count >= least)


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
    pairs = [(run["drops"], dates(run, least=options.least)) for run in runs]
    total, whole = sum(len(drops) for drops, _ in pairs), math.log(options.steps)
    hits = sum(met(drops, breaks, window=options.window) for drops, breaks in pairs)
    expected = sum(len(d) * coverage(b, window=options.window, steps=options.steps) for d, b in pairs)
    rng, as_many = random.Random(0), 0
    for _ in range(draws):
        found = 0
        for drops, breaks in pairs:
            shift = rng.random() * whole
            moved = [math.exp((math.log(d) + shift) % whole) for d in drops]
            found += met(moved, breaks, window=options.window)
        as_many += found >= hits
    p = as_many / draws if total else math.nan
    return {"drops": total, "met": hits, "by_chance": expected, "p": p}


def draw(runs: dict[str, Any], *, options: Any) -> Any:
    """Draw the first seed's course at every scale; a dotted line is a reading at which units broke."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3), layout="constrained")
    for axes, (scale, row) in zip(figure.subplots(1, len(runs), sharey=True), runs.items(), strict=True):
        run = row["seeds"][0]
        steps, train, test = zip(*run["curve"], strict=True)
        for date in dates(run, least=options.least):
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
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--inputs", type=int, default=20)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=50)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--per-decade", type=int, default=16, help="readings")
    parser.add_argument("--broken-above", type=float, default=0.1)
    parser.add_argument(
        "--steep", type=float, default=1.5, help="a drop falls faster than 1 / t to this power"
    )
    parser.add_argument("--flat", type=float, default=0.9, help="a plateau slower than to this")
    parser.add_argument("--window", type=float, default=1.5)
    parser.add_argument("--least", type=int, default=2, help="units that must break at one reading")
    parser.add_argument("--runs", type=Path, help="a JSON of this script's: analyse its runs, train none")
    parser.add_argument("--smoke", action="store_true", help="seconds: fewer steps, two scales")
    options = parser.parse_args()
    scales: tuple[float, ...] = SCALES
    if options.smoke:
        options.seeds, options.steps, scales = 2, 1000, (0.01, 100.0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    runs: dict[str, Any] = {}
    stored = json.loads(options.runs.read_text())["runs"] if options.runs else {}
    for scale in stored or scales:
        if stored:
            seeds = [again(run, options=options) for run in stored[scale]["seeds"]]
        else:
            seeds = [learn(scale, options=options, seed=seed) for seed in range(options.seeds)]
        keys = ("train", "test", "effective_units")
        numbers = {key: spread([run[key] for run in seeds]) for key in keys}
        runs[str(scale)] = {**numbers, **chance(seeds, options=options), "seeds": seeds}
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
    config = {k: v for k, v in vars(options).items() if k not in ("out", "runs")}
    result = {"config": config, "runs": runs, "all": every}
    save(options.out, "loss_staircase", result, draw(runs, options=options))


if __name__ == "__main__":
    main()
