"""What the strangers' runs share: real digits, a plain module, independent measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

#: Cases by name, and the kinds of alarm that are right of each; none of a healthy one.
CASES: dict[str, Callable[[int], Run]] = {}
KINDS: dict[str, tuple[str, ...]] = {}


def case(name: str, *kinds: str) -> Callable[[Callable[[int], Run]], Callable[[int], Run]]:
    """Register a case: the kinds that are right of it, none if it is healthy."""

    def add(build: Callable[[int], Run]) -> Callable[[int], Run]:
        CASES[name], KINDS[name] = build, kinds
        return build

    return add


@dataclass
class Run:
    """One run, built and ready to fit.

    Args:
        fits: module, batches and optimizer steps of each fit, one after another.
        truth: after the fits, numbers that were measured and whether they are those of a sick run.
        targets: where the class labels are in a batch, if there are any.
        views: whether it is self-supervised.
        trainer: further arguments of the Trainer.
        callbacks: further callbacks.
    """

    fits: list[tuple[LightningModule, Any, int]]
    truth: Callable[[], tuple[dict[str, float], Any]]
    targets: int | None = None
    views: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: list[Any] = field(default_factory=list)


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return 1,300 digits to train on and 497 held out, 64 pixels in [0, 1] each."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    x = torch.tensor(loaded.data, dtype=torch.float32) / 16
    y = torch.tensor(loaded.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(7))
    x, y = x[order], y[order]
    return (x[:1300], y[:1300]), (x[1300:], y[1300:])


def images() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the digits as images of one channel."""
    (a, b), (c, d) = digits()
    return (a.view(-1, 1, 8, 8), b), (c.view(-1, 1, 8, 8), d)


def loader(
    *tensors: Tensor, batch: int = 64, shuffle: bool = True, drop_last: bool = True
) -> DataLoader[Any]:
    """Return batches of tensors."""
    return DataLoader(TensorDataset(*tensors), batch_size=batch, shuffle=shuffle, drop_last=drop_last)


class Lit(LightningModule):
    """A network, a loss of (output, target), a maker of an optimizer and one of a schedule."""

    def __init__(
        self,
        net: nn.Module,
        loss: Any = F.cross_entropy,
        optim: Any = lambda parameters: torch.optim.Adam(parameters, 1e-3),
        schedule: Any = None,
    ) -> None:
        super().__init__()
        self.net, self.loss, self.optim, self.schedule = net, loss, optim, schedule

    def forward(self, x: Tensor) -> Any:
        """Return the network's output."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        x, y = batch
        loss: Tensor = self.loss(self(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and the schedule if there is one."""
        optimizer = self.optim(self.parameters())
        if self.schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"},
        }


def accuracy(module: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the accuracy in eval mode; 0 where an output is not finite."""
    module.eval()
    with torch.no_grad():
        out = module(x)
        return float((out.argmax(-1) == y).float().mean()) if torch.isfinite(out).all() else 0.0


def dead_share(module: nn.Module, x: Tensor) -> dict[str, float]:
    """Return the share of ReLU units or channels that never fire: the mean over layers and the most."""
    seen: dict[nn.Module, Tensor] = {}

    def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        output = output.detach()
        dims = [0, *range(2, output.ndim)] if output.ndim == 4 else list(range(output.ndim - 1))
        seen[layer] = (output > 0).float().amax(dim=dims)

    handles = [m.register_forward_hook(hook) for m in module.modules() if isinstance(m, nn.ReLU)]
    module.eval()
    with torch.no_grad():
        module(x)
    for handle in handles:
        handle.remove()
    shares = [float((fires == 0).float().mean()) for fires in seen.values()]
    return {"dead_mean": sum(shares) / len(shares), "dead_most": max(shares)}
