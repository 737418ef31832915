"""VICReg with and without its variance term, trained for real: the one is told from the other."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_sym.callbacks import EigenmodeMonitor
from lightning_sym.losses import VICRegLoss
from lightning_sym.modules import JointEmbedding
from tests.models import trainer


def loader(samples=128):
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(samples, 12, generator=generator)
    views = [signal + 0.3 * torch.randn(samples, 12, generator=generator) for _ in range(2)]
    return DataLoader([(views, torch.zeros(samples))] * 150, batch_size=None)


def collapse(loss, **monitored):
    """Return the embedding's collapse at each reading, and its last variance."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))
    module = JointEmbedding(
        loss, backbone, features=16, projector=(32, 8), optimizer="adam", lr=1e-2, schedule="constant"
    )
    monitor = EigenmodeMonitor(every_n_steps=50, picture=False, strict=True, **monitored)
    trainer(max_epochs=1, callbacks=[monitor], limit_val_batches=0).fit(module, loader())
    rows = monitor.history
    return [row["eigenmodes/embedding/collapse"] for row in rows], rows[-1]["eigenmodes/embedding/variance"]


@pytest.mark.parametrize("covariance", [0.0, 1.0])
def test_without_the_variance_term_the_embedding_collapses(covariance):
    readings, variance = collapse(VICRegLoss(variance=0.0, covariance=covariance))
    assert readings[0] == 0
    assert readings[-1] == 2
    assert variance < 0.1


def test_with_it_none_does():
    readings, variance = collapse(VICRegLoss())
    assert readings == [0] * 4
    assert variance > 4  # eight dimensions whose deviation the hinge wants at one


def test_with_the_variance_alone_every_dimension_is_the_same_one():
    """The covariance term keeps dimensions apart: without it, and with one to choose, they agree."""
    readings, variance = collapse(VICRegLoss(invariance=25.0, covariance=0.0), dimensional_below=0.9)
    assert readings[-1] == 1
    assert variance > 4
