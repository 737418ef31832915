"""The noise of SGD takes a linear network to one balanced, aligned point, and makes it sharper or flatter.

Two layers U W learn y = x + noise from fresh samples, from three ratios of their sizes. Gradient descent
keeps U'U - WW', and ends about as far from balance as it started. SGD ends at one point, whatever the
start, and the trace of the Hessian goes to one value: down where the start was lopsided, up where it was
flatter than the noise allows. The point, and the trace there, are known in closed form. Source: Ziyin, Wang,
Li and Wu, 2024, arXiv 2402.07193.

SGD does not rest at that point but moves about it, the further the larger the learning rate over the batch
size: that is the floor of the imbalance at one moment. Averages over the second half of the steps have a
lower one: the closed form takes the noise of a minimum, and weights that fluctuate add their own. With that
counted in ("exact": what a step changes on average at the weights of the moment) what is left is the error of
an average over so many steps. Hence two numbers of the imbalance, of one moment ("SGD imb") and of averages.

The same goes for the sharpness: the trace agrees with the closed form, the largest eigenvalue ("top", beside
its closed form, mean over the second half of the readings) of weights that fluctuate does not.

Shape letters: I inputs, H hidden units, O outputs.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table
from _trainer import quiet_trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_sym.callbacks import SharpnessMonitor
from lightning_sym.papers.noise_equilibrium import DeepLinearNetwork, charge_change

RATIOS = {"1:3": 1 / 3, "1:1": 1.0, "3:1": 3.0}


class Again:
    """One batch, over and over."""

    def __init__(self, batch: tuple[Tensor, Tensor], times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.repeat(self.batch, self.times)


class Network(DeepLinearNetwork):
    """The same without logging its loss: that costs as much as a step of so small a network."""

    def log(self, *_: Any, **__: Any) -> None:
        """Log nothing."""


class Course(Callback):
    """Keeps the balance and the closed form's trace, and averages over the second half of the steps."""

    def __init__(self, *, steps: int, every: int = 10) -> None:
        self.steps, self.every = steps, every
        self.rows: list[dict[str, float]] = []
        self.sums: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        """Read the module at every so many steps."""
        step = trainer.global_step
        if step % self.every or not isinstance(module, DeepLinearNetwork):
            return
        w, u = module.weights
        (balance,) = module.balance()
        trace = module.hessian_trace()
        self.rows.append({"step": step, "residual": balance.residual, "trace": trace})
        if step <= self.steps // 2:
            return
        noise = {"cov_x": module.cov_x, "cov_noise": module.cov_noise}
        batch = module.batch_size
        change = charge_change([w, u], module.target, lr=module.lr, batch=batch, **noise)
        unit = 4 * module.lr**2 / batch * w.shape[1] * float(module.cov_noise.trace())
        seen = {
            "incoming": balance.incoming,
            "outgoing": balance.outgoing,
            "exact": change / unit,
            "point": torch.stack([u @ u.mT, w.mT @ w]),  # whatever the rotation of the hidden units
            "residual": torch.tensor(balance.residual),
            "trace": torch.tensor(trace),
            "off": (u @ w - module.target).norm(),
            "n": torch.ones(()),
        }
        for key, value in seen.items():
            self.sums[key] = self.sums.get(key, torch.zeros_like(value)) + value

    def average(self, key: str) -> Tensor:
        """Return the time average."""
        return self.sums[key] / self.sums["n"]


def network(noise: Tensor, ratio: float, *, options: Any, seed: int) -> DeepLinearNetwork:
    """Return a network whose layers' sizes have that ratio, outgoing over incoming; the smaller is given."""
    start = options.start
    return Network(
        [len(noise), options.hidden, len(noise)],
        cov_x=torch.eye(len(noise)),
        cov_noise=torch.diag(noise),
        scales=[start * max(1.0, 1 / ratio), start * max(1.0, ratio)],
        lr=options.lr,
        batch_size=options.batch,
        seed=seed,
    )


def train(module: DeepLinearNetwork, *, steps: int, sharpness: int, descent: bool) -> tuple[Course, Any]:
    """Train by SGD, or by gradient descent on the expected loss; watch balance and sharpness."""
    course = Course(steps=steps)
    count = sum(p.numel() for p in module.parameters())
    monitor = SharpnessMonitor(
        every_n_steps=sharpness, data=module.exact_batch(), vectors=count, lanczos_steps=30, strict=True
    )
    trainer = quiet_trainer(
        max_steps=steps,
        max_epochs=-1,
        callbacks=[course, monitor],
    )
    trainer.fit(module, Again(module.exact_batch(), module.steps_per_epoch) if descent else None)
    return course, monitor


def distance(a: Tensor, b: Tensor) -> float:
    """Return how far a is from b, relative to b."""
    return float((a - b).norm() / b.norm())


def run(noise: Tensor, *, options: Any, seed: int) -> dict[str, Any]:
    """Train from all ratios with both, and hold the ends against the closed form and each other."""
    found: dict[str, Any] = {}
    ends: dict[str, list[Tensor]] = {"sgd": [], "gd": []}
    for k, (name, ratio) in enumerate(RATIOS.items()):  # data of their own: equal data would lead them alike
        row: dict[str, Any] = {}
        for how in ("gd", "sgd"):
            module = network(noise, ratio, options=options, seed=3 * seed + k)
            w, u = module.equilibrium()
            predicted = torch.stack([u @ u.mT, w.mT @ w])
            steps = options.descent if how == "gd" else options.steps
            course, monitor = train(
                module, steps=steps, sharpness=steps // options.readings, descent=how == "gd"
            )
            m, n = course.average("incoming"), course.average("outgoing")
            ends[how].append(course.average("point"))
            last = monitor.history[-1]
            row[how] = {
                "residual": float(2 * (m - n).norm() / (m + n).norm()),
                "cosine": float((m * n).sum() / (m.norm() * n.norm())),
                "norms": float(n.trace() / m.trace()),
                "exact": float(2 * course.average("exact").norm() / (m + n).norm()),
                "instant": float(course.average("residual")),
                "off": float(course.average("off")),
                "point": distance(course.average("point"), predicted),
                "trace": float(course.average("trace")),
                "monitor_error": abs(last["sharpness/trace"] / module.hessian_trace() - 1),
                "top": last["sharpness/top"],
                "course": course.rows[:: max(1, len(course.rows) // 50)],
                "readings": [
                    {k.removeprefix("sharpness/"): reading[k] for k in ("step", "sharpness/trace")}
                    for reading in monitor.history
                ],
            }
            row["closed"], row["closed_top"] = module.predicted_sharpness()
        readings = monitor.history[len(monitor.history) // 2 :]  # of SGD, the last to be trained
        row["sgd"]["top"] = sum(reading["sharpness/top"] for reading in readings) / len(readings)
        row["top_over_closed"] = row["sgd"]["top"] / row["closed_top"]
        row["trace_over_closed"] = row["sgd"]["trace"] / row["closed"]
        row["predicted"] = row["closed"] / row["gd"]["trace"] - 1
        row["seen"] = row["sgd"]["trace"] / row["gd"]["trace"] - 1
        found[name] = row
    for how, points in ends.items():
        pairs = itertools.combinations(points, 2)
        found[f"apart_{how}"] = max(distance(a, b) for a, b in pairs)
    return found


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and spread of the numbers over seeds; the courses of the first."""

    def merged(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: merged([value[key] for value in values]) for key in values[0]}
        return values[0] if isinstance(values[0], list) else spread(values)

    return merged(seeds)


def draw(found: dict[str, Any]) -> Any:
    """Draw the balance and the trace over the steps, SGD beside gradient descent."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for k, ratio in enumerate(RATIOS):
        row = found["uneven"][ratio]["sgd"]["course"]
        axes[0].plot([r["step"] for r in row], [r["residual"] for r in row], color=f"C{k}", label=ratio)
        descent = found["uneven"][ratio]["gd"]["course"][-1]["residual"]
        axes[0].axhline(descent, color=f"C{k}", linestyle=":", linewidth=1)
        for panel, noise in zip(axes[1:], ("uneven", "even"), strict=True):
            row = found[noise][ratio]
            course, readings = row["sgd"]["course"], row["sgd"]["readings"]
            panel.plot([r["step"] for r in course], [r["trace"] for r in course], color=f"C{k}", alpha=0.4)
            panel.plot(
                [r["step"] for r in readings],
                [r["trace"] for r in readings],
                "o",
                color=f"C{k}",
                markersize=3,
                label=f"U : W = {ratio}",
            )
            panel.axhline(row["gd"]["course"][-1]["trace"], color=f"C{k}", linestyle=":", linewidth=1)
    axes[0].plot([], [], ":", color="0.4", label="gradient descent")
    axes[0].set(yscale="log", ylim=(0.08, 5), xlabel="step", title="imbalance, uneven noise, first seed")
    axes[0].set_ylabel(r"$2|M-N|\,/\,|M+N|$")
    axes[0].legend(fontsize=7, ncols=4, loc="upper center")
    for panel, noise in zip(axes[1:], ("uneven", "even"), strict=True):
        closed = found[noise]["1:1"]["closed"]["mean"]
        panel.axhline(closed, color="black", linestyle="--", linewidth=1, label="predicted for SGD")
        panel.plot([], [], ":", color="0.4", label="gradient descent")
        panel.set(xlabel="step", title=f"trace of the Hessian, {noise} noise")
    axes[1].legend(fontsize=7)
    return figure


def main() -> None:
    """Train all, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/noise_equilibrium"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--size", type=int, default=6, help="inputs, and outputs")
    parser.add_argument("--hidden", type=int, default=8)
    parser.add_argument("--uneven", type=float, default=0.8, help="decades between the noise's mean and ends")
    parser.add_argument("--start", type=float, default=0.6, help="scale of the smaller layer at the start")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--descent", type=int, default=400, help="steps of gradient descent")
    parser.add_argument("--readings", type=int, default=10, help="of the sharpness, in each run")
    parser.add_argument("--smoke", action="store_true", help="seconds: smaller, one seed, fewer steps")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.size, options.hidden = 1, 3, 4
        options.lr, options.batch, options.start = 0.08, 8, 0.4
        options.steps, options.descent, options.readings = 600, 150, 1
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    ends = torch.logspace(-options.uneven, options.uneven, options.size).double()
    kinds = {"uneven": ends / ends.mean(), "even": torch.ones(options.size).double()}
    found = {
        kind: summary([run(noise, options=options, seed=seed) for seed in range(options.seeds)])
        for kind, noise in kinds.items()
    }
    rows = []
    for kind, ratio in itertools.product(kinds, RATIOS):
        row = found[kind][ratio]
        sgd, gd = row["sgd"], row["gd"]
        rows.append(
            (
                kind,
                ratio,
                gd["residual"]["mean"],
                *(sgd[k]["mean"] for k in ("instant", "residual", "exact", "cosine", "norms", "point")),
                gd["trace"]["mean"],
                sgd["trace"]["mean"],
                row["closed"]["mean"],
                row["predicted"]["mean"],
                row["seen"]["mean"],
                sgd["top"]["mean"],
                row["closed_top"]["mean"],
                row["top_over_closed"]["mean"],
                max(sgd["monitor_error"]["mean"], gd["monitor_error"]["mean"]),
            )
        )
    header = ("noise", "U:W", "GD imb", "SGD imb", "averaged", "exact", "cos", "norms", "point")
    header += ("Tr GD", "Tr SGD", "closed", "predicted", "seen", "top", "closed", "ratio", "monitor")
    print(table(rows, header))
    for kind in kinds:
        apart = {how: found[kind][f"apart_{how}"]["mean"] for how in ("sgd", "gd")}
        print(
            f"{kind}: ends of the three starts are apart by {apart['sgd']:.3f} (SGD), {apart['gd']:.3f} (GD)"
        )
    config = {k: v for k, v in vars(options).items() if k != "out"}
    save(options.out, "noise_equilibrium", {"config": config, "found": found}, draw(found))


if __name__ == "__main__":
    main()
