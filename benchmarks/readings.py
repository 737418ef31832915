"""Record what every monitor reads alone on small networks, and compare two records.

A refactor changes no number but those it says it changes: record before it, compare after it.

    python benchmarks/readings.py record before.json
    python benchmarks/readings.py compare before.json after.json
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym import callbacks

STEPS = 3
EVERY: dict[str, dict[str, Any]] = {
    "CollapseMonitor": {"targets": 1, "causes": True},
    "PlasticityMonitor": {"trainability_steps": 2},
    "AlignmentMonitor": {"exponents": True},
    "BalanceMonitor": {"details": True},
    "HierarchyMonitor": {"picture": False},
    "SharpnessMonitor": {"vectors": 3, "lanczos_steps": 4, "per_layer": True},
    "FeatureLearningMonitor": {"samples": 8},
    "CircuitMonitor": {"loss": "loss", "pictures": False},
    "KNNProbe": {"k": 3},
    "LinearProbe": {},
    "EigenmodeMonitor": {"picture": False},
}


class Attend(nn.Module):
    """Attention of a sequence to itself, then the mean over positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, width]``."""
        return self.attention(x, x, x, need_weights=False)[0].mean(dim=1)


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Return each network and the shape of a sample."""
    convolutional = nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 8, 3, stride=2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 4)),
    )
    perceptron = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4))
    attention = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), Attend(8), nn.ReLU(), nn.Linear(8, 4))
    return {"mlp": (perceptron, (6,)), "cnn": (convolutional, (1, 8, 8)), "attention": (attention, (5, 6))}


class Fit(LightningModule):
    """Cross-entropy by SGD with decay."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        """Return the loss of a batch."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a representation and an embedding."""
        return x.flatten(1), self(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.05, weight_decay=0.01)


def read(kind: str, network: str) -> list[dict[str, float]]:
    """Return the history of one monitor, alone in a fit of three steps."""
    torch.manual_seed(0)
    net, shape = networks()[network]
    data = TensorDataset(torch.randn(48, *shape), torch.arange(48) % 4)
    options = dict(EVERY[kind])
    if kind in ("KNNProbe", "LinearProbe"):
        loader = DataLoader(data, 16)
        monitor = getattr(callbacks, kind)(train=loader, val=loader, **options)
    else:
        if kind == "EigenmodeMonitor":
            options["data"] = (torch.randn(16, *shape), torch.randn(16, *shape))
        monitor = getattr(callbacks, kind)(every_n_steps=1, strict=True, **options)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", devices=1, enable_model_summary=False, callbacks=[monitor], **quiet
    )
    trainer.fit(Fit(net), DataLoader(data, 16))
    return monitor.history


def record(path: Path) -> None:
    """Write every monitor's readings on every network."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {f"{network}/{kind}": read(kind, network) for network in networks() for kind in EVERY}
    path.write_text(json.dumps(found, indent=0))
    print(f"{sum(len(row) for rows in found.values() for row in rows)} readings in {path}")


def compare(before: Path, after: Path, *, tolerance: float) -> int:
    """Print the keys that differ, with the largest relative difference of each; return their number."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    lines = []
    for place in sorted(old.keys() | new.keys()):
        worst: dict[str, float] = {}
        rows, others = old.get(place, []), new.get(place, [])
        if len(rows) != len(others):
            lines.append(f"{place}: {len(rows)} rows before, {len(others)} after")
        for row, other in zip(rows, others, strict=False):
            for key in row.keys() | other.keys():
                a, b = row.get(key), other.get(key)
                if a is None or b is None:
                    worst[f"{key} ({'new' if a is None else 'gone'})"] = math.inf
                elif not (a == b or (a != a and b != b)):
                    worst[key] = max(worst.get(key, 0.0), abs(a - b) / max(abs(a), abs(b), 1e-12))
        lines += [f"{place} {key}: {value:.2g}" for key, value in sorted(worst.items()) if value > tolerance]
    print("\n".join(lines) or "no reading differs")
    return len(lines)


def main() -> None:
    """Record or compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("record", "compare"))
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-6)
    arguments = parser.parse_args()
    if arguments.verb == "record":
        record(arguments.paths[0])
    else:
        compare(*arguments.paths, tolerance=arguments.tolerance)


if __name__ == "__main__":
    main()
