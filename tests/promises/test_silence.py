"""Promise 2: a run with monitors is bitwise the run without.

Parameters, buffers, optimizer state, gradients left behind, random states, train modes, and the user's
own counters, metrics, logs and hooks.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_sym.callbacks import Monitor
from tests.promises.every import (
    BATCH,
    CLASSES,
    SHAPES,
    Circuit,
    Module,
    dataset,
    every_monitor,
    fit,
    net_of,
    same,
)


class Everything(Callback):
    """Takes down all that a run consists of, wherever a batch or an epoch ends."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def look(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters()]
        kept = [list(o.state_dict()["state"].values()) for o in trainer.optimizers]
        groups = [
            [{k: v for k, v in g.items() if k != "params"} for g in o.param_groups]
            for o in trainer.optimizers
        ]
        step_ends = (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
        numpys = numpy.random.get_state()  # noqa: NPY002
        row = [
            dict(pl_module.state_dict()),
            gradients,
            kept,
            groups,
            [torch.get_rng_state(), list(random.getstate()[1]), numpys[1].tolist(), numpys[2]],
            [child.training for child in pl_module.modules()],
            [sorted(vars(child)) for child in pl_module.modules()],
            hooks_of(pl_module) if step_ends else None,  # in an accumulated step they are at work
            [p.requires_grad for p in pl_module.parameters()],
            [list(vars(child)["_parameters"]) for child in pl_module.modules()],
            dict(getattr(pl_module, "counts", {})),
            {key: float(value) for key, value in trainer.callback_metrics.items() if "/" not in key},
            {key: float(value) for key, value in trainer.logged_metrics.items()},
            [torch.is_grad_enabled(), torch.get_default_dtype() == torch.float32],
        ]
        self.seen.append(copy.deepcopy(row))

    on_train_batch_end = on_train_epoch_end = on_validation_end = on_train_end = look


def hooks_of(module: nn.Module) -> list[tuple[int, ...]]:
    """Return how many hooks of each kind a module and those inside it have."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [tuple(len(getattr(child, kind)) for kind in kinds) for child in module.modules()]


def run(
    make: Callable[[], LightningModule], watching: list[Any], *, kind: str = "mlp", **settings: Any
) -> Any:
    """Fit; return all that was seen of the run."""
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002
    everything, module = Everything(), make()
    before = hooks_of(module)
    shuffled = DataLoader(dataset(kind), BATCH, shuffle=True)
    val = settings.pop("val", DataLoader(dataset(kind), BATCH))
    fit(module, *watching, everything, kind=kind, loader=shuffled, val=val, **settings)
    assert all(each.history for each in watching if isinstance(each, Monitor))
    assert any(isinstance(each, Careless) for each in watching) or hooks_of(module) == before
    return everything.seen


def differs(bare: Any, watched: Any) -> list[str]:
    """Return where two runs differ, for messages."""
    if len(bare) != len(watched):
        return [f"{len(bare)} and {len(watched)} moments"]
    return [
        f"moment {i}, part {k}"
        for i in range(len(bare))
        for k in range(14)
        if not same(bare[i][k], watched[i][k])
    ]


class Draws(Callback):
    """Draws one number of each kind."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        self.draw = draw

    def on_train_batch_start(self, *_: Any) -> None:
        self.draw()


class Careless(Callback):
    """Does one thing to the module, before the first batch."""

    def __init__(self, act: Callable[[Any], Any]) -> None:
        self.act = act

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 1:
            self.act(pl_module)


@pytest.mark.parametrize(
    "careless",
    [
        Draws(lambda: torch.rand(1)),
        Draws(random.random),
        Draws(lambda: numpy.random.rand()),  # noqa: NPY002
        Careless(lambda module: module.net[4].eval()),
        Careless(lambda module: module.register_forward_hook(lambda *_: None)),
        Careless(lambda module: module(torch.ones(2, 6))),
        Careless(lambda module: module.log("loss", 0.0)),
        Careless(lambda module: setattr(module, "mine", 1)),
    ],
)
def test_the_comparison_can_fail(careless):
    bare = run(lambda: Counted(net_of("mlp")), [], max_epochs=1)
    assert not differs(bare, run(lambda: Counted(net_of("mlp")), [], max_epochs=1))
    assert differs(bare, run(lambda: Counted(net_of("mlp")), [careless], max_epochs=1))


class Counted(Module):
    """Counts its calls, has metrics, hooks, logs and a function that captured it, and draws numbers."""

    def __init__(self, net: nn.Module, optimizer: Any = torch.optim.AdamW, **settings: Any) -> None:
        super().__init__("mlp")
        self.net, self.optimizer, self.settings = net, optimizer, {"lr": 0.01, **settings}
        self.counts: dict[str, float] = {"forward": 0, "hook": 0, "step": 0, "embed": 0, "backward": 0}
        self.accuracy, self.mean = MulticlassAccuracy(CLASSES), MeanMetric()
        self.register_buffer("calls", torch.zeros(()))
        self.through = lambda x: self._run(x)
        self.net.register_forward_hook(self._hook)
        next(iter(net.parameters())).register_hook(self._backward)

    def _run(self, x: Tensor) -> Tensor:
        self.counts["forward"] += 1
        self.calls += 1
        return self.net(x) + 1e-3 * (torch.rand(()) + random.random() + numpy.random.rand())  # noqa: NPY002

    def _hook(self, *_: Any) -> None:
        self.counts["hook"] += 1

    def _backward(self, gradient: Tensor) -> None:
        self.counts["backward"] += 1

    def forward(self, x: Tensor) -> Tensor:
        """Go through the captured function."""
        return self.through(x)

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Count, too."""
        self.counts["embed"] += 1
        y = self(x)
        return y, y * 2

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Count, measure and log."""
        self.counts["step"] += 1
        y = self(batch[0])
        loss = nn.functional.cross_entropy(y, batch[1])
        self.accuracy(y, batch[1])
        self.mean.update(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_epoch=True, on_step=False)
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the mean."""
        self.log("mean", self.mean.compute())
        self.mean.reset()

    def configure_optimizers(self) -> Any:
        """Return the optimizer."""
        return self.optimizer(self.parameters(), **self.settings)


@pytest.mark.filterwarnings("ignore:.*lightning_sym.*:UserWarning")
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_monitor_is_silent(kind, accumulate):
    """AdamW, dropout, batch normalisation in the conv net, validation, counters, metrics, captured self."""
    settings = {"kind": kind, "accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0}
    bare = run(lambda: Counted(net_of(kind)), [], **settings)
    assert len(bare) == 2 * (3 + 1 + 1) + 1 + 1  # batches, ends of epochs and validations, sanity check, end
    watching = every_monitor(kind)
    assert not differs(bare, run(lambda: Counted(net_of(kind)), watching, **settings))


class Counting(nn.Module):
    """A parametrization that counts its calls, in a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("made", torch.zeros(()))

    def forward(self, weight: Tensor) -> Tensor:
        """Scale."""
        self.made += 1
        return weight * (1 + 1e-3 * self.made)


def spectral() -> nn.Module:
    """Return a network whose weights are made by parametrizations with a state."""
    net = net_of("mlp")
    parametrizations.spectral_norm(net[0])
    parametrizations.weight_norm(net[2])
    parametrize.register_parametrization(net[5], "weight", Counting())
    return net


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_every_monitor_is_silent_where_weights_are_made_by_parametrizations_with_a_state():
    class Parametrized(Module):
        def __init__(self):
            super().__init__("mlp")
            self.net = spectral()

    bare = run(Parametrized, [])
    watching = every_monitor("mlp")
    assert not differs(bare, run(Parametrized, watching))
    assert any("weight_effective_rank" in key for key in watching[0].history[-1])


class Players(LightningModule):
    """Two optimizers stepped by hand, the one twice as often; each network is run in the other's turn."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net, self.other = net_of("mlp"), net_of("mlp")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.net(x) + self.other(x).detach()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Step the one, then the other in every second batch."""
        for k, (net, optimizer) in enumerate(zip((self.net, self.other), self.optimizers(), strict=True)):
            if k and batch_idx % 2:
                continue
            optimizer.zero_grad()
            both = net(batch[0]) + (self.other, self.net)[k](batch[0])
            self.manual_backward(nn.functional.cross_entropy(both, batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        """Return Adam and SGD."""
        return [torch.optim.Adam(self.net.parameters()), torch.optim.SGD(self.other.parameters(), 0.1)]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_every_monitor_is_silent_with_several_optimizers():
    bare = run(Players, [], val=None)
    watching = [m for m in every_monitor("mlp") if m.prefix not in ("eigenmodes", "circuit", "step")]
    assert not differs(bare, run(Players, watching, val=None))


def test_monitors_are_silent_in_a_circuit():
    watching = [m for m in every_monitor("mlp", strict=True) if m.prefix in ("circuit", "knn", "linear")]
    assert not differs(run(Circuit, [], val=None), run(Circuit, watching, val=None))
    assert len(watching) == 3
