"""The phase diagram of feature learning, swept: which scalings are kernel machines, which learn features?

Xu and Ziyin, 2024, arXiv 2401.07085. As the width grows as kappa, the output scale, the variance of the
weights and the learning rates grow as powers of kappa. ``regime`` says from the exponents alone whether a
network becomes a kernel machine, stays in between or learns features ever more; ``pace`` whether its first
steps become too fast, stay, or freeze. Here every cell of a grid of exponents is trained at several widths,
by gradient descent with steps small against the tangent kernel of the moment, and the exponents are
*measured*: of the size r, from the growth of the kernel (growth^2 - 1 = (2 v / r)^2), and of the kernel at
the start. The names that the measured exponents give are held against the predicted ones.

    python examples/feature_phases.py

Shape letters: K networks (seeds), D hidden units.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table
from torch import Tensor

from lightning_sym.papers.feature_learning import pace, regime

REGIMES, PACES = ("kernel", "mixed", "rich"), ("unstable", "steady", "frozen")
TARGET = 1.0


def train(width: int, exponents: dict[str, float], *, options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Train a network a seed; return its first kernel, the kernel's growth and the last slope, ``[K]``."""
    scale = {key: float(width) ** value for key, value in exponents.items()}
    gamma, eta_u, eta_w = scale["output_scale"], scale["lr_u"], scale["lr_w"]
    half = width // 2
    drawn = torch.stack(
        [
            torch.randn(2, half, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in range(options.seeds)
        ]
    )
    # Twins of opposite outgoing weight: f = 0 at the start, whatever the scale.
    u_KD = torch.cat([drawn[:, 0], -drawn[:, 0]], dim=1) * scale["var_u"] ** 0.5
    w_KD = torch.cat([drawn[:, 1], drawn[:, 1]], dim=1) * scale["var_w"] ** 0.5

    def kernel() -> Tensor:
        return gamma**2 * (eta_w * u_KD.square().sum(dim=1) + eta_u * w_KD.square().sum(dim=1))

    first = kernel()
    rate = 2 * gamma * math.sqrt(eta_u * eta_w) * TARGET  # at which small weights grow
    for _ in range(options.steps):
        slope_K = gamma * (u_KD * w_KD).sum(dim=1)
        if bool(((slope_K - TARGET).abs() < 1e-4).all()):
            break
        step_K = options.share / (kernel() + rate)
        pull_K1 = (2 * step_K * gamma * (TARGET - slope_K))[:, None]
        u_KD, w_KD = u_KD + eta_u * pull_K1 * w_KD, w_KD + eta_w * pull_K1 * u_KD
    return first, kernel() / first, gamma * (u_KD * w_KD).sum(dim=1)


def slope(widths: list[int], values: Tensor) -> list[float]:
    """Return for each seed the slope of log values ``[T, K]`` over log widths."""
    x = torch.tensor(widths, dtype=torch.float64).log()
    x = x - x.mean()
    return ((x[:, None] * values.log()).sum(dim=0) / x.square().sum()).tolist()


def named(exponent: float, names: tuple[str, str, str], *, tolerance: float) -> str:
    """Return the first name above, the second at and the third below zero."""
    return names[1] if abs(exponent) < tolerance else names[0] if exponent > 0 else names[2]


def cell(exponents: dict[str, float], *, options: Any) -> dict[str, Any]:
    """Measure the exponents of one scaling and hold the names against the predicted ones."""
    found = [train(width, exponents, options=options) for width in options.widths]
    starts, growths, ends = (torch.stack(part) for part in zip(*found, strict=True))
    # growth = sqrt(1 + (2 v / r)^2); in the kernel regime what is measured is small, and rounding smaller.
    sizes = 2 * TARGET / (growths.square() - 1).clamp_min(1e-14).sqrt()
    size, speed = slope(options.widths, sizes), slope(options.widths, starts)
    names = {
        "regime": [named(value, REGIMES, tolerance=options.tolerance) for value in size],
        "pace": [named(value, PACES, tolerance=options.tolerance) for value in speed],
    }
    predicted = {"regime": regime(**exponents), "pace": pace(**exponents)}
    return {
        **exponents,
        "predicted": predicted,
        "size_exponent": spread(size),
        "kernel_exponent": spread(speed),
        "learned": float((ends - TARGET).abs().max()) < 0.01,
        "agree": {
            key: sum(name == predicted[key] for name in found_names) for key, found_names in names.items()
        },
    }


def draw(cells: list[dict[str, Any]], options: Any) -> Any:
    """Draw the measured exponent of the size over the grid, colours as predicted, a panel a learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(options.rates), 3.6), layout="constrained")
    panels = figure.subplots(1, len(options.rates), squeeze=False)[0]
    shades = {"kernel": "C3", "mixed": "0.6", "rich": "C0"}
    for panel, rate in zip(panels, options.rates, strict=True):
        for each in cells:
            if each["lr_u"] != rate:
                continue
            x, y = each["output_scale"], each["var_u"]
            panel.scatter(x, y, s=330, color=shades[each["predicted"]["regime"]], alpha=0.35, linewidths=0)
            panel.text(x, y, f"{each['size_exponent']['median']:.1f}", ha="center", va="center", fontsize=7)
        panel.set(xlabel="exponent of the output scale", title=f"learning rates of exponent {rate:g}")
    panels[0].set_ylabel("exponent of the weights' variance")
    for name, shade in shades.items():
        panels[-1].scatter([], [], color=shade, alpha=0.35, label=f"{name}, predicted")
    figure.legend(fontsize=7, loc="outside lower center", ncols=3)
    return figure


def main() -> None:
    """Sweep the grid, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/feature_phases"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--scales", type=float, nargs="+", default=[-1.5, -1.0, -0.5, 0.0])
    parser.add_argument("--variances", type=float, nargs="+", default=[-1.5, -1.0, -0.5, 0.0])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--share", type=float, default=0.05, help="of the largest stable step")
    parser.add_argument("--steps", type=int, default=3000, help="at most")
    parser.add_argument("--tolerance", type=float, default=0.15, help="an exponent below this is zero")
    parser.add_argument("--smoke", action="store_true", help="seconds: a corner of the grid, two seeds")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.widths, options.scales, options.rates = 2, [64, 256, 1024], [-1.0, -0.5], [0.0]
        options.variances = [-1.0, 0.0]
    began = time.process_time()
    cells = []
    for rate, scale, variance in itertools.product(options.rates, options.scales, options.variances):
        exponents = {"output_scale": scale, "var_u": variance, "var_w": variance, "lr_u": rate, "lr_w": rate}
        cells.append(cell(exponents, options=options))
    rows = [
        (
            *(c[key] for key in ("output_scale", "var_u", "lr_u")),
            c["predicted"]["regime"],
            c["size_exponent"]["median"],
            c["predicted"]["pace"],
            c["kernel_exponent"]["median"],
            c["agree"]["regime"],
            c["agree"]["pace"],
            c["learned"],
        )
        for c in cells
    ]
    header = ("scale", "variance", "lr", "regime", "r", "pace", "K", "agree", "agree", "learned")
    print(table(rows, header))
    total = len(cells) * options.seeds
    agree = {key: sum(c["agree"][key] for c in cells) / total for key in ("regime", "pace")}
    print(f"share of runs that agree: {agree}")
    config = {k: v for k, v in vars(options).items() if k != "out"}
    result = {"config": config, "cpu_seconds": time.process_time() - began, "agree": agree, "cells": cells}
    save(options.out, "feature_phases", result, draw(cells, options))


if __name__ == "__main__":
    main()
