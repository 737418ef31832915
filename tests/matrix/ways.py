"""Ways to train in one process."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym import watch
from lightning_sym.callbacks import CollapseMonitor, EigenmodeMonitor, KNNProbe, LinearProbe, Monitor, Syre
from lightning_sym.optim import attach_syre
from tests.matrix.rows import Column, Outcome, batches, fitted, outcome, plain, watching
from tests.promises.every import BATCH, Module, dataset, views


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


class Pair(Module):
    """Two networks with an optimizer each, stepped by hand in turn; each is run in the other's turn."""

    def __init__(self, kind: str = "mlp", **settings: Any) -> None:
        super().__init__(kind, **settings)
        self.other = Module(kind).net
        self.other[4].p = 0.0
        self.automatic_optimization = False

    def turns(self, batch: Any, optimizers: Sequence[Any], backward: Callable[[Tensor], Any]) -> None:
        """Let both take their step."""
        nets = self.net, self.other
        for net, against, optimizer in zip(nets, nets[::-1], optimizers, strict=True):
            optimizer.zero_grad()
            both = net(batch[0]) + against(batch[0])
            backward(nn.functional.cross_entropy(both, batch[1]))
            optimizer.step()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.turns(batch, self.optimizers(), self.manual_backward)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), **self.settings) for net in (self.net, self.other)]


def turns(callbacks: Sequence[Any], *_: Any) -> Outcome:
    """Train two networks in turn, in a plain loop."""
    module = of(Pair)
    optimizers = module.configure_optimizers()
    monitors = [each for each in callbacks if isinstance(each, Monitor)]
    for each, optimizer in itertools.product(callbacks, optimizers):
        if isinstance(each, Syre):
            named = module.named_parameters()
            attach_syre(optimizer, sigma=each.sigma, seed=each.seed, named_parameters=named)
    with watch(module, optimizers, monitors) if monitors else contextlib.nullcontext() as watched:
        for _epoch in range(2):
            for batch in batches():
                if watched is not None:
                    watched.batch(batch)
                module.turns(batch, optimizers, lambda loss: loss.backward())
            if watched is not None:
                watched.epoch_end()
    return outcome(module, optimizers, callbacks)


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
    """Return a module whose network is compiled, and one layer in it by a wrapper."""
    module = plain()
    module.net[2] = torch.compile(module.net[2], backend="eager")
    module.net.compile(backend="eager")
    return module


def single(dtype: torch.dtype = torch.float32) -> Module:
    """Return a module in another type."""
    return plain().to(dtype)


class Swa(StochasticWeightAveraging):
    """Averages the last epochs, at the learning rate there is."""

    def __init__(self) -> None:
        super().__init__(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)


class Average(Callback):
    """In a few lines: the mean of weights as epochs begin, or a moving one of those after steps."""

    def __init__(self, decay: float | None = None) -> None:
        self.decay, self.count = decay, 0
        self.mean: list[Tensor] = []

    def _add(self, module: Any, share: float) -> None:
        now = [p.detach().clone() for p in module.parameters()]
        self.mean = [a + (b - a) * share for a, b in zip(self.mean or now, now, strict=True)]
        self.count += 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self.decay is not None:
            self._add(pl_module, 1 - self.decay)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.decay is None:
            self._add(pl_module, 1 / (self.count + 1))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            for p, mean in zip(pl_module.parameters(), self.mean, strict=True):
                p.copy_(mean)


def beside(make: Callable[[], Any], callbacks: Sequence[Any], *_: Any, **settings: Any) -> Outcome:
    """Fit beside another callback."""
    return fitted([make(), *callbacks], plain(), **settings)


def halves(monitors: list[Monitor]) -> list[Monitor]:
    """Let data of monitors be of bfloat16, which a Trainer sees to."""
    for monitor in monitors:
        if isinstance(monitor, KNNProbe | LinearProbe):
            x, *labels = dataset("mlp").tensors
            monitor.train = monitor.val = DataLoader(TensorDataset(x.bfloat16(), *labels), 8)
    return monitors


def with_views() -> list[Monitor]:
    """Return monitors of which the one of embeddings looks at data of its own."""
    x = dataset("mlp", double=True).tensors[0]
    every = [m for m in watching() if not isinstance(m, EigenmodeMonitor)]
    return [*every[:-2], EigenmodeMonitor(every_n_steps=2, data=(x, x.flip(-1)), picture=False), *every[-2:]]


#: What takes derivatives outside of the step, and what torch says where these can't be had.
OF_GRADIENTS = ("SharpnessMonitor", "FeatureLearningMonitor", "CircuitMonitor")
REENTRANT = "use_reentrant=True"
autocast = partial(torch.autocast, "cpu", torch.bfloat16)
half_autocast = partial(torch.autocast, "cpu", torch.float16)


def scaler() -> Any:
    """Return a gradient scaler that grows on the way."""
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)


def single_monitors() -> list[Monitor]:
    """Return monitors whose data are float32."""
    return watching(double=False)


class ByName(Module):
    """Takes batches that are dicts, and runs itself as ``self(**batch)``."""

    def forward(self, x: Tensor, label: Any = None, other: Any = None) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = by_name(self, batch)
        self.log("loss", loss)
        return loss


def by_name(module: Any, batch: Any) -> Tensor:
    """Return the loss of a batch that is a dict."""
    return nn.functional.cross_entropy(module(**batch), batch["label"])


def dicts() -> DataLoader:
    """Return the batches of the matrix as dicts."""
    rows = dataset("mlp", double=True)
    return DataLoader([dict(zip(("x", "label", "other"), row, strict=True)) for row in rows], BATCH)


def monitors_by_name() -> list[Monitor]:
    """Return the monitors, told where things are by their names."""
    found = watching()
    for monitor in found:
        if callable(getattr(monitor, "loss", None)):
            monitor.loss = by_name
        if isinstance(monitor, EigenmodeMonitor):
            monitor.inputs = lambda batch: views([batch["x"]])
    found[0] = CollapseMonitor(every_n_steps=1, targets="label", causes=True, histograms=True, strict=True)
    return found


SINGLE = {"watch": single_monitors}
COLUMNS = [
    Column("automatic optimization", fit, loop, "a plain loop"),
    Column("a plain loop (`watch`)", loop, fit, "a Trainer"),
    Column(
        "manual optimization", partial(fit, make=partial(of, Manual)), fit, "automatic optimization",
        unread="predicted|law_error", note="no flow is predicted: it is not known what is minimised",
    ),
    Column(
        "two optimizers in turn (a GAN)", partial(fit, make=partial(of, Pair)), turns, "a plain loop",
    ),
    Column(
        "batches that are dicts, `forward(**batch)`",
        partial(fit, make=partial(of, ByName), loader=dicts()), fit, "batches that are tuples",
        watch=monitors_by_name, watch_reference=watching,
    ),
    Column(
        "accumulation of 2 batches", partial(fit, loader=batches(4), accumulate_grad_batches=2), fit,
        "one batch of twice the size", places=1e-9, watch=with_views, unread="trainability",
        note="trainability is tried on one of the batches",
    ),
    Column(
        "gradient clipping", partial(fit, gradient_clip_val=0.1), partial(loop, clip=0.1),
        "a plain loop that clips", places=1e-12, unread="predicted|law_error",
        note="no flow is predicted: it is one of whole gradients",
    ),
    Column(
        "`bf16-mixed`", partial(fit, make=single, loader=batches(double=False), precision="bf16-mixed"),
        partial(loop, make=single, double=False, precision=autocast), "a plain loop under autocast", **SINGLE,
    ),
    Column(
        "float16 with a `GradScaler`",
        partial(loop, make=single, double=False, precision=half_autocast, scaler=scaler),
        partial(loop, make=single, double=False, precision=half_autocast), "the loop without one",
        places=2e-2,
        **SINGLE,
    ),
    Column(
        "`bf16-true`", partial(fit, make=partial(single, torch.bfloat16), precision="bf16-true",
        loader=batches(double=False)),
        partial(loop, make=partial(single, torch.bfloat16), double=False, cast=Tensor.bfloat16),
        "a plain loop in bfloat16", watch_reference=lambda: halves(single_monitors()), **SINGLE,
    ),
    Column("`64-true`", partial(fit, precision="64-true"), loop, "a plain loop in float64"),
    Column(
        "activation checkpointing", partial(fit, make=partial(checkpointed, False)),
        partial(fit, make=partial(checkpointed, None)), "no checkpointing",
    ),
    Column(
        "reentrant activation checkpointing", partial(fit, make=partial(checkpointed, True)),
        partial(fit, make=partial(checkpointed, None)), "no checkpointing",
        refused=dict.fromkeys(OF_GRADIENTS, REENTRANT), unread=r"signal/(.*/)?dead",
        note="dead units are not seen where layers run without gradients first",
    ),
    Column("compiled submodules", partial(fit, make=compiled), fit, "nothing compiled", places=1e-9),
    Column(
        "Fabric", lambda callbacks, _: loop(callbacks, fabric=Fabric(accelerator="cpu", devices=1)), loop,
        "a plain loop",
    ),
    Column(
        "stochastic weight averaging", partial(beside, Swa), fit, "no averaging; an average in a few lines",
        places=1e-12, syre_reference=partial(beside, Average),
    ),
    Column(
        "EMA of weights", partial(beside, EMAWeightAveraging), fit, "no averaging; an average in a few lines",
        places=1e-12, syre_reference=partial(beside, partial(Average, 0.999)),
    ),
]  # fmt: skip
