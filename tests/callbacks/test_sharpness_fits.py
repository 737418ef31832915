"""SharpnessMonitor in fits of every kind: uneven ranks, modules that count, second runs, undefined values."""

import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import SharpnessMonitor
from lightning_sym.engine.schedule import EpochEnds
from tests.models import Classifier, data, fit, mlp
from tests.uneven import Counting, uneven

ALL = 10_000  # as many vectors as there are parameters, or more: exact


def classifier(**settings):
    torch.manual_seed(0)
    return Classifier(mlp(4, 6, 3, act=nn.Tanh), **settings)


def test_ranks_whose_batches_differ_count_by_their_samples(tmp_path):
    class Dump(SharpnessMonitor):
        def on_train_end(self, trainer, pl_module):
            file = tmp_path / f"{trainer.world_size}-{trainer.global_rank}.json"
            file.write_text(json.dumps(self.history))

    for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
        monitor = Dump(every_n_steps=1, vectors=ALL, lanczos_steps=20, strict=True)
        module = classifier(lr=0.0)
        ranks = {"devices": devices, "strategy": strategy, "use_distributed_sampler": False}
        fit(module, monitor, loader=uneven(), max_epochs=1, **ranks)
    one, a, b = (json.loads((tmp_path / name).read_text()) for name in ("1-0.json", "2-0.json", "2-1.json"))
    assert a == b
    assert len(a) == 3
    for row, expected in zip(a, one, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)


class Counted(Counting, Classifier):
    """Classifies, and counts."""


def test_calls_hooks_and_captured_functions_of_the_module_are_those_of_the_bare_fit():
    found, right = [], SharpnessMonitor(every_n_steps=1, strict=True)
    fit(classifier(), right)
    for watched in (False, True):
        torch.manual_seed(0)
        module = Counted(mlp(4, 6, 3, act=nn.Tanh))
        monitor = SharpnessMonitor(every_n_steps=1, strict=True)
        fit(module, *[monitor] * watched)
        found.append((module.calls, module.fired, module.losses))
    assert found[0] == found[1]
    assert found[0][:2] == (9, [8] * 8)  # the hook is there from the second call on
    assert monitor.history == right.history


def test_a_second_run_of_a_monitor_is_that_of_a_new_one():
    def run(monitor):
        fit(classifier(), monitor, max_epochs=1, loader=DataLoader(TensorDataset(*data(16, seed=5)), 8))
        return [{**row, "fit": 1} for row in monitor.history[-2:]]

    monitor = SharpnessMonitor(every_n_steps=1, strict=True)
    fit(classifier(), monitor, max_epochs=1)
    again = run(monitor)
    assert again == run(SharpnessMonitor(every_n_steps=1, strict=True))
    assert [row["fit"] for row in monitor.history] == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("second", ["_", "batch_nb", "*rest"])
def test_the_second_argument_of_a_step_has_any_name(second):
    space = {"F": nn.functional}
    exec(f"def step(self, b, {second}): return F.cross_entropy(self(b[0]), b[1])", space)
    named, right = (SharpnessMonitor(every_n_steps=3, strict=True) for _ in range(2))
    torch.manual_seed(0)
    fit(type("Named", (Classifier,), {"training_step": space["step"]})(mlp(4, 6, 3, act=nn.Tanh)), named)
    fit(classifier(), right)
    assert named.history == right.history
    assert named.history


def test_what_is_undefined_is_not_logged():
    class Diverged(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    monitor = SharpnessMonitor(every_n_steps=1, vectors=1, strict=True)
    torch.manual_seed(0)
    fit(Diverged(mlp(4, 6, 3)), monitor, max_steps=2)
    assert [set(row) for row in monitor.history] == [{"step", "fit", "sharpness/line"}] * 2
    monitor = SharpnessMonitor(every_n_steps=1, vectors=1, strict=True)
    fit(classifier(), monitor, max_steps=1)
    assert "sharpness/trace_error" not in monitor.history[0]  # of one vector
    assert "sharpness/trace" in monitor.history[0]


def test_ends_of_epochs_and_a_name_of_its_own():
    monitor = SharpnessMonitor(every_n_steps=EpochEnds(), name="curvature", strict=True)
    fit(classifier(), monitor, max_epochs=2)
    assert [row["step"] for row in monitor.history] == [3, 6]
    assert all("curvature/top" in row for row in monitor.history)
    first = EpochEnds(at_start=True)
    with pytest.raises(ValueError, match=r"every_n_steps=EpochEnds.* reads before there is a batch"):
        fit(classifier(), SharpnessMonitor(every_n_steps=first))
    monitor = SharpnessMonitor(every_n_steps=first, data=data(8), strict=True)
    fit(classifier(), monitor, max_epochs=1)
    assert [row["step"] for row in monitor.history] == [0, 3]
