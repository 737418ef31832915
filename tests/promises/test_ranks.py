"""Promise 4: one rank = two = four, for every key, to 1e-6 in float64, and the same keys on every rank.

In a due step there is one packed all-reduce beside small ones, in any other step none. What can't be right
under a strategy is refused by name before training; ``fully_shard`` is right.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_sym import watch
from lightning_sym.callbacks import (
    CollapseMonitor,
    FeatureLearningMonitor,
    Monitor,
    PlasticityMonitor,
    monitors,
)
from tests.promises.every import BATCH, Circuit, Module, dataset, every_monitor, fit
from tests.promises.ranked import on_ranks, rows_by_key, shares


def plain(kind: str, **settings: Any) -> Module:
    """Return a module in float64 that has no random draws and no statistics of a rank's own batch."""
    module = Module(kind, **settings).double()
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
    if kind == "conv":
        module.net[1] = nn.Identity()
    return module


def compare(one: Any, several: list[Any], *, places: float = 1e-6) -> list[str]:
    """Return what differs between one rank and several, or between these."""
    wrong = []
    for k, expected in enumerate(one["rows"]):
        first = several[0]["rows"][k]
        for rank, found in enumerate(several[1:], 1):
            a, b = dict(rows_by_key(first)), dict(rows_by_key(found["rows"][k]))
            wrong += [] if repr(a) == repr(b) else [f"rank {rank} reads other numbers than rank 0"]
        a, b = dict(rows_by_key(expected)), dict(rows_by_key(first))
        wrong += [f"{key} on one side alone" for key in sorted(a.keys() ^ b.keys())]
        wrong += [
            f"{key}: {a[key]} and {b[key]}"
            for key in sorted(a.keys() & b.keys())
            if not (
                math.isclose(a[key], b[key], rel_tol=places, abs_tol=places) or a[key] != a[key] != b[key]
            )
        ]
    keys = [set(found["metrics"]) for found in (one, *several)]
    wrong += [] if all(each == keys[0] for each in keys) else ["other keys in callback_metrics"]
    wrong += [found["error"] for found in (one, *several) if found["error"]]
    return wrong


@pytest.mark.parametrize(("kind", "ranks"), [("mlp", 2), ("mlp", 4), ("conv", 2), ("attention", 2)])
def test_every_key_of_every_monitor_is_that_of_one_rank(kind, ranks, tmp_path):
    def run(count: int) -> Any:
        watching = every_monitor(kind, samples=4, double=True, strict=True)
        loader = shares(dataset(kind, double=True), BATCH)
        return on_ranks(count, tmp_path, lambda: plain(kind), watching, loader=loader, max_epochs=2)

    (one,), several = run(1), run(ranks)
    assert one["steps"] == 6
    assert all(one["rows"])
    assert not compare(one, several)


def test_layers_wider_than_a_block_of_products_are_those_of_one_rank(tmp_path):
    """Of products ranks send what is not below the diagonal's blocks."""

    def wide() -> Any:
        module = plain("mlp")
        first, last = module.net[0], module.net[-1]
        ins, outs = first.in_features, last.out_features
        module.net = nn.Sequential(nn.Linear(ins, 300), nn.Tanh(), nn.Linear(300, outs)).double()
        return module

    def run(count: int) -> Any:
        watching = list(monitors("standard", every_n_steps=2, targets=1, strict=True))
        loader = shares(dataset("mlp", double=True), BATCH)
        return on_ranks(count, tmp_path, wide, watching, loader=loader)

    (one,), several = run(1), run(2)
    assert any(
        "collapse/net.0/participation_ratio" in key for rows in one["rows"] for key, _ in rows_by_key(rows)
    )
    assert not compare(one, several)


def test_the_comparison_can_fail():
    def of(value: float, **more: float) -> Any:
        return {"rows": [[{"step": 1, "a": value, **more}]], "metrics": {"a": 0.0}, "error": ""}

    assert not compare(of(1.0), [of(1.0), of(1.0)])
    assert compare(of(1.0), [of(1.0 + 1e-5), of(1.0 + 1e-5)])
    assert compare(of(1.0), [of(1.0), of(1.0 + 1e-12)])
    assert compare(of(1.0), [of(1.0, b=2.0), of(1.0, b=2.0)])
    assert compare(of(1.0), [of(1.0), {**of(1.0), "metrics": {}}])


#: Of the optimizer's gradient, which DDP averages over ranks, and of a loss that it reports.
OF_DDP = ("zero_gradients", "relative_update", "update_cosine", "flow", "law", "step_", "hierarchy/loss")
#: From halves of the samples, which are dealt out in another way.
OF_HALVES = ("participation_ratio", "alignment/net", "alignment/mean", "alignment/null", "one/")
#: Random targets are dealt to samples by their number.
OF_NUMBERS = ("plasticity/trainability",)


@pytest.mark.parametrize(("kind", "ranks"), [("mlp", 3), ("conv", 2), ("attention", 2)])
def test_ranks_whose_batches_differ_count_by_their_samples(kind, ranks, tmp_path):
    """Rank 0 has a sample more, the last one less.

    DDP averages gradients over ranks, not over samples: parameters stand still here, so that what is read is
    of the same network. What is of the optimizer's gradient itself is DDP's business and is left out.
    """

    def run(count: int) -> Any:
        watching = every_monitor(kind, samples=4 * BATCH, double=True, strict=True)
        loader = shares(dataset(kind, double=True), BATCH, uneven=True)
        still = {"lr": 0.0, "momentum": 0.0, "weight_decay": 0.0}
        return on_ranks(count, tmp_path, lambda: plain(kind, **still), watching, loader=loader, max_epochs=1)

    (one,), several = run(1), run(ranks)
    others = (*OF_DDP, *OF_HALVES, *OF_NUMBERS)
    wrong = [text for text in compare(one, several) if not any(part in text for part in others)]
    assert not wrong
    samples = {row["collapse/samples"] for row in several[0]["rows"][0]}
    assert samples == {BATCH}


@pytest.mark.parametrize("ranks", [2])
def test_a_circuit_on_several_ranks_reads_what_one_reads(ranks, tmp_path):
    def run(count: int) -> Any:
        watching = [
            m for m in every_monitor("mlp", double=True, strict=True) if m.prefix in ("circuit", "knn")
        ]
        loader = shares(dataset("mlp", double=True), BATCH, uneven=True)
        return on_ranks(count, tmp_path, lambda: Circuit().double(), watching, loader=loader)

    (one,), several = run(1), run(ranks)
    assert any("feedback_cosine" in key for key, _ in rows_by_key(one["rows"][0]))
    assert not compare(one, several)


OBJECTS = -1  # stands for a collective of objects


class Counts(Callback):
    """Counts the collectives of each step, by the number of numbers that they sum."""

    def __init__(self) -> None:
        self.notes: list[list[int]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.notes:
            return
        plain_reduce = torch.distributed.all_reduce

        def all_reduce(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            self.notes[-1].append(tensor.numel())
            return plain_reduce(tensor, *args, **kwargs)

        torch.distributed.all_reduce = all_reduce
        for name in ("all_gather_object", "all_gather", "broadcast_object_list", "broadcast", "barrier"):
            self._count(name)

    def _count(self, name: str) -> None:
        plain = getattr(torch.distributed, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.notes[-1].append(OBJECTS)
            return plain(*args, **kwargs)

        setattr(torch.distributed, name, counted)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.notes.append([])  # listed before the monitors


def test_a_due_step_has_one_packed_sum_and_any_other_no_collective(tmp_path):
    chosen = list(monitors("standard", every_n_steps=3, targets=1, strict=True))
    layers, statistics = 3, len({need for monitor in chosen for need in monitor.needs})
    counted = []
    for watching in ([], chosen):
        found = on_ranks(
            2, tmp_path, lambda: Module("mlp"), watching, Counts(), loader=shares(dataset("mlp"), BATCH)
        )
        assert found[0]["notes"] == found[1]["notes"]
        counted.append(found[0]["notes"][0])
    own = [list((Counter(step) - Counter(bare)).elements()) for bare, step in zip(*counted, strict=True)]
    assert [len(step) > 0 for step in own] == [True, False, True, False, False, True]
    for step in (own[i] for i in (0, 2, 5)):
        status = 2 * layers + 3 * statistics * layers
        packed = [count for count in step if count > status]
        assert len(packed) == 1, step
        assert sum(count > 3 for count in step) <= 2, step  # the other is the status of what failed
        assert (
            sum(count == OBJECTS for count in step) == len(chosen) + 1
        )  # the numbers are rank 0's, and what functions showed


class FullyShardedDataParallel(nn.Sequential):
    """Named as torch's."""


class FSDPStrategy(SingleDeviceStrategy):
    """Named as Lightning's."""


class ZeRO(SingleDeviceStrategy):
    """Has DeepSpeed's configuration."""

    def __init__(self, stage: int) -> None:
        super().__init__("cpu")
        self.config = {"zero_optimization": {"stage": stage}}


@pytest.mark.parametrize("kind", [CollapseMonitor, FeatureLearningMonitor])
def test_parameters_in_pieces_are_refused_by_name_before_training(kind):
    def wrapped() -> Module:
        module = Module("mlp")
        module.net = FullyShardedDataParallel(*module.net)
        return module

    cases = [
        (wrapped(), {}, "FSDP1 flattens parameters.*fully_shard"),
        (Module("mlp"), {"strategy": FSDPStrategy("cpu")}, "FSDP1 flattens.*ModelParallelStrategy"),
        (Module("mlp"), {"strategy": ZeRO(3)}, "ZeRO-3 keeps parameters in pieces; use stage 1 or 2"),
    ]
    for module, settings, message in cases:
        with pytest.raises(ValueError, match=f"{kind.__name__} cannot read this fit: .*{message}"):
            fit(module, kind(), **settings)
        assert module._trainer.global_step == 0
    fit(Module("mlp"), monitor := kind(every_n_steps=1, strict=True), strategy=ZeRO(2))
    assert len(monitor.history) == 6
    module = wrapped()
    with pytest.raises(ValueError, match=f"{kind.__name__} cannot read this fit: FSDP1 flattens"):
        watch(module, torch.optim.SGD(module.parameters(), 0.1), kind()).__enter__()


class Sharded(Module):
    """Is sharded by ``fully_shard``, or its layers are tensor-parallel, where there is a mesh."""

    def __init__(self, how: str) -> None:
        super().__init__("mlp")
        self.how = how
        self.net[4].p = 0.0
        self.double()

    def configure_model(self) -> None:
        """Shard."""
        if self.device_mesh is None or isinstance(self.net[0].weight, DTensor):
            return
        if self.how == "fully_shard":
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
        else:
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)


def model_parallel(data: int, tensor: int) -> Any:
    return lambda: ModelParallelStrategy(
        data_parallel_size=data, tensor_parallel_size=tensor, process_group_backend="gloo"
    )


def layer_monitors() -> list[Monitor]:
    return [
        *monitors("standard", every_n_steps=2, targets=1, strict=True),
        CollapseMonitor(every_n_steps=1, layers="net.2", name="other", histograms=True, strict=True),
    ]


def test_fully_shard_reads_what_one_process_reads(tmp_path):
    loader = shares(dataset("mlp", double=True), BATCH)
    (one,) = on_ranks(1, tmp_path, lambda: Sharded("fully_shard"), layer_monitors(), loader=loader)
    strategy = model_parallel(2, 1)
    both = on_ranks(
        2, tmp_path, lambda: Sharded("fully_shard"), layer_monitors(), loader=loader, strategy=strategy
    )
    assert all(one["rows"])
    # What needs a whole gradient or the weight at the start is not read of pieces; all else is the same.
    unread = re.compile(r"signal/(.*/)?(weight_gradient|distance|dead|off|off_runs)")
    for row in (*itertools.chain(*one["rows"]), one["metrics"]):
        for key in filter(unread.fullmatch, list(row)):
            del row[key]
    assert not compare(one, both)


def test_what_runs_the_module_apart_is_refused_under_fully_shard(tmp_path):
    for monitor in (FeatureLearningMonitor(), PlasticityMonitor(trainability_steps=3)):
        both = on_ranks(2, tmp_path, lambda: Sharded("fully_shard"), [monitor], strategy=model_parallel(2, 1))
        for found in both:
            name = type(monitor).__name__
            assert (
                f"{name} runs the module outside of its step, which needs parameters whole" in found["error"]
            )
            assert found["steps"] == 0


def test_tensor_parallel_layers_are_refused_by_name(tmp_path):
    both = on_ranks(
        2, tmp_path, lambda: Sharded("tensor"), [CollapseMonitor()], strategy=model_parallel(1, 2)
    )
    for found in both:
        assert "CollapseMonitor cannot read this fit: layers are tensor-parallel" in found["error"]
        assert found["steps"] == 0


def test_ranks_read_the_same_though_their_running_statistics_differ(tmp_path):
    """Under DDP each rank's batch normalisation has its own: numbers are those of rank 0."""
    watching = every_monitor("conv", strict=True)
    found = on_ranks(2, tmp_path, lambda: Module("conv"), watching, Statistics(), loader=loader_of_conv())
    first, second = found
    assert first["notes"] != second["notes"]
    assert not [each["error"] for each in found if each["error"]]
    assert repr(first["rows"]) == repr(second["rows"])
    assert all(first["rows"])


class Statistics(Callback):
    """Keeps a rank's running statistics."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.notes = pl_module.net[1].running_mean.tolist()


def loader_of_conv() -> Any:
    return shares(dataset("conv"), BATCH)
