"""Promise 3: what failed, on any rank, has no reading on any, and one warning says what, where and when.

Nothing of ours, built-in or user-written, ends or hangs a fit unless ``strict=True``, and then all ranks end.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sym import watch
from lightning_sym.callbacks import CollapseMonitor, Monitor
from lightning_sym.observe import Reading, SecondMoments, Statistic, Tally
from tests.promises.every import Module, apart, dataset, fit
from tests.promises.ranked import on_ranks, shares


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


@dataclass(frozen=True)
class Fragile(Statistic):
    """Counts calls and their gradients; fails in one method, of one layer, on one rank, from one call on."""

    at: str = ""
    layer: str = "net.2"
    on: int = 0
    call: int = 1
    uses_gradients = True

    def begin(self, watch: Any) -> Tally:
        tally = Counter(self, watch)
        tally.fail("begin")
        return tally


class Counter(Tally):
    def __init__(self, what: Fragile, watch: Any) -> None:
        self.what, self.name, self.calls = what, watch.layer.name, 0
        self.count = torch.zeros(2, dtype=torch.float64)
        self.more = torch.zeros(3, dtype=torch.float64)

    def fail(self, place: str) -> None:
        here = self.what.at == place and self.what.layer == self.name and self.what.on == rank()
        if here and (place == "begin" or self.calls >= self.what.call):
            raise ArithmeticError(f"fragile in {place}")

    def forward(self, call: Any) -> None:
        self.calls += 1
        self.count[0] += len(call.x)
        self.fail("forward")

    def hold(self, call: Any) -> None:
        self.fail("hold")

    def backward(self, call: Any, gradient: Tensor) -> None:
        self.count[1] += len(gradient)
        self.fail("backward")

    def end_batch(self) -> None:
        self.fail("end_batch")

    def stepped(self) -> None:
        self.fail("stepped")

    def tensors(self) -> list[Tensor]:
        self.fail("tensors")
        return [self.count]

    def second_pass(self) -> list[Tensor]:
        self.fail("second_pass")
        return [self.more]

    def result(self) -> float:
        self.fail("result")
        return float(self.count.sum())


class Reads(Monitor):
    """Reads a fragile statistic beside a sound one."""

    quantity = "reads"

    def __init__(self, at: str = "", *, on: int = 0, call: int = 1, **options: Any) -> None:
        super().__init__(**{"every_n_steps": 1, **options})
        self.fragile, self.sound = Fragile(at, on=on, call=call), SecondMoments("outputs")
        self.needs = (self.fragile, self.sound)

    def read(self, seen: Any) -> Any:
        for layer in seen.layers:
            for what, statistic in (("fragile", self.fragile), ("sound", self.sound)):
                if (found := layer.get(statistic)) is not None:
                    yield Reading(layer.name, what, found if what == "fragile" else found.second.trace())


METHODS = [
    "begin",
    "forward",
    "hold",
    "backward",
    "end_batch",
    "stepped",
    "tensors",
    "second_pass",
    "result",
]


def make() -> Module:
    """Return a module without random draws in its forward pass."""
    module = Module("mlp")
    module.net[4].p = 0.0
    return module


def fitted(*monitors: Any, **settings: Any) -> tuple[list[str], int]:
    """Fit; return the warnings about observing, and the steps made."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit(make(), *monitors, **settings)
    return [said for w in caught if "fragile" in (said := str(w.message))], run.global_step


@pytest.mark.parametrize("at", METHODS)
def test_a_statistic_that_fails_costs_its_own_readings_of_its_layer(at):
    """In the third micro-batch of a step, too: no sum of the two before is read."""
    whole, beside = Reads(strict=True), CollapseMonitor(every_n_steps=1, strict=True)
    said, steps = fitted(whole, beside, accumulate_grad_batches=3)
    assert (said, steps) == ([], 2)
    assert whole.history[0]["reads/net.2/fragile"] == 48  # 24 samples and 24 gradients
    faulty, other = Reads(at, call=3), CollapseMonitor(every_n_steps=1, strict=True)
    said, steps = fitted(faulty, other, accumulate_grad_batches=3)
    assert steps == 2
    assert not apart(other.history, beside.history)
    assert len(said) == 1, said
    assert f"ArithmeticError: fragile in {at}" in said[0]
    assert "net.2" in said[0]
    assert "step 1" in said[0]
    assert "Reads" in said[0]
    if at == "result":  # found out while reading: the monitor has no reading, rather than a part of one
        assert faulty.history == []
        return
    lost = {"reads/net.2/fragile"}
    for row, all_of_it in zip(faulty.history, whole.history, strict=True):
        assert row == {key: value for key, value in all_of_it.items() if key not in lost}


@pytest.mark.parametrize("at", METHODS)
def test_a_statistic_that_fails_ends_the_fit_if_strict(at):
    with pytest.raises(ArithmeticError, match=f"fragile in {at}"):
        fitted(Reads(at, strict=True))


@pytest.mark.parametrize("at", METHODS)
def test_a_statistic_that_fails_on_one_rank_has_no_reading_on_any(at, tmp_path):
    faulty, other = Reads(at, on=1), CollapseMonitor(every_n_steps=1)
    both = on_ranks(2, tmp_path, make, [faulty, other], loader=shares(dataset("mlp"), 8), max_epochs=1)
    assert [found["steps"] for found in both] == [3, 3]
    assert both[0]["rows"] == both[1]["rows"]
    assert [found["metrics"].pop("loss") for found in both]  # the user's, of each rank
    assert both[0]["metrics"] == both[1]["metrics"]
    mine, others = both[0]["rows"]
    assert len(others) == 3
    assert all("collapse/net.2/effective_rank" in row and row["collapse/samples"] == 8 for row in others)
    if at == "result":
        assert mine == []
    else:
        assert len(mine) == 3
        for row in mine:
            assert "reads/net.2/fragile" not in row
            assert row["reads/net.0/fragile"] == 16
            assert "reads/net.2/sound" in row
    said = [text for text in both[0]["said"] if "fragile" in text]
    assert len(said) == 1, both[0]["said"]
    assert all(part in said[0] for part in ("net.2", "step 1", "rank 1", "Reads"))
    assert not any("fragile" in text for text in both[1]["said"])


def test_a_statistic_that_fails_on_one_rank_ends_all_if_strict(tmp_path):
    faulty = Reads("backward", on=1, strict=True)
    loader = shares(dataset("mlp"), 8)
    both = on_ranks(2, tmp_path, make, [faulty], loader=loader, max_epochs=1)
    assert [found["steps"] for found in both] == [1, 1]
    assert all("fragile in backward" in found["error"] for found in both)
    assert "rank 1" in both[0]["error"]


@dataclass(frozen=True)
class Ragged(Statistic):
    """Keeps as many numbers as the rank had samples, or something that is no tensor."""

    what: str = "rows"

    def begin(self, watch: Any) -> Tally:
        class Rows(Tally):
            kept = torch.zeros(0, dtype=torch.float64)

            def forward(self, call: Any) -> None:
                self.kept = torch.ones(len(call.x), dtype=torch.float64)

            def tensors(tally) -> Any:
                return [tally.kept] if self.what == "rows" else [1.0]

            def result(self) -> float:
                return float(self.kept.sum())

        return Rows()


class ReadsRagged(Reads):
    def __init__(self, what: str, **options: Any) -> None:
        super().__init__(**options)
        self.fragile = Ragged(what)
        self.needs = (self.fragile, self.sound)


def test_sums_that_cannot_be_summed_are_said_and_hang_no_rank(tmp_path):
    monitors = [ReadsRagged("rows"), ReadsRagged("number", name="numbers"), CollapseMonitor(every_n_steps=1)]
    loader = shares(dataset("mlp"), 8, uneven=True)
    both = on_ranks(2, tmp_path, make, monitors, loader=loader, max_epochs=1)
    assert [found["steps"] for found in both] == [3, 3]
    assert both[0]["rows"] == both[1]["rows"]
    for row in both[0]["rows"][0] + both[0]["rows"][1]:
        assert sum("sound" in key for key in row) == 3
        assert not any("fragile" in key for key in row)
    assert len(both[0]["rows"][2]) == 3
    said = " ".join(both[0]["said"])
    assert (
        "layer net.0 failed (Ragged, for ReadsRagged) at step 1 on rank 0: ValueError: the sums have" in said
    )
    alone = ReadsRagged("rows", strict=True)
    fit(make(), alone)
    assert alone.history[0]["reads/net.0/fragile"] == 8
    with pytest.raises(TypeError, match=r"Rows.tensors must return a list of tensors, got \[1.0\]"):
        fit(make(), ReadsRagged("number", strict=True))


class Raises(Monitor):
    """A user's monitor that raises in one method, on one rank."""

    quantity = "raises"
    reads_epochs = True

    def __init__(self, at: str = "", *, on: int = 0, **options: Any) -> None:
        super().__init__(**{"every_n_steps": 2, **options})
        self.at, self.on, self.called = at, on, 0

    def fail(self, place: str) -> None:
        if place == self.at and rank() == self.on:
            self.called += 1
            raise ArithmeticError(f"fragile in {place}")

    def begin_run(self) -> None:
        super().begin_run()
        self.fail("begin_run")

    def end_run(self) -> None:
        super().end_run()
        self.fail("end_run")

    def start(self, seen: Any) -> None:
        self.fail("start")

    def prepare(self, seen: Any) -> None:
        self.fail("prepare")

    def prepare_batch(self, seen: Any) -> None:
        self.fail("prepare_batch")

    def optimizer_stepped(self, run: Any, optimizer: Any) -> None:
        self.fail("optimizer_stepped")

    def read(self, seen: Any) -> Any:
        yield Reading("", "one", 1.0)
        self.fail("read")

    def read_epoch(self, seen: Any) -> Any:
        yield Reading("", "epoch", 1.0)
        self.fail("read_epoch")

    def check(self, run: Any) -> None:
        super().check(run)
        self.fail("check")

    def choose(self, module: Any) -> Any:
        self.fail("choose")
        return super().choose(module)


class Next:
    """A user's schedule, which fails from the second asking on."""

    def __init__(self, on: int = 0) -> None:
        self.on, self.asked = on, 0

    def next(self, step: int) -> int:
        self.asked += 1
        if self.asked > 1 and rank() == self.on:
            raise ArithmeticError("fragile in next")
        return step + 1


PLACES = [
    "begin_run",
    "end_run",
    "start",
    "prepare",
    "prepare_batch",
    "optimizer_stepped",
    "read",
    "read_epoch",
    "next",
]


def raising(at: str, **options: Any) -> Raises:
    if at == "next":
        return Raises(every_n_steps=Next(options.pop("on", 0)), **options)
    return Raises(at, **options)


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("first", [True, False])
def test_a_monitor_that_raises_costs_itself_alone(at, first):
    def watch() -> CollapseMonitor:
        return CollapseMonitor(every_n_steps=1, strict=True)

    alone = watch()
    fitted(alone)
    mine, beside = raising(at), watch()
    said, steps = fitted(*([mine, beside] if first else [beside, mine]))
    assert steps == 6
    assert not apart(beside.history, alone.history)
    assert len(said) == 1, said
    assert f"fragile in {at}" in said[0]
    assert "Raises" in said[0]
    assert not any(key.startswith("raises/one") for row in mine.history for key in row) or at not in (
        "read",
        "optimizer_stepped",
    )


@pytest.mark.parametrize("at", PLACES)
def test_a_monitor_that_raises_ends_the_fit_if_strict(at):
    with pytest.raises(ArithmeticError, match=f"fragile in {at}"):
        fitted(raising(at, strict=True))


@pytest.mark.parametrize("at", ["check", "choose"])
def test_wrong_arguments_end_the_fit_before_its_first_step(at):
    """What a monitor finds wrong with itself is the user's to mend, strict or not."""
    module = make()
    with pytest.raises(ArithmeticError, match=f"fragile in {at}"):
        fit(module, Raises(at))
    assert module._trainer.global_step == 0


@pytest.mark.parametrize("at", PLACES)
def test_a_monitor_that_raises_on_one_rank_hangs_none(at, tmp_path):
    monitors = [raising(at, on=1), CollapseMonitor(every_n_steps=1)]
    both = on_ranks(2, tmp_path, make, monitors, loader=shares(dataset("mlp"), 8), max_epochs=1)
    assert [found["steps"] for found in both] == [3, 3]
    assert both[0]["rows"] == both[1]["rows"]
    assert len(both[0]["rows"][1]) == 3
    said = [text for found in both for text in found["said"] if "fragile" in text]
    assert len(said) == 1, said
    assert "rank 1" in said[0] or at in ("end_run",)


@pytest.mark.parametrize("at", ["check", "start", "read"])
def test_a_monitor_that_raises_on_one_rank_ends_all_if_strict(at, tmp_path):
    loader = shares(dataset("mlp"), 8)
    both = on_ranks(2, tmp_path, make, [Raises(at, on=1, strict=True)], loader=loader)
    assert len(both) == 2
    assert all(f"fragile in {at}" in found["error"] for found in both)
    assert [found["steps"] for found in both] == [int(at == "read")] * 2


class Yields(Monitor):
    """Returns what it was given."""

    quantity = "yields"

    def __init__(self, what: Any, **options: Any) -> None:
        super().__init__(every_n_steps=1, **options)
        self.what = what

    def read(self, seen: Any) -> Any:
        return self.what


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ([1.0], r"read must yield Reading\(layer, what, value\), got 1.0"),
        (["net.0"], r"read must yield Reading\(layer, what, value\), got 'net.0'"),
        ({"score": 1.0}, r"read must yield Reading\(layer, what, value\), got 'score'"),
        ([("net.0", "rank", 1.0)], r"read must yield Reading\(layer, what, value\), got \('net.0'"),
        ([Reading("net.0", "rank", [1.0])], "the value of 'yields/net.0/rank' must be a number.* got list"),
        (
            [Reading("net.0", "rank", None)],
            "the value of 'yields/net.0/rank' must be a number.* got NoneType",
        ),
        (None, "read must yield Reading.* got None"),
        (3.0, "read must yield Reading.* got 3.0"),
        (Reading("", "score", 1.0), "read must yield Reading.* got Reading"),
    ],
)
def test_a_reading_of_the_wrong_type_is_one_clear_warning(what, message):
    beside = CollapseMonitor(every_n_steps=1, strict=True)
    with pytest.warns(UserWarning, match=message) as caught:
        fit(make(), Yields(what), beside)
    assert len([w for w in caught if "Yields" in str(w.message)]) == 1
    assert len(beside.history) == 6
    with pytest.raises(TypeError, match=message):
        fit(make(), Yields(what, strict=True))


LIGHTNING = [
    "setup",
    "teardown",
    "on_fit_start",
    "on_fit_end",
    "on_sanity_check_start",
    "on_sanity_check_end",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_train_start",
    "on_train_end",
    "on_validation_start",
    "on_validation_end",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
]


def hooked(names: list[str], *, calls_super: bool) -> type[Monitor]:
    """Return a monitor that overrides hooks of Lightning's, and counts."""

    def override(name: str) -> Any:
        def hook(self: Any, *args: Any, **kwargs: Any) -> None:
            self.counted = {**getattr(self, "counted", {}), name: 1}
            if calls_super:
                getattr(Monitor, name)(self, *args, **kwargs)

        return hook

    class Hooked(CollapseMonitor):
        quantity = "hooked"

    return type("Hooked", (Hooked,), {name: override(name) for name in names})


@pytest.mark.parametrize("calls_super", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_overriding_lightnings_hooks_silences_nobody(calls_super, first):
    alone = CollapseMonitor(every_n_steps=1, strict=True)
    fit(make_seeded(), alone)
    kind = hooked(LIGHTNING, calls_super=calls_super)
    own, other = kind(every_n_steps=1, strict=True), CollapseMonitor(every_n_steps=1, strict=True)
    loader = torch.utils.data.DataLoader(dataset("mlp"), 8)
    fit(make_seeded(), *([own, other] if first else [other, own]), val=loader)
    assert set(own.counted) == set(LIGHTNING)
    assert not apart(other.history, alone.history)
    renamed = [
        {key.replace("hooked", "collapse"): value for key, value in row.items()} for row in own.history
    ]
    assert not apart(renamed, alone.history)
    fit(make_seeded(), by_itself := kind(every_n_steps=1, strict=True))
    assert not apart(by_itself.history, own.history)


def make_seeded() -> Module:
    torch.manual_seed(0)
    return make()


@dataclass(frozen=True)
class Collected(Statistic):
    """Keeps rows in a list, and has no sums until something was seen."""

    def begin(self, watch: Any) -> Tally:
        class Rows(Tally):
            def __init__(self) -> None:
                self.rows: list[torch.Tensor] = []

            def forward(self, call: Any) -> None:
                self.rows.append(call.x.sum().double())

            def tensors(self) -> list[torch.Tensor]:
                return [torch.stack(self.rows)]

            def result(self) -> float:
                return float(torch.stack(self.rows).sum())

        return Rows()


def test_sums_are_asked_for_when_something_was_seen():
    class ReadsCollected(Reads):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.fragile = Collected()
            self.needs = (self.fragile, self.sound)

    monitor = ReadsCollected(strict=True)
    net = torch.nn.Sequential(torch.nn.Linear(4, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with watch(net, optimizer, monitor):
        net(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    (row,) = monitor.history
    assert any("fragile" in key for key in row)
