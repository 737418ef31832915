"""All callbacks at once: they get along, and together change no more than each alone."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_sym import callbacks
from lightning_sym.engine import lightning as driving
from lightning_sym.engine.schedule import LogSpaced
from tests.models import Classifier, Witness, convnet, images, trainer

EVERY = [
    kind
    for kind in vars(callbacks).values()
    if isinstance(kind, type) and issubclass(kind, Callback) and kind is not callbacks.Monitors
]


def everything():
    shared = {"every_n_steps": LogSpaced(3), "strict": True}
    return [
        *callbacks.monitors("full", targets=1, **shared),
        callbacks.CollapseMonitor(causes=True, histograms=True, layers="net.*", name="causes", **shared),
        callbacks.BalanceMonitor(details=True, **shared),
        callbacks.SharpnessMonitor(per_layer=True, vectors=2, lanczos_steps=3, **shared),
        callbacks.FeatureLearningMonitor(samples=4, **shared),
        callbacks.HierarchyMonitor(histograms=True, **shared),
        callbacks.CircuitMonitor(**shared),
    ]


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [(torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-3}), (torch.optim.AdamW, {"lr": 1e-2})],
)
def test_a_run_with_everything_is_bitwise_the_run_without(optimizer, settings, tmp_path):
    runs = []
    for watching in ([], everything()):
        torch.manual_seed(0)
        witness = Witness()
        logger = TensorBoardLogger(tmp_path) if watching else False
        run = trainer(max_epochs=2, callbacks=[*watching, witness], logger=logger)
        run.fit(Classifier(convnet(), optimizer=optimizer, **settings), images(shuffle=True), images(seed=1))
        assert all(each.history for each in watching)
        runs.append(witness.seen)
    assert len(runs[0]) == len(runs[1]) == 8
    for bare, watched in zip(*runs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(bare, watched, strict=True))
    quantities = {key.partition("/")[0] for each in everything() for key in [each.quantity]}
    assert quantities <= {key.partition("/")[0] for key in run.callback_metrics}


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_every_callback_is_built_from_plain_values(kind):
    """LightningCLI's parser can build it from its defaults, and print help."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "callback")
    built = parser.instantiate(parser.parse_args([])).callback
    assert type(built) is kind
    assert "default" in parser.format_help()


def readings(callbacks_, **settings):
    """What the first of some callbacks read in a short run."""
    torch.manual_seed(0)
    run = trainer(callbacks=callbacks_, **settings)
    run.fit(Classifier(convnet()), images(), images(seed=1))
    return next(each for each in callbacks_ if type(each) is callbacks.CollapseMonitor).history


def test_passes_of_other_callbacks_are_not_taken_for_the_steps():
    def watch():
        return callbacks.CollapseMonitor(every_n_steps=1, strict=True)

    def forwards():
        return callbacks.FeatureLearningMonitor(samples=4, every_n_steps=1, strict=True)

    alone = readings([watch()])
    assert readings([watch(), forwards()]) == alone
    assert readings([forwards(), watch()]) == alone


def test_validation_within_an_accumulated_step_is_not_the_step():
    def first_step(**settings):
        early = ["net.0", "net.3"]  # before the dropout, whose draws validation's loader shifts
        watch = callbacks.CollapseMonitor(every_n_steps=1, layers=early, strict=True)
        return readings([watch], accumulate_grad_batches=2, max_steps=1, **settings)

    assert first_step(val_check_interval=1) == first_step(limit_val_batches=0)


def test_forked_processes_end_whatever_the_number_of_readings(tmp_path, monkeypatch):
    """Lightning's launcher waits for them before it reads the pipe that they fill."""
    monkeypatch.setattr(driving, "RETURNABLE", 12_000)  # the same, without a thousand layers

    class Keys(Callback):
        def on_train_end(self, trainer, pl_module):
            held = driving._stored_size(trainer.callback_metrics)
            (tmp_path / f"{trainer.global_rank}.txt").write_text(str(held))

    watching = callbacks.monitors("standard", every_n_steps=2, strict=True)
    run = trainer(callbacks=[*watching, Keys()], devices=2, strategy="ddp_fork", max_steps=2)
    run.fit(Classifier(convnet()), images())
    assert int((tmp_path / "0.txt").read_text()) > 2 * driving.RETURNABLE
    assert driving._stored_size(run.callback_metrics) <= driving.RETURNABLE
    assert {"collapse/score", "alignment/mean", "plasticity/dormant_units"} <= set(run.callback_metrics)
    alone = trainer(callbacks=callbacks.monitors("standard", every_n_steps=2, strict=True), max_steps=2)
    alone.fit(Classifier(convnet()), images())
    assert "collapse/net.0/effective_rank" in alone.callback_metrics  # nothing is returned here


def test_two_ranks_read_the_same_though_their_running_statistics_differ(tmp_path):
    class Keep(Callback):
        def on_train_end(self, trainer, pl_module):
            read = {key: float(value) for key, value in trainer.callback_metrics.items() if "/" in key}
            statistics = pl_module.net[1].running_mean.tolist()
            torch.save({"read": read, "own": statistics}, tmp_path / f"{trainer.global_rank}.pt")

    run = trainer(callbacks=[*everything(), Keep()], devices=2, strategy="ddp_fork", max_steps=3)
    run.fit(Classifier(convnet()), images(48))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["own"] != second["own"]
    assert first["read"].keys() == second["read"].keys()
    apart = {key for key, value in first["read"].items() if value != second["read"][key] and value == value}
    assert not apart
