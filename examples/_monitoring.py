"""What the two monitoring examples share: a classifier to fit, and what is left of the fit."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_sym.callbacks import Monitor
from lightning_sym.plots import in_words, overview, summary

#: What the picture shows of all that is read.
PICTURED = [
    "collapse/effective_rank",
    "collapse/score",
    "collapse/nc1",
    "alignment/in/gwa",
    "alignment/out/rga",
    "alignment/mean",
    "plasticity/dormant_units",
    "plasticity/relative_update",
]


class Classifier(LightningModule):
    """Fits a backbone to labels with AdamW."""

    def __init__(self, net: nn.Module, *, classes: int, lr: float, weight_decay: float) -> None:
        super().__init__()
        self.net = net
        self.lr, self.weight_decay = lr, weight_decay
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the accuracy."""
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)


def parser(name: str, about: str) -> argparse.ArgumentParser:
    """Return a parser with the options both examples have."""
    made = argparse.ArgumentParser(description=about)
    made.add_argument("--out", type=Path, default=Path("runs") / name, help="logs and picture go here")
    made.add_argument("--epochs", type=int, default=None)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--accelerator", default="auto")
    return made


def finish(
    watch: Sequence[Monitor], *, out: Path, name: str, metrics: dict[str, Any], word: str = ""
) -> None:
    """Draw the overview and the summary, and say what was seen."""
    history = [row for monitor in watch for row in monitor.history]
    out.mkdir(parents=True, exist_ok=True)
    picture = out / f"{name}.png"
    summary(history, keys=PICTURED).savefig(picture, dpi=110)
    glance = out / f"{name}_overview.png"
    overview(history).savefig(glance, dpi=110)
    print(f"\nWhat the monitors saw{f' of the {word} run' if word else ''}")
    for sentence in in_words(history):
        print(f"  {sentence}")
    if "accuracy" in metrics:
        print(f"  Validation accuracy at the end: {float(metrics['accuracy']):.3f}.")
    print(f"  Overview: {glance}\n  Readings: {picture}\n")


def tell_where(out: Path) -> None:
    """Tell where to look further."""
    print(f"All on one page:  lightning-sym report {out} --out {out / 'report.html'}")
    print(f"In TensorBoard:   tensorboard --logdir {out}   (it opens with the overviews)")
