"""Where does SGD leave a product of weights? Its stationary density against the formula, below T_c and above.

A diagonal linear network learns y = x + noise. The density of its slope v is simulated by the stochastic
differential equation and held against the closed form at four temperatures (learning rate over batch size),
T_c = 1/3 between them, and at greater depth and width. Discrete SGD at batch size 1, whose learning rate is
the temperature, is a row of its own: the formula is the small-step limit's. Source: Ziyin et al., 2023, arXiv
2308.06671.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table

from lightning_sym.papers.law_of_balance import DiagonalNetwork, simulate

TEMPERATURES = (0.05, 0.1, 0.2, 0.5)
DEEP = ((2, 1, 0.2), (3, 2, 0.2))  # depth, width, temperature


def steps_of_sgd(temperature: float, *, chains: int, steps: int, seed: int) -> dict[str, float]:
    """Run SGD on u * w at batch size 1; return how many chains diverged and the others' moments over time."""
    rng = torch.Generator().manual_seed(seed)
    u, w = torch.full((2, chains), 0.5**0.5, dtype=torch.float64)
    lost = torch.zeros(chains, dtype=torch.bool)
    first, second = torch.zeros(2, chains, dtype=torch.float64)
    for step in range(steps):
        x, noise = torch.randn(2, chains, dtype=torch.float64, generator=rng)
        slope = 2 * (u * w * x - x - noise) * x
        u, w = u - temperature * slope * w, w - temperature * slope * u
        lost |= (u.abs() > 1e3) | (w.abs() > 1e3)
        u, w = torch.where(lost, 0.0, u), torch.where(lost, 0.0, w)
        if step >= steps // 2:
            first, second = first + u * w, second + (u * w).square()
    found = {"diverged": float(lost.double().mean())}
    if not bool(lost.all()):
        count = steps - steps // 2
        mean = float(first[~lost].mean()) / count
        variance = float(second[~lost].mean()) / count - mean**2
        found |= {"mean": mean, "std": math.sqrt(max(variance, 0.0))}
    return found


def simulated(
    network: DiagonalNetwork, temperature: float, edges: torch.Tensor, options: argparse.Namespace
) -> dict[str, Any]:
    """Return moments and shares by the equation over seeds, and what the formula says."""
    mean, deviation = network.moments(temperature)
    exact = network.probability(edges, temperature=temperature)
    seeds = []
    for seed in range(options.seeds):
        sizes = {"chains": options.chains, "steps": options.steps, "burn_in": options.steps // 2}
        found = simulate(network, temperature, **sizes, seed=seed, edges=edges)
        shares = found[2]
        seeds.append((found[0], found[1], float((shares - exact).abs().max()), shares.tolist()))
    return {
        "formula": {"mean": mean, "std": deviation, "mode": network.mode(temperature)},
        "mean": spread([s[0] for s in seeds]),
        "std": spread([s[1] for s in seeds]),
        "worst_share": spread([s[2] for s in seeds]),
        "exact": exact.tolist(),
        "shares": seeds[0][3],
    }


def draw(rows: dict[str, Any], edges: torch.Tensor, critical: float) -> Any:
    """Draw the density of the first seed and the formula's at every temperature."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3), layout="constrained")
    wide = float(edges[1] - edges[0])
    for axes, (name, row) in zip(figure.subplots(1, len(rows), sharey=True), rows.items(), strict=True):
        density = [share / wide for share in row["shares"]]
        axes.stairs(density, edges.tolist(), fill=True, color="C0", alpha=0.4, label="simulated")
        exact = [share / wide if share > 1e-9 else math.nan for share in row["exact"]]
        axes.plot(
            (edges[:-1] + wide / 2).tolist(), exact, "o", color="black", markersize=2.5, label="formula"
        )
        side = "below" if float(name) < critical else "above"
        axes.set(xlabel="v", title=f"T = {name}, {side} $T_c$", yscale="log", ylim=(1e-3, 30))
    figure.axes[0].set_ylabel("density")
    figure.axes[0].legend(fontsize=8)
    return figure


def main() -> None:
    """Simulate, print the tables, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/stationary_density"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--chains", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--sgd-steps", type=int, default=4000)
    parser.add_argument("--smoke", action="store_true", help="seconds: fewer chains and steps")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.chains, options.steps, options.sgd_steps = 2, 500, 1400, 600
    edges = torch.linspace(0, 3, 31, dtype=torch.float64)
    line = DiagonalNetwork.noisy_line()
    rows = {str(T): simulated(line, T, edges, options) for T in TEMPERATURES}
    discrete: dict[str, Any] = {}
    for T in TEMPERATURES:
        seeds = [
            steps_of_sgd(T, chains=options.chains, steps=options.sgd_steps, seed=s)
            for s in range(options.seeds)
        ]
        keys = [key for key in seeds[0] if all(key in seed for seed in seeds)]
        discrete[str(T)] = {key: spread([seed[key] for seed in seeds]) for key in keys}
    deep = {}
    for depth, width, T in DEEP:
        network = DiagonalNetwork.noisy_line(depth=depth, width=width)
        deep[f"depth {depth}, width {width}, T = {T}"] = simulated(network, T, edges, options)
    header = ("T", "mean", "formula", "std", "formula", "worst share", "SGD mean", "SGD std", "SGD diverged")
    cells = [
        (
            *(name, row["mean"]["mean"], row["formula"]["mean"], row["std"]["mean"], row["formula"]["std"]),
            row["worst_share"]["mean"],
            *(discrete.get(name, {}).get(key, {"mean": "-"})["mean"] for key in ("mean", "std", "diverged")),
        )
        for name, row in (rows | deep).items()
    ]
    print(table(cells, header))
    config = {key: value for key, value in vars(options).items() if key != "out"}
    result = {
        "config": config,
        "critical_temperature": line.critical_temperature(),
        "edges": edges.tolist(),
        "equation": rows,
        "sgd": discrete,
        "deep": deep,
    }
    save(options.out, "stationary_density", result, draw(rows, edges, line.critical_temperature()))


if __name__ == "__main__":
    main()
