r"""Representation, gradient and weight of a layer become one matrix: six relations over decay and depth.

Ziyin et al., 2024, arXiv 2410.03006. On either side of a layer, second moments of activations and of
their gradients and the Gram matrix of the weight align where gradient noise balances weight decay (the
canonical representation hypothesis). Here the paper's synthetic regression in kind: tanh networks with
five hidden layers on a random tanh teacher, fresh Gaussian inputs, SGD at lr 0.1 and batch 100. The
teacher's outputs carry noise (--noise): without it gradient noise dies with the error, and nothing is left
to balance the decay; ``--noise 0`` is the control.

Layer l is the linear map out of hidden layer l, layer 5 the output; a is a layer's input side, b its output
side. At the output's side b nothing is free to align: the gradient there is the labels' noise, the same in
all directions, and the representation is the teacher's. ``--orthogonal`` gives the teacher outputs that are
the same in all directions too.

Moments are those of the paper's main text (samples normalised, centred), on 20,000 samples that were not
trained on: the correlation of two matrices that were estimated from few samples is too low. Beside the six:
effective ranks; the feature ansatz, W'W against the mean outer product of the outputs' gradients; and, from
raw moments, exponents of W'W and WW' (the polynomial alignment hypothesis, for where the relations are
broken).

    python examples/canonical_representation.py
    python examples/canonical_representation.py --name canonical_representation_noiseless --noise 0 \
        --decays 1e-3 1e-2 --read-at 10000
    python examples/canonical_representation.py --name canonical_representation_orthogonal --orthogonal \
        --decays 1e-3 1.7e-3 --read-at 10000

Shape letters: K networks, B samples.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table
from _stacked import Stack
from torch import Tensor

from lightning_sym.functional import effective_rank_from_eigenvalues, numerical_rank
from lightning_sym.functional.alignment import crh_relations, matrix_alignment, second_moment
from lightning_sym.functional.pah import pah_exponents, pah_phase

INPUTS, OUTPUTS, DEPTH = 40, 20, 5
RELATIONS = [f"{side}/{name}" for side in "ab" for name in ("rga", "rwa", "gwa")]
EXPONENTS = ("h_a", "h_b", "g_b", "g_a")


class Teachers:
    """A random two-layer tanh teacher a seed, and its noisy answers to fresh Gaussian inputs."""

    def __init__(self, seeds: list[int], options: Any) -> None:
        self.noise, width = options.noise, options.width
        self.generators = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]
        self.first, self.second = (
            torch.stack([torch.randn(i, o, generator=g) for g in self.generators]) / i**0.5
            for i, o in ((INPUTS, width), (width, OUTPUTS))
        )
        if options.orthogonal:
            self.second = torch.linalg.qr(self.second).Q

    def draw(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return inputs ``[seeds, B, I]`` and noisy targets ``[seeds, B, O]``."""
        both = torch.stack([torch.randn(batch, INPUTS + OUTPUTS, generator=g) for g in self.generators])
        x, noise = both.split([INPUTS, OUTPUTS], dim=2)
        return x, torch.tanh(x @ self.first) @ self.second + self.noise * noise


def squared(outputs: Tensor, y: Tensor) -> Tensor:
    """Return half the squared error, summed over everything."""
    return 0.5 * (outputs - y).square().sum()


def sides(below: Tensor, above: Tensor, g_below: Tensor, g_above: Tensor, weight_IO: Tensor) -> Any:
    """Return by side samples of the representation and gradient and the weight's Gram matrix."""
    return {"a": (below, g_below, weight_IO @ weight_IO.mT), "b": (above, g_above, weight_IO.mT @ weight_IO)}


def read(
    stack: Stack, x: Tensor, *, loss: Callable[[Tensor], Tensor], seed: int
) -> list[list[dict[str, Any]]]:
    """Return for each network and each layer from the second on what the matrices say.

    Args:
        stack: the networks.
        x: inputs ``[K, B, I]``.
        loss: from the outputs to the losses, summed over samples and networks.
        seed: of the signs with which outputs are mixed for the feature ansatz.
    """
    seen = stack.gradients(x, loss=loss)
    # Gradients of a random sign's worth of outputs: their second moment is the mean of J'J.
    shape = (*x.shape[:2], stack.widths[-1])
    signs = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).sign()
    by_outputs = stack.gradients(x, loss=lambda out: (out * signs).sum())[2]
    rows = []
    for k in range(len(x)):
        layers = []
        for layer in range(1, len(stack.weights)):
            weight = stack.weights[layer][k].detach()
            samples = sides(*(part[layer][k] for part in seen), weight)
            row: dict[str, Any] = {}
            moments: dict[str, Tensor] = {}
            for side, (h, g, z) in samples.items():
                found = crh_relations(second_moment(h), second_moment(g), z)
                row |= {f"{side}/{name}": float(value) for name, value in found._asdict().items()}
                for name, matrix in (("h", h), ("g", g)):
                    moments[f"{name}_{side}"] = second_moment(matrix.double(), moments="raw")
                spectrum = torch.linalg.eigvalsh(second_moment(h.double()))
                row[f"{side}/rank"] = float(effective_rank_from_eigenvalues(spectrum))
                fits = pah_exponents(moments[f"h_{side}"], moments[f"g_{side}"], z.double())
                for name, fit in (("h", fits["rwa"]), ("g", fits["gwa"])):
                    key = f"{name}_{side}"
                    row[key] = float(fit.exponent)
                    row[f"{key}/off_diagonal"] = float(fit.off_diagonal)
                    row["decades"] = float(fit.decades)
            row["phase"] = pah_phase(**{key: row[key] for key in EXPONENTS}, decades=row["decades"]).name
            row["least"] = min(row[name] for name in RELATIONS)
            row["weight_rank"] = float(numerical_rank(weight, rtol=1e-2))
            agop = second_moment(by_outputs[layer][k], moments="raw")
            row["ansatz"] = float(matrix_alignment(agop, samples["a"][2]))
            row["g_over_h"] = float(moments["g_b"].trace() / moments["h_b"].trace())
            layers.append(row)
        rows.append(layers)
    return rows


def train(options: Any) -> dict[str, dict[str, Any]]:
    """Train all decays and seeds side by side; return readings by decay and step."""
    seeds = list(range(options.seeds))
    count = len(options.decays)
    teachers = Teachers(seeds, options)
    widths = [INPUTS, *[options.width] * DEPTH, OUTPUTS]
    stack = Stack(widths, seeds=[seed for _ in options.decays for seed in seeds], activation=torch.tanh)
    decay = torch.tensor(options.decays).repeat_interleave(len(seeds)).view(-1, 1, 1)
    results: dict[str, dict[str, Any]] = {f"{value:g}": {} for value in options.decays}
    for step in range(1, max(options.read_at) + 1):
        x, y = (part.repeat(count, 1, 1) for part in teachers.draw(options.batch))
        stack.step(squared(stack.outputs(x), y) / options.batch, lr=options.lr, decay=decay)
        if step not in options.read_at:
            continue
        held = Teachers(seeds, options)
        held.generators = [torch.Generator().manual_seed(5000 + seed) for seed in seeds]
        x, y = held.draw(options.samples)
        for i, found in enumerate(results.values()):
            part = Stack(widths, seeds=seeds, activation=torch.tanh)
            part.weights = [w[i * len(seeds) : (i + 1) * len(seeds)] for w in stack.weights]
            with torch.no_grad():
                errors = (part.outputs(x) - y).square().mean(dim=(1, 2)) - options.noise**2
            rows = read(part, x, loss=partial(squared, y=y), seed=step)
            found[str(step)] = [
                {"error": float(error), "layers": row} for error, row in zip(errors, rows, strict=True)
            ]
        print(f"step {step} read", flush=True)
    return results


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians and spread over seeds, layer by layer, and how many seeds meet the goals."""
    depth = range(len(runs[0]["layers"]))
    keys = [key for key, value in runs[0]["layers"][0].items() if isinstance(value, float)]
    layers = [
        {key: spread([run["layers"][layer][key] for run in runs]) for key in keys}
        | {"phases": [run["layers"][layer]["phase"] for run in runs]}
        for layer in depth
    ]
    return {
        "error": spread([run["error"] for run in runs]),
        "layers": layers,
        "goals": {
            "rga of the input side at least .97 in layers 3 to 5": sum(
                min(row["a/rga"] for row in run["layers"][2:]) >= 0.97 for run in runs
            ),
            "all six at least .9 in layers 3 and 4, the last two hidden ones": sum(
                min(row["least"] for row in run["layers"][2:4]) >= 0.9 for run in runs
            ),
            "all six at least .9 in layers 4 and 5": sum(
                min(row["least"] for row in run["layers"][3:]) >= 0.9 for run in runs
            ),
        },
    }


def draw(results: dict[str, Any]) -> Any:
    """Draw RGA of the input side and the least of the six over depth, and ranks; a line a decay."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    for i, (decay, by_step) in enumerate(results.items()):
        layers = list(by_step.values())[-1]["layers"]
        color = colormaps["viridis"](i / max(len(results) - 1, 1) * 0.9)
        for axis, key in zip(axes, ("a/rga", "least", "a/rank"), strict=True):
            cells = [row[key] for row in layers]
            middle = [cell["median"] for cell in cells]
            bars = [
                [cell["median"] - cell["low"] for cell in cells],
                [cell["high"] - cell["median"] for cell in cells],
            ]
            depth = range(1, len(layers) + 1)
            axis.errorbar(depth, middle, bars, marker="o", color=color, capsize=2, label=f"decay {decay}")
    for axis, title in zip(
        axes, ("RGA, input side", "least of the six relations", "effective rank of H"), strict=True
    ):
        axis.set(xlabel="layer", title=title)
        axis.set_xticks(range(1, DEPTH + 1))
    for axis in axes[:2]:
        axis.set_ylim(min(0, axis.get_ylim()[0]), 1.02)
    axes[0].legend(frameon=False, fontsize=7)
    return figure


def main() -> None:
    """Train, read, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/canonical_representation"))
    parser.add_argument("--name", default="canonical_representation", help="of the JSON and the picture")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--noise", type=float, default=0.5, help="standard deviation, of each output")
    parser.add_argument("--decays", type=float, nargs="+", default=[1e-5, 1.3e-4, 1e-3, 1.7e-3])
    parser.add_argument("--read-at", type=int, nargs="+", default=[1000, 3000, 10_000, 20_000], help="steps")
    parser.add_argument("--orthogonal", action="store_true", help="a teacher of equal, orthogonal outputs")
    parser.add_argument("--samples", type=int, default=20_000, help="that the matrices are estimated from")
    parser.add_argument("--smoke", action="store_true", help="seconds: narrow, few steps, two decays")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.width, options.decays = 2, 16, [1e-4, 1e-2]
        options.read_at, options.samples = [100, 1200], 2000
    began = time.process_time()
    readings = train(options)
    results = {
        decay: {step: summary(runs) for step, runs in by_step.items()} for decay, by_step in readings.items()
    }
    last = str(max(options.read_at))
    for key in ("a/rga", "least", "ansatz", "a/rank"):
        rows = [
            [decay, *(row[key]["median"] for row in by_step[last]["layers"])]
            for decay, by_step in results.items()
        ]
        print(f"\n{key}, medians over {options.seeds} seeds")
        print(table(rows, ["decay", *[f"layer {i}" for i in range(1, DEPTH + 1)]]))
    for decay, by_step in results.items():
        print(f"decay {decay}: seeds that meet the goals:", by_step[last]["goals"])
    config = {k: v for k, v in vars(options).items() if k not in ("out", "name")}
    result = {
        "config": config,
        "cpu_seconds": time.process_time() - began,
        "results": results,
        "runs": {
            decay: [
                {key: [row[key] for row in run["layers"]] for key in ("a/rga", "least")}
                for run in by_step[last]
            ]
            for decay, by_step in readings.items()
        },
    }
    save(options.out, options.name, result, draw(results))


if __name__ == "__main__":
    main()
