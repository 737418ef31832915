"""The search for symmetries that monitors share: on a few samples, and rank 0's on all ranks."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import Monitor
from lightning_sym.callbacks.symmetries import SAMPLES, symmetries_of
from lightning_sym.engine.run import Run
from lightning_sym.sandbox import Sandbox
from tests.models import Classifier, mlp, trainer


def run_of(net, batch):
    run = Run(net)
    run.sandbox, run.batch = Sandbox(net), batch
    return run


class Counts(nn.Module):
    """Notes the samples of each pass where copies of it do, too."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        SIZES.append(len(x))
        return self.net(x)


SIZES: list[int] = []


def test_it_runs_on_a_few_samples_of_a_copy():
    SIZES.clear()
    net = Counts(mlp(4, 6, 3))
    found = symmetries_of(run_of(net, {"x": torch.randn(500, 4), "y": torch.zeros(500)}), inputs="x")
    assert SIZES
    assert set(SIZES) == {SAMPLES}
    assert {symmetry.kind for symmetry in found} >= {"permutation", "signflip"}
    assert all(symmetry.module is net for symmetry in found)


class Scores(nn.Sequential):
    """Has a method that runs the module itself."""

    def scores(self, x):
        return self(x).softmax(1)


@pytest.mark.parametrize("forward", ["scores", lambda module, x: module(x).softmax(1), "__call__"])
def test_what_is_called_may_run_the_module_itself(forward):
    net = Scores(*mlp(4, 6, 3))
    plain = symmetries_of(run_of(net, torch.randn(20, 4)), inputs=None)
    found = symmetries_of(run_of(net, torch.randn(20, 4)), inputs=None, forward=forward)
    assert {str(s) for s in found} >= {str(s) for s in plain}
    assert all(symmetry.module is net for symmetry in found)
    assert "forward" not in vars(net)


def test_its_error_names_the_argument():
    with pytest.raises(RuntimeError, match="inputs='z'"):
        symmetries_of(run_of(mlp(4, 6, 3), {"x": torch.randn(5, 4)}), inputs="z")


class Finds(Monitor):
    """Searches with another input on each rank: on the second one it cannot be found."""

    quantity = "finds"

    def __init__(self, path):
        super().__init__(every_n_steps=1, strict=True)
        self.path = path

    def prepare(self, seen):
        rank = seen.run.ranks.rank
        found = symmetries_of(seen.run, inputs=0 if rank == 0 else 7)
        (self.path / f"{rank}.json").write_text(json.dumps([str(s) for s in found]))

    def read(self, seen):
        return iter(())


def test_every_rank_has_what_the_first_one_found(tmp_path):
    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.randint(0, 3, (8,))), batch_size=4)
    fit = trainer(callbacks=[Finds(tmp_path)], devices=2, strategy="ddp_fork", max_steps=1)
    fit.fit(Classifier(mlp(4, 6, 3)), data)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first
    assert first == second
