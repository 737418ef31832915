"""The two monitors of one's own against slow twins: single samples, float64, and numpy."""

import ast
import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_sym.callbacks import EpochEnds
from tests.models import Classifier, data, mlp, trainer

SCRIPT = Path(__file__).parents[2] / "examples" / "own_monitors.py"
spec = importlib.util.spec_from_file_location("own_monitors", SCRIPT)
own = importlib.util.module_from_spec(spec)
spec.loader.exec_module(own)


def test_each_has_at_most_fifteen_lines_and_no_private_name():
    source = SCRIPT.read_text()
    kinds = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    assert [kind.name for kind in kinds] == ["UnitNoise", "SpectralNorms"]
    for kind in kinds:
        assert kind.end_lineno - kind.lineno + 1 <= 15
        assert "._" not in ast.get_source_segment(source, kind)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_unit_noise_is_that_of_single_samples(accumulate):
    torch.manual_seed(0)
    module = Classifier(mlp(4, 6, 5, 3)).double()
    twin = mlp(4, 6, 5, 3).double()
    twin.load_state_dict(module.net.state_dict())
    x, y = data(8)
    x = x.double()
    monitor = own.UnitNoise(every_n_steps=1, strict=True)
    loader = DataLoader(torch.utils.data.TensorDataset(x, y), 8 // accumulate)
    trainer(max_steps=1, callbacks=[monitor], accumulate_grad_batches=accumulate).fit(module, loader)
    for k in (0, 2, 4):
        rows = []
        for n in range(8):
            h = twin[:k](x[n : n + 1])
            b = twin[k](h).detach().requires_grad_()
            nn.functional.cross_entropy(twin[k + 1 :](b), y[n : n + 1]).backward()
            rows.append(b.grad[0].tolist())
        ratios = []
        for unit in zip(*rows, strict=True):
            mean = sum(unit) / 8
            ratios.append(abs(mean) / math.sqrt(sum((g - mean) ** 2 for g in unit) / 8))
        expected = sorted(ratios)[(len(ratios) - 1) // 2]  # torch's median of an even number: the lower one
        assert monitor.history[0][f"unit_noise/net.{k}/median"] == pytest.approx(expected, rel=1e-9)


def test_spectral_norms_are_numpys_at_each_epochs_end():
    class Keeps(Classifier):
        norms: list = []  # noqa: RUF012

        def on_train_epoch_end(self):
            self.norms.append([numpy.linalg.norm(self.net[k].weight.detach().numpy(), 2) for k in (0, 2)])

    torch.manual_seed(0)
    monitor = own.SpectralNorms(every_n_steps=EpochEnds(), strict=True)
    loader = DataLoader(torch.utils.data.TensorDataset(*data()), 8)
    trainer(max_epochs=2, callbacks=[monitor]).fit(Keeps(mlp(4, 6, 3)), loader)
    found = [[row["spectral_norm/net.0"], row["spectral_norm/net.2"]] for row in monitor.history]
    assert len(found) == len(Keeps.norms) == 2
    for row, expected in zip(found, Keeps.norms, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    assert found[0] != found[1]


def test_the_example_runs():
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke"], check=True, capture_output=True, text=True, timeout=120
    )
    assert "unit_noise/0/median" in ran.stdout
    assert "spectral_norm/4" in ran.stdout
