"""Promise 7: the same monitors, the same numbers in a plain torch loop."""

# ruff: noqa: PT012, PT031 -- the block is what is tested
from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_sym import watch
from lightning_sym.callbacks import (
    AlignmentMonitor,
    CircuitMonitor,
    CollapseMonitor,
    FeatureLearningMonitor,
    Monitor,
    SharpnessMonitor,
    SignalMonitor,
    monitors,
)
from tests.promises.every import BATCH, SHAPES, Module, apart, dataset, every_monitor, fit, hooks, net_of
from tests.promises.test_silence import Players


def batches(kind: str, size: int = BATCH) -> DataLoader:
    return DataLoader(dataset(kind), size)


def loop(
    module: Any, optimizer: Any, watching: Any, *, kind: str = "mlp", accumulate: int = 1, size: int = BATCH
) -> None:
    """Train for two epochs, as the Trainer does."""
    for _ in range(2):
        module.train()
        for k, batch in enumerate(batches(kind, size)):
            watching.batch(batch)
            loss = nn.functional.cross_entropy(module(batch[0]), batch[1])
            watching.loss(loss)
            if k % accumulate == 0:
                optimizer.zero_grad()
            (loss / accumulate).backward()
            if (k + 1) % accumulate == 0:
                optimizer.step()
        watching.epoch_end()


@pytest.mark.parametrize("kind", SHAPES)
def test_every_monitor_reads_in_a_loop_what_it_reads_in_a_trainer(kind):
    own = every_monitor(kind, strict=True)
    torch.manual_seed(0)
    fit(Module(kind), *own, kind=kind)
    torch.manual_seed(0)
    module, here = Module(kind), every_monitor(kind, strict=True)
    optimizer = module.configure_optimizers()
    with watch(module, optimizer, here) as watching:
        loop(module, optimizer, watching, kind=kind)
    assert hooks(module) == 0
    for expected, monitor in zip(own, here, strict=True):
        assert monitor.history
        assert not apart(expected.history, monitor.history), type(monitor).__name__


def test_accumulated_batches_are_one_step_as_in_a_trainer():
    own = every_monitor("mlp", strict=True)
    torch.manual_seed(0)
    fit(Module("mlp"), *own, loader=batches("mlp", 4), accumulate_grad_batches=3)
    torch.manual_seed(0)
    module, here = Module("mlp"), every_monitor("mlp", strict=True)
    optimizer = module.configure_optimizers()
    with watch(module, optimizer, here, accumulate=3) as watching:
        loop(module, optimizer, watching, accumulate=3, size=4)
    assert here[0].history[0]["collapse/samples"] == 12
    for expected, monitor in zip(own, here, strict=True):
        assert not apart(expected.history, monitor.history), type(monitor).__name__


def test_two_optimizers_that_take_turns_read_as_in_a_trainer():
    class Turns(Players):
        """Steps both in every batch."""

        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, 0)

    def chosen() -> list[Monitor]:
        every = every_monitor("mlp", strict=True)
        return [m for m in every if m.prefix not in ("eigenmodes", "circuit", "step", "balance", "hierarchy")]

    own, here = chosen(), chosen()
    torch.manual_seed(0)
    fit(Turns(), *own)
    torch.manual_seed(0)
    module = Turns()
    optimizers = module.configure_optimizers()
    with watch(module, optimizers, here) as watching:
        for _ in range(2):
            for batch in batches("mlp"):
                watching.batch(batch)
                nets = module.net, module.other
                for k, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
                    optimizer.zero_grad()
                    both = net(batch[0]) + nets[1 - k](batch[0])
                    nn.functional.cross_entropy(both, batch[1]).backward()
                    optimizer.step()
            watching.epoch_end()
    for expected, monitor in zip(own, here, strict=True):
        assert monitor.history
        assert not apart(expected.history, monitor.history), type(monitor).__name__


class Closures(Module):
    """Is optimised by LBFGS, which evaluates the closure several times."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


def test_an_optimizer_with_a_closure_reads_as_in_a_trainer():
    own, here = (
        monitors("standard", every_n_steps=1, targets=1),
        monitors("standard", every_n_steps=1, targets=1),
    )
    torch.manual_seed(0)
    fit(Closures("mlp"), *own)
    torch.manual_seed(0)
    module = Closures("mlp")
    optimizer = module.configure_optimizers()
    with watch(module, optimizer, here) as watching:
        for _ in range(2):
            for batch in batches("mlp"):
                watching.batch(batch)

                def closure(batch: Any = batch) -> Any:
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(module(batch[0]), batch[1])
                    watching.loss(loss)
                    loss.backward()
                    return loss

                optimizer.step(closure)
    for expected, monitor in zip(own, here, strict=True):
        assert len(monitor.history) == 6
        assert not apart(expected.history, monitor.history), type(monitor).__name__


def test_what_others_run_in_a_loops_step_is_in_no_reading_of_functions():
    """Monitors that run a copy of the module do so at the head of a step, where the loop's own may be."""

    def read(*others: Monitor) -> Any:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        signal = SignalMonitor(every_n_steps=1, strict=True)
        with watch(net, optimizer, [*others, signal], accumulate=2) as watching:
            for batch in list(batches("mlp", 4))[:4]:
                watching.batch(batch)
                nn.functional.cross_entropy(net(batch[0]), batch[1]).backward()
                if watching._told == 2:
                    optimizer.step()
        return signal.history

    def loss(module: Any, batch: Any) -> Any:
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    alone = read()
    assert len(alone) == 2
    assert "signal/0/saturated" in alone[0]
    circuit = CircuitMonitor(every_n_steps=1, loss=loss, pictures=False, strict=True)
    others = circuit, FeatureLearningMonitor(every_n_steps=1, strict=True)
    assert not apart(alone, read(*others, SharpnessMonitor(every_n_steps=1, loss=loss, strict=True)))


def plain() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = net_of("mlp")
    net[4].p = 0.0
    return net, torch.optim.SGD(net.parameters(), 0.05)


def layer_monitors(**settings: Any) -> list[Monitor]:
    return list(monitors("standard", **{"every_n_steps": 1, "strict": True, **settings}))


def step(net: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, scaler: Any = None) -> None:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
    (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def rows(chosen: list[Monitor]) -> list[Any]:
    return [monitor.history for monitor in chosen]


@pytest.mark.parametrize("bad", [None, 0, 1, 2])
def test_a_gradient_scaler_that_skips_a_step(bad):
    """What passed in the step that was skipped is in no reading; scales are undone."""
    every = list(batches("mlp"))
    net, optimizer = plain()
    with watch(net, optimizer, expected := layer_monitors(targets=1)) as watching:
        for k, batch in enumerate(every):
            if k != bad:
                watching.batch(batch)
                step(net, optimizer, batch)
    net, optimizer = plain()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)  # it grows, too
    found = layer_monitors(targets=1)
    with watch(net, optimizer, found, scaler=scaler) as watching:
        for k, batch in enumerate(every):
            x = batch[0] * float("inf") if k == bad else batch[0]
            watching.batch([x, *batch[1:]])
            step(net, optimizer, [x, *batch[1:]], scaler)
    assert scaler.get_scale() == {None: 2048, 0: 1024, 1: 512, 2: 1024}[bad]
    assert len(found[0].history) == len(every) - (bad is not None)
    for a, b in zip(rows(expected), rows(found), strict=True):
        for one, other in zip(a, b, strict=True):
            assert other == pytest.approx(one, rel=1e-5, abs=1e-6)


def test_a_scaler_needs_batches_to_be_told():
    """Where a step may be skipped, only that says where the next one begins."""
    net, optimizer = plain()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    chosen = layer_monitors(strict=False)
    with (
        pytest.warns(UserWarning, match=r"a gradient scaler.*watching\.batch\(batch\)"),
        watch(net, optimizer, chosen, scaler=scaler),
    ):
        for batch in batches("mlp"):
            step(net, optimizer, batch, scaler)
    assert not any(rows(chosen))


def test_fabrics_loop_reads_the_same():
    net, optimizer = plain()
    with watch(net, optimizer, expected := layer_monitors(targets=1)) as watching:
        for batch in batches("mlp"):
            watching.batch(batch)
            step(net, optimizer, batch)
    net, optimizer = plain()
    fabric = Fabric(accelerator="cpu", devices=1)
    net, optimizer = fabric.setup(net, optimizer)
    with watch(net, optimizer, found := layer_monitors(targets=1)) as watching:
        for batch in fabric.setup_dataloaders(batches("mlp")):
            watching.batch(batch)
            optimizer.zero_grad()
            fabric.backward(nn.functional.cross_entropy(net(batch[0]), batch[1]))
            optimizer.step()
    assert len(found[0].history) == 3
    assert rows(expected) == rows(found)
    assert "collapse/0/effective_rank" in found[0].history[0]


@pytest.mark.parametrize("how", ["compiled", "ddp", "both"])
def test_names_are_the_modules_own(how):
    net, optimizer = plain()
    with watch(net, optimizer, expected := layer_monitors()):
        step(net, optimizer, next(iter(batches("mlp"))))
    net, optimizer = plain()
    if how != "compiled":
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = net if how == "ddp" else torch.compile(net, backend="eager")
        wrapped = wrapped if how == "compiled" else DistributedDataParallel(wrapped)
        with watch(wrapped, optimizer, found := layer_monitors()):
            step(wrapped, optimizer, next(iter(batches("mlp"))))
    finally:
        if how != "compiled":
            torch.distributed.destroy_process_group()
    assert rows(found)[0][0].keys() == rows(expected)[0][0].keys()
    for a, b in zip(rows(expected), rows(found), strict=True):
        assert b == [pytest.approx(row, rel=1e-5, abs=1e-6) for row in a]


def test_readings_go_to_a_writer_and_to_functions(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    def fails(values: Any, step: int) -> None:
        raise OSError("disk full")

    taken: list[Any] = []
    net, optimizer = plain()
    with SummaryWriter(str(tmp_path)) as writer, pytest.warns(UserWarning, match="disk full") as caught:
        chosen = [CollapseMonitor(every_n_steps=2, histograms=True)]
        sinks = [writer, fails, lambda values, step: taken.append((step, values))]
        with watch(net, optimizer, chosen, to=sinks):
            for batch in batches("mlp"):
                step(net, optimizer, batch)
    assert len([w for w in caught if "disk full" in str(w.message)]) == 1
    history = chosen[0].history
    assert [at for at, _ in taken] == [row["step"] for row in history] == [1, 2]
    for (_, values), row in zip(taken, history, strict=True):
        assert {**values, "step": row["step"], "fit": 1} == row
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars("collapse/score")] == [1, 2]
    assert "collapse/0/spectrum" in events.Tags()["histograms"]
    net, optimizer = plain()
    with watch(net, optimizer, CollapseMonitor(every_n_steps=1), to=lambda values, at: taken.append(at)):
        step(net, optimizer, next(iter(batches("mlp"))))
    assert taken[-1] == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_block_leaves_no_hook(error):
    net, optimizer = plain()
    linear = nn.functional.linear
    with pytest.raises(error, match="mine"), watch(net, optimizer, layer_monitors()):
        net(next(iter(batches("mlp")))[0]).sum().backward()
        raise error("mine")
    assert hooks(net) == 0
    assert not optimizer._optimizer_step_post_hooks
    assert nn.functional.linear is linear
    chosen = layer_monitors()
    with watch(net, optimizer, chosen):
        step(net, optimizer, next(iter(batches("mlp"))))
    assert len(chosen[0].history) == 1


def test_batches_need_not_be_told_where_nothing_of_them_is_wanted():
    histories = []
    for tell in (True, False):
        net, optimizer = plain()
        chosen = [
            CollapseMonitor(every_n_steps=1, strict=True),
            AlignmentMonitor(every_n_steps=2, strict=True),
        ]
        with watch(net, optimizer, chosen) as watching:
            for batch in batches("mlp"):
                if tell:
                    watching.batch(batch)
                step(net, optimizer, batch)
        histories.append(rows(chosen))
    assert [len(history) for history in histories[0]] == [3, 2]
    for a, b in zip(*histories, strict=True):
        for one, other in zip(a, b, strict=True):
            assert other == pytest.approx(one, rel=1e-6, abs=1e-9)


def test_labels_of_a_batch_that_was_not_told_are_one_warning():
    net, optimizer = plain()
    chosen = CollapseMonitor(every_n_steps=1, targets=1)
    with pytest.warns(UserWarning, match="targets=1") as caught, watch(net, optimizer, chosen):
        for batch in batches("mlp"):
            step(net, optimizer, batch)
    assert len([w for w in caught if "targets=1" in str(w.message)]) == 1
    assert len(chosen.history) == 3
    assert not any("nc1" in key for row in chosen.history for key in row)


def several() -> list[Monitor]:
    shared = {"every_n_steps": 1, "strict": True}
    loss = {"loss": lambda module, batch: nn.functional.cross_entropy(module(batch[0]), batch[1])}
    return [
        SharpnessMonitor(vectors=1, lanczos_steps=0, **loss, **shared),
        FeatureLearningMonitor(samples=4, **shared),
        CollapseMonitor(causes=True, **shared),
    ]


def test_several_monitors_that_run_the_module():
    net, optimizer = plain()
    alone = []
    for k in range(3):
        net, optimizer = plain()
        with watch(net, optimizer, monitor := several()[k]) as watching:
            for batch in batches("mlp"):
                watching.batch(batch)
                step(net, optimizer, batch)
        alone.append(monitor.history)
    net, optimizer = plain()
    with watch(net, optimizer, chosen := several()) as watching:
        for batch in batches("mlp"):
            watching.batch(batch)
            step(net, optimizer, batch)
    assert rows(chosen) == alone
    assert all(len(history) == 3 for history in alone)


def test_monitors_that_need_a_batch_say_so_if_it_is_not_told():
    net, optimizer = plain()
    chosen = [FeatureLearningMonitor(every_n_steps=1), CollapseMonitor(every_n_steps=1)]
    message = r"FeatureLearningMonitor.*watching\.batch\(batch\)"
    with pytest.warns(UserWarning, match=message) as caught, watch(net, optimizer, chosen):
        for batch in batches("mlp"):
            step(net, optimizer, batch)
    assert len([w for w in caught if "watching.batch" in str(w.message)]) == 1
    assert [len(monitor.history) for monitor in chosen] == [0, 2]  # the other reads on, from the second step
    net, optimizer = plain()
    strict = FeatureLearningMonitor(every_n_steps=1, strict=True)
    with pytest.raises(ValueError, match=message), watch(net, optimizer, strict):
        step(net, optimizer, next(iter(batches("mlp"))))


def test_another_threads_steps_and_passes_are_not_the_loops():
    net, optimizer = plain()
    with watch(net, optimizer, expected := layer_monitors()):
        for batch in batches("mlp"):
            step(net, optimizer, batch)
    net, optimizer = plain()
    other, theirs = plain()

    def beside() -> None:
        with torch.no_grad():
            net(torch.ones(50, 6))
        step(other, theirs, (torch.ones(5, 6), torch.zeros(5, dtype=torch.int64)))

    with watch(net, optimizer, found := layer_monitors()):
        for batch in batches("mlp"):
            thread = threading.Thread(target=beside)
            thread.start()
            thread.join()
            step(net, optimizer, batch)
    assert rows(found) == rows(expected)


def test_validation_without_gradients_is_not_the_step():
    found = []
    for validate in (False, True):
        net, optimizer = plain()
        with watch(net, optimizer, chosen := layer_monitors()):
            for batch in batches("mlp"):
                step(net, optimizer, batch)
                if validate:
                    net.eval()
                    with torch.no_grad():
                        net(torch.ones(50, 6))
                    net.train()
        found.append(rows(chosen))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"module": 3}, TypeError, "module must be a torch.nn.Module, got int"),
        ({"optimizer": []}, ValueError, "optimizer must be an optimizer or several, got none"),
        ({"optimizer": "sgd"}, TypeError, "optimizer must be a torch.optim.Optimizer, got str"),
        ({"optimizer": None}, TypeError, "optimizer must be a torch.optim.Optimizer, got NoneType"),
        ({"monitors": 3}, TypeError, "monitors must be a monitor or several.*got int"),
        ({"monitors": [CollapseMonitor]}, TypeError, "monitors must be a monitor or several.*got type"),
        ({"monitors": "standard"}, TypeError, "monitors must be a monitor or several.*got str"),
        ({"monitors": []}, ValueError, "monitors must be a monitor or several, got none"),
        ({"accumulate": 0}, ValueError, "accumulate must be a positive integer, got 0"),
        ({"accumulate": True}, ValueError, "accumulate must be a positive integer, got True"),
        ({"to": 3}, TypeError, "to must be a SummaryWriter, a logger, a function.* got int"),
        ({"to": "runs"}, TypeError, "to must be a SummaryWriter, a logger, a function.* got str"),
        ({"scaler": 2.0}, TypeError, "scaler must be a torch.amp.GradScaler, got float"),
        ({"precision": "bf16"}, TypeError, "precision must be a function that makes a context, got str"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    net, optimizer = plain()
    given = {"module": net, "optimizer": optimizer, "monitors": CollapseMonitor(), **change}
    module, optimizer, chosen = given.pop("module"), given.pop("optimizer"), given.pop("monitors")
    with pytest.raises(error, match=message):
        watch(module, optimizer, chosen, **given)


def test_a_preset_may_stand_in_a_list():
    net, optimizer = plain()
    light, other = monitors("light"), CollapseMonitor(name="other")
    assert watch(net, optimizer, [light, other]).monitors == [*light, other]


def test_two_monitors_with_one_name_are_refused_and_layers_too():
    net, optimizer = plain()
    with pytest.raises(ValueError, match="name='collapse_b'"):
        watch(net, optimizer, [CollapseMonitor(), CollapseMonitor()])
    with (
        pytest.raises(ValueError, match=r"layers='nothing'"),
        watch(net, optimizer, CollapseMonitor(layers="nothing")),
    ):
        pass
    assert hooks(net) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with watch(net, optimizer, CollapseMonitor()):
            pass
