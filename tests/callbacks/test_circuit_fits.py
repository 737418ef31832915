"""CircuitMonitor in fits of every kind: uneven ranks, faults, clipping, second runs, plain loops."""

import json
import math
import warnings

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import CircuitMonitor
from lightning_sym.engine.loop import watch
from lightning_sym.engine.schedule import EpochEnds
from lightning_sym.papers.learning_circuit import LearningCircuit
from tests.models import Classifier, data, fit, mlp
from tests.uneven import Counting, uneven


def circuit(rule="four_synapse", **settings):
    return LearningCircuit((4,), layers=[6, 5, 3], rule=rule, activation="tanh", seed=1, **settings)


def classifier(**settings):
    torch.manual_seed(0)
    return Classifier(mlp(4, 9, 7, 3, act=nn.ReLU), **settings)


def loss_of(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


class Dump(CircuitMonitor):
    """Writes what a rank has read."""

    def __init__(self, path, **options):
        super().__init__(every_n_steps=1, **options)
        self.path = path

    def on_train_end(self, trainer, pl_module):
        file = self.path / f"{trainer.world_size}-{trainer.global_rank}.json"
        file.write_text(json.dumps([trainer.global_step, self.history]))

    def rows(self, *ranks):
        return [json.loads((self.path / f"{rank}.json").read_text())[1] for rank in ranks]


@pytest.mark.parametrize("rule", ["feedback_alignment", "backprop"])
def test_ranks_whose_batches_differ_count_by_their_samples_in_a_circuit(rule, tmp_path):
    monitor = Dump(tmp_path, strict=True)
    for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
        ranks = {"devices": devices, "strategy": strategy, "use_distributed_sampler": False}
        fit(circuit(rule), monitor, loader=uneven(), max_epochs=1, **ranks)
    one, a, b = monitor.rows("1-0", "2-0", "2-1")
    a, b = (([{**row, "fit": 1} for row in rows]) for rows in (a[-3:], b[-3:]))
    assert a == b
    for row, expected in zip(a, one, strict=True):
        assert row == pytest.approx(expected, abs=2e-6, rel=2e-6)
    if rule == "backprop":  # the mean over all samples has an angle of 0 to itself
        assert [row["circuit/update_cosine"] for row in a] == pytest.approx([1.0] * 3, abs=1e-7)


@pytest.mark.parametrize("loss", [None, lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])])
def test_ranks_whose_batches_differ_count_alike_under_ddp(loss, tmp_path):
    monitor = Dump(tmp_path, loss=loss, strict=True)
    ranks = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    fit(classifier(), monitor, loader=uneven(), max_epochs=1, **ranks)
    a, b = monitor.rows("2-0", "2-1")
    assert a == b
    assert [row["circuit/update_cosine"] for row in a] == pytest.approx([1.0] * 3, abs=1e-6)


def test_a_loss_that_fails_on_one_rank_stops_no_other(tmp_path):
    def loss(module, batch):
        if torch.distributed.get_rank() == 1:
            raise RuntimeError("out of luck")
        return loss_of(module, batch)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first rank's says that it failed on the other
        fit(classifier(), monitor := Dump(tmp_path, loss=loss), devices=2, strategy="ddp_fork", max_epochs=1)
    for rows in monitor.rows("2-0", "2-1"):
        assert len(rows) == 2
        assert not any("cosine" in key for row in rows for key in row)
        assert all("circuit/net.2/weight_rank" in row for row in rows)  # that needs no loss


def test_no_sum_of_a_part_of_a_steps_batches_is_read():
    asked = []

    class Fails(Classifier):
        def objective(self, batch):
            asked.append(1)
            if len(asked) == 4:  # the first of the second step
                raise RuntimeError("out of luck")
            return loss_of(self, batch)

    torch.manual_seed(0)
    monitor = CircuitMonitor(every_n_steps=1, loss="objective")
    with pytest.warns(UserWarning, match="CircuitMonitor failed in prepare_batch at step 1: .*out of luck"):
        fit(Fails(mlp(4, 9, 3)), monitor, accumulate_grad_batches=3)
    assert len(asked) == 9
    read = [row.get("circuit/update_cosine") for row in monitor.history]
    assert read[1] is None
    assert [read[0], read[2]] == pytest.approx([1, 1], abs=1e-5)


def test_the_gradient_is_the_clipped_one_that_the_optimizer_used():
    clip = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    used, whole = CircuitMonitor(every_n_steps=1, strict=True), CircuitMonitor(every_n_steps=1, loss=loss_of)
    fit(classifier(), used, max_steps=3, **clip)
    fit(classifier(), whole, max_steps=3, **clip)
    assert [row["circuit/update_cosine"] for row in used.history] == pytest.approx([1.0] * 3, abs=1e-4)
    assert all(row["circuit/update_cosine"] < 0.95 for row in whole.history)


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"maximize": True}, {"dampening": 0.0}])
def test_nesterov_on_all_parameters_at_once_reads_as_one_by_one(settings):
    rows = []
    for foreach in (False, True):  # the second one adds momentum to the gradients themselves
        module = classifier(momentum=0.9, nesterov=True, foreach=foreach, **settings)
        monitor = CircuitMonitor(every_n_steps=1, strict=True)
        fit(module, monitor, max_steps=6)
        rows.append(monitor.history)
    for row, expected in zip(*rows, strict=True):
        assert row == pytest.approx(expected, abs=1e-5)
    if not settings:
        assert rows[1][-1]["circuit/net.0/update_cosine"] < 0.999


class Counted(Counting, Classifier):
    """Classifies, and counts."""

    def objective(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])


def test_calls_hooks_and_captured_functions_of_the_module_are_those_of_the_bare_fit():
    found, right = [], CircuitMonitor(every_n_steps=1, loss=loss_of, strict=True)
    fit(classifier(), right)
    for watched in (False, True):
        torch.manual_seed(0)
        module = Counted(mlp(4, 9, 7, 3, act=nn.ReLU))
        monitor = CircuitMonitor(every_n_steps=1, loss="objective", strict=True)
        fit(module, *[monitor] * watched)
        found.append((module.calls, module.fired, module.losses))
    assert found[0] == found[1]
    assert found[0][:2] == (9, [8] * 8)  # the hook is there from the second call on
    assert monitor.history == right.history


@pytest.mark.parametrize("kind", ["own loss", "named loss", "circuit"])
def test_a_second_run_of_a_monitor_is_that_of_a_new_one(kind):
    def run(monitor):
        module = circuit() if kind == "circuit" else classifier(momentum=0.9)
        fit(module, monitor, max_epochs=1)
        return [{**row, "fit": 1} for row in monitor.history[-3:]]

    options = {"every_n_steps": 1, "loss": loss_of if kind == "named loss" else None, "strict": True}
    monitor = CircuitMonitor(**options)
    first = run(monitor)
    assert run(monitor) == first == run(CircuitMonitor(**options))
    assert [row["fit"] for row in monitor.history] == [1] * 3 + [2] * 3
    assert not any(torch.is_tensor(value) for value in vars(monitor).values())
    assert (monitor._watched, monitor._before, monitor._gradients) == ({}, None, None)  # no module is held


def test_what_is_undefined_is_not_logged(tmp_path):
    monitor = CircuitMonitor(every_n_steps=1, strict=True)
    fit(classifier(lr=0.0), monitor, max_steps=2, logger=CSVLogger(tmp_path))
    for row in monitor.history:  # an update of zero has no angle
        assert not any("cosine" in key for key in row)
        assert all(math.isfinite(value) for value in row.values())
    torch.manual_seed(0)
    net = mlp(4, 9, 3)
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nan
    monitor = CircuitMonitor(every_n_steps=1, strict=True)
    fit(Classifier(net), monitor, max_steps=1)
    assert set(monitor.history[0]) == {"step", "fit"}


def test_ends_of_epochs_are_for_circuits():
    monitor = CircuitMonitor(every_n_steps=EpochEnds(), strict=True)
    fit(circuit(), monitor, max_epochs=2)
    every = CircuitMonitor(every_n_steps=3, strict=True)
    fit(circuit(), every, max_epochs=2)
    assert monitor.history == [row for row in every.history if row["step"] > 1]
    for module, schedule in ((classifier(), EpochEnds()), (circuit(), EpochEnds(at_start=True))):
        with pytest.raises(ValueError, match=r"every_n_steps=EpochEnds.* give an interval in steps"):
            fit(module, CircuitMonitor(every_n_steps=schedule))


def test_a_name_of_its_own_is_that_of_the_picture_too():
    from lightning_sym.plots.circuit import alignment_over_time

    monitor = CircuitMonitor(every_n_steps=1, name="learning", strict=True)
    fit(circuit(), monitor, max_epochs=1)
    assert all(key.startswith("learning/") for key in monitor.history[0] if "/" in key)
    figure = alignment_over_time(monitor.history, quantity="learning")
    assert len(figure.axes) == 2
    with pytest.raises(ValueError, match="history must have circuit/"):
        alignment_over_time(monitor.history)


def test_a_plain_loop_reads_what_a_trainer_reads():
    module, monitor = classifier(momentum=0.9), CircuitMonitor(every_n_steps=1, strict=True)
    optimizer = torch.optim.SGD(module.net.parameters(), lr=0.05, momentum=0.9)
    with watch(module, optimizer, monitor):
        for x, y in DataLoader(TensorDataset(*data()), 8):
            F.cross_entropy(module.net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = CircuitMonitor(every_n_steps=1, strict=True)
    fit(classifier(momentum=0.9), expected, max_epochs=1)
    for row, right in zip(monitor.history, expected.history, strict=True):
        assert row == pytest.approx(right, abs=1e-6)
