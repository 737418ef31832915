"""A Trainer's own callbacks: what drives monitors is none of them, in a fit neither."""

from __future__ import annotations

import itertools
import time
import warnings
from collections import Counter
from copy import deepcopy
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import CollapseMonitor, Monitor, Monitors, monitors
from lightning_sym.callbacks.base import stored_states
from lightning_sym.engine.lightning import driver_of
from lightning_sym.observe import Reading
from tests.models import Classifier, data, fit, mlp, trainer


def loader() -> DataLoader:
    return DataLoader(TensorDataset(*data()), 8)


def watched(how: str) -> Any:
    found = monitors("light", every_n_steps=1, strict=True)
    return [*found] if how == "each" else [found]


def flat(callbacks: list[Any]) -> list[Any]:
    return [one for each in callbacks for one in (each if isinstance(each, Monitors) else [each])]


class Norm(Monitor):
    """The norm of all parameters."""

    quantity = "norm"

    def read(self, seen):
        yield Reading("", "value", sum(p.norm() for p in seen.run.module.parameters()))


@pytest.mark.parametrize("how", ["each", "as one"])
def test_a_trainer_has_the_callbacks_it_had(how):
    class Raises(Callback):
        raises = False

        def on_train_batch_end(self, trainer, *args):
            during.append(trainer.callbacks == before)
            during.append(len(deepcopy(trainer.callbacks)) == len(before))
            if self.raises:
                raise KeyError("mine")

    breaks = Raises()
    during: list[bool] = []
    run = trainer(callbacks=[*watched(how), breaks])
    before = list(run.callbacks)
    module = Classifier(mlp(4, 6, 3))
    for breaks.raises in (False, True, False):
        if breaks.raises:
            with pytest.raises(KeyError, match="mine"):
                run.fit(module, loader())
        else:
            run.fit(module, loader())
        assert run.callbacks == before
        assert not any(set(vars(each)) & {*vars(Callback), "log"} for each in before[:-1])
        assert driver_of(run).probes > 0
        run.validate(module, loader(), verbose=False)
        assert run.callbacks == before
        run.fit_loop.max_epochs += 1
    assert during
    assert all(during)
    assert {row["fit"] for each in before[0:1] for row in (each if how == "each" else each[0]).history} == {1}


@pytest.mark.parametrize("how", ["each", "as one"])
def test_a_checkpoint_stored_after_the_fit_has_what_one_stored_within_it_has(how, tmp_path):
    keep = ModelCheckpoint(tmp_path / "within", save_top_k=1)
    run = trainer(callbacks=[*watched(how), keep], enable_checkpointing=True)
    run.fit(Classifier(mlp(4, 6, 3)), loader())
    run.save_checkpoint(tmp_path / "after.ckpt")
    within, after = (torch.load(path) for path in (keep.best_model_path, tmp_path / "after.ckpt"))
    assert within["callbacks"].keys() == after["callbacks"].keys()
    kept = [stored_states(each) for each in (within, after)]
    kinds = ("CollapseMonitor", "PlasticityMonitor", "SignalMonitor", "Diagnosis")
    assert all(any(key.startswith(kind) for key in kept[0]) for kind in kinds)
    for each in kept:
        del each[keep.state_key]
    assert repr(kept[0]) == repr(kept[1])


@pytest.mark.parametrize("kind", [Mock, MagicMock])
def test_mocks_among_the_callbacks_are_none_of_ours(kind):
    mock = kind()
    mock.state_dict.return_value = {}
    run = fit(Classifier(mlp(4, 6, 3)), mock, *watched("as one"), mock)
    assert driver_of(run).probes > 0
    assert mock.on_train_batch_end.call_count == 2 * run.global_step
    assert not mock.read.called


def test_hooks_of_the_first_monitors_own():
    """What a user's monitor does in Lightning's hooks, and what is set on an instance, is done once."""

    class Own(Norm):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.calls = Counter()

        def on_train_batch_end(self, *args):
            self.calls["batch"] += 1

        def on_train_start(self, *args):
            super().on_train_start(*args)
            self.calls["start"] += 1

    first, second = Own(every_n_steps=1), Own(every_n_steps=1, name="second")
    first.on_train_end = Mock()  # type: ignore[method-assign]
    for callbacks in ([first, second], [second, first], [Monitors([first, second])]):
        for one in (first, second):
            one.calls.clear()
        first.on_train_end.reset_mock()
        run = fit(Classifier(mlp(4, 6, 3)), *callbacks)
        assert first.calls == second.calls == {"batch": run.global_step, "start": 1}
        assert first.on_train_end.call_count == 1
        assert isinstance(vars(first)["on_train_end"], Mock)
    assert len(first.history) == len(second.history) == 3 * run.global_step


@pytest.mark.parametrize("deferred", [False, True])
def test_copies_taken_in_a_fit_can_be_fitted_with(deferred):
    """Of the callbacks and of the whole Trainer: the fit goes on in the original alone."""
    callbacks: list[Any] = []
    trainers: list[Any] = []

    class Takes(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 2 and not trainers:
                trainers.append(None)
                callbacks.extend(deepcopy(trainer.callbacks[:2]))
                trainers[:] = [deepcopy(trainer)]

    def mine() -> list[Any]:
        return [
            Norm(every_n_steps=1),
            CollapseMonitor(every_n_steps=1, deferred=deferred, strict=True),
            Takes(),
        ]

    run = fit(Classifier(mlp(4, 6, 3)), *mine(), max_epochs=1)
    again = fit(Classifier(mlp(4, 6, 3)), *reversed(callbacks), max_epochs=1)
    for norm in (run.callbacks[0], callbacks[0]):
        assert [row["step"] for row in norm.history][-3:] == [1, 2, 3]
    assert driver_of(run).probes == driver_of(again).probes == 3
    assert driver_of(trainers[0]).engine is None


@pytest.mark.parametrize(("stored", "resumed"), [*itertools.product(["each", "as one"], repeat=2)])
def test_a_fit_is_resumed_with_monitors_listed_either_way(stored, resumed, tmp_path):
    kept = watched(stored)
    run = fit(Classifier(mlp(4, 6, 3)), *kept)
    run.save_checkpoint(tmp_path / "stored.ckpt")
    again = watched(resumed)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Be aware that when using `ckpt_path`|You're resuming from a checkpoint"
        )
        run = fit(Classifier(mlp(4, 6, 3)), *again, ckpt_path=tmp_path / "stored.ckpt", max_epochs=5)
    for each in flat(again):
        steps = [row["step"] for row in each.history if row["fit"] == 1]
        assert steps == [*range(1, run.global_step + 1)], each


def test_the_users_clock_is_not_read(monkeypatch):
    """A clock that tests or users replaced tells them their own times, one for each reading."""
    ticks = iter(range(3))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    seen = []

    class Reads(Callback):
        def on_train_batch_end(self, *args):
            seen.append(time.perf_counter())

    run = fit(Classifier(mlp(4, 6, 3)), *watched("as one"), Reads(), max_epochs=1)
    assert seen == [0, 1, 2]
    assert run.global_step == 3
