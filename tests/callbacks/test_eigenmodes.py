"""EigenmodeMonitor: what it records, what it leaves alone, ranks, resumption, theory."""

import json
import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_sym.observe.schedule import Every, LogSpaced
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks.eigenmodes import EigenmodeMonitor
from lightning_sym.functional.eigenmodes import cross_covariance_eigenvalues
from lightning_sym.losses import CrossCovarianceLoss, VICRegLoss
from lightning_sym.modules import JointEmbedding
from lightning_sym.papers.stepwise_ssl import Staircase

SCALE = torch.tensor([1.0, 0.75, 0.55, 0.35, 0.2, 0.1])


def pairs(n=40, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(n, 6, generator=generator) * SCALE
    return [(signal + 0.1 * torch.randn(n, 6, generator=generator)).to(dtype) for _ in range(2)]


class Pairs(torch.utils.data.Dataset):
    def __init__(self, views):
        self.views = views

    def __len__(self):
        return len(self.views[0])

    def __getitem__(self, index):
        return [view[index] for view in self.views], 0


def linear(scale=1e-6, d=3, lr=1e-2, dtype=torch.float64):
    backbone = nn.Linear(6, d, bias=False, dtype=dtype)
    with torch.no_grad():
        backbone.weight.copy_(scale * torch.randn(d, 6, generator=torch.Generator().manual_seed(1)))
    options = {"features": d, "projector": (), "optimizer": "sgd", "lr": lr, "schedule": "constant"}
    return JointEmbedding(CrossCovarianceLoss(), backbone, weight_decay=0.0, **options)


def network(seed=0):
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
    return JointEmbedding(VICRegLoss(), backbone, features=8, projector=(8, 4), optimizer="adam", lr=1e-2)


def fit(module, *callbacks, views=None, batch_size=40, dataset=None, ckpt_path=None, **options):
    trainer = Trainer(
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"max_epochs": 3, "logger": False, **options},
    )
    trainer.fit(module, DataLoader(dataset or Pairs(views or pairs()), batch_size), ckpt_path=ckpt_path)
    return trainer


def test_a_linear_run_is_dated_as_theory_says():
    views = pairs(dtype=torch.float64)

    def theory(module):
        return Staircase.from_pairs(views[0], x_other=views[1], weight=module.backbone.weight, lr=1e-2)

    monitor = EigenmodeMonitor(every_n_steps=20, center=False, theory=theory, strict=True)
    fit(linear(), monitor, views=views, max_epochs=2000)
    predicted = monitor._predicted.dates()
    assert monitor.dates().tolist() == pytest.approx(predicted.tolist(), rel=0.05)
    last = monitor.history[-1]
    assert last["eigenmodes/embedding/learned"] == 3
    assert last["eigenmodes/embedding/step_likeness"] > 0.9
    assert max(row["eigenmodes/embedding/theory_error"] for row in monitor.history) < 0.1
    assert last["eigenmodes/embedding/theory_error"] < 0.01
    dated = [
        row[f"eigenmodes/embedding/date/{j}"]
        for j in (1, 2, 3)
        for row in monitor.history
        if f"eigenmodes/embedding/date/{j}" in row
    ]
    assert dated == pytest.approx(monitor.dates().tolist())
    figure = monitor.figure()
    assert len(figure.axes[0].lines) == 3 + 3 + 3  # measured, predicted, dates


def test_the_spectrum_is_that_of_the_modules_embeddings():
    monitor = EigenmodeMonitor(every_n_steps=1, strict=True)
    module = network()
    fit(module, monitor, max_epochs=1)
    module.train()
    module.backbone[3].eval()  # dropout: compare without
    again = EigenmodeMonitor(every_n_steps=1, strict=True)
    trainer = type("T", (), {"world_size": 1, "global_rank": 0, "global_step": 7})()
    trainer.precision_plugin = Trainer(accelerator="cpu", logger=False, barebones=True).precision_plugin
    module.backbone[3].p = 0.0
    readings = {r.key: r for r in again.measure(trainer, module, (pairs(), None))}
    module.train()
    z = [module.embed(view)[1].detach() for view in pairs()]
    expected = cross_covariance_eigenvalues(z[0], z_b=z[1])
    torch.testing.assert_close(again.spectra[0]["embedding"], expected)
    h = module.embed(pairs()[0])[0].detach().double()
    share = h.var(dim=0, correction=0).sum() / h.square().mean(dim=0).sum()
    assert readings["eigenmodes/representation/variance_share"].scalar == pytest.approx(
        share.item(), rel=1e-5
    )
    p = torch.linalg.svdvals(z[0].double() - z[0].double().mean(0))
    p = p / p.sum()
    assert readings["eigenmodes/embedding/rank"].scalar == pytest.approx(
        math.exp(-(p * p.log()).sum()), rel=1e-5
    )
    assert readings["eigenmodes/samples"].scalar == 40


def test_a_run_with_the_monitor_is_bitwise_the_run_without():
    states = []
    for callbacks in ([], [EigenmodeMonitor(every_n_steps=1, strict=True)]):
        module = network()
        fit(module, *callbacks, batch_size=20)
        states.append(([*module.state_dict().values()], torch.get_rng_state()))
    assert torch.equal(states[0][1], states[1][1])
    assert all(torch.equal(a, b) for a, b in zip(states[0][0], states[1][0], strict=True))


class Constant(LightningModule):
    def __init__(self, rank):
        super().__init__()
        self.rank, self.weight = rank, nn.Parameter(torch.zeros(1))

    def embed(self, x):
        z = torch.zeros(len(x), 20)
        z[:, : self.rank] = x[:, : self.rank]
        return x, z + 5.0

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("rank", "collapse"), [(0, 2), (1, 1), (6, 0)])
def test_collapse_is_known(rank, collapse):
    monitor = EigenmodeMonitor(every_n_steps=1, strict=True)
    fit(Constant(rank), monitor, max_epochs=1)
    row = monitor.history[0]
    assert row["eigenmodes/embedding/collapse"] == collapse
    assert row["eigenmodes/representation/collapse"] == 0
    if rank < 2:
        assert row["eigenmodes/embedding/rank"] == pytest.approx(rank)  # rank one reads one


def test_fixed_data_and_a_relative_level():
    data = tuple(pairs(seed=3))
    monitor = EigenmodeMonitor(every_n_steps=1, data=data, samples=16, relative=True, level=0.01, strict=True)
    fit(network(), monitor)
    assert all(row["eigenmodes/samples"] == 16 for row in monitor.history)
    level = 0.01 * monitor.eigenvalues.max()
    assert monitor.history[-1]["eigenmodes/embedding/learned"] == (monitor.eigenvalues[-1] >= level).sum()
    assert monitor.dates(own=True)[0] <= monitor.steps[-1]


def test_pictures_reach_tensorboard(tmp_path):
    monitor = EigenmodeMonitor(every_n_steps=1, strict=True)
    fit(network(), monitor, logger=TensorBoardLogger(tmp_path), max_epochs=1)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(tmp_path.rglob("events*"))), size_guidance={"images": 0})
    events.Reload()
    assert "eigenmodes/staircase" in events.Tags()["images"]
    assert "eigenmodes/embedding/rank" in events.Tags()["scalars"]


def test_resuming_goes_on_with_the_staircase(tmp_path):
    whole, module = EigenmodeMonitor(every_n_steps=1, strict=True), linear(scale=0.1)
    fit(module, whole, views=pairs(dtype=torch.float64), max_epochs=6)
    first = EigenmodeMonitor(every_n_steps=1, strict=True)
    trainer = fit(linear(scale=0.1), first, views=pairs(dtype=torch.float64), max_epochs=3)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    second = EigenmodeMonitor(every_n_steps=1, strict=True)
    fit(
        linear(scale=0.1),
        second,
        views=pairs(dtype=torch.float64),
        max_epochs=6,
        ckpt_path=tmp_path / "c.ckpt",
    )
    assert second.history == whole.history
    assert torch.equal(second.eigenvalues, whole.eigenvalues)


def test_two_ranks_read_what_one_reads(tmp_path):
    data = tuple(view.double() for view in pairs(n=41, seed=3))

    class Dump(EigenmodeMonitor):
        def on_train_end(self, trainer, pl_module):
            file = tmp_path / f"{trainer.world_size}-{trainer.global_rank}.json"
            file.write_text(json.dumps([self.history, self.eigenvalues.tolist()]))

    module = linear(scale=0.1, lr=1e-12)
    options = {"views": pairs(dtype=torch.float64), "max_epochs": 2, "batch_size": 20}
    fit(module, Dump(every_n_steps=1, data=data, strict=True), **options, limit_train_batches=1)
    fit(
        linear(scale=0.1, lr=1e-12),
        Dump(every_n_steps=1, data=data, strict=True),
        **options,
        limit_train_batches=1,
        devices=2,
        strategy="ddp_fork",
    )
    one, a, b = (json.loads((tmp_path / name).read_text()) for name in ("1-0.json", "2-0.json", "2-1.json"))
    assert a == b
    assert len(a[0]) == len(one[0]) == 2
    for row, expected in zip(a[0], one[0], strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("value", "schedule"),
    [
        (None, LogSpaced(12)),
        (5, Every(5)),
        ({"per_decade": 3}, LogSpaced(3)),
        ({"class_path": "lightning_sym.observe.LogSpaced", "init_args": {"per_decade": 4}}, LogSpaced(4)),
    ],
)
def test_it_is_built_from_plain_values(value, schedule):
    """What LightningCLI does with YAML, the default schedule, an object, included."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(EigenmodeMonitor, "monitor")
    config = {"strict": True} if value is None else {"every_n_steps": value}
    assert parser.instantiate(parser.parse_object({"monitor": config})).monitor.schedule == schedule


def test_bad_input_is_named():
    for options, message in (
        ({"samples": 1}, "samples must be at least 2, got 1"),
        ({"modes": 0}, "modes must be at least 1, got 0"),
        ({"level": 0}, "level must be positive, got 0"),
        ({"complete_below": 2}, r"complete_below must be in \[0, 1\], got 2"),
        ({"data": (torch.ones(3, 1), torch.ones(2, 1))}, r"data must be two views .* got \[3, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            EigenmodeMonitor(**options)
    with pytest.raises(TypeError, match="embed='features' is not a method of JointEmbedding"):
        fit(network(), EigenmodeMonitor(embed="features"))
    strict = EigenmodeMonitor(every_n_steps=1, strict=True)
    with pytest.raises(ValueError, match="at least 2 views in a list; or pass data"):
        fit(Constant(1), strict, dataset=TensorDataset(torch.ones(4, 6), torch.ones(4)))
