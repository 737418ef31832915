"""Is a broken symmetry the cause of a drop of the loss? The staircase with the symmetries taken in hand.

``loss_staircase.py`` dates drops and breakings: a correlation. Ziyin et al. (2025, arXiv 2502.05300) say that
the breaking is the cause. Two interventions on its network (a two-layer ReLU student of a teacher of three
units, gradient descent):

* *held and released*: units begin at zero, the mirror of their rescaling, where gradient descent leaves
  them: all of them, or those of negative outgoing weight. At step T they get the small random weights that
  they have in ``loss_staircase.py``. If breaking is the cause, the loss drops a constant time after T,
  whatever T, and never if there is no T.
* *removed*: the same start, and decay towards a frozen random point (syre, arXiv 2408.15495) in place of
  zero: zero is no longer stationary, and needs no release. And from small random weights: how many drops has
  the staircase without decay, with decay, and with symmetries removed at decays and sizes?

    python examples/staircase_intervention.py

Shape letters: K networks, D inputs, H hidden units.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table
from _stacked import Stack
from loss_staircase import drops

from lightning_sym.engine.schedule import LogSpaced
from lightning_sym.papers.hierarchy import Student, problem

SCALE = 0.01  # of the initial weights


@dataclass(frozen=True)
class Arm:
    """What is done to the networks.

    Args:
        zero: which units begin at zero: ``all``, ``negative`` or ``none``.
        release: step at which these get small random weights; ``inf``: never.
        decay: strength of the weight decay.
        sigma: deviation of the point that it draws to, relative to ordinary initial weights; 0: to zero.
    """

    zero: str
    release: float = math.inf
    decay: float = 0.0
    sigma: float = 0.0


def arms(options: Any) -> dict[str, Arm]:
    """Return by name what is done."""
    found = {}
    for zero in ("all", "negative"):
        for step in options.releases:
            found[f"{zero} zero, released at {step}"] = Arm(zero, step)
        found[f"{zero} zero, never released"] = Arm(zero)
        found[f"{zero} zero, decay"] = Arm(zero, decay=options.decay)
        for sigma in options.sigmas:
            found[f"{zero} zero, removed, sigma {sigma:g}"] = Arm(zero, decay=options.decay, sigma=sigma)
    found["small start"] = Arm("none")
    for decay in (options.decay, 10 * options.decay):
        found[f"small start, decay {decay:g}"] = Arm("none", decay=decay)
        for sigma in options.sigmas:
            found[f"small start, removed, decay {decay:g}, sigma {sigma:g}"] = Arm(
                "none", decay=decay, sigma=sigma
            )
    return found


def since(arm: Arm, options: Any) -> int:
    """Return the step whose loss must halve: of the release, else of the plateau that the arm begins on."""
    plateau = 1 if arm.zero == "all" else options.settled
    return int(arm.release) if arm.release < math.inf else plateau


def train(arm: Arm, *, options: Any, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Train a network a seed, side by side; return its course."""
    data, students = [], []
    for seed in seeds:
        train_data, _ = problem(options.inputs, options.samples, seed=seed)
        data.append(train_data)
        students.append(Student(options.hidden, train_data, scale=SCALE, seed=seed).double())
    x, y = (torch.stack([pair[part] for pair in data]).double() for part in range(2))
    lr = torch.tensor([student.lr for student in students], dtype=torch.float64).view(-1, 1, 1)
    weights = [
        torch.stack([getattr(student, name).weight.detach().mT for student in students])
        for name in ("first", "second")
    ]
    generator = torch.Generator().manual_seed(9000)
    points = [
        arm.sigma * torch.randn(w.shape, generator=generator, dtype=w.dtype) / w.shape[1] ** 0.5
        for w in weights
    ]
    # The first half of the units repeats the second with the other sign; the sign is that of the unit.
    out_KH1 = weights[1]
    zero_KH1 = {"all": torch.ones_like(out_KH1), "negative": (out_KH1 < 0).to(out_KH1), "none": 0 * out_KH1}
    held = [zero_KH1[arm.zero].mT, zero_KH1[arm.zero]]  # for [K, D, H] and [K, H, 1]
    small = [weight.clone() for weight in weights]
    weights = [weight * (1 - mask) for weight, mask in zip(weights, held, strict=True)]
    stack = Stack([options.inputs, options.hidden, 1], seeds=list(seeds))
    stack.weights = [weight.requires_grad_() for weight in weights]
    schedule, due = LogSpaced(16), 1
    runs: list[dict[str, Any]] = [{"curve": [], "halved": None} for _ in seeds]
    plateau, known = None, since(arm, options)
    for step in range(1, options.steps + 1):
        if step == arm.release:
            with torch.no_grad():
                for weight, start, mask in zip(stack.weights, small, held, strict=True):
                    weight += start * mask
        errors = (stack.outputs(x).squeeze(2) - y).square().mean(dim=1) / 2
        losses = errors.detach()
        if step == due:
            for run, loss in zip(runs, losses.tolist(), strict=True):
                run["curve"].append([step, loss, loss])
            due = schedule.next(due)
        if step == known:  # what came before is over
            plateau = losses.clone()
        if plateau is not None:
            for run, loss, before in zip(runs, losses.tolist(), plateau.tolist(), strict=True):
                if run["halved"] is None and loss < before / 2:
                    run["halved"] = step
        gradients = torch.autograd.grad(errors.sum(), stack.weights)
        with torch.no_grad():
            for weight, gradient, point in zip(stack.weights, gradients, points, strict=True):
                weight -= lr * (gradient + arm.decay * (weight - point))
    for run, loss in zip(runs, losses.tolist(), strict=True):
        run |= {"end": loss, "drops": drops(run)}
    return runs


def draw(results: dict[str, Any], options: Any) -> Any:
    """Draw the first seed's loss, a panel a start."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for name, result in results.items():
        panel = 2 if name.startswith("small") else 0 if name.startswith("all") else 1
        steps, loss, _ = zip(*result["course"], strict=True)
        axes[panel].plot(steps, loss, label=name.replace("small start", "small"))
    for step in options.releases:
        for axis in axes[:2]:
            axis.axvline(step, color="0.7", linestyle=":", linewidth=0.8)
    for axis, title in zip(
        axes, ("all units begin at zero", "negative units do", "small start"), strict=True
    ):
        axis.set(xscale="log", yscale="log", xlabel="step", title=title)
        axis.legend(fontsize=5.5, loc="lower left")
    axes[0].set_ylabel("training loss")
    return figure


def main() -> None:
    """Train all, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/staircase_intervention"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--inputs", type=int, default=20)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--releases", type=int, nargs="+", default=[300, 1000, 2000])
    parser.add_argument(
        "--settled",
        type=int,
        default=2000,
        help="step after which a loss that halves counts, if none is released",
    )
    parser.add_argument("--decay", type=float, default=1e-3)
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.01, 1.0])
    parser.add_argument("--smoke", action="store_true", help="seconds: fewer steps, seeds and arms")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.steps, options.sigmas = 2, 900, [1.0]
        options.releases, options.settled = [200, 400], 300
    began = time.process_time()
    seeds = list(range(200, 200 + options.seeds))
    results: dict[str, Any] = {}
    for name, arm in arms(options).items():
        runs = train(arm, options=options, seeds=seeds)
        lags = [run["halved"] - since(arm, options) for run in runs if run["halved"]]
        results[name] = {
            "halved": sum(run["halved"] is not None for run in runs),
            "of": len(runs),
            "steps_until_halved": spread(lags) if lags else None,
            "drops": spread([len(run["drops"]) for run in runs]),
            "end": spread([run["end"] for run in runs]),
            "course": runs[0]["curve"],
        }
        print(
            name, {key: value for key, value in results[name].items() if key in ("halved", "of")}, flush=True
        )
    rows = [
        (
            name,
            f"{row['halved']}/{row['of']}",
            *((row["steps_until_halved"] or {}).get(key, "") for key in ("median", "low", "high")),
            row["drops"]["mean"],
            row["end"]["median"],
        )
        for name, row in results.items()
    ]
    print(table(rows, ("arm", "halved", "steps until", "least", "most", "drops", "loss at the end")))
    config = {k: v for k, v in vars(options).items() if k != "out"} | {"seeds": seeds, "scale": SCALE}
    result = {"config": config, "cpu_seconds": time.process_time() - began, "results": results}
    save(options.out, "staircase_intervention", result, draw(results, options))


if __name__ == "__main__":
    main()
