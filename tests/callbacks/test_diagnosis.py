"""Findings while training goes on: told once, after the others, in any loop; and the fit ends where asked."""

import logging
import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import Diagnosis, PlasticityMonitor, SignalMonitor, monitors
from lightning_sym.diagnosis import diagnose_run
from lightning_sym.engine.loop import watch

QUIET = {
    "accelerator": "cpu",
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def network(*, dead):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    if dead:
        net[2].bias.data.fill_(-20.0)
    return net


class Net(LightningModule):
    def __init__(self, *, dead):
        super().__init__()
        self.net = network(dead=dead)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 4, generator=generator)
    return x, x[:, :3].argmax(1)


def fit(callbacks, *, dead=True, steps=12, **options):
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, callbacks=callbacks, **{"logger": False, **QUIET, **options}
    )
    trainer.fit(Net(dead=dead), DataLoader(TensorDataset(*data()), 16))
    return trainer


class Board(Logger):
    name, version = "board", "0"

    def __init__(self):
        super().__init__()
        self.texts, self.figures = [], []

    @property
    def experiment(self):
        return self

    def add_text(self, key, value, step):
        self.texts.append((key, value, step))

    def add_figure(self, key, figure, step, close=True):
        self.figures.append((key, figure, step))

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, *args, **kwargs):
        pass


def test_findings_are_those_of_the_histories_and_told_once(caplog):
    watched, board = monitors("light", every_n_steps=2, strict=True), Board()
    with caplog.at_level(logging.INFO):
        fit([watched], logger=board)
    diagnosis = watched[-1]
    assert isinstance(diagnosis, Diagnosis)
    assert [row["findings/alarms"] for row in diagnosis.history] == [0, 1, 1, 1, 1, 1, 1]
    assert diagnosis.findings == diagnose_run([m.history for m in watched[:-1]])
    assert (diagnosis.findings[0].kind, diagnosis.findings[0].step) == ("dead_units", 1)
    texts = [(key, step) for key, value, step in board.texts if "dead_units" in value]
    assert texts == [("findings/text", 1)]  # the batch of the second reading
    assert {key for key, _, _ in board.figures} == {"_findings/overview"}  # the first group there
    told = [record.getMessage() for record in caplog.records if "dead_units" in record.getMessage()]
    assert len(told) == 2  # when it was found, and in the summary
    assert told[1].startswith("lightning_sym after 12 steps: 1 finding\n")


def test_it_reads_after_the_others_wherever_it_stands():
    diagnosis = Diagnosis(every_n_steps=1, strict=True)
    plasticity = PlasticityMonitor(every_n_steps=1, strict=True)
    fit([diagnosis, plasticity], steps=3)
    assert diagnosis.history[-1]["findings/alarms"] == 1.0  # the third reading is in


def test_a_healthy_fit_has_no_finding(caplog):
    watched = monitors("light", every_n_steps=2, strict=True)
    with caplog.at_level(logging.INFO):
        fit([watched], dead=False, steps=40)
    assert all(row["findings/alarms"] == row["findings/warnings"] == 0 for row in watched[-1].history)
    assert any("no finding" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(("stop_on", "steps"), [(["dead_units"], 2), (["divergence"], 12), ([], 12)])
def test_stop_on_ends_the_fit(stop_on, steps):
    trainer = fit(
        [
            SignalMonitor(every_n_steps=2),
            PlasticityMonitor(every_n_steps=2),
            Diagnosis(every_n_steps=2, stop_on=stop_on),
        ]
    )
    assert trainer.global_step == steps


def test_a_plain_loop_is_asked_to_stop():
    net, (x, y) = network(dead=True), data()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    watched = monitors("light", every_n_steps=2, strict=True)
    watched[-1].stop_on = ["dead_units"]
    with watch(net, optimizer, watched) as watching:
        for _ in range(1, 13):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            if watching.stop:
                break
    assert watched[0].history[-1]["step"] == 2
    assert [f.kind for f in watched[-1].findings if f.level == "alarm"] == ["dead_units"]


def test_a_second_run_is_judged_by_itself():
    watched = monitors("light", every_n_steps=2, strict=True)
    fit([*watched])
    fit([*watched], dead=False)
    assert watched[-1].findings == []
    assert [row["findings/alarms"] for row in watched[-1].history][-7:] == [0] * 7
    again = diagnose_run([m.history for m in watched])
    assert {f.message.split(":")[0] for f in again if f.level == "alarm"} == {"Fit 1 of 2"}


def test_resumed_equals_never_stopped(tmp_path):
    def made():
        return monitors("light", every_n_steps=2, strict=True)

    whole, first, second = made(), made(), made()
    fit([*whole])
    trainer = fit([*first], steps=6)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    resumed = Trainer(max_steps=12, max_epochs=-1, callbacks=[*second], logger=False, **QUIET)
    loader = DataLoader(TensorDataset(*data()), 16)
    resumed.fit(Net(dead=True), loader, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert second[-1].history == whole[-1].history
    assert second[-1].findings == whole[-1].findings
    assert second[-1].state == whole[-1].state


@pytest.mark.parametrize("stop_on", ["dead_units", ["dead"], [3]])
def test_unknown_kinds_are_refused(stop_on):
    with pytest.raises(ValueError, match="stop_on must be a list of kinds"):
        Diagnosis(stop_on=stop_on)


def test_the_score_is_of_the_worst_layer_and_of_what_its_input_carries():
    def score(*, dead, rank=4):
        x, y = data()
        x[:, rank:] = 0
        watched = monitors("light", every_n_steps=1, layers="*", strict=True)
        module = Net(dead=dead)
        Trainer(max_steps=1, callbacks=[watched], logger=False, **QUIET).fit(
            module, DataLoader(TensorDataset(x, y), 32)
        )
        return watched[0].history[-1]["collapse/score"]

    assert score(dead=True) == 1.0  # one layer of three, and no mean
    assert score(dead=False) < 0.5
    assert score(dead=False, rank=1) < 0.5  # one direction goes in, so one comes out of the first layer
    assert math.isfinite(score(dead=False, rank=0))
