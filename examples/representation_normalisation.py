r"""Noise sets the size and shape of hidden representations, whatever they began as.

Ziyin, Wang, Li and Wu, 2024, arXiv 2402.07193: at the noise equilibrium the second moment of each hidden
representation, over the trace of the one before, is that of what the layers behind make of the noise. So the
sizes of all representations come to values that data, noise and target fix, and a middle layer's singular
values to a single one; gradient descent keeps what the start gave. Two networks, uneven inputs and uneven
noise, three lopsided starts (first to last layer 1:3, 1:1, 3:1):

* *linear*, three layers: traces of both representations' second moments over their closed form, and the
  spread of the middle layer's singular values, largest over smallest;
* *tanh*, two layers: the cosine of the two sides of the balance, W Cov(x) W' and U' Cov(noise) U, and the
  ratio of their traces, both over the traces of the covariances. No closed form: theory is of linear
  networks, and the paper has pictures of such a network.

Moments are averaged over the last quarter of the steps, since SGD moves about the point.

    python examples/representation_normalisation.py

Shape letters: K networks, B samples, I inputs, H hidden units, O outputs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table
from _stacked import Activation, Stack
from torch import Tensor

from lightning_sym.papers.noise_equilibrium import equilibrium_weights

STARTS = {"1:3": 3**-0.5, "1:1": 1.0, "3:1": 3**0.5}
NETWORKS = {"linear": (3, lambda x: x), "tanh": (2, torch.tanh)}


def uneven(size: int, decades: float) -> Tensor:
    """Return a diagonal covariance of unit mean whose ends lie so many decades apart."""
    values = torch.logspace(-decades / 2, decades / 2, size, dtype=torch.float64)
    return torch.diag(values / values.mean())


def moments(weights: list[Tensor], cov_x: Tensor) -> list[Tensor]:
    """Return the second moment of each layer's outputs but the last, ``[K, H, H]``; weights ``[K, I, O]``."""
    found, moment = [], cov_x.expand(len(weights[0]), -1, -1)
    for weight in weights[:-1]:
        moment = weight.mT @ moment @ weight
        found.append(moment)
    return found


def train(
    network: str, how: str, options: Any, *, activation: Activation | None = None
) -> dict[str, list[dict[str, float]]]:
    """Train all starts and seeds side by side, of that activation or the network's own.

    Returns:
        By start, what each network ends as.
    """
    layers, own = NETWORKS[network]
    activation = activation or own
    size, seeds = options.size, list(range(options.seeds))
    chosen = [(start, seed) for start in STARTS for seed in seeds]
    count = len(chosen)
    widths = [size, *[options.hidden] * (layers - 1), size]
    stack = Stack(widths, seeds=[seed for _, seed in chosen], activation=activation, dtype=torch.float64)
    factor = torch.tensor([STARTS[start] for start, _ in chosen]).view(-1, 1, 1)
    first, *middle, last = (options.start * weight.detach() for weight in stack.weights)
    stack.weights = [w.requires_grad_() for w in (first * factor, *middle, last / factor)]
    cov_x, cov_noise = uneven(size, options.uneven), uneven(size, options.uneven).flip(0, 1)
    target = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(3)).double()).Q
    wide = cov_x.sqrt().expand(count, -1, -1) * size**0.5  # expected loss: its second moment is cov_x
    generator = torch.Generator().manual_seed(0)
    steps = options.steps if how == "SGD" else options.descent
    kept: list[Tensor] = []
    for step in range(1, steps + 1):
        if how == "GD":
            x, noise = wide, torch.zeros_like(wide)
        else:
            both = torch.randn(count, options.batch, 2 * size, generator=generator, dtype=torch.float64)
            x, noise = both.split(size, dim=2)
            x, noise = x @ cov_x.sqrt(), noise @ cov_noise.sqrt()
        stack.step((stack.outputs(x) - x @ target.mT - noise).square().sum() / x.shape[1], lr=options.lr)
        if step > 0.75 * steps and step % options.every == 0:
            with torch.no_grad():
                kept.append(numbers(stack, network, cov_x, cov_noise, target))
    mean = torch.stack(kept).mean(0)
    names = ("first", "second", "middle") if network == "linear" else ("cosine", "norms")
    rows: dict[str, list[dict[str, float]]] = {start: [] for start in STARTS}
    for (start, _), row in zip(chosen, mean.tolist(), strict=True):
        rows[start].append(dict(zip(names, row, strict=True)))
    return rows


def numbers(stack: Stack, network: str, cov_x: Tensor, cov_noise: Tensor, target: Tensor) -> Tensor:
    """Return what is averaged, ``[K, numbers]``."""
    weights = [weight.detach() for weight in stack.weights]
    if network == "linear":
        hidden = [weight.shape[2] for weight in weights[:-1]]
        ideal = equilibrium_weights(target, hidden=hidden, cov_x=cov_x, cov_noise=cov_noise)
        wanted = moments([weight.mT[None] for weight in ideal], cov_x)
        sizes = [
            found.diagonal(dim1=1, dim2=2).sum(1) / float(closed.diagonal(dim1=1, dim2=2).sum())
            for found, closed in zip(moments(weights, cov_x), wanted, strict=True)
        ]
        values = torch.linalg.svdvals(weights[1])[:, : len(target)]
        return torch.stack([*sizes, values[:, 0] / values[:, -1]], dim=1)
    incoming = moments(weights, cov_x)[0] / cov_x.trace()
    outgoing = weights[1] @ cov_noise @ weights[1].mT / cov_noise.trace()
    cosine = (incoming * outgoing).sum((1, 2)) / (incoming.norm(dim=(1, 2)) * outgoing.norm(dim=(1, 2)))
    traces = [side.diagonal(dim1=1, dim2=2).sum(1) for side in (outgoing, incoming)]
    return torch.stack([cosine, traces[0] / traces[1]], dim=1)


def draw(results: dict[str, Any]) -> Any:
    """Draw each number over the three starts, SGD beside gradient descent."""
    from matplotlib.figure import Figure

    titles = {
        "first": "linear: first representation over closed form",
        "second": "linear: second representation over closed form",
        "middle": "linear: middle layer, largest over smallest",
        "cosine": "tanh: cosine of the two sides",
        "norms": "tanh: ratio of the two traces",
    }
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    for axis, (key, title) in zip(axes, titles.items(), strict=False):
        for name, by_start in results.items():
            how = name.split(", ")[1]
            if key not in next(iter(by_start.values())):
                continue
            cells = [cell[key] for cell in by_start.values()]
            middle = [cell["median"] for cell in cells]
            bars = [
                [cell["median"] - cell["low"] for cell in cells],
                [cell["high"] - cell["median"] for cell in cells],
            ]
            axis.errorbar(
                list(by_start), middle, bars, fmt="o" if how == "SGD" else "s", capsize=3, label=how
            )
        axis.axhline(1, color="0.6", linewidth=0.8)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("start, first layer to last")
        if key != "cosine":
            axis.set_yscale("log")
    axes[0].legend(fontsize=8)
    axes[-1].axis("off")
    return figure


def main() -> None:
    """Train all, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/representation_normalisation"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--size", type=int, default=6, help="inputs, and outputs")
    parser.add_argument("--hidden", type=int, default=6)
    parser.add_argument("--uneven", type=float, default=0.6, help="decades between variances")
    parser.add_argument("--start", type=float, default=0.8, help="gain of the initial weights")
    parser.add_argument("--lr", type=float, default=0.08)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--descent", type=int, default=1000, help="steps of gradient descent")
    parser.add_argument("--every", type=int, default=20, help="steps between two moments that are averaged")
    parser.add_argument("--smoke", action="store_true", help="seconds: smaller, fewer steps and seeds")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.size, options.hidden, options.steps, options.descent = 2, 4, 4, 2500, 500
    began = time.process_time()
    results = {
        f"{network}, {how}": {
            start: {key: spread([row[key] for row in rows]) for key in rows[0]}
            for start, rows in train(network, how, options).items()
        }
        for network in NETWORKS
        for how in ("SGD", "GD")
    }
    shown = [
        (name, start, key, cell["median"], cell["low"], cell["high"])
        for name, by_start in results.items()
        for start, cells in by_start.items()
        for key, cell in cells.items()
    ]
    print(table(shown, ("network", "start", "", "median", "low", "high")))
    config = {k: v for k, v in vars(options).items() if k != "out"}
    result = {"config": config, "cpu_seconds": time.process_time() - began, "results": results}
    save(options.out, "representation_normalisation", result, draw(results))


if __name__ == "__main__":
    main()
