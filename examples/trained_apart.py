"""Deep linear networks that are trained apart, each behind embeddings of its own, come to represent alike.

Ziyin et al. (2025, arXiv 2502.05300) find that networks trained apart become alike: inner products between
samples, h(x1) . h(x2), agree from network to network, in the same layer and across layers. For deep linear
networks between fixed embeddings, B W_D ... W_1 A x, it is a theorem (Ziyin and Chuang, 2025, arXiv
2505.12387): at the noise equilibrium of SGD all hidden layers of all such networks have the same Gram matrix
up to a factor, whatever depth, width, embeddings and start. Gradient descent keeps what it began with.

Here three depths by three widths, nine networks a seed, with embeddings A and B, initial weights and batches
of their own, on one task y = V x + noise. Alignment is the cosine of the centred Gram matrices of samples not
trained on, over all 36 pairs of networks: ``same`` layer (counted from the input) and ``across`` layers.
Arms: SGD; gradient descent on the expected loss; SGD with labels free of noise (``quiet``: nothing moves at
the minimum); the same networks with ReLU under SGD. SGD moves about its equilibrium, the further the larger
its learning rate: in the end come some steps (--cool) at a tenth of it, in which the fluctuations die and
the balance, which takes a hundred times as long, stays where it is (``cooled``).

    python examples/trained_apart.py

Shape letters: K networks, B samples, I and O inputs and outputs of the task.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table
from _stacked import Stack
from torch import Tensor

from lightning_sym.functional import gram_alignment

ARMS = ("sgd", "gd", "quiet", "relu")
PLACES = ("same", "across")
Grams = list[Tensor]  # the hidden layers' features [B, width] of one network, from the input on


def gaussian(*shape: int, seed: int) -> Tensor:
    """Return Gaussian numbers of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def embedding(size: int, *, uneven: float, seed: int) -> Tensor:
    """Return a random matrix whose singular values run over ``uneven`` decades, of root mean square 1."""
    left, right = (torch.linalg.qr(gaussian(size, size, seed=2 * seed + k)).Q for k in range(2))
    values = torch.logspace(-uneven / 2, uneven / 2, size)
    return (left * (values / values.square().mean().sqrt())) @ right


class Task:
    """One linear task, y = V x + noise, with inputs of uneven variance."""

    def __init__(self, options: Any, *, seed: int) -> None:
        size, rank = options.size, options.rank
        left, right = (torch.linalg.qr(gaussian(size, rank, seed=100 * seed + k)).Q for k in range(2))
        self.target = (left * torch.linspace(1.5, 0.5, rank)) @ right.mT  # V, [O, I]
        deviations = torch.logspace(-0.25, 0.25, size)
        self.deviations = deviations / deviations.square().mean().sqrt()
        white = torch.linalg.qr(gaussian(4 * size, size, seed=100 * seed + 2)).Q * (4 * size) ** 0.5
        self.exact = white * self.deviations  # second moments exactly those of the distribution
        self.probe = gaussian(options.probe, size, seed=100 * seed + 3) * self.deviations


class Networks:
    """Networks of one depth and width, one a seed and arm, behind their embeddings."""

    def __init__(self, tasks: list[Task], arms: list[str], options: Any, *, place: int) -> None:
        depth, width = (
            options.depths[place // len(options.widths)],
            options.widths[place % len(options.widths)],
        )
        self.options, self.arms, self.count = options, arms, len(tasks)
        numbers = [1000 * seed + place for seed in range(len(tasks))]

        def for_arms(parts: list[Tensor]) -> Tensor:
            return torch.stack(parts).repeat(len(arms), 1, 1)

        sizes = {"uneven": options.uneven}
        self.before = for_arms([embedding(options.size, **sizes, seed=n).mT for n in numbers])
        self.after = for_arms([embedding(options.size, **sizes, seed=n + 500).mT for n in numbers])
        self.target = for_arms([task.target.mT for task in tasks])
        slopes = [0.0 if arm == "relu" else 1.0 for arm in arms for _ in tasks]
        slope = torch.tensor(slopes).view(-1, 1, 1)
        self.stack = Stack(
            [options.size, *[width] * (depth - 1), options.size],
            seeds=numbers * len(arms),
            activation=lambda x: torch.where(x > 0, x, slope * x),
        )
        noise = [0.0 if arm == "quiet" else options.noise for arm in arms for _ in tasks]
        self.noise = torch.tensor(noise).view(-1, 1, 1)
        self.generator = torch.Generator().manual_seed(77_000 + place)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the squared error, summed over outputs and networks, averaged over samples."""
        out = self.stack.outputs(x @ self.before) @ self.after
        return (out - y).square().sum() / x.shape[1]

    def descend(self, tasks: list[Task]) -> None:
        """Make the steps of gradient descent."""
        x = torch.stack([task.exact for task in tasks]).repeat(len(self.arms), 1, 1)
        for _ in range(self.options.descent):
            self.stack.step(self.loss(x, x @ self.target), lr=self.options.lr)

    def learn(self, tasks: list[Task], steps: int, *, lr: float) -> None:
        """Make steps of SGD, every network on batches of its own."""
        deviations = tasks[0].deviations
        shape = (len(self.noise), self.options.batch, 2 * self.options.size)
        for _ in range(steps):
            both = torch.randn(shape, generator=self.generator)
            x, noise = both.split(self.options.size, dim=2)
            x = x * deviations
            self.stack.step(self.loss(x, x @ self.target + self.noise * noise), lr=lr)

    @torch.no_grad()
    def seen(self, tasks: list[Task]) -> list[list[Grams]]:
        """Return by arm and seed the hidden layers' features of the seed's probe samples."""
        x = torch.stack([task.probe for task in tasks]).repeat(len(self.arms), 1, 1) @ self.before
        layers = self.stack.forward(x)[0][1:]
        rows = [[layer[k].double() for layer in layers] for k in range(len(x))]
        return [rows[i * self.count : (i + 1) * self.count] for i in range(len(self.arms))]

    @torch.no_grad()
    def errors(self, tasks: list[Task]) -> list[list[float]]:
        """Return by arm and seed the expected error over that of answering zero."""
        x = torch.stack([task.exact for task in tasks]).repeat(len(self.arms), 1, 1)
        y = x @ self.target
        out = self.stack.outputs(x @ self.before) @ self.after
        ratio = (out - y).square().sum(dim=(1, 2)) / y.square().sum(dim=(1, 2))
        return ratio.view(len(self.arms), self.count).tolist()


def alike(networks: list[Grams]) -> dict[str, float]:
    """Return the mean alignment over pairs of networks, same layer and across layers, and the least."""
    found: dict[str, list[float]] = {place: [] for place in PLACES}
    for one, other in itertools.combinations(networks, 2):
        for i, a in enumerate(one):
            for j, b in enumerate(other):
                found["same" if i == j else "across"].append(float(gram_alignment(a, b)))
    means = {place: statistics.fmean(values) for place, values in found.items() if values}
    return {**means, "least": min(itertools.chain(*found.values()))}


def run(options: Any) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Train all networks; return by arm and step what each seed's networks have in common."""
    tasks = [Task(options, seed=seed) for seed in range(options.seeds)]
    places = range(len(options.depths) * len(options.widths))
    noisy = [arm for arm in ARMS if arm != "gd"]
    courses: dict[str, dict[str, list[Any]]] = {arm: {} for arm in ARMS}

    def keep(networks: Networks, step: int) -> None:
        for arm, seen, errors in zip(
            networks.arms, networks.seen(tasks), networks.errors(tasks), strict=True
        ):
            courses[arm].setdefault(str(step), []).append((seen, errors))

    for place in places:
        descent = Networks(tasks, ["gd"], options, place=place)
        keep(descent, 0)
        descent.descend(tasks)
        keep(descent, options.descent)
        noise, done = Networks(tasks, noisy, options, place=place), 0
        for step in options.read_at:
            noise.learn(tasks, step - done, lr=options.lr)
            done = step
            keep(noise, step)
        noise.learn(tasks, options.cool, lr=options.lr / 10)
        keep(noise, done + options.cool)
        print(f"network {place + 1} of {len(places)}", flush=True)
    result: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for arm, course in courses.items():
        result[arm] = {}
        for step, rows in course.items():
            result[arm][step] = [
                alike([seen[seed] for seen, _ in rows])
                | {"error": statistics.fmean(errors[seed] for _, errors in rows)}
                for seed in range(options.seeds)
            ]
    return result


def draw(result: dict[str, Any]) -> Any:
    """Draw alignment over the steps, and that of gradient descent as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, place in zip(axes, PLACES, strict=True):
        for k, arm in enumerate(ARMS):
            steps = [int(step) for step in result[arm]]
            cells = [spread([run[place] for run in runs]) for runs in result[arm].values()]
            middle = [cell["median"] for cell in cells]
            if arm == "gd":
                axis.axhline(middle[-1], color=f"C{k}", linestyle="--", label="gradient descent")
                continue
            low, high = ([cell[key] for cell in cells] for key in ("low", "high"))
            label = {"sgd": "SGD", "quiet": "SGD, no label noise", "relu": "SGD, ReLU"}[arm]
            axis.plot(steps, middle, "o-", color=f"C{k}", markersize=3, label=label)
            axis.fill_between(steps, low, high, color=f"C{k}", alpha=0.2)
        axis.set(xscale="symlog", xlabel="step", title=f"{place} layer{'s' if place == 'across' else ''}")
        axis.set_xlim(0)
    axes[0].set(ylabel="alignment of Gram matrices", ylim=(0, 1.02))
    axes[0].legend(fontsize=7, loc="lower right")
    return figure


def main() -> None:
    """Train all, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/trained_apart"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 3, 4], help="weight matrices")
    parser.add_argument("--widths", type=int, nargs="+", default=[12, 24, 48])
    parser.add_argument("--size", type=int, default=8, help="inputs, and outputs")
    parser.add_argument("--rank", type=int, default=6, help="of the task")
    parser.add_argument("--uneven", type=float, default=0.5, help="decades of an embedding's singular values")
    parser.add_argument("--noise", type=float, default=1.0, help="deviation of the labels' noise")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--read-at", type=int, nargs="+", default=[0, 100, 300, 1000, 3000, 10_000, 20_000])
    parser.add_argument("--cool", type=int, default=1000, help="last steps of SGD, at a tenth of the rate")
    parser.add_argument("--descent", type=int, default=2000, help="steps of gradient descent")
    parser.add_argument("--probe", type=int, default=400, help="samples the networks are compared on")
    parser.add_argument("--smoke", action="store_true", help="seconds: fewer networks and steps")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.depths, options.widths, options.probe = 2, [2, 3], [8], 200
        options.size, options.rank, options.lr = 4, 3, 0.04
        options.read_at, options.descent = [0, 600], 100
        options.cool = 100
    began = time.process_time()
    result = run(options)
    rows = []
    summary: dict[str, Any] = {}
    for arm, course in result.items():
        last, end = list(course.values())[-2:]
        parts = {"start": course["0"], "end": end if arm == "gd" else last, "cooled": end}
        summary[arm] = {
            f"{key}_{when}": spread([run[key] for run in runs])
            for key in (*PLACES, "least", "error")
            for when, runs in parts.items()
        }
        keys = [f"{key}_{when}" for key in PLACES for when in parts] + ["least_cooled", "error_end"]
        rows.append([arm, *(summary[arm][key]["median"] for key in keys)])
    header = ["arm", "same, start", "end", "cooled", "across, start", "end", "cooled", "least pair", "error"]
    print(table(rows, header))
    goal = [
        sum(min(run[place] for place in PLACES) >= 0.98 for run in runs)
        for runs in list(result["sgd"].values())[-2:]
    ]
    print(f"seeds in which SGD reaches .98, and when cooled: {goal} of {options.seeds}")
    config = {k: v for k, v in vars(options).items() if k != "out"}
    saved = {
        "config": config,
        "cpu_seconds": time.process_time() - began,
        "seeds_at_0.98": dict(zip(("end", "cooled"), goal, strict=True)),
        "summary": summary,
        "courses": result,
    }
    save(options.out, "trained_apart", saved, draw(result))


if __name__ == "__main__":
    main()
