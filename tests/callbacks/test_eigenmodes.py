"""EigenmodeMonitor: what it records, what it leaves alone, ranks, resumption, theory."""

import json
import math
import signal
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import EigenmodeMonitor
from lightning_sym.engine.schedule import EpochEnds, Every, LogSpaced
from lightning_sym.functional.eigenmodes import cross_covariance_eigenvalues, mode_dates
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


def network(seed=0, dropout=0.3):
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout))
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
    module = network(dropout=0.0)
    fit(module, monitor, max_epochs=1)  # one step: read after it, on its batch
    readings = monitor.history[0]
    module.train()
    z = [module.embed(view)[1].detach() for view in pairs()]
    expected = cross_covariance_eigenvalues(z[0], z_b=z[1])
    torch.testing.assert_close(monitor.spectra[0]["embedding"], expected)
    covariance = monitor.spectra[0]["embedding_covariance"]
    assert readings["eigenmodes/embedding/variance"] == pytest.approx(float(covariance.sum()))
    torch.testing.assert_close(covariance.sum(), z[0].double().var(dim=0, correction=0).sum())
    h = module.embed(pairs()[0])[0].detach().double()
    share = h.var(dim=0, correction=0).sum() / h.square().mean(dim=0).sum()
    assert readings["eigenmodes/representation/variance_share"] == pytest.approx(share.item(), rel=1e-5)
    p = torch.linalg.svdvals(z[0].double() - z[0].double().mean(0))
    p = p / p.sum()
    assert readings["eigenmodes/embedding/rank"] == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-5)
    assert readings["eigenmodes/samples"] == 40


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
        (
            {"class_path": "lightning_sym.engine.schedule.LogSpaced", "init_args": {"per_decade": 4}},
            LogSpaced(4),
        ),
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
        ({"shrunk_below": -1}, r"shrunk_below must be in \[0, 1\], got -1"),
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
    with pytest.raises(
        TypeError, match=r"embed=backbone must return \(representation, embedding\).*got Tensor"
    ):
        fit(network(), EigenmodeMonitor(embed=backbone, every_n_steps=1, strict=True))
    with pytest.raises(ValueError, match="reads before the first batch: pass data"):
        fit(network(), EigenmodeMonitor(every_n_steps=EpochEnds(at_start=True)))


def backbone(module, x):
    return module.backbone(x)


class Scripted(Constant):
    """Embeds as told: the k-th number scales the embedding after k steps."""

    def __init__(self, scales, *, representation=None, noise=None):
        super().__init__(0)
        self.scales, self.representation, self.noise = scales, representation or [1.0] * len(scales), noise

    def embed(self, x):
        step = int(self.trainer.global_step)
        z = self.scales[step] * (x if self.noise is None else self.noise)
        return self.representation[step] * x, z


def collapses(module, layer="embedding", **options):
    monitor = EigenmodeMonitor(every_n_steps=1, picture=False, strict=True, **options)
    fit(module, monitor, max_epochs=len(module.scales) - 1)
    return [row[f"eigenmodes/{layer}/collapse"] for row in monitor.history]


def test_an_embedding_that_shrinks_to_nothing_is_a_complete_collapse():
    unit = pairs()[0].std().item()
    # A tenth of the deviation is a hundredth of the variance, against the start before any step.
    assert collapses(Scripted([1.0, 0.5, 0.11, 0.09, 1e-6, 0.5])) == [0, 0, 2, 2, 0]
    assert collapses(Scripted([1.0, 1e-3])) == [2]  # in one step
    assert collapses(Scripted([1.0, 0.09]), shrunk_below=1e-3) == [0]
    # Not: small from the start; coming down to the loss's scale; a loss that does not ask for a scale.
    assert collapses(Scripted([1e-6, 1e-6, 1e-5])) == [0, 0]
    assert collapses(Scripted([1e4 / unit, 10 / unit])) == [0]
    assert collapses(Scripted([1.0, 1e-3]), relative=True) == [0]


def test_the_representation_has_collapsed_only_if_it_shrank_itself():
    both = {"scales": [1.0, 1e-3], "representation": [1.0, 1e-3]}
    assert collapses(Scripted(**both), "representation") == [2]
    assert collapses(Scripted([1.0, 1e-3]), "representation") == [0]
    assert collapses(Scripted([1.0, 1.0], representation=[1.0, 1e-3]), "representation") == [0]


@pytest.mark.parametrize(("variance", "collapse"), [(0.0, 2), (25.0, 0)])
def test_vicreg_without_its_variance_term_collapses(variance, collapse):
    torch.manual_seed(0)
    module = JointEmbedding(
        VICRegLoss(variance=variance),
        nn.Linear(6, 8),
        **{"features": 8, "projector": (), "optimizer": "adam", "lr": 2e-2, "schedule": "constant"},
    )
    monitor = EigenmodeMonitor(every_n_steps=20, picture=False, strict=True)
    fit(module, monitor, max_epochs=100)
    assert monitor.history[0]["eigenmodes/embedding/collapse"] == 0
    assert monitor.history[-1]["eigenmodes/embedding/collapse"] == collapse


def test_as_many_directions_as_samples_can_show_are_no_collapse():
    """Five orthogonal samples: centred, they have four equal directions, and four is all there could be."""
    module = Scripted([1.0, 1.0], noise=torch.eye(5))
    monitor = EigenmodeMonitor(every_n_steps=1, dimensional_below=0.9, picture=False, strict=True)
    fit(module, monitor, views=pairs(5), max_epochs=1)
    assert monitor.history[0]["eigenmodes/embedding/rank"] == pytest.approx(4)
    assert monitor.history[0]["eigenmodes/embedding/collapse"] == 0


def test_one_reading_of_nan_spoils_no_other():
    growing = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 3.2]
    broken = [*growing[:3], math.nan, *growing[4:]]
    for relative in (False, True):
        options = {"level": 0.1 if relative else 0.5, "relative": relative, "picture": False, "strict": True}
        monitor = EigenmodeMonitor(every_n_steps=1, **options)
        fit(Scripted(broken), monitor, max_epochs=6)
        bad = {key: value for key, value in monitor.history[2].items() if "/embedding/" in key}
        assert len(bad) == 6
        assert all(math.isnan(value) for value in bad.values()), bad
        whole = EigenmodeMonitor(every_n_steps=1, **options)
        fit(Scripted(growing), whole, max_epochs=6)
        for row, expected in zip(monitor.history[3:], whole.history[3:], strict=True):
            same = {key: value for key, value in row.items() if "date" not in key and "step_l" not in key}
            assert same == {key: expected[key] for key in same}
            assert math.isfinite(row["eigenmodes/embedding/step_likeness"])
        assert monitor.history[-1]["eigenmodes/embedding/learned"] > 0
        fine = [k for k in range(6) if k != 2]
        expected = mode_dates(
            whole.steps[fine], eigenvalues=whole.eigenvalues[fine], level=monitor._level(whole.eigenvalues)
        )
        assert torch.equal(monitor.dates(), expected)
        assert monitor.figure().axes


def test_a_module_of_nan_reads_nan_and_the_fit_goes_on():
    monitor = EigenmodeMonitor(every_n_steps=1, strict=True)
    fit(Scripted([math.nan] * 4), monitor)
    assert math.isnan(monitor.history[-1]["eigenmodes/embedding/collapse"])
    assert monitor.dates().tolist() == [math.inf] * 6
    assert monitor.figure().axes


def test_a_second_run_begins_anew():
    used, fresh = (EigenmodeMonitor(every_n_steps=1, strict=True, level=0.1) for _ in "ab")
    fit(linear(scale=0.5, d=5), used, views=pairs(dtype=torch.float64), max_epochs=7)
    fit(linear(scale=0.1), used, views=pairs(dtype=torch.float64))
    fit(linear(scale=0.1), fresh, views=pairs(dtype=torch.float64))
    assert [row["fit"] for row in used.history] == [1] * 7 + [2] * 3
    assert [{**row, "fit": 1} for row in used.history[7:]] == fresh.history
    assert torch.equal(used.eigenvalues, fresh.eigenvalues)


def test_few_samples_in_a_last_batch_change_no_number_of_modes():
    monitor = EigenmodeMonitor(every_n_steps=1, samples=None, picture=False, strict=True)
    wide = Scripted([1.0] * 3)
    wide.embed = lambda x: (x, x.repeat(1, 2))
    fit(wide, monitor, views=pairs(6), batch_size=4, max_epochs=1)
    assert [row["eigenmodes/samples"] for row in monitor.history] == [4, 2]
    assert monitor.eigenvalues.shape == (2, 12)
    small = [(view[4:] - view[4:].mean(0)).double().repeat(1, 2) for view in pairs(6)]
    c = small[0].T @ small[1] / 2
    torch.testing.assert_close(monitor.eigenvalues[1], torch.linalg.eigvalsh((c + c.T) / 2).flip(0))


def test_views_are_found_in_any_batch():
    class Named(Pairs):
        def __getitem__(self, index):
            return {"views": super().__getitem__(index)[0]}

    class Inside(Pairs):
        def __getitem__(self, index):
            return 0, {"both": [{"x": view} for view in super().__getitem__(index)[0]]}

    rows = []
    for dataset, inputs in ((Pairs, None), (Named, None), (Inside, lambda batch: batch[1]["both"])):
        monitor = EigenmodeMonitor(every_n_steps=1, inputs=inputs, picture=False, strict=True)
        fit(Constant(6), monitor, dataset=dataset(pairs()), max_epochs=1)
        rows.append(monitor.history)
    assert rows[0] == rows[1] == rows[2]


class Watched(Constant):
    """Counts its calls, keeps a metric and what it has captured of itself."""

    def __init__(self):
        super().__init__(3)
        self.net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.calls, self.fired, self.seen = 0, 0, []
        self.again = lambda x: self.net(x)
        self.net.register_forward_hook(self.count)

    def count(self, *_):
        self.fired += 1

    def embed(self, x):
        self.calls += 1
        self.seen.append(len(x))
        self.log("calls", float(self.calls))
        return x, self.again(x)

    def training_step(self, batch, batch_idx):
        a, b = (self.embed(view)[1] for view in batch[0])
        return (a - b).square().mean() + self.weight.sum()


def test_nothing_of_the_module_notices_it():
    runs = []
    for callbacks in ([], [EigenmodeMonitor(every_n_steps=1, strict=True)]):
        torch.manual_seed(0)
        module = Watched()
        trainer = fit(module, *callbacks, batch_size=20)
        state = [t.clone() for t in module.state_dict().values()]
        metrics = {key: float(v) for key, v in trainer.callback_metrics.items() if key == "calls"}
        gradients = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
        counts = (module.calls, module.fired, module.seen, metrics, module.training)
        runs.append((counts, [*state, *gradients, torch.get_rng_state()]))
    assert runs[0][0] == runs[1][0]
    assert runs[0][0][0] == 12
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


class PerRank(Callback):
    """Writes down what every rank has."""

    def __init__(self, folder, monitor):
        self.folder, self.monitor = folder, monitor

    def on_train_end(self, trainer, pl_module):
        file = self.folder / f"{trainer.world_size}-{trainer.global_rank}.json"
        file.write_text(json.dumps([self.monitor.history, trainer.global_step]))


def test_ranks_with_batches_of_other_sizes_read_what_one_reads(tmp_path):
    views = pairs(11, dtype=torch.float64)

    class Uneven(Pairs):
        """Three samples on the first rank and eight on the second, or all of them."""

        def _mine(self):
            ranks = torch.distributed.is_initialized() and torch.distributed.get_world_size() == 2
            return (slice(0, 3), slice(3, 11))[torch.distributed.get_rank()] if ranks else slice(None)

        def __len__(self):
            return len(self.views[0][self._mine()])

        def __getitem__(self, index):
            return [view[self._mine()][index] for view in self.views], 0

    for ranks in (1, 2):
        monitor = EigenmodeMonitor(every_n_steps=1, picture=False, strict=True)
        options = (
            {} if ranks == 1 else {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
        )
        options |= {"dataset": Uneven(views), "max_epochs": 1, "batch_size": 11}
        fit(linear(scale=0.1, lr=1e-15), monitor, PerRank(tmp_path, monitor), **options)
    one, a, b = (
        json.loads((tmp_path / name).read_text())[0] for name in ("1-0.json", "2-0.json", "2-1.json")
    )
    assert a == b
    assert a[0]["eigenmodes/samples"] == 11
    assert a[0] == pytest.approx(one[0], rel=1e-6)


@pytest.mark.parametrize("fault", ["raises", "is of another width"])
def test_a_fault_on_one_rank_is_a_warning_and_hangs_nobody(tmp_path, fault):
    class Faulty(Constant):
        def embed(self, x):
            if self.global_rank == 1 and fault == "raises":
                raise RuntimeError("no embedding today")
            return x, x.repeat(1, 1 + self.global_rank)

    class Words(PerRank):
        def on_fit_start(self, trainer, pl_module):
            signal.alarm(60)  # ends this rank if it hangs

        def on_train_end(self, trainer, pl_module):
            super().on_train_end(trainer, pl_module)
            (self.folder / f"words-{trainer.global_rank}").write_text(
                " ".join(str(w.message) for w in caught)
            )

    monitor = EigenmodeMonitor(every_n_steps=1, picture=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Faulty(3), Words(tmp_path, monitor), monitor, batch_size=10, devices=2, strategy="ddp_fork")
    for rank in (0, 1):
        history, steps = json.loads((tmp_path / f"2-{rank}.json").read_text())
        assert (history, steps) == ([], 6)
    said = (tmp_path / "words-0").read_text()
    assert ("on rank 1: RuntimeError: no embedding today" if fault == "raises" else "on all ranks") in said


def test_a_reading_that_fails_leaves_nothing_behind():
    class Broken:
        def eigenvalues(self, steps):
            raise RuntimeError("no theory today")

    monitor = EigenmodeMonitor(every_n_steps=1, theory=Broken(), picture=False)
    with pytest.warns(UserWarning, match="no theory today"):
        fit(network(), monitor)
    assert monitor.spectra == monitor.history == []


def test_a_resumed_run_goes_on_with_the_theory_of_its_start(tmp_path):
    views = pairs(dtype=torch.float64)

    def theory(module):
        return Staircase.from_pairs(views[0], x_other=views[1], weight=module.backbone.weight, lr=1e-2)

    def monitor(theory):
        return EigenmodeMonitor(every_n_steps=1, theory=theory, strict=True)

    whole, first, second = (monitor(theory) for _ in range(3))
    fit(linear(scale=0.1), whole, views=views, max_epochs=6)
    trainer = fit(linear(scale=0.1), first, views=views)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    options = {"views": views, "max_epochs": 6, "ckpt_path": tmp_path / "c.ckpt"}
    fit(linear(scale=0.1), second, **options)
    assert second.history == whole.history
    bare = monitor(None)
    fit(linear(scale=0.1), bare, views=views).save_checkpoint(tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match="theory is made from the module as training starts"):
        fit(linear(scale=0.1), monitor(theory), **options)
