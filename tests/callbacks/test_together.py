"""All callbacks at once: they get along, and together change no more than each alone."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_sym import callbacks
from lightning_sym.observe import LogSpaced
from tests.models import Classifier, Witness, convnet, images, trainer

EVERY = [kind for kind in vars(callbacks).values() if isinstance(kind, type) and issubclass(kind, Callback)]


def everything():
    shared = {"every_n_steps": LogSpaced(3), "strict": True}
    return [
        *callbacks.monitors("full", targets=1, **shared),
        callbacks.CollapseMonitor(causes=True, histograms=True, layers="net.*", **shared),
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
