"""Every monitor in small fits: what the tests of the promises share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym import callbacks
from lightning_sym.callbacks import EpochEnds, LogSpaced, Monitor
from lightning_sym.observe import Observation, Reading, Weight
from lightning_sym.papers.learning_circuit import LearningCircuit
from tests.models import Flatten, SelfAttention, trainer

CLASSES, SAMPLES, BATCH = 3, 24, 8
SHAPES = {"mlp": (6,), "conv": (1, 5, 6), "attention": (4, 5)}


def net_of(kind: str) -> nn.Sequential:
    """Return a network with random draws in its forward pass."""
    if kind == "mlp":
        body: list[nn.Module] = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Dropout(0.1)]
        return nn.Sequential(*body, nn.Linear(7, CLASSES))
    if kind == "conv":
        body = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
        body += [nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.ReLU(inplace=True), nn.Dropout(0.1)]
        return nn.Sequential(*body, nn.Flatten(), nn.Linear(6 * 4, CLASSES))
    body = [nn.Linear(5, 8), nn.Tanh(), SelfAttention(8, 2), nn.Dropout(0.1), Flatten()]
    return nn.Sequential(*body, nn.Linear(8, CLASSES))


class Module(LightningModule):
    """Fits a network to class labels; has what each monitor asks for."""

    def __init__(self, kind: str, **settings: Any) -> None:
        super().__init__()
        self.net = net_of(kind)
        self.settings = {"lr": 0.05, "momentum": 0.5, "weight_decay": 1e-3, **settings}

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.net(x)

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a representation and an embedding."""
        h = self.net[:-1](x)
        return h, self.net[-1](h)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss."""
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), **self.settings)


class Circuit(LearningCircuit):
    """A circuit with its own rule of learning."""

    def __init__(self, kind: str = "mlp") -> None:
        super().__init__(SHAPES[kind], layers=[7, CLASSES], rule="feedback_alignment", momentum=0.5)


def dataset(kind: str, n: int = SAMPLES, *, double: bool = False) -> TensorDataset:
    """Return samples, labels and other labels."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, *SHAPES[kind], generator=generator)
    x = x.double() if double else x
    return TensorDataset(x, torch.arange(n) % CLASSES, torch.arange(n) // 2 % 2)


def views(batch: Any) -> list[Tensor]:
    """Return two views of a batch."""
    return [batch[0], batch[0].flip(-1)]


def cross_entropy(module: Any, batch: Any) -> Tensor:
    """Return the loss of a batch."""
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def every_monitor(kind: str, *, samples: int = 6, double: bool = False, **shared: Any) -> list[Monitor]:
    """Return all monitors, with caps, schedules and labels that differ."""
    data = dataset(kind, double=double)
    loader = DataLoader(data, BATCH)
    probe: dict[str, Any] = {"train": loader, "val": loader, **shared}
    loss = {"loss": cross_entropy, "samples": samples, **shared}
    last = "net.7" if kind == "conv" else "net.5"
    return [
        callbacks.CollapseMonitor(every_n_steps=1, targets=1, causes=True, histograms=True, **shared),
        callbacks.CollapseMonitor(every_n_steps=2, targets=2, layers=last, name="other", **shared),
        callbacks.PlasticityMonitor(every_n_steps=2, max_layers=2, trainability_steps=2, **shared),
        callbacks.AlignmentMonitor(every_n_steps=1, exponents=True, **shared),
        callbacks.AlignmentMonitor(every_n_steps=3, max_layers=1, moments="raw", name="one", **shared),
        callbacks.BalanceMonitor(every_n_steps=2, details=True, **shared),
        callbacks.HierarchyMonitor(every_n_steps=LogSpaced(4), max_units=6, picture=False, **shared),
        callbacks.SharpnessMonitor(every_n_steps=2, vectors=1, lanczos_steps=2, **loss),
        callbacks.SharpnessMonitor(every_n_steps=3, vectors=1, lanczos_steps=0, name="step", **shared),
        callbacks.FeatureLearningMonitor(every_n_steps=1, samples=samples, by_rate=True, **shared),
        callbacks.CircuitMonitor(every_n_steps=1, pictures=False, **shared),
        callbacks.CircuitMonitor(every_n_steps=2, loss=cross_entropy, pictures=False, name="named", **shared),
        callbacks.EigenmodeMonitor(every_n_steps=2, inputs=views, samples=samples, picture=False, **shared),
        callbacks.KNNProbe(k=2, **probe),
        callbacks.LinearProbe(solver_steps=3, every_n_epochs=2, **probe),
        Norms(every_n_steps=EpochEnds(2, at_start=True), **shared),
    ]


class Norms(Monitor):
    """A monitor of one's own: norms of weights at the ends of epochs."""

    quantity = "norms"
    weight = Weight()
    needs = (weight,)

    def read(self, seen: Observation) -> Iterator[Reading]:
        """Yield the norms."""
        for layer in seen.layers:
            yield Reading(layer.name, "", layer[self.weight].norm)


def fit(module: LightningModule, *monitors: Any, kind: str = "mlp", **settings: Any) -> Trainer:
    """Fit for two epochs of three batches, or as told; return the trainer."""
    val = settings.pop("val", None)
    loader = settings.pop("loader", None) or DataLoader(dataset(kind), BATCH)
    run = trainer(callbacks=list(monitors), **{"max_epochs": 2, **settings})
    run.fit(module, loader, val)
    return run


def same(a: Any, b: Any) -> bool:
    """Return whether rows, numbers or tensors are bitwise the same; NaN equals NaN."""
    if isinstance(a, Tensor):
        return (
            isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7))
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b or (a != a and b != b))


def apart(a: list[dict[str, float]], b: list[dict[str, float]]) -> list[str]:
    """Return which keys of two histories differ, for messages."""
    if len(a) != len(b):
        return [f"{len(a)} rows and {len(b)}"]
    found = [
        f"{key}: {x.get(key)} and {y.get(key)} at step {x['step']}"
        for x, y in zip(a, b, strict=True)
        for key in sorted(x.keys() | y.keys())
        if not same(x.get(key), y.get(key))
    ]
    return found


def hooks(module: nn.Module) -> int:
    """Return the number of hooks on a module and those inside it."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(child, kind)) for child in module.modules() for kind in kinds)
