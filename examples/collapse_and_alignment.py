r"""Neural collapse and the feature ansatz beside the six relations, on the same classifiers.

Ziyin et al. (2024, arXiv 2410.03006) say that the canonical representation hypothesis contains both: at the
penultimate layer of a classifier that fits its training data it holds exactly where neural collapse does
(theorem 3), and the feature ansatz, W'W against the mean outer product of the outputs' gradients, is one of
its relations seen from the input side. ReLU networks on images over weight decays: at each layer the six
relations and the ansatz on test images; at the penultimate layer NC1, within-class variability over that
between classes, on training images, where collapse is defined, and on test images. Does NC1 fall where the
relations rise?

    python examples/collapse_and_alignment.py                # scikit-learn's digits
    python examples/collapse_and_alignment.py --data MNIST
    python examples/collapse_and_alignment.py --data MNIST --decays 3e-3 --steps 60 \
        --name collapse_and_alignment_early    # before they fit

Shape letters: K networks, B samples.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table
from _stacked import Stack
from canonical_representation import read
from self_assembly import tensors
from torch import Tensor
from torch.nn import functional as F

from lightning_sym.functional import neural_collapse


def cross_entropy(outputs: Tensor, *, y: Tensor) -> Tensor:
    """Return the losses, summed over samples and networks; labels ``[B]`` or ``[K, B]``."""
    labels = y.expand(outputs.shape[:2])
    return F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="sum")


def images(options: Any) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], str]:
    """Return training and test images by their leading principal components, with labels."""
    (x, y), (x_test, y_test), name = tensors(options)
    index = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: options.images_used]
    x, y, mean = x[index], y[index], x[index].mean(dim=0)
    basis = torch.linalg.eigh((x - mean).mT @ (x - mean))[1][:, -options.components :]
    x, x_test = (x - mean) @ basis, (x_test - mean) @ basis
    scale = x.square().mean().sqrt()
    return (x / scale, y), (x_test / scale, y_test), name


def train(parts: Any, options: Any) -> dict[str, list[dict[str, Any]]]:
    """Train all decays and seeds side by side; return what each network is at the end."""
    (x, y), (x_test, y_test) = parts
    seeds = list(range(options.seeds))
    widths = [x.shape[1], *[options.width] * options.depth, 10]
    stack = Stack(widths, seeds=[seed for _ in options.decays for seed in seeds], gain=2**0.5)
    decay = torch.tensor(options.decays).repeat_interleave(len(seeds)).view(-1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    for step in range(options.steps):
        index = torch.randint(len(x), (len(seeds), options.batch), generator=generator)
        index = index.repeat(len(options.decays), 1)
        loss = cross_entropy(stack.outputs(x[index]), y=y[index]) / options.batch
        # The last tenth at a tenth of the rate: collapse is a matter of the end of training.
        stack.step(loss, lr=options.lr * (0.1 if step > 0.9 * options.steps else 1.0), decay=decay)
    results: dict[str, list[dict[str, Any]]] = {}
    for i, value in enumerate(options.decays):
        part = Stack(widths, seeds=seeds)
        part.weights = [w[i * len(seeds) : (i + 1) * len(seeds)] for w in stack.weights]
        rows = read(part, x_test.expand(len(seeds), -1, -1), loss=partial(cross_entropy, y=y_test), seed=0)
        found = []
        for k, layers in enumerate(rows):
            row: dict[str, Any] = {"layers": layers}
            for where, (inputs, labels) in (("train", (x, y)), ("test", (x_test, y_test))):
                with torch.no_grad():
                    below, above = part.forward(inputs.expand(len(seeds), -1, -1))
                row[f"{where}_accuracy"] = float((above[-1][k].argmax(1) == labels).double().mean())
                weight = part.weights[-1][k].detach().mT
                row[f"{where}_nc1"] = float(
                    neural_collapse(below[-1][k].double(), labels, weight.double()).nc1
                )
            found.append(row)
        results[f"{value:g}"] = found
    return results


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the spread over seeds of each number, layers beside."""
    flat = [key for key in runs[0] if key != "layers"]
    keys = (
        "least",
        "ansatz",
        *(f"{side}/{name}" for side in "ab" for name in ("rga", "rwa", "gwa")),
        "a/rank",
    )
    return {key: spread([run[key] for run in runs]) for key in flat} | {
        "layers": [
            {key: spread([run["layers"][layer][key] for run in runs]) for key in keys}
            for layer in range(len(runs[0]["layers"]))
        ]
    }


def last(run: dict[str, Any], key: str) -> float:
    """Return a number of the output layer; the ansatz, which is an identity there, of the one before."""
    return float(run["layers"][-2 if key == "ansatz" else -1][key])


def correlation(results: dict[str, list[dict[str, Any]]], key: str) -> float:
    """Return the rank correlation of NC1 and a number of the last layer, over decays and seeds."""
    rows = [row for runs in results.values() for row in runs]
    a, b = (
        torch.tensor(values, dtype=torch.float64).argsort().argsort().double()
        for values in ([row["train_nc1"] for row in rows], [last(row, key) for row in rows])
    )
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def draw(results: dict[str, list[dict[str, Any]]]) -> Any:
    """Draw the relations of the last layer and the ansatz against NC1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (key, title) in zip(
        axes,
        (("a/rga", "RGA, input side of the output layer"), ("ansatz", "feature ansatz, layer before")),
        strict=True,
    ):
        for k, (decay, runs) in enumerate(results.items()):
            axis.plot(
                [run["train_nc1"] for run in runs],
                [last(run, key) for run in runs],
                "o",
                color=f"C{k}",
                label=f"decay {decay}",
            )
        axis.set(xscale="log", xlabel="NC1, training images", title=title)
    axes[0].set_ylabel("alignment")
    axes[0].legend(fontsize=7)
    return figure


def main() -> None:
    """Train, read, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/collapse_and_alignment"))
    parser.add_argument(
        "--data", type=Path, default=None, help="a torchvision root with MNIST; default: digits"
    )
    parser.add_argument("--name", default=None, help="of the JSON and the picture")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=3, help="hidden layers")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--decays", type=float, nargs="+", default=[0.0, 3e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--components", type=int, default=64)
    parser.add_argument("--images-used", type=int, default=5000, help="to train on")
    parser.add_argument("--smoke", action="store_true", help="seconds: few steps, two decays and seeds")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.width, options.steps, options.decays = 2, 32, 800, [0.0, 3e-3]
    options.images = "mnist"
    began = time.process_time()
    train_part, test, name = images(options)
    results = train((train_part, test), options)
    cells = {decay: summary(runs) for decay, runs in results.items()}
    rows = [
        (
            decay,
            *(cell[key]["median"] for key in ("train_accuracy", "test_accuracy", "train_nc1", "test_nc1")),
            *(cell["layers"][-1][key]["median"] for key in ("a/rga", "a/rwa", "a/gwa", "least")),
            *(cell["layers"][-2][key]["median"] for key in ("ansatz", "least")),
        )
        for decay, cell in cells.items()
    ]
    header = ("decay", "train", "test", "NC1", "NC1, test", "a/rga", "a/rwa", "a/gwa", "least")
    print(table(rows, (*header, "ansatz, layer before", "least")))
    keys = ("a/rga", "a/rwa", "a/gwa", "least", "ansatz")
    ranked = {key: correlation(results, key) for key in keys}
    print("rank correlation with NC1:", {key: round(value, 2) for key, value in ranked.items()})
    config = {k: v for k, v in vars(options).items() if k not in ("out", "data", "name")} | {"images": name}
    result = {
        "config": config,
        "cpu_seconds": time.process_time() - began,
        "rank_correlation_with_nc1": ranked,
        "results": cells,
    }
    save(options.out, options.name or f"collapse_and_alignment_{name}", result, draw(results))


if __name__ == "__main__":
    main()
