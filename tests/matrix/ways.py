"""Ways to train in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_sym import watch
from lightning_sym.callbacks import Monitor, Syre
from lightning_sym.optim import attach_syre
from tests.matrix.rows import Column, Outcome, batches, fitted, outcome, plain, watching
from tests.promises.every import Module, cross_entropy


def loop(
    callbacks: Sequence[Any],
    *_: Any,
    make: Callable[[], Any] = plain,
    size: int = 8,
    accumulate: int = 1,
    clip: float = 0.0,
    double: bool = True,
    cast: Callable[[Tensor], Tensor] | None = None,
    precision: Callable[[], Any] | None = None,
    scaler: Any = None,
    fabric: Any = None,
    epochs: int = 2,
) -> Outcome:
    """Train in a plain loop, as the Trainer does."""
    module = make()
    optimizer = module.configure_optimizers()
    for each in callbacks:
        if isinstance(each, Syre):
            named = module.named_parameters()
            attach_syre(optimizer, sigma=each.sigma, seed=each.seed, named_parameters=named)
    monitors = [each for each in callbacks if isinstance(each, Monitor)]
    run, loader = module, batches(size, double=double)
    scale = scaler() if scaler is not None else None
    if fabric is not None:
        run, optimizer = fabric.setup(module, optimizer)
        run.mark_forward_method("embed") if hasattr(run, "mark_forward_method") else None
        loader = fabric.setup_dataloaders(loader)
    options = {"accumulate": accumulate, "precision": precision, "scaler": scale}
    with watch(run, optimizer, monitors, **options) if monitors else contextlib.nullcontext() as watched:
        for _ in range(epochs):
            module.train()
            for k, batch in enumerate(loader):
                if cast is not None:
                    batch = [cast(batch[0]), *batch[1:]]
                if watched is not None:
                    watched.batch(batch)
                with (precision or contextlib.nullcontext)():
                    loss = nn.functional.cross_entropy(run(batch[0]), batch[1])
                if watched is not None:
                    watched.loss(loss)
                if k % accumulate == 0:
                    optimizer.zero_grad()
                part = loss / accumulate if scale is None else scale.scale(loss / accumulate)
                fabric.backward(part) if fabric is not None else part.backward()
                if (k + 1) % accumulate == 0:
                    if clip:
                        nn.utils.clip_grad_norm_(module.parameters(), clip)
                    if scale is None:
                        optimizer.step()
                    else:
                        scale.step(optimizer)
                        scale.update()
            if watched is not None:
                watched.epoch_end()
    return outcome(module, [optimizer], callbacks)


def fit(callbacks: Sequence[Any], *_: Any, make: Callable[[], Any] = plain, **settings: Any) -> Outcome:
    """Fit with a Trainer."""
    return fitted(callbacks, make(), **settings)


class Manual(Module):
    """Steps by hand."""

    def __init__(self, kind: str = "mlp", **settings: Any) -> None:
        super().__init__(kind, **settings)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


class Checkpointed(nn.Sequential):
    """Computes its middle layers again in the backward pass."""

    reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return super().forward(x)
        x = self[1](self[0](x))
        x = checkpoint(nn.Sequential.forward, self[2:4], x, use_reentrant=self.reentrant)
        return self[5](self[4](x))


def of(kind: type[Module], **settings: Any) -> Module:
    """Return a module of another class with the same weights."""
    torch.manual_seed(0)
    module = kind("mlp", **settings).double()
    module.net[4].p = 0.0
    return module


def checkpointed(reentrant: bool | None) -> Module:
    """Return a module that computes layers again."""
    module = plain()
    module.net = Checkpointed(*module.net)
    module.net.reentrant = reentrant
    return module


def compiled() -> Module:
    """Return a module whose network is compiled."""
    module = plain()
    module.net = torch.compile(module.net, backend="eager")
    return module


def single(dtype: torch.dtype = torch.float32) -> Module:
    """Return a module in another type."""
    return plain().to(dtype)


class Averaged(StochasticWeightAveraging):
    """Averages the last epoch."""

    def __init__(self) -> None:
        super().__init__(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)


def with_callback(make: Callable[[], Any], callbacks: Sequence[Any], *_: Any, **settings: Any) -> Outcome:
    """Fit beside another callback."""
    found = fitted([make(), *callbacks], plain(), **settings)
    return found


NO_LOSS_ON_CLIP = r"balance/.*|circuit/.*"
autocast = partial(torch.autocast, "cpu", torch.bfloat16)
half_autocast = partial(torch.autocast, "cpu", torch.float16)


def scaler() -> Any:
    """Return a gradient scaler that grows on the way."""
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)


def single_monitors() -> list[Monitor]:
    """Return monitors whose data are float32."""
    return watching(double=False)


SINGLE = {"watch": single_monitors}
COLUMNS = [
    Column("automatic optimization", fit, loop, "a plain loop"),
    Column("a plain loop (`watch`)", loop, fit, "a Trainer"),
    Column(
        "manual optimization", partial(fit, make=partial(of, Manual)), fit, "automatic optimization",
        unread=r"^(circuit|balance)/", note="no angle and no law: it is not known what is minimised",
    ),
    Column(
        "accumulation of 2 batches", partial(fit, loader=batches(4), accumulate_grad_batches=2), fit,
        "one batch of twice the size", places=1e-9,
    ),
    Column(
        "gradient clipping", partial(fit, gradient_clip_val=0.1), partial(loop, clip=0.1),
        "a plain loop that clips", places=1e-12, unread=r"^balance/.*predicted|^balance/.*law",
        note="no law is read: it is one of gradients as they are",
    ),
    Column(
        "`bf16-mixed`", partial(fit, make=single, loader=batches(double=False), precision="bf16-mixed"),
        partial(loop, make=single, double=False, precision=autocast), "a plain loop under autocast", **SINGLE,
    ),
    Column(
        "float16 with a `GradScaler`",
        partial(loop, make=single, double=False, precision=half_autocast, scaler=scaler),
        partial(loop, make=single, double=False, precision=half_autocast), "the loop without one", places=2e-2,
        **SINGLE,
    ),
    Column(
        "`bf16-true`", partial(fit, make=partial(single, torch.bfloat16), precision="bf16-true",
        loader=batches(double=False)),
        partial(loop, make=partial(single, torch.bfloat16), double=False, cast=Tensor.bfloat16),
        "a plain loop in bfloat16", **SINGLE,
    ),
    Column("`64-true`", partial(fit, precision="64-true"), loop, "a plain loop in float64"),
    Column(
        "activation checkpointing", partial(fit, make=partial(checkpointed, False)),
        partial(fit, make=partial(checkpointed, None)), "no checkpointing",
    ),
    Column(
        "reentrant activation checkpointing", partial(fit, make=partial(checkpointed, True)),
        partial(fit, make=partial(checkpointed, None)), "no checkpointing",
    ),
    Column("compiled submodules", partial(fit, make=compiled), fit, "nothing compiled", places=1e-9),
    Column(
        "Fabric", lambda callbacks, _: loop(callbacks, fabric=Fabric(accelerator="cpu", devices=1)), loop,
        "a plain loop",
    ),
    Column("stochastic weight averaging", partial(with_callback, Averaged), partial(with_callback, Averaged),
           "the fit without monitors alone"),
    Column(
        "EMA of weights", partial(with_callback, EMAWeightAveraging), fit, "no average"),
]  # fmt: skip
_ = cross_entropy
