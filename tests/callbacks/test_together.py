"""All callbacks: built from plain values, and all at once on ranks that are forked."""

from __future__ import annotations

import os
import warnings

import pytest
from lightning.pytorch import Callback

from lightning_sym import callbacks
from lightning_sym.engine import lightning as driver
from tests.models import Classifier, convnet, images, trainer

EVERY = [kind for kind in vars(callbacks).values() if isinstance(kind, type) and issubclass(kind, Callback)]
ABSTRACT = (callbacks.Monitor, callbacks.RepresentationProbe, callbacks.Monitors)


@pytest.mark.parametrize("kind", [kind for kind in EVERY if kind not in ABSTRACT], ids=lambda k: k.__name__)
def test_every_callback_is_built_from_plain_values(kind):
    """LightningCLI's parser can build it from its defaults, and print help."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "callback")
    built = parser.instantiate(parser.parse_args([])).callback
    assert type(built) is kind
    assert "default" in parser.format_help()


def test_forked_processes_end_whatever_the_number_of_readings(tmp_path, monkeypatch):
    """Lightning's launcher waits for them before it reads the pipe that they fill."""
    monkeypatch.setattr(driver, "RETURNABLE", 12_000)  # the same, without a thousand layers

    class Keys(Callback):
        def on_train_end(self, trainer, pl_module):
            held = driver._stored_size(trainer.callback_metrics)
            (tmp_path / f"{trainer.global_rank}.txt").write_text(str(held))

    watching = callbacks.monitors("standard", every_n_steps=2, strict=True)
    run = trainer(callbacks=[*watching, Keys()], devices=2, strategy="ddp_fork", max_steps=2)
    run.fit(Classifier(convnet()), images())
    assert int((tmp_path / "0.txt").read_text()) > 2 * driver.RETURNABLE
    assert driver._stored_size(run.callback_metrics) <= driver.RETURNABLE
    assert {"collapse/score", "alignment/mean", "plasticity/dormant_units"} <= set(run.callback_metrics)
    alone = trainer(callbacks=callbacks.monitors("standard", every_n_steps=2, strict=True), max_steps=2)
    alone.fit(Classifier(convnet()), images())
    assert "collapse/net.0/effective_rank" in alone.callback_metrics  # nothing is returned to a parent here


def test_ready_monitors_join_lists():
    watch, others = callbacks.monitors(), [Callback()]
    assert others + watch == [*others, *watch]
    assert watch + others == [*watch, *others]
    assert len(watch) == 5  # not one more


def test_a_module_that_cannot_be_copied_is_told_of_once_for_all_monitors():
    """Whoever runs the module outside of its step is named, with what is off, and the others read on."""

    class Holds(Classifier):
        def __init__(self, net, file):
            super().__init__(net)
            self.file = file

        def forward(self, x):
            self.file.write("")
            return super().forward(x)

    running = [
        callbacks.SharpnessMonitor(every_n_steps=1),
        callbacks.FeatureLearningMonitor(every_n_steps=1),
        callbacks.PlasticityMonitor(every_n_steps=1, trainability_steps=2),
    ]
    collapse = callbacks.CollapseMonitor(every_n_steps=1)
    with open(os.devnull, "w") as file, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(callbacks=[*running, collapse], max_epochs=1)
        run.fit(Holds(convnet(), file), images())
    said = [text for each in caught if "TextIOWrapper" in (text := str(each.message))]
    assert len(said) == 1
    assert "SharpnessMonitor, FeatureLearningMonitor, PlasticityMonitor (trainability)" in said[0]
    assert "CollapseMonitor" not in said[0]
    assert len(collapse.history) == len(running[2].history) == run.global_step
    assert all(set(row) == {"step", "fit"} for each in running[:2] for row in each.history)
