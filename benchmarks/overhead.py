"""What do the monitors cost? Probed against unprobed steps of the same fit, and where the time goes.

Whole fits differ by a fifth from run to run on a shared machine; so every step is timed inside the
process, and each kind of fit is run in turn with the others.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import environment, spread, write_json
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import (
    AlignmentMonitor,
    CollapseMonitor,
    Monitor,
    PlasticityMonitor,
    monitors,
)
from lightning_sym.engine.engine import SECTIONS
from lightning_sym.engine.lightning import driver_of

#: Steps between probes in the benchmark, and by default.
EVERY = 5
DEFAULT = {"none": 1, "collapse": 100, "alignment": 100, "plasticity": 100, "standard": 200, "full": 200}


def watch(arm: str, every: int) -> list[Monitor]:
    """Return the monitors of an arm."""
    if arm == "none":
        return []
    kinds = {"collapse": CollapseMonitor, "alignment": AlignmentMonitor, "plasticity": PlasticityMonitor}
    if arm in kinds:
        return [kinds[arm](every_n_steps=every)]
    chosen = list(monitors(arm, every_n_steps=every))  # type: ignore[arg-type]
    for monitor in chosen:
        if isinstance(monitor, PlasticityMonitor):
            monitor.reads_epochs = False  # a cost of the epoch's end, not of a probe
    return chosen


class Fit(LightningModule):
    """Cross-entropy and SGD with momentum."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class First(Callback):
    """Notes when a batch begins, before any monitor."""

    began = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.began = time.perf_counter()


class Last(Callback):
    """Notes when a batch ends, after every monitor."""

    def __init__(self, first: First) -> None:
        self.first, self.seconds = first, []

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop the clock."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.first.began)


def resnet(batch: int) -> tuple[nn.Module, TensorDataset]:
    """Return a timm ResNet-18 and data of CIFAR-10's shape."""
    import timm

    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    return timm.create_model("resnet18", num_classes=10), TensorDataset(x, y)


class Transformer(nn.Module):
    """Two encoder layers over token embeddings."""

    def __init__(self, width: int = 256, vocabulary: int = 1000) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.encoder(self.embedding(tokens)).mean(dim=1))


def transformer(batch: int) -> tuple[nn.Module, TensorDataset]:
    """Return a two-layer transformer and sequences of 64 tokens."""
    return Transformer(), TensorDataset(torch.randint(0, 1000, (batch, 64)), torch.randint(0, 10, (batch,)))


def once(arm: str, build: Callable[[int], tuple[nn.Module, TensorDataset]], options: Any) -> dict[str, Any]:
    """Fit once, and return the medians of its steps' seconds and of our own, by section."""
    torch.manual_seed(0)
    net, data = build(options.batch)
    first = First()
    last = Last(first)
    trainer = Trainer(
        max_steps=options.steps,
        max_epochs=-1,
        accelerator=options.accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[first, *watch(arm, EVERY), last],
    )
    trainer.fit(Fit(net), DataLoader(data, batch_size=options.batch))
    seconds = last.seconds[1:]  # the first step warms up
    probed = [s for i, s in enumerate(seconds, start=2) if i % EVERY == 0]
    plain = [s for i, s in enumerate(seconds, start=2) if i % EVERY]
    driver = driver_of(trainer) if arm != "none" else None
    return {
        "unprobed": statistics.median(plain),
        "probed": statistics.median(probed),
        "sections": {k: 0.0 if driver is None else driver.seconds[k] / driver.probes for k in SECTIONS},
        "held_mb": 0.0 if driver is None else driver.held_bytes / 1e6,
    }


def compare(build: Callable[[int], tuple[nn.Module, TensorDataset]], options: Any) -> dict[str, Any]:
    """Run every arm in turn, several rounds long."""
    rounds: dict[str, list[dict[str, Any]]] = {arm: [] for arm in DEFAULT}
    for turn in range(options.pairs + 1):
        for arm in list(DEFAULT) if turn % 2 else list(DEFAULT)[::-1]:
            found = once(arm, build, options)
            if turn:
                rounds[arm].append(found)
            print(f"  round {turn}/{options.pairs} {arm}: {found['probed']:.3f} s probed", flush=True)
    report: dict[str, Any] = {}
    for arm, found in rounds.items():
        steps = [f["probed"] / f["unprobed"] - 1 for f in found]
        bare = [f["unprobed"] / b["unprobed"] for f, b in zip(found, rounds["none"], strict=True)]
        unit = [f["unprobed"] for f in found]
        report[arm] = {
            "unprobed_step_over_bare": spread(bare),
            "probe_in_steps": spread(steps),
            "share_of_fit_at_default": spread([max(s, 0.0) / DEFAULT[arm] for s in steps]),
            "default_interval": DEFAULT[arm],
            "sections_in_steps": {
                section: statistics.median(
                    f["sections"][section] / u for f, u in zip(found, unit, strict=True)
                )
                for section in found[0]["sections"]
            },
            "held_mb": found[0]["held_mb"],
            "step_seconds": spread(unit),
        }
    return report


def main() -> None:
    """Measure both networks and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/overhead.json"))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--accelerator", default="cpu")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for name, build in (("resnet18", resnet), ("transformer", transformer)):
        print(name)
        results[name] = compare(build, options)
        print(f"{'arm':12}{'unprobed/bare':>15}{'probe, steps':>14}{'share of fit':>14}")
        for arm, row in results[name].items():
            print(
                f"{arm:12}{row['unprobed_step_over_bare']['median']:15.3f}"
                f"{row['probe_in_steps']['median']:14.2f}"
                f"{row['share_of_fit_at_default']['median']:14.2%}"
            )
    config = {"pairs": options.pairs, "steps": options.steps, "batch": options.batch, "every": EVERY}
    write_json(options.out, config=config | {"environment": environment()}, results=results)


if __name__ == "__main__":
    main()
