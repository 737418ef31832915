"""Promise 1: every reading of every monitor is the same alone and beside every other, in any order.

What other callbacks run through the module, a validation, a nested fit or another thread is not taken
for the step.
"""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_sym.callbacks import (
    CircuitMonitor,
    CollapseMonitor,
    CompositionMonitor,
    KNNProbe,
    Monitor,
    SharpnessMonitor,
    monitors,
)
from lightning_sym.datamodules import GaussianBumpsDataModule
from lightning_sym.papers.composition import MLPDecoder
from tests.models import trainer
from tests.promises.every import (
    BATCH,
    SHAPES,
    Circuit,
    Module,
    apart,
    cross_entropy,
    dataset,
    every_monitor,
    fit,
)


def histories(kind: str, watching: list[Monitor], *others: Callback, **settings: Any) -> list[Any]:
    """Fit one module, always the same; return what each monitor read."""
    torch.manual_seed(0)
    fit(Module(kind), *watching, *others, kind=kind, val=DataLoader(dataset(kind), BATCH), **settings)
    assert all(monitor.history for monitor in watching)
    return [monitor.history for monitor in watching]


@pytest.mark.parametrize("kind", SHAPES)
def test_readings_are_the_same_alone_and_beside_all_others_in_any_order(kind):
    count = len(every_monitor(kind))
    alone = [histories(kind, [every_monitor(kind, strict=True)[i]])[0] for i in range(count)]
    for seed in range(3):
        order = list(range(count))
        random.Random(seed).shuffle(order)
        together = every_monitor(kind, strict=True)
        found = dict(zip(order, histories(kind, [together[i] for i in order]), strict=True))
        for i in range(count):
            assert not apart(alone[i], found[i]), type(together[i]).__name__


def test_the_comparison_can_fail():
    """One reading that moved by a rounding error, one that is missing and one row less are seen."""
    row = {"step": 1, "a": 1.0, "b": float("nan")}
    assert not apart([row], [dict(row)])
    assert apart([row], [{**row, "a": 1.0 + 1e-15}])
    assert apart([row], [{"step": 1, "a": 1.0}])
    assert apart([row], [])
    assert apart([row], [{**row, "b": 0.0}])


def test_readings_of_a_circuit_are_the_same_beside_others():
    def read(*others: Monitor) -> Any:
        torch.manual_seed(0)
        watch = CircuitMonitor(every_n_steps=1, strict=True)
        fit(Circuit(), *others, watch)
        return watch.history

    alone, probed = read(), DataLoader(dataset("mlp"), BATCH)
    sharp = SharpnessMonitor(every_n_steps=1, loss=cross_entropy, vectors=1, lanczos_steps=0)
    others = [sharp, CircuitMonitor(every_n_steps=2, name="b"), KNNProbe(train=probed, val=probed)]
    assert any("feedback_cosine" in key for key in alone[0])
    assert not apart(alone, read(*others))


def test_readings_of_composition_are_the_same_beside_others():
    def read(*others: Monitor) -> Any:
        data = GaussianBumpsDataModule(
            size=8, sigma=1.0, encoding="bump", batch_size=16, holdout_size=3, seed=0
        )
        watch = CompositionMonitor(every_n_steps=1, grid=4, pictures=False, strict=True)
        torch.manual_seed(0)
        run = trainer(max_steps=2, callbacks=[*others, watch], limit_val_batches=0)
        run.fit(MLPDecoder(16, size=8, width=8, hidden_layers=1, seed=0), datamodule=data)
        return watch.history

    assert not apart(read(), read(*monitors("full", every_n_steps=1)))


HOOKS = [
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_end",
]


def layer_monitors(kind: str) -> list[Monitor]:
    """Return those whose readings come from what passes through layers."""
    chosen = every_monitor(kind, strict=True)
    return [monitor for monitor in chosen if any(need.of_step for need in monitor.needs)]


class Look(Callback):
    """Runs the module, with and without gradients, wherever Lightning lets it."""

    def __init__(self, kind: str) -> None:
        self.x, self.ran = torch.ones(5, *SHAPES[kind]), 0
        for hook in HOOKS:
            setattr(self, hook, self.look)

    def look(self, trainer, pl_module, *args):
        self.ran += 1
        training, state = pl_module.training, torch.get_rng_state()
        pl_module.eval()
        with torch.no_grad():
            pl_module(self.x)
        with torch.enable_grad():
            torch.autograd.grad(pl_module(self.x).sum(), list(pl_module.parameters()))
        pl_module.train(training)
        torch.set_rng_state(state)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("first", [True, False])
def test_what_a_callback_runs_through_the_module_is_not_the_step(kind, first):
    alone = histories(kind, layer_monitors(kind))
    watching, look = layer_monitors(kind), Look(kind)
    torch.manual_seed(0)
    both = [look, *watching] if first else [*watching, look]
    fit(Module(kind), *both, kind=kind, val=DataLoader(dataset(kind), BATCH))
    assert look.ran > 30
    for monitor, expected in zip(watching, alone, strict=True):
        assert not apart(expected, monitor.history), type(monitor).__name__


def test_a_validation_inside_an_accumulated_step_is_not_the_step():
    def read(**settings: Any) -> Any:
        watching = layer_monitors("mlp")
        torch.manual_seed(0)
        module = Module("mlp")
        module.net[4] = nn.Identity()  # dropout: validation's loader shifts what is drawn
        val = DataLoader(dataset("mlp"), BATCH)
        fit(module, *watching, val=val, accumulate_grad_batches=3, **settings)
        return [monitor.history for monitor in watching]

    inside, without = read(val_check_interval=1), read(limit_val_batches=0)
    for a, b in zip(inside, without, strict=True):
        assert a
        assert not apart(a, b)


class Nested(Callback):
    """Fits the same module's copy, and another one, in the middle of a fit."""

    def __init__(self, kind: str, hook: str) -> None:
        self.kind, self.rows = kind, []
        setattr(self, hook, self.nest)

    def nest(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        state = torch.get_rng_state()
        watch = CollapseMonitor(every_n_steps=1, strict=True)
        torch.manual_seed(1)
        fit(Module(self.kind), watch, kind=self.kind, max_epochs=1)
        self.rows.append(watch.history)
        torch.set_rng_state(state)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"])
def test_a_fit_inside_a_callback_is_not_the_step(hook):
    alone = histories("mlp", layer_monitors("mlp"), max_epochs=1)
    nested = Nested("mlp", hook)
    for a, b in zip(alone, histories("mlp", layer_monitors("mlp"), nested, max_epochs=1), strict=True):
        assert not apart(a, b)
    assert len(nested.rows) == 3
    assert all(not apart(nested.rows[0], rows) for rows in nested.rows)
    assert all(row["collapse/samples"] == BATCH for row in nested.rows[0])


def test_another_thread_that_runs_the_same_module_is_not_the_step():
    class Apart(Callback):
        """Runs the module in a thread, from the start of the step's forward pass to its end."""

        def on_train_start(self, trainer, pl_module):
            self.ran, self.inside = 0, False
            self.hook = pl_module.net[0].register_forward_pre_hook(self.beside)

        def beside(self, module, args):
            if not self.inside:
                self.inside = True
                thread = threading.Thread(target=self.run, args=(module,))
                thread.start()
                thread.join()
                self.inside = False

        def run(self, module):
            self.ran += 1
            module(torch.ones(50, 6)).sum()

    alone = histories("mlp", layer_monitors("mlp"))
    beside = Apart()
    for a, b in zip(alone, histories("mlp", layer_monitors("mlp"), beside), strict=True):
        assert not apart(a, b)
    assert beside.ran >= 6


def test_fits_in_two_threads_read_what_each_reads_alone():
    """Attention is watched by a replaced ``F.linear``, the trainer's steps by hooks: neither is shared."""

    def job(kind: str, found: list[Any]) -> None:
        watch = [
            CollapseMonitor(every_n_steps=1, strict=True),
            *monitors("standard", every_n_steps=1, strict=True)[1:],
        ]
        module = modules[kind]
        fit(module, *watch, kind=kind, max_epochs=4)
        found += [monitor.history for monitor in watch]

    def made() -> dict[str, Module]:
        torch.manual_seed(0)
        found = {kind: Module(kind) for kind in ("attention", "mlp")}
        for module in found.values():  # random draws are of the process
            module.apply(lambda child: setattr(child, "p", 0.0) if isinstance(child, nn.Dropout) else None)
        return found

    alone: dict[str, list[Any]] = {"attention": [], "mlp": []}
    modules = made()
    for kind, found in alone.items():
        job(kind, found)
    beside: dict[str, list[Any]] = {"attention": [], "mlp": []}
    modules = made()
    threads = [threading.Thread(target=job, args=item) for item in beside.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for kind in alone:
        assert len(beside[kind]) == len(alone[kind])
        assert all(beside[kind])
        for a, b in zip(alone[kind], beside[kind], strict=True):
            assert not apart(a, b), kind
