"""Small modules that tests fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(LightningModule):
    """Fits ``net`` to class labels."""

    def __init__(
        self,
        net: nn.Module,
        *,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.net = net
        self.optimizer, self.settings = optimizer, {"lr": 0.05, **settings}
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.detach().clone())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), **self.settings)


class Flatten(nn.Module):
    """Mean over all dimensions but the first and last."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2).mean(dim=1)


class SelfAttention(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self, width: int, heads: int, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def mlp(*widths: int, act: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Linear layers with activations between."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(a, b), act()] if i < len(widths) - 2 else [nn.Linear(a, b)]
    return nn.Sequential(*layers)


def convnet() -> nn.Sequential:
    """Convolutions with a normalisation, an in-place activation and dropout."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(8 * 9, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


def images(
    n: int = 32, *, batch_size: int = 8, classes: int = 4, seed: int = 0, **settings: Any
) -> DataLoader:
    """Random 8x8 images with labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 8, 8, generator=generator)
    y = torch.randint(0, classes, (n,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, **settings)


def trainer(**settings: Any) -> Trainer:
    """A quiet trainer on the CPU."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return Trainer(**{**quiet, **settings})


def data(n: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random points of four dimensions with one of three labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def fit(
    module: LightningModule,
    *callbacks: Callback,
    loader: DataLoader | None = None,
    ckpt_path: Any = None,
    **options: Any,
) -> Trainer:
    """Fit to :func:`data` for three epochs, or as told; return the trainer."""
    run = trainer(callbacks=list(callbacks), **{"max_epochs": 3, **options})
    run.fit(module, loader or DataLoader(TensorDataset(*data()), 8), ckpt_path=ckpt_path)
    return run


class Witness(Callback):
    """Everything a run consists of, after every batch."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = [t.detach().clone() for t in pl_module.state_dict().values()]
        for optimizer in trainer.optimizers:
            for per_parameter in optimizer.state.values():
                state += [v.clone() for v in per_parameter.values() if isinstance(v, Tensor)]
        self.seen.append([*state, torch.get_rng_state(), outputs["loss"].detach().clone()])
