"""EarlyStopping counts readings, and ModelCheckpoint stores no weights under the score of others."""

import warnings
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import KNNProbe
from lightning_sym.callbacks.base import Monitor
from lightning_sym.engine.lightning import driver_of, reading_age
from lightning_sym.engine.schedule import EpochEnds
from lightning_sym.observe import Reading

BATCHES = 5


class Net(LightningModule):
    def __init__(self, lr=0.5):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.lr = nn.Linear(4, 3), lr
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Norm(Monitor):
    """Norm of the first weight as it is when the step has ended: what a checkpoint of it holds."""

    quantity = "norm"

    def read(self, seen):
        yield Reading("", "value", float(seen.run.module.net.weight.detach().double().norm()))


class Silent(Norm):
    def read(self, seen):
        raise RuntimeError("nothing to read")


def data(batches=BATCHES):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8 * batches, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)


def probe(*, every=1, **options):
    return Norm(every_n_steps=EpochEnds(every, at_start=True), **options)


def fit(*callbacks, validate=False, module=None, ckpt_path=None, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"max_epochs": 6, "enable_checkpointing": False, "num_sanity_val_steps": 0, **settings}
    if any(isinstance(each, ModelCheckpoint) for each in callbacks):
        settings["enable_checkpointing"] = True
    trainer = Trainer(accelerator="cpu", callbacks=list(callbacks), **quiet, **settings)
    module = Net() if module is None else module
    trainer.fit(module, data(), data(1) if validate else None, ckpt_path=ckpt_path)
    return trainer


def scores(keep):
    """Return the step, the score and the norm of the weights of each stored checkpoint."""
    found = []
    for path, score in keep.best_k_models.items():
        stored = torch.load(path, weights_only=True)
        norm = float(stored["state_dict"]["net.weight"].double().norm())
        found.append((stored["global_step"], float(score), norm))
    return sorted(found)


@pytest.mark.parametrize(("validate", "at_end"), [(False, None), (True, None), (True, False)])
@pytest.mark.parametrize("first", [False, True])
def test_patience_counts_readings(validate, at_end, first):
    stop = EarlyStopping("norm/value", mode="max", patience=2, check_on_train_epoch_end=at_end)
    watch = probe(every=3)
    callbacks = (stop, watch) if first else (watch, stop)
    trainer = fit(*callbacks, validate=validate, module=Net(lr=0.0), max_epochs=20)
    # The untrained value is the best; those after epochs 3 and 6 are no better.
    assert [row["step"] for row in watch.history] == [0, 3 * BATCHES, 6 * BATCHES]
    assert stop.wait_count == 2
    assert trainer.global_step == 6 * BATCHES


def test_a_metric_that_is_no_reading_is_looked_at_every_epoch():
    stop = EarlyStopping("loss", mode="min", patience=2, check_on_train_epoch_end=True)
    trainer = fit(probe(every=3), stop, module=Net(lr=0.0), max_epochs=20)
    assert trainer.global_step == 3 * BATCHES


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [15, 30]),
        ({"validate": True}, [15, 30]),
        ({"validate": True, "check_val_every_n_epoch": 3}, [15, 30]),
        ({"validate": True, "check_val_every_n_epoch": 2}, [30]),
    ],
)
def test_a_checkpoint_is_stored_with_the_score_of_its_weights(tmp_path, settings, steps):
    keep = ModelCheckpoint(tmp_path, monitor="norm/value", mode="max", save_top_k=-1, filename="{step}")
    fit(probe(every=3), keep, **settings)
    found = scores(keep)
    assert [step for step, *_ in found] == steps
    assert all(score == pytest.approx(norm, rel=1e-6) for _, score, norm in found)


@pytest.mark.parametrize(
    ("settings", "options", "steps"),
    [
        ({}, {}, [5, 10, 15]),
        ({"validate": True}, {}, [5, 10, 15]),
        ({"accumulate_grad_batches": 2}, {}, [3, 6, 9]),
        ({"validate": True, "val_check_interval": 2}, {}, [2, 4, 7, 9, 12, 14]),
        ({}, {"every_n_train_steps": 3}, [3, 6, 9, 12, 15]),
    ],
)
def test_a_step_after_which_a_checkpoint_is_stored_is_read(tmp_path, settings, options, steps):
    keep = ModelCheckpoint(
        tmp_path, monitor="norm/value", mode="max", save_top_k=-1, filename="{step}", **options
    )
    watch = Norm(every_n_steps=4)
    fit(watch, keep, max_epochs=3, **settings)
    found = scores(keep)
    assert [step for step, *_ in found] == steps
    assert all(score == pytest.approx(norm, rel=1e-6) for _, score, norm in found)
    last = steps[-1]
    assert {row["step"] for row in watch.history} == {1, *steps, *range(4, last + 1, 4)}


def test_a_checkpoint_that_finds_no_reading_of_its_step_says_so(tmp_path):
    keep = ModelCheckpoint(
        tmp_path, monitor="norm/value", mode="max", save_top_k=-1, train_time_interval=timedelta(0)
    )
    with pytest.warns(UserWarning, match=r"ModelCheckpoint\(monitor='norm/value'\) stored nothing at step 2"):
        fit(Norm(every_n_steps=4), keep, max_epochs=2)
    assert {step for step, *_ in scores(keep)} <= {1, 4, 5, 8, 10}


def test_the_last_checkpoint_of_a_resumed_run_waits_for_a_reading(tmp_path):
    always, again = (ModelCheckpoint(tmp_path / "always", save_top_k=k) for k in (1, 0))
    fit(probe(every=3), always, max_epochs=4)
    stop = EarlyStopping("norm/value", mode="max", patience=1)
    keep = ModelCheckpoint(tmp_path / "kept", monitor="norm/value", mode="max", save_top_k=-1)
    watch = probe(every=3)
    for validate in (False, True):
        fit(watch, stop, keep, again, validate=validate, ckpt_path=always.best_model_path, max_epochs=7)
    assert {step for step, *_ in scores(keep)} == {6 * BATCHES}


def test_a_key_that_is_not_read_is_still_missed(tmp_path):
    with pytest.raises(RuntimeError, match="metric `norm/vaule` which is not available"):
        fit(probe(), EarlyStopping("norm/vaule"))
    with pytest.raises(RuntimeError, match="metric `nrom/value` which is not available"):
        fit(probe(), EarlyStopping("nrom/value"))


def test_a_monitor_that_fails_does_not_end_the_fit_through_those_who_watch_it(tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="norm/value", save_last=True)
    with pytest.warns(UserWarning, match="Silent failed in read"):
        trainer = fit(Silent(every_n_steps=1), EarlyStopping("norm/value"), keep, validate=True, max_epochs=2)
    assert trainer.global_step == 2 * BATCHES


def test_callbacks_are_left_as_they_were(tmp_path):
    class Broken(Net):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 3:
                raise KeyError("broken")
            return super().training_step(batch, batch_idx)

    stop, keep = EarlyStopping("norm/value"), ModelCheckpoint(tmp_path, monitor="norm/value")
    fit(probe(), stop, keep, max_epochs=1)
    with pytest.raises(KeyError, match="broken"):
        fit(probe(), stop, keep, module=Broken())
    methods = {"_run_early_stopping_check", "_save_topk_checkpoint"}
    assert all(not methods & set(vars(each)) for each in (stop, keep))


def test_ages():
    trainer = fit(Norm(every_n_steps=4), probe(name="end", every=4))
    assert trainer.global_step == 30
    assert reading_age(trainer, "norm/value") == 2
    assert reading_age(trainer, "end/value") == 10
    assert reading_age(trainer, "loss") is None
    assert driver_of(trainer).taken == {"norm/value": 28, "end/value": 20}


@pytest.mark.parametrize("ranks", [1, 2])
def test_neighbours_by_every_third_epoch_on_ranks(tmp_path, ranks):
    knn = KNNProbe(train=data(), val=data(2), k=5, every_n_epochs=3, strict=True)
    keep = ModelCheckpoint(tmp_path, monitor="knn/accuracy", mode="max", save_top_k=-1, filename="{step}")
    stop = EarlyStopping("knn/accuracy", mode="max", patience=1)
    settings = {} if ranks == 1 else {"devices": 2, "strategy": "ddp_fork"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*use_distributed_sampler.*|.*does not have many workers.*")
        fit(knn, keep, stop, module=Net(lr=0.0), max_epochs=9, **settings)
    assert [path.name for path in tmp_path.iterdir()] == [f"step={3 * (-(-BATCHES // ranks))}.ckpt"]
