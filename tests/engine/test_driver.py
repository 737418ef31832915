"""A Trainer's own callbacks: what drives monitors is among them during a fit, and at no other time."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import monitors
from lightning_sym.engine.lightning import driver_of
from tests.models import Classifier, data, fit, mlp, trainer


def loader() -> DataLoader:
    return DataLoader(TensorDataset(*data()), 8)


def watched(how: str) -> Any:
    found = monitors("light", every_n_steps=1, strict=True)
    return [*found] if how == "each" else [found]


@pytest.mark.parametrize("how", ["each", "as one"])
def test_a_trainer_has_the_callbacks_it_had(how):
    class Raises(Callback):
        raises = False

        def on_train_batch_end(self, *args):
            if self.raises:
                raise KeyError("mine")

    breaks = Raises()
    run = trainer(callbacks=[*watched(how), breaks])
    before = list(run.callbacks)
    module = Classifier(mlp(4, 6, 3))
    for breaks.raises in (False, True, False):
        if breaks.raises:
            with pytest.raises(KeyError, match="mine"):
                run.fit(module, loader())
        else:
            run.fit(module, loader())
        assert run.callbacks == before
        assert driver_of(run).probes > 0
        run.validate(module, loader(), verbose=False)
        assert run.callbacks == before
        run.fit_loop.max_epochs += 1
    assert {row["fit"] for each in before[0:1] for row in (each if how == "each" else each[0]).history} == {1}


@pytest.mark.parametrize("how", ["each", "as one"])
def test_a_checkpoint_stored_after_the_fit_has_what_one_stored_within_it_has(how, tmp_path):
    keep = ModelCheckpoint(tmp_path / "within", save_top_k=1)
    run = trainer(callbacks=[*watched(how), keep], enable_checkpointing=True)
    run.fit(Classifier(mlp(4, 6, 3)), loader())
    run.save_checkpoint(tmp_path / "after.ckpt")
    within, after = (torch.load(path) for path in (keep.best_model_path, tmp_path / "after.ckpt"))
    assert within["callbacks"].keys() == after["callbacks"].keys()
    kept = [
        {key: state for key, state in each["callbacks"].items() if not key.startswith("ModelCheckpoint")}
        for each in (within, after)
    ]
    assert len(kept[0]) == len(monitors("light"))
    assert repr(kept[0]) == repr(kept[1])


@pytest.mark.parametrize("kind", [Mock, MagicMock])
def test_mocks_among_the_callbacks_are_none_of_ours(kind):
    mock = kind()
    mock.state_dict.return_value = {}
    run = fit(Classifier(mlp(4, 6, 3)), mock, *watched("as one"), mock)
    assert driver_of(run).probes > 0
    assert mock.on_train_batch_end.call_count == 2 * run.global_step
    assert not mock.read.called
