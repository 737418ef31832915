"""Are two networks that were trained apart one and the same, but for their symmetries?

Entezari et al. (2022, arXiv 2110.06296) conjecture that once the order of hidden units is made up for, the
straight line between two trained networks has no barrier; Ainsworth et al. (2023, arXiv 2209.04836) see
it for wide networks, with scripts for fixed architectures. Here ``lightning_sym.symmetry.match`` finds the
symmetries of any architecture: a multilayer perceptron, a residual network with batch normalisation (whose
statistics are set anew at each point, Jordan et al., 2023, arXiv 2211.08403) and a small transformer on
scikit-learn's digits. Reported are barriers of the training and test loss and the accuracy half-way, before
and after alignment by weights and by activations, over pairs of seeds; b is a with other initial
weights and another order of batches.

    python examples/weight_matching.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sym.symmetry import find_symmetries, loss_barrier, match

WAYS = ("before", "weights", "activations")


class Residual(nn.Module):
    """A stem, residual blocks of two convolutions with batch normalisation, and a linear head."""

    def __init__(self, width: int, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits for images ``[N, 64]``."""
        x = F.relu(self.stem(x.view(-1, 1, 8, 8)))
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((2, 3)))


class Transformer(nn.Module):
    """Rows of the image as tokens, an encoder with normalisation first, and the mean's linear head."""

    def __init__(self, width: int, depth: int = 1) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, width), nn.Parameter(0.1 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits for images ``[N, 64]``."""
        tokens = self.embed(x.view(-1, 8, 8)) + self.place
        return self.head(self.norm(self.encoder(tokens)).mean(1))


def perceptron(width: int) -> nn.Module:
    """Return three linear layers with ReLU between."""
    return nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "mlp": perceptron,
    "resnet": Residual,
    "transformer": Transformer,
}
Data = tuple[Tensor, Tensor]


def digits() -> tuple[Data, Data]:
    """Return scikit-learn's digits, centred: three quarters to train on, the rest to test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
    x = (x - x.mean()) / x.std()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[: len(x) * 3 // 4], order[len(x) * 3 // 4 :]
    return (x[train], y[train]), (x[test], y[test])


def trained(name: str, width: int, data: Data, *, epochs: int, seed: int) -> nn.Module:
    """Train one network by AdamW with a falling rate; return it in evaluation mode."""
    torch.manual_seed(seed)
    model, (x, y) = NETWORKS[name](width), data
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    steps = epochs * (len(x) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64)[: len(x) // 64]:
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    refresh(model, x)
    return model.eval()


@torch.no_grad()
def refresh(model: nn.Module, x: Tensor) -> None:
    """Set running statistics to those of all training images; the mode stays."""
    norms = [child for child in model.modules() if isinstance(child, nn.BatchNorm2d)]
    if norms:
        training = model.training
        for norm in norms:
            norm.momentum = 1.0
        model.train()
        model(x)
        model.train(training)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Return the share of right labels."""
    return float((model(data[0]).argmax(1) == data[1]).double().mean())


def line(a: nn.Module, b: Any, train: Data, test: Data, *, points: int) -> dict[str, Any]:
    """Return barriers of the training and test loss, and the accuracies along the line."""
    along: list[float] = []
    seen: list[float] = []

    def loss(model: nn.Module) -> Tensor:
        refresh(model, train[0])
        along.append(accuracy(model, test))
        seen.append(float(F.cross_entropy(model(train[0]), train[1])))
        return F.cross_entropy(model(test[0]), test[1])

    found = loss_barrier(a, b, loss, points=points)
    straight = torch.linspace(seen[0], seen[-1], points, dtype=torch.float64)
    return {
        "train": float((torch.tensor(seen, dtype=torch.float64) - straight).max().clamp_min(0)),
        "train_line": seen,
        "test": found.height,
        "test_line": found.losses.tolist(),
        "half-way": along[points // 2],
        "ends": (along[0] + along[-1]) / 2,
    }


def compare(name: str, width: int, train: Data, test: Data, *, options: Any, seed: int) -> dict[str, Any]:
    """Train a pair and return what lies between it, before and after alignment."""
    a, b = (trained(name, width, train, epochs=options.epochs, seed=2 * seed + k) for k in range(2))
    samples = train[0][: options.samples]
    symmetries = find_symmetries(a, samples[:8])
    rows: dict[str, Any] = {"before": line(a, b, train, test, points=options.points)}
    for by in WAYS[1:]:
        matched = match(a, b, samples, by=by, symmetries=symmetries)
        rows[by] = line(a, matched.tensors, train, test, points=options.points)
        rows[by]["distance"] = matched.after / matched.before
        rows[by]["error"] = matched.error
    return rows


def draw(results: dict[str, list[dict[str, Any]]], *, points: int) -> Any:
    """Draw the mean test loss along the line, a panel a network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(results), 3), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (name, pairs) in zip(panels, results.items(), strict=True):
        for way in WAYS:
            lines = torch.tensor([pair[way]["test_line"] for pair in pairs])
            axes.plot(torch.linspace(0, 1, points), lines.mean(0), marker="o", markersize=3, label=way)
        axes.set(title=name, xlabel="from a to b", ylabel="test loss")
    panels[0].legend(fontsize=7)
    return figure


def main() -> None:
    """Train all pairs, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/weight_matching"))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=5, help="pairs of each network")
    parser.add_argument("--mlp", type=int, default=256, help="its width")
    parser.add_argument("--resnet", type=int, default=32, help="its channels")
    parser.add_argument("--transformer", type=int, default=64, help="its width")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--points", type=int, default=11, help="on the line")
    parser.add_argument("--samples", type=int, default=256, help="whose activations are compared")
    parser.add_argument("--smoke", action="store_true", help="seconds: one pair of smaller networks each")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.epochs, options.points, options.samples = 1, 8, 5, 64
        options.mlp, options.resnet, options.transformer = 64, 8, 16
    train, test = digits()
    results: dict[str, list[dict[str, Any]]] = {}
    rows: dict[str, Any] = {}
    for name in options.networks:
        results[name] = []
        for seed in range(options.seeds):
            pair = compare(name, getattr(options, name), train, test, options=options, seed=seed)
            results[name].append(pair)
            print(name, seed, *(f"{way} {pair[way]['test']:.3f}" for way in WAYS), flush=True)
        for way in WAYS:
            keys = [key for key in results[name][0][way] if not key.endswith("line")]
            values = {key: [pair[way][key] for pair in results[name]] for key in keys}
            rows[f"{name}, {way}"] = {key: spread(found) for key, found in values.items()}
    keys = ("train", "test", "half-way", "ends")
    shown = [(*row.split(", "), *(rows[row][key]["mean"] for key in keys)) for row in rows]
    print(
        table(shown, ("network", "aligned", "train barrier", "test barrier", "accuracy half-way", "at ends"))
    )
    config = {key: value for key, value in vars(options).items() if key != "out"}
    result = {"config": config, "rows": rows, "pairs": results}
    save(options.out, "weight_matching", result, draw(results, points=options.points))


if __name__ == "__main__":
    main()
