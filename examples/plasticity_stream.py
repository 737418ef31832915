"""Does a network keep learning? A stream of tasks: digits with their pixels permuted anew each time.

Every task gets the same few hundred steps. What counts is the accuracy on held-out digits of the newest task,
at its end. Rank always stands beside loss: with strong decay weights go to theta_0, which is full of rank and
knows nothing. Setting after Kumar et al., 2023, arXiv 2308.11958, and Ziyin et al., 2024, arXiv 2408.15495.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sym.functional import dormant_fraction, effective_rank
from lightning_sym.optim import attach_syre

WIDTH = 64


def network(seed: int) -> nn.Sequential:
    """Return a ReLU network with two hidden layers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
        )


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Return standardised images, labels and which of them are held out."""
    raw = load_digits()
    x = torch.from_numpy(raw.data).float()
    return (x - x.mean()) / x.std(), torch.from_numpy(raw.target).long(), torch.arange(len(x)) % 5 == 0


def stream(arm: str, decay: float, seed: int, options: Any) -> list[dict[str, float]]:
    """Train through the stream; return what was measured at the end of each task."""
    x, y, held_out = digits()
    net = network(seed)
    first = [p.detach().clone() for p in net.parameters()]
    native = decay if arm in ("decay", "syre") else 0.0
    optimizer = torch.optim.Adam(net.parameters(), lr=options.lr, weight_decay=native)
    if arm == "syre":
        attach_syre(optimizer, sigma=options.sigma, seed=seed, named_parameters=net.named_parameters())
    generator = torch.Generator().manual_seed(1000 + seed)
    train_x, train_y = x[~held_out], y[~held_out]
    rows = []
    for _ in range(options.tasks):
        pixels = torch.randperm(64, generator=generator)
        for _ in range(options.steps):
            index = torch.randint(len(train_x), (options.batch,), generator=generator)
            loss = F.cross_entropy(net(train_x[index][:, pixels]), train_y[index])
            optimizer.zero_grad()
            loss.backward()
            if arm == "init":
                with torch.no_grad():
                    for p, start in zip(net.parameters(), first, strict=True):
                        p.grad += decay * (p - start)
            optimizer.step()
        with torch.no_grad():
            hidden = net[:4](x[held_out][:, pixels])
            logits = net[4](hidden)
            rows.append(
                {
                    "accuracy": float((logits.argmax(1) == y[held_out]).float().mean()),
                    "loss": float(F.cross_entropy(net(train_x[:, pixels]), train_y)),
                    "rank": float(effective_rank(hidden)),
                    "dormant": float(dormant_fraction(hidden)),
                }
            )
    return rows


def draw(results: dict[str, Any]) -> Any:
    """Draw the four measures over tasks, the best decay of each arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots(2, 2).flat
    names = {
        "accuracy": "accuracy on the newest task",
        "loss": "training loss",
        "rank": "effective rank",
        "dormant": "dormant units",
    }
    best: dict[str, str] = {}
    for name, result in results.items():
        arm = name.split()[0]
        if (
            arm not in best
            or result["late"]["accuracy"]["mean"] > results[best[arm]]["late"]["accuracy"]["mean"]
        ):
            best[arm] = name
    for axis, (key, title) in zip(axes, names.items(), strict=True):
        for name in best.values():
            curves = torch.tensor([[task[key] for task in seed] for seed in results[name]["seeds"]])
            axis.plot(range(1, curves.shape[1] + 1), curves.mean(0).tolist(), label=name)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("task")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    """Run every arm at every decay, and write table, JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/plasticity_stream"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=25)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--sigma", type=float, default=0.1, help="relative to the initialisation scale")
    parser.add_argument("--decays", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2])
    parser.add_argument("--smoke", action="store_true", help="seconds: two seeds, three tasks, one decay")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.tasks, options.decays = 2, 3, [1e-3]
    results: dict[str, Any] = {}
    for arm in ("plain", "decay", "syre", "init"):
        for decay in [0.0] if arm == "plain" else options.decays:
            seeds = [stream(arm, decay, seed, options) for seed in range(options.seeds)]
            quarter = max(1, options.tasks // 4)
            late = {
                key: spread([sum(t[key] for t in seed[-quarter:]) / quarter for seed in seeds])
                for key in seeds[0][0]
            }
            early = spread([sum(t["accuracy"] for t in seed[:quarter]) / quarter for seed in seeds])
            name = arm if arm == "plain" else f"{arm} {decay:g}"
            results[name] = {"late": late, "early_accuracy": early, "seeds": seeds}
            print(f"{name}: {late['accuracy']['mean']:.3f}", flush=True)
    rows = [
        [
            name,
            r["early_accuracy"]["mean"],
            *[r["late"][k]["mean"] for k in ("accuracy", "loss", "rank", "dormant")],
        ]
        for name, r in results.items()
    ]
    print(table(rows, ["arm", "early accuracy", "late accuracy", "loss", "rank", "dormant"]))
    config = {k: v for k, v in vars(options).items() if k != "out"}
    save(options.out, "plasticity_stream", {"config": config, "results": results}, draw(results))


if __name__ == "__main__":
    main()
