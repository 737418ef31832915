"""Readings that cost too much are further apart, on all ranks alike; without a budget the schedule stands.

All clocks are the tests' own: they move where a test moves them, so that each step is known beforehand.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sym import watch
from lightning_sym.callbacks import CollapseMonitor, EpochEnds, KNNProbe, LogSpaced, Monitor, monitors
from lightning_sym.engine import budget, deferred, engine, reader
from lightning_sym.engine.budget import Spent
from lightning_sym.engine.deferred import Deferred
from lightning_sym.engine.ranks import Ranks
from lightning_sym.observe import Observation, Reading, Statistic, Weight, functions, hooks
from lightning_sym.observe.functions import FunctionWatch
from lightning_sym.observe.statistics.statistic import Tally
from tests.models import trainer
from tests.promises.every import BATCH, Module, dataset, fit
from tests.promises.ranked import on_ranks

STEP, COST = 0.125, 1.0  # seconds of a step, and of a reading
PLACES = ["prepare", "forward", "stepped", "look", "optimizer_stepped", "read"]


class Clock:
    """Stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    for module in (budget, deferred, engine, functions, hooks, reader):
        monkeypatch.setattr(module, "perf_counter", made)
    return made


class Timed(Module):
    """Each step of it takes its time."""

    def __init__(self, clock: Clock, step: Callable[[], float] = lambda: STEP) -> None:
        super().__init__("mlp")
        self.clock, self.step = clock, step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.clock.move(self.step())
        return super().training_step(batch, batch_idx)


@dataclass(frozen=True)
class Hooked(Statistic):
    """Moves the clock when a layer is called, or when its optimizer has stepped."""

    method: str
    move: Callable[[], None]

    def begin(self, watch: Any) -> Tally:
        tally = Tally()
        setattr(tally, self.method, lambda *_: self.move())
        tally.result = float  # type: ignore[method-assign]
        return tally


class Costs(Monitor):
    """Takes its time in one place."""

    quantity = "costs"

    def __init__(self, clock: Clock, place: str, cost: Callable[[], float] = lambda: COST, **settings: Any):
        super().__init__(layers="net.0", **settings)
        self.defers = True
        self._place, self._move = place, lambda: clock.move(cost())
        self.needs = (Hooked(place, self._move),) if place in ("forward", "stepped") else (Weight(),)

    def prepare(self, seen: Observation) -> None:
        if self._place == "prepare":
            self._move()
        if self._place == "look":
            seen.look = FunctionWatch(seen.run.module)
            seen.look.see = self._see  # type: ignore[method-assign]

    def _see(self, func: Any, *_: Any) -> None:
        if func is nn.functional.cross_entropy:  # once a step
            self._move()

    def optimizer_stepped(self, *_: Any) -> None:
        if self._place == "optimizer_stepped":
            self._move()

    def read(self, seen: Observation) -> Iterator[Reading]:
        if self._place == "read":
            self._move()
        yield Reading("", "value", 1.0)


def rows(monitor: Monitor) -> list[int]:
    return [int(row["step"]) for row in monitor.history]


def loader(batches: int) -> DataLoader[Any]:
    return DataLoader(dataset("mlp", batches * BATCH), BATCH)


def greedy(
    share: float | None, steps: int, schedule: Callable[[int], int], step_seconds: float, cost: float
) -> list[int]:
    """Return the steps that are read if each due one is, as long as the share is not exceeded with it."""
    read, own, elapsed, due = [], 0.0, 0.0, schedule(0)
    for step in range(1, steps + 1):
        elapsed += step_seconds
        if step < due:
            continue
        due = schedule(step)
        if share is None or not read or own + cost <= share * (elapsed + cost):
            read.append(step)
            own, elapsed = own + cost, elapsed + cost
    return read


def every(n: int) -> Callable[[int], int]:
    return lambda step: 1 if not step else step - step % n + n


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("step_seconds", [0.0, 0.125, 3])
def test_the_first_step_within_the_share(share, step_seconds):
    readings, steps = 3, 40
    own = readings * COST
    spent = Spent(own, own + steps * step_seconds, readings, steps, step=100)
    found = spent.earliest(share)
    if not step_seconds:
        assert found == 0  # nothing is known of a step
        return

    def within(step: int) -> bool:
        """Return whether ours would be within the share if the step were read."""
        elapsed = own + (steps + step - 100) * step_seconds + COST
        return own + COST <= share * elapsed * (1 + 1e-12)

    assert within(max(found, 100))
    assert not found or not within(found - 1)


@pytest.mark.parametrize("place", PLACES)
def test_a_fit_leaves_out_due_steps_wherever_the_time_goes(clock, place):
    kept = {}
    for share in (None, 0.25, 0.5, 0.66):
        costs = Costs(clock, place, every_n_steps=3, max_overhead=share, strict=True)
        fit(Timed(clock), costs, loader=loader(90), max_epochs=1)
        kept[share] = rows(costs)
        assert kept[share] == greedy(share, 90, every(3), STEP, COST)
    assert len(kept[None]) == 31  # all of them
    assert 2 < len(kept[0.25]) < len(kept[0.5]) < len(kept[0.66]) < 31


@pytest.mark.parametrize("deferred", [False, True])
def test_a_plain_loop_leaves_out_the_same(clock, deferred):
    module = Timed(clock)
    costs = Costs(clock, "prepare", every_n_steps=3, deferred=deferred, max_overhead=0.5)
    optimizer = module.configure_optimizers()
    with watch(module, optimizer, costs) as watching:
        for batch in loader(60):
            watching.batch(batch)
            optimizer.zero_grad()
            clock.move(STEP)
            nn.functional.cross_entropy(module(batch[0]), batch[1]).backward()
            optimizer.step()
    assert rows(costs) == greedy(0.5, 60, every(3), STEP, COST)


@pytest.mark.parametrize("n", [1, 3, 10])
def test_readings_in_a_thread_cost_what_is_waited_for(clock, monkeypatch, n):
    join = Deferred.join
    monkeypatch.setattr(Deferred, "join", lambda self: (clock.move(COST), join(self)))
    costs = Costs(clock, "", every_n_steps=n, deferred=True, max_overhead=0.5, strict=True)
    fit(Timed(clock), costs, loader=loader(80), max_epochs=1)
    assert rows(costs)[:1] == [1]
    if n > 1:  # a reading is paid for when it is published, before the next one
        assert rows(costs) == greedy(0.5, 80, every(n), STEP, COST)
    assert 7 < len(rows(costs)) < 11


@pytest.mark.parametrize("deferred", [False, True])
def test_it_is_said_once_and_all_read_together(clock, caplog, deferred):
    caplog.set_level(logging.INFO)
    for share in (None, 0.5):
        caplog.clear()
        chosen = monitors(every_n_steps=3, deferred=deferred, max_overhead=share, strict=True)
        costs = Costs(clock, "prepare", every_n_steps=3, max_overhead=share, strict=True)
        fit(Timed(clock), chosen, costs, loader=loader(45), max_epochs=1)
        for monitor in [*chosen, costs]:
            assert rows(monitor) == greedy(share, 45, every(3), STEP, COST), type(monitor).__name__
        assert caplog.text.count("leaves out due steps") == (share is not None)
    assert "within max_overhead=0.5: a reading costs 8 steps" in caplog.text
    assert "reads next at step 18 instead of 3" in caplog.text


class Own:
    """A schedule of one's own, as ranks may disagree on it."""

    def next(self, step: int) -> int:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return step - step % 5 + 5 + 100 * rank if step else 1


@pytest.mark.parametrize("schedule", [LogSpaced(8), Own()])
def test_other_schedules_are_kept_to_as_well(clock, schedule):
    costs = Costs(clock, "read", every_n_steps=schedule, max_overhead=0.25, strict=True)
    fit(Timed(clock), costs, loader=loader(100), max_epochs=1)
    expected = greedy(0.25, 100, schedule.next, STEP, COST)
    assert rows(costs) == expected
    assert 2 < len(expected) < 8


def test_what_others_cost_counts_but_only_those_with_a_budget_wait(clock):
    costs = Costs(clock, "read", every_n_steps=4)
    light = CollapseMonitor(every_n_steps=2)
    light.max_overhead = 0.5
    fit(Timed(clock), light, costs, loader=loader(40), max_epochs=1)
    assert rows(costs) == [1, *range(4, 41, 4)]
    # Ours is more than half of the time at every one of those, and nothing ever makes up for it.
    assert rows(light) == [1]


def test_epoch_ends_and_what_a_checkpoint_needs_are_counted_but_taken(clock, tmp_path):
    ends = Costs(clock, "read", every_n_steps=EpochEnds(), max_overhead=0.01, name="ends")
    costs = Costs(clock, "", every_n_steps=4, max_overhead=0.4)
    fit(Timed(clock), ends, costs, loader=loader(8), max_epochs=4)
    assert rows(ends) == [8, 16, 24, 32]
    assert rows(costs) == [1, 4, 8, 16]  # 1 of 2, 2 of 4, 3 of 6 seconds were the ends'
    costs = Costs(clock, "read", every_n_steps=4, max_overhead=0.5)
    saves = ModelCheckpoint(tmp_path, monitor="costs/value", every_n_train_steps=6, save_top_k=-1)
    fit(Timed(clock), costs, saves, loader=loader(30), max_epochs=1, enable_checkpointing=True)
    assert rows(costs) == [1, 6, 12, 18, 24, 30]
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint")
@pytest.mark.parametrize("stored", [10, 17])
def test_a_resumed_fit_goes_on_as_one_that_was_never_stopped(clock, tmp_path, stored):
    def chosen() -> list[Any]:
        saves = ModelCheckpoint(tmp_path, every_n_train_steps=stored, save_top_k=-1)
        return [Costs(clock, "read", every_n_steps=1, max_overhead=0.5, strict=True), saves]

    whole, rest = chosen(), chosen()
    fit(Timed(clock), *whole, loader=loader(50), max_epochs=1, enable_checkpointing=True)
    assert rows(whole[0]) == greedy(0.5, 50, every(1), STEP, COST)
    path = next(path for path in tmp_path.iterdir() if f"step={stored}" in path.name)
    clock.move(1e6)
    run = trainer(callbacks=rest, max_epochs=1, enable_checkpointing=True)
    run.fit(Timed(clock), loader(50), ckpt_path=path)
    assert rows(rest[0]) == rows(whole[0])
    assert rest[0].spent == whole[0].spent
    fit(Timed(clock), rest[0], loader=loader(50), max_epochs=1)  # and a new one begins anew
    assert rows(rest[0])[len(rows(whole[0])) :] == rows(whole[0])


def by_rank(mine: float, other: float) -> float:
    """Return what a clock shows on rank 0, and on the others."""
    there = torch.distributed.is_initialized() and torch.distributed.get_rank() > 0
    return other if there else mine


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("schedule", [2, Own()])
def test_ranks_with_different_clocks_leave_out_the_same_steps(clock, tmp_path, deferred, schedule):
    step, cost = partial(by_rank, STEP, 3 * STEP), partial(by_rank, COST, 5 * COST)
    chosen: list[Monitor] = [
        Costs(clock, "prepare", cost, every_n_steps=schedule, deferred=deferred, max_overhead=0.5),
        CollapseMonitor(every_n_steps=schedule, deferred=deferred),
    ]
    chosen[1].max_overhead = 0.5
    found = on_ranks(2, tmp_path, lambda: Timed(clock, step), chosen, loader=loader(40), max_epochs=1)
    asked = every(2) if schedule == 2 else schedule.next
    expected = greedy(0.5, 40, asked, STEP, COST)
    assert 2 < len(expected) < 8
    for one in found:
        assert not one["error"]
        assert not [said for said in one["said"] if "lightning_sym" in said or "failed" in said]
        assert [[row["step"] for row in each] for each in one["rows"]] == [expected] * 2


def test_ranks_speak_no_more_than_without_a_budget(clock, monkeypatch):
    spoken = []
    for method in ("_agree", "_broadcast", "_gather", "sum"):
        own = getattr(Ranks, method)
        monkeypatch.setattr(Ranks, method, lambda *a, own=own, **k: (spoken.append(own), own(*a, **k))[1])

    def words(n: int, share: float | None) -> tuple[int, int]:
        """Return how often ranks spoke in a fit, and its readings."""
        spoken.clear()
        costs = Costs(clock, "read", every_n_steps=n, max_overhead=share)
        fit(Timed(clock), costs, loader=loader(45), max_epochs=1)
        return len(spoken), len(costs.history)

    (many, often), (few, seldom) = words(3, None), words(9, None)
    each = (many - few) / (often - seldom)
    found, left = words(3, 0.5)
    assert each > 0
    assert seldom != left < often
    assert found == many - each * (often - left)


def test_without_a_budget_no_clock_is_read(monkeypatch):
    monkeypatch.setattr(budget, "perf_counter", None)
    monitor = CollapseMonitor(every_n_steps=1, strict=True)
    fit(Module("mlp"), monitor)
    assert len(monitor.history) == 6
    assert monitor.spent == Spent()


@pytest.mark.parametrize("share", [0, 1, -0.1, 2, float("nan"), True, "0.02"])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=r"max_overhead must be a share in \(0, 1\), such as 0\.02, or None"):
        monitors(max_overhead=share)
    monitor = KNNProbe(train=loader(1), val=loader(1))
    with pytest.raises(ValueError, match="max_overhead must be a share"):
        monitor.max_overhead = share
