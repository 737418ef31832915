"""Readings that are computed in a thread: the same numbers under the same steps, published when it is due."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_sym import watch
from lightning_sym.callbacks import (
    AlignmentMonitor,
    CollapseMonitor,
    Monitor,
    PlasticityMonitor,
    SharpnessMonitor,
    monitors,
)
from lightning_sym.engine.reader import LAG
from lightning_sym.observe import Observation, Reading, Weight
from tests.models import trainer
from tests.promises.every import BATCH, SHAPES, Module, apart, dataset, fit
from tests.promises.ranked import on_ranks, rows_by_key


def several(*, deferred: bool, every: int = 1, **shared: Any) -> list[Monitor]:
    how: dict[str, Any] = {"deferred": deferred, **shared}
    return [
        *monitors("full", every_n_steps=every, targets=1, **how),
        CollapseMonitor(every_n_steps=3, max_layers=1, name="few", **how),
        AlignmentMonitor(every_n_steps=2, moments="raw", name="raw", **how),
    ]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "lightning_sym" in thread.name]


def loader(batches: int) -> DataLoader[Any]:
    return DataLoader(dataset("mlp", batches * BATCH), BATCH)


class Course(Callback):
    """Notes after each batch how many rows a monitor has, and whether its key can be watched."""

    def __init__(self, monitor: Monitor, key: str) -> None:
        self.monitor, self.key = monitor, key
        self.rows: list[int] = []
        self.there: list[bool] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.rows.append(len(self.monitor.history))
        self.there.append(self.key in trainer.callback_metrics)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("every", [1, 2])
def test_numbers_and_steps_are_those_that_are_read_at_once(kind, every):
    kept = []
    for deferred in (False, True):
        torch.manual_seed(0)
        module, mine = Module(kind), several(deferred=deferred, every=every, strict=True)
        fit(module, *mine, kind=kind)
        kept.append((mine, [p.detach().clone() for p in module.parameters()], torch.random.get_rng_state()))
    (once, plain, seed), (later, watched, after) = kept
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert torch.equal(seed, after)
    for one, other in zip(once, later, strict=True):
        assert one.history
        assert not apart(one.history, other.history), type(one).__name__
    assert once[-1].history[-1]["step"] == 6  # and what was due last is not lost
    assert not threads()


def test_a_loop_publishes_the_same():
    kept = []
    for deferred in (False, True):
        torch.manual_seed(0)
        module, mine = Module("mlp"), several(deferred=deferred, strict=True)
        optimizer = module.configure_optimizers()
        seen: list[tuple[int, str]] = []
        to = lambda values, step, seen=seen: seen.extend((step, key) for key in values)  # noqa: E731
        with watch(module, optimizer, mine, to=to) as watching:
            for batch in loader(7):
                watching.batch(batch)
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(batch[0]), batch[1]).backward()
                optimizer.step()
        kept.append((mine, sorted(seen)))
    (once, sent), (later, sent_later) = kept
    assert sent == sent_later
    for one, other in zip(once, later, strict=True):
        assert not apart(one.history, other.history), type(one).__name__
    assert not threads()


@pytest.mark.parametrize("every", [2, 3, 10])
def test_readings_are_published_at_a_fixed_later_step(every):
    """So many steps later, before the next reading at the latest, and at the epoch's last batch."""
    for _ in range(2):
        monitor = CollapseMonitor(every_n_steps=every, deferred=True, strict=True)
        course = Course(monitor, "collapse/score")
        fit(Module("mlp"), monitor, course, loader=loader(14), max_epochs=1)
        due = [step for step in range(1, 15) if step == 1 or step % every == 0]
        shown = [min([s + LAG, *(d for d in due if d > s), 14]) for s in due]
        expected = [sum(at <= step for at in shown) for step in range(1, 15)]
        assert course.rows == expected
        assert course.there == [count > 0 for count in expected]
        assert [row["step"] for row in monitor.history] == due


class Looks(Callback):
    """Notes how many rows there are when validation begins, and in a state that is taken."""

    def __init__(self, monitor: Monitor, *, takes: bool = False) -> None:
        self.monitor, self.takes = monitor, takes
        self.rows: list[int] = []

    def on_validation_start(self, trainer: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.rows.append(len(self.monitor.history))

    def on_train_batch_end(self, *_: Any) -> None:
        if self.takes:
            self.rows.append(self.monitor.state_dict()["history"]["rows"])


def test_validation_and_states_find_all_that_was_observed():
    for takes, expected in ((False, [2, 3, 4]), (True, [1, 2, 2, 3, 3, 4])):
        monitor = CollapseMonitor(every_n_steps=2, deferred=True, strict=True)
        look = Looks(monitor, takes=takes)
        val = None if takes else loader(1)
        fit(Module("mlp"), monitor, look, val=val, loader=loader(6), max_epochs=1, val_check_interval=2)
        assert look.rows == expected


def test_early_stopping_decides_by_the_same_numbers_wherever_it_stands():
    stopped = []
    for deferred in (False, True):
        for before in (False, True):
            torch.manual_seed(0)
            monitor = PlasticityMonitor(every_n_steps=3, deferred=deferred, strict=True)
            stop = EarlyStopping(
                "plasticity/feature_rank", mode="max", patience=1, check_on_train_epoch_end=True
            )
            order = [stop, monitor] if before else [monitor, stop]
            run = fit(Module("mlp", lr=1.0), *order, max_epochs=8)
            stopped.append((run.current_epoch, float(stop.best_score)))
    assert len(set(stopped)) == 1


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:You.re resuming from a checkpoint")
def test_a_checkpoint_in_between_resumes_what_was_never_stopped(tmp_path):
    def chosen() -> list[Monitor]:
        return [*monitors(every_n_steps=3, deferred=True, strict=True)]

    def saves() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)

    torch.manual_seed(0)
    whole, rest = chosen(), chosen()
    fit(Module("mlp"), *whole, saves(), loader=loader(10), max_epochs=1, enable_checkpointing=True)
    path = next(path for path in tmp_path.iterdir() if "step=4" in path.name)
    run = trainer(callbacks=[*rest, saves()], max_epochs=1, enable_checkpointing=True)
    run.fit(Module("mlp"), loader(10), ckpt_path=path)
    for one, other in zip(whole, rest, strict=True):
        assert [row["step"] for row in other.history] == [row["step"] for row in one.history] == [1, 3, 6, 9]
        assert not apart(one.history[:2], other.history[:2])


class Breaks(Monitor):
    """Fails where it reads; its failure is not known before its thread has ended."""

    quantity, defers = "breaks", True
    weight = Weight()
    needs = (weight,)

    def read(self, seen: Observation) -> Iterator[Reading]:
        assert threading.current_thread() is not threading.main_thread() or not self.deferred
        for layer in seen.layers:
            raise ZeroDivisionError(f"of {layer.name}")
        yield Reading("", "", 1.0)


def test_an_error_in_the_thread_is_one_warning_and_spoils_no_other_monitor():
    collapse = CollapseMonitor(every_n_steps=1, deferred=True, strict=True)
    breaks = Breaks(every_n_steps=1, deferred=True)
    with pytest.warns(UserWarning, match=r"Breaks failed in read of layer net\.0 at step 1: Zero") as caught:
        fit(Module("mlp"), breaks, collapse)
    assert len([w for w in caught if "Breaks" in str(w.message)]) == 1
    assert len(collapse.history) == 6
    assert not breaks.history
    assert not threads()


def test_strict_raises_it_when_it_is_to_be_published():
    collapse = CollapseMonitor(every_n_steps=5, deferred=True)
    breaks = Breaks(every_n_steps=5, deferred=True, strict=True)
    with pytest.raises(ZeroDivisionError, match=r"of net\.0"):
        fit(Module("mlp"), breaks, collapse, loader=loader(9))
    assert not threads()
    assert "settle" not in vars(breaks)


class Stops(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2:
            raise KeyError("the user's own")
        return super().training_step(batch, batch_idx)


def test_an_exception_of_the_users_loses_nothing_that_was_observed():
    monitor = CollapseMonitor(every_n_steps=1, deferred=True)
    with pytest.raises(KeyError, match="the user's own"):
        fit(Stops("mlp"), monitor)
    assert [row["step"] for row in monitor.history] == [1, 2]
    assert not threads()


def test_only_what_reads_observed_layers_alone_can_wait():
    for monitor in (
        CollapseMonitor(causes=True, deferred=True),
        type("Own", (SharpnessMonitor,), {})(vectors=1, lanczos_steps=0),
    ):
        monitor.deferred = True
        with pytest.raises(ValueError, match=f"deferred must be False for {type(monitor).__name__}"):
            fit(Module("mlp"), monitor)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_publish_the_same_rows_in_a_thread_as_at_once(tmp_path, ranks):
    kept = []
    for deferred in (False, True):
        found = on_ranks(
            ranks,
            tmp_path,
            lambda: Module("mlp").double(),
            [*monitors(every_n_steps=2, targets=1, deferred=deferred)],
            loader=DataLoader(dataset("mlp", 48, double=True), BATCH),
            max_epochs=1,
        )
        assert not any(one["error"] for one in found)
        kept.append([[dict(rows_by_key(rows)) for rows in one["rows"]] for one in found])
    assert repr(kept[0]) == repr(kept[1])
    assert repr(kept[0][0]) == repr(kept[0][-1])
