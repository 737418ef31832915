"""How far from its noise equilibrium does SGD stay, and is it the size of a step that keeps it away?

``noise_equilibrium.py`` finds, at one moment, an imbalance that is not zero and a largest eigenvalue of the
Hessian that is not that of the closed form. Here the same two-layer linear networks begin at the closed form,
so that nothing is left to be reached, and train at several learning rates; the number of steps grows as the
inverse square of the rate, since the noise moves the balance by its square a step. What SGD's fluctuations
do must shrink with the rate, and the powers of it are fitted. Both noises of that script; means over the
second half of the steps.

    python examples/noise_floor.py

Shape letters: K networks, B samples, I inputs, H hidden units, O outputs.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table
from _stacked import Stack
from torch import Tensor

from lightning_sym.papers.noise_equilibrium import (
    equilibrium_weights,
    linear_hessian_top,
    linear_hessian_trace,
)

KEYS = ("imbalance", "averaged", "off", "trace", "top")


def hessian_top(w_IH: Tensor, u_HO: Tensor) -> float:
    """Return the largest eigenvalue of the expected loss's Hessian; inputs are white, V is the identity."""
    split = w_IH.numel()

    def loss(flat: Tensor) -> Tensor:
        w, u = flat[:split].view_as(w_IH), flat[split:].view_as(u_HO)
        return (w @ u - torch.eye(len(w), dtype=w.dtype)).square().sum()

    flat = torch.cat([w_IH.flatten(), u_HO.flatten()])
    return float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))[-1])


def train(noise: Tensor, lr: float, options: Any) -> list[dict[str, float]]:
    """Train all seeds side by side from the equilibrium on; return what each shows on average."""
    size, seeds = len(noise), list(range(options.seeds))
    target, cov_noise = torch.eye(size, dtype=torch.float64), torch.diag(noise)
    w, u = equilibrium_weights(target, hidden=[options.hidden], cov_noise=cov_noise)
    closed_trace, closed_top = linear_hessian_trace([w, u]), linear_hessian_top([w, u])
    stack = Stack([size, options.hidden, size], seeds=seeds, activation=lambda x: x, dtype=torch.float64)
    stack.weights = [weight.mT.expand(len(seeds), -1, -1).clone().requires_grad_() for weight in (w, u)]
    steps = round(options.steps * (max(options.rates) / lr) ** 2)
    every = max(1, steps // (2 * options.readings))
    generator = torch.Generator().manual_seed(0)
    rows: list[Tensor] = []
    sums = [torch.zeros(len(seeds), options.hidden, options.hidden, dtype=torch.float64) for _ in range(2)]
    for step in range(1, steps + 1):
        both = torch.randn(len(seeds), options.batch, 2 * size, generator=generator, dtype=torch.float64)
        x, noises = both.split(size, dim=2)
        residual = stack.outputs(x) - x - noises * noise.sqrt()
        stack.step(residual.square().sum() / options.batch, lr=lr)
        if step <= steps // 2 or step % every:
            continue
        w_KIH, u_KHO = (weight.detach() for weight in stack.weights)
        sides = (w_KIH.mT @ w_KIH / size, u_KHO @ cov_noise @ u_KHO.mT / noise.sum())
        sums = [total + side for total, side in zip(sums, sides, strict=True)]
        off = (w_KIH @ u_KHO - target).flatten(1).norm(dim=1)
        pairs = list(zip(w_KIH, u_KHO, strict=True))
        traces = torch.tensor([linear_hessian_trace([a.mT, b.mT]) for a, b in pairs]) / closed_trace
        tops = torch.tensor([hessian_top(a, b) for a, b in pairs]) / closed_top
        rows.append(torch.stack([imbalance(*sides), off, traces, tops], dim=1))
    means = torch.stack(rows).mean(0).tolist()
    found = []
    for (now, off_, trace, top), averaged in zip(means, imbalance(*sums).tolist(), strict=True):
        found.append(dict(zip(KEYS, (now, averaged, off_, trace, top), strict=True)))
    return found


def imbalance(m: Tensor, n: Tensor) -> Tensor:
    """Return ``2 |M - N| / |M + N|``, ``[K]``."""
    return 2 * (m - n).flatten(1).norm(dim=1) / (m + n).flatten(1).norm(dim=1)


def power(rates: list[float], values: list[float]) -> float:
    """Return the slope of the values' logarithm over that of the rates."""
    x, y = (torch.tensor(each, dtype=torch.float64).log() for each in (rates, values))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def draw(results: dict[str, Any]) -> Any:
    """Draw imbalance, and trace and largest eigenvalue over their closed forms, over the learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, (kind, found) in enumerate(results.items()):
        rates = [float(rate) for rate in found["rates"]]
        for axis, key, style in ((left, "imbalance", "o-"), (right, "top", "o-"), (right, "trace", "s--")):
            cells = [cell[key] for cell in found["rates"].values()]
            bars = [[c["median"] - c["low"] for c in cells], [c["high"] - c["median"] for c in cells]]
            names = {"imbalance": "", "top": ", largest eigenvalue", "trace": ", trace"}
            label = f"{kind} noise{names[key]}"
            axis.errorbar(
                rates, [c["median"] for c in cells], bars, fmt=style, color=f"C{k}", markersize=4, label=label
            )
    left.set(xscale="log", yscale="log", title=r"imbalance at one moment, $2|M-N|\,/\,|M+N|$")
    marks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    left.set_yticks(marks, [f"{mark:g}" for mark in marks])
    right.axhline(1, color="0.6", linewidth=0.8)
    right.set(xscale="log", title="Hessian, over its closed form")
    for axis in (left, right):
        axis.set_xlabel("learning rate")
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.minorticks_off()
        axis.legend(fontsize=7)
    return figure


def main() -> None:
    """Train all, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/noise_floor"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--size", type=int, default=6, help="inputs, and outputs")
    parser.add_argument("--hidden", type=int, default=8)
    parser.add_argument("--uneven", type=float, default=0.8, help="decades between the noise's mean and ends")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0125, 0.025, 0.05, 0.1])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1250, help="at the largest rate")
    parser.add_argument("--readings", type=int, default=20)
    parser.add_argument("--smoke", action="store_true", help="seconds: smaller, two rates, few readings")
    options = parser.parse_args()
    if options.smoke:
        options.size, options.hidden, options.rates, options.readings = 3, 4, [0.025, 0.1], 5
        options.steps = 300
    began = time.process_time()
    ends = torch.logspace(-options.uneven, options.uneven, options.size).double()
    results: dict[str, Any] = {}
    for kind, noise in {"even": torch.ones_like(ends), "uneven": ends / ends.mean()}.items():
        runs = {str(lr): train(noise, lr, options) for lr in options.rates}
        results[kind] = {
            "rates": {
                rate: {key: spread([row[key] for row in rows]) for key in KEYS} for rate, rows in runs.items()
            },
            "power": {
                name: spread(
                    [
                        power(options.rates, [far(rows[k]) for rows in runs.values()])
                        for k in range(options.seeds)
                    ]
                )
                for name, far in {
                    "imbalance": lambda row: row["imbalance"],
                    "off": lambda row: row["off"],
                    "top": lambda row: abs(row["top"] - 1),
                    "trace": lambda row: abs(row["trace"] - 1),
                }.items()
            },
        }
    shown = [
        (kind, rate, *(cell[key]["median"] for key in KEYS))
        for kind, found in results.items()
        for rate, cell in found["rates"].items()
    ]
    print(table(shown, ("noise", "rate", *KEYS)))
    for kind, found in results.items():
        powers = {
            key: cell["median"] for key, cell in found["power"].items() if math.isfinite(cell["median"])
        }
        print(f"{kind}: powers of the rate", {key: round(value, 2) for key, value in powers.items()})
    config = {k: v for k, v in vars(options).items() if k != "out"}
    result = {"config": config, "cpu_seconds": time.process_time() - began, "results": results}
    save(options.out, "noise_floor", result, draw(results))


if __name__ == "__main__":
    main()
