"""What mirror symmetries do to a network on purpose, and what gradient noise does with one unasked.

Ziyin, 2023, arXiv 2309.16932. Two parts.

* *Constraints by symmetry on a network*: the first layer of an MLP on images is factorised in four ways
  (``lightning_sym.optim.constrain``), whose mirrors are single zeros, zero units, low rank and equal units,
  over decays: what is exactly there at the end, and the test accuracy. Beside it plain decay of the same
  strength, and *pruning*: an MLP without decay of which as much is taken by size, without training further.
* *Collapse by gradient noise alone*: two linear layers learn y = V x + noise at decay 0, over learning rates
  at batch size 1. The rank of their product falls as the noise rises (a mode of strength k is lost at a
  temperature of about k over the noise's variance). Beside it a residual network, (1 + U)(1 + W), the paper's
  control. Of linear layers it is none: without decay a shift of the weights is another start of the same run,
  and the mirror is moved, not removed (it lies at U = -1 now).

    python examples/mirror_symmetry.py
    python examples/mirror_symmetry.py --data MNIST

Shape letters: K networks, B samples.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table
from _stacked import Stack
from self_assembly import tensors
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sym.optim.dcs import KINDS, constrain, finalize

Data = tuple[Tensor, Tensor]


def mlp(inputs: int, hidden: int, *, seed: int) -> nn.Sequential:
    """Return a two-layer ReLU network of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def fit(kind: str, decay: float, parts: tuple[Data, Data], *, options: Any, seed: int) -> dict[str, Any]:
    """Train one network; return its accuracy and what of its first weight is nothing."""
    (x, y), test = parts
    module = mlp(x.shape[1], options.hidden, seed=seed)
    layer = module[0]
    assert isinstance(layer, nn.Linear)
    decayed = [layer.weight] if kind == "plain" else constrain(layer, kind=kind)  # type: ignore[arg-type]
    chosen = {id(parameter) for parameter in decayed}
    free = [parameter for parameter in module.parameters() if id(parameter) not in chosen]
    groups = [{"params": decayed, "weight_decay": decay}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, options.steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(options.steps):
        index = torch.randint(len(x), (options.batch,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(module(x[index]), y[index]).backward()
        optimizer.step()
        schedule.step()
    gone = None if kind == "plain" else finalize(layer, tolerance=options.tolerance)
    row = {"accuracy": accuracy(module, test), **shape_of(layer.weight.detach(), options.tolerance)}
    if gone is not None:
        row["gone"] = float(gone.double().mean())
    return {"row": row, "module": module}


def shape_of(weight: Tensor, tolerance: float) -> dict[str, float]:
    """Return shares of zero entries, zero units, lost directions and units at the mean of all."""
    values = torch.linalg.svdvals(weight.double())
    return {
        "sparse": float((weight.abs() <= tolerance).double().mean()),
        "group": float((weight.norm(dim=1) <= tolerance).double().mean()),
        "low_rank": float((values <= max(tolerance, 1e-6 * float(values[0]))).double().mean()),
        "equal": float(((weight - weight.mean(dim=0)).norm(dim=1) <= tolerance).double().mean()),
    }


@torch.no_grad()
def accuracy(module: nn.Module, test: Data) -> float:
    """Return the share of right answers."""
    return float((module(test[0]).argmax(1) == test[1]).double().mean())


@torch.no_grad()
def pruned(module: nn.Sequential, kind: str, share: float, test: Data) -> float:
    """Return the accuracy when so large a share of the first weight is taken away by size."""
    layer = module[0]
    assert isinstance(layer, nn.Linear)
    kept = layer.weight.clone()
    weight = kept.clone()
    mean = weight.mean(dim=0)
    if kind == "low_rank":
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        s[len(s) - round(share * len(s)) :] = 0
        weight = (u * s) @ v
    else:
        size = {"sparse": weight.abs(), "group": weight.norm(dim=1)}.get(kind, (weight - mean).norm(dim=1))
        taken = size.flatten().argsort()[: round(share * size.numel())]
        if kind == "sparse":
            weight.view(-1)[taken] = 0
        else:
            weight[taken] = mean if kind == "equal" else 0.0
    layer.weight.copy_(weight)
    right = accuracy(module, test)
    layer.weight.copy_(kept)
    return right


def constraints(parts: tuple[Data, Data], options: Any) -> dict[str, Any]:
    """Train all kinds at all decays; return the cells."""
    seeds = range(options.seeds)
    bare = [fit("plain", 0.0, parts, options=options, seed=seed) for seed in seeds]
    cells: dict[str, Any] = {"plain, no decay": told([run["row"] for run in bare])}
    for kind, decay in itertools.product(("plain", *KINDS), options.decays):
        rows = []
        for seed in seeds:
            row = fit(kind, decay, parts, options=options, seed=seed)["row"]
            if kind != "plain":
                row["pruned"] = pruned(bare[seed]["module"], kind, row["gone"], parts[1])
            rows.append(row)
        cells[f"{kind}, decay {decay:g}"] = told(rows)
        print(f"{kind}, {decay:g}: {cells[f'{kind}, decay {decay:g}']['accuracy']['median']:.3f}", flush=True)
    return cells


def told(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Return the spread of each number."""
    return {key: spread([row[key] for row in rows]) for key in rows[0]}


def collapse(options: Any) -> dict[str, Any]:
    """Train linear networks, plain and residual, by SGD over learning rates; return the ranks."""
    size = options.size
    strengths = torch.linspace(0.2, 1.6, size)
    result: dict[str, Any] = {"strengths": strengths.tolist(), "noise": options.noise}
    rates = [rate for rate in options.rates for _ in range(options.seeds)]
    for name in ("plain", "residual"):
        identity = torch.eye(size) if name == "residual" else torch.zeros(size, size)
        stack = Stack([size, size, size], seeds=list(range(options.seeds)) * len(options.rates), gain=0.7)
        lr = torch.tensor(rates).view(-1, 1, 1)
        generator = torch.Generator().manual_seed(1)
        ranks: list[Tensor] = []
        for step in range(options.noise_steps):
            both = torch.randn(len(rates), 1, 2 * size, generator=generator)
            x, noise = both.split(size, dim=2)
            first, second = (weight + identity for weight in stack.weights)
            out = x @ first @ second
            target = x * strengths + options.noise * noise
            stack.step(0.5 * (out - target).square().sum(), lr=lr)
            if step >= options.noise_steps * 3 // 4 and step % 50 == 0:
                with torch.no_grad():
                    first, second = (weight + identity for weight in stack.weights)
                    values = torch.linalg.svdvals(torch.nan_to_num(first @ second, nan=0.0, posinf=0.0))
                    ranks.append((values > options.lost).sum(dim=1).double())
        rank = torch.stack(ranks).mean(dim=0)
        finite = torch.stack([w.detach().isfinite().all(dim=2).all(dim=1) for w in stack.weights]).all(dim=0)
        for k, rate in enumerate(options.rates):
            part = slice(k * options.seeds, (k + 1) * options.seeds)
            kept = rank[part][finite[part]]
            cell = {"diverged": int((~finite[part]).sum())}
            result[f"{name}, lr {rate:g}"] = cell | ({"rank": spread(kept.tolist())} if len(kept) else {})
    return result


def draw(cells: dict[str, Any], noise: dict[str, Any], options: Any) -> Any:
    """Draw accuracy over what is gone, and rank over the learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, kind in enumerate(KINDS):
        rows = [cells[f"{kind}, decay {decay:g}"] for decay in options.decays]
        gone = [row["gone"]["median"] for row in rows]
        left.plot(gone, [row["accuracy"]["median"] for row in rows], "o-", color=f"C{k}", label=kind)
        left.plot(gone, [row["pruned"]["median"] for row in rows], "x:", color=f"C{k}")
    left.plot([], [], "x:", color="0.4", label="pruned alike")
    left.axhline(cells["plain, no decay"]["accuracy"]["median"], color="0.6", linewidth=0.8)
    left.set(xlabel="share that is gone", ylabel="test accuracy")
    left.legend(fontsize=7)
    for name in ("plain", "residual"):
        rows = [noise[f"{name}, lr {rate:g}"] for rate in options.rates]
        shown = [(r, row["rank"]) for r, row in zip(options.rates, rows, strict=True) if "rank" in row]
        right.errorbar(
            [rate for rate, _ in shown],
            [cell["median"] for _, cell in shown],
            yerr=[
                [cell["median"] - cell["low"] for _, cell in shown],
                [cell["high"] - cell["median"] for _, cell in shown],
            ],
            marker="o",
            linestyle="-" if name == "plain" else "--",  # one lies on the other
            capsize=2,
            label=name,
        )
    right.set(
        xscale="log", xlabel="learning rate, batch size 1", ylabel="rank of the product", ylim=(0, None)
    )
    right.set_xticks(options.rates, [f"{rate:g}" for rate in options.rates])
    right.minorticks_off()
    right.legend(fontsize=7)
    return figure


def main() -> None:
    """Train all, print tables, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/mirror_symmetry"))
    parser.add_argument(
        "--data", type=Path, default=None, help="a torchvision root with MNIST; default: digits"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--decays", type=float, nargs="+", default=[3e-3, 1e-2])
    parser.add_argument("--tolerance", type=float, default=1e-3, help="what counts as nothing")
    parser.add_argument("--size", type=int, default=8, help="of the linear layers")
    parser.add_argument("--noise", type=float, default=1.0, help="deviation of the labels' noise")
    parser.add_argument("--noise-steps", type=int, default=10_000)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.003, 0.01, 0.02, 0.04, 0.06])
    parser.add_argument("--lost", type=float, default=0.05, help="a mode below this is lost")
    parser.add_argument("--smoke", action="store_true", help="seconds: fewer steps, seeds and settings")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.steps, options.decays, options.hidden = 2, 500, [0.03], 32
        options.noise_steps, options.rates = 1500, [0.005, 0.05]
    options.images = "mnist"
    began = time.process_time()
    train_part, test, name = tensors(options)
    cells = constraints((train_part, test), options)
    noise = collapse(options)
    keys = ("accuracy", "pruned", "gone", *KINDS)
    rows = [(n, *(cell[key]["median"] if key in cell else "" for key in keys)) for n, cell in cells.items()]
    print(table(rows, ("first layer", *keys)))
    for key, cell in noise.items():
        if "lr" in key:
            print(key, cell)
    config = {k: v for k, v in vars(options).items() if k not in ("out", "data")} | {"images": name}
    result = {
        "config": config,
        "cpu_seconds": time.process_time() - began,
        "constraints": cells,
        "noise_alone": noise,
    }
    save(options.out, f"mirror_symmetry_{name}", result, draw(cells, noise, options))


if __name__ == "__main__":
    main()
