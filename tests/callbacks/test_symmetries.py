"""The search for symmetries that monitors share: on a few samples, and the first rank's on all."""

from __future__ import annotations

import json

import pytest
import torch
from lightning_sym.callbacks._symmetries import SAMPLES, symmetries_of
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import Monitor
from tests.models import Classifier, mlp, trainer


class Alone:
    """A trainer as far as the search knows it."""

    class strategy:
        @staticmethod
        def broadcast(value, source):
            return value


def test_it_runs_on_a_few_samples_of_a_copy():
    sizes: list[int] = []
    net = mlp(4, 6, 3)
    net.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    batch = {"x": torch.randn(500, 4), "y": torch.zeros(500)}
    found = symmetries_of(Alone(), net, batch, inputs="x")
    assert sizes
    assert set(sizes) == {SAMPLES}
    assert {symmetry.kind for symmetry in found} >= {"permutation", "signflip"}
    assert all(symmetry.module is net for symmetry in found)


def test_its_error_is_the_users_to_read():
    with pytest.raises(ValueError, match="inputs='z'"):
        symmetries_of(Alone(), mlp(4, 6, 3), {"x": torch.randn(5, 4)}, inputs="z")


class Finds(Monitor):
    """Searches with another input on each rank: on the second one it cannot be found."""

    quantity = "finds"

    def __init__(self, path):
        super().__init__(every_n_steps=1, strict=True)
        self.path = path

    def prepare(self, trainer, pl_module, batch):
        found = symmetries_of(trainer, pl_module, batch, inputs=0 if trainer.global_rank == 0 else 7)
        (self.path / f"{trainer.global_rank}.json").write_text(json.dumps([str(s) for s in found]))

    def read(self, seen):
        return iter(())


def test_every_rank_has_what_the_first_one_found(tmp_path):
    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.randint(0, 3, (8,))), batch_size=4)
    fit = trainer(callbacks=[Finds(tmp_path)], devices=2, strategy="ddp_fork", max_steps=1)
    fit.fit(Classifier(mlp(4, 6, 3)), data)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first
    assert first == second
