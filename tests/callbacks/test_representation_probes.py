"""KNNProbe and LinearProbe: accuracies, ranks, silence, refusals."""

import json

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks.knn_probe import KNNProbe
from lightning_sym.callbacks.linear_probe import LinearProbe
from lightning_sym.functional.neighbours import linear_classifier, neighbour_vote


def blobs(n, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    centres = 1.5 * torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
    return centres[labels] + torch.randn(n, 6, generator=generator), labels


TRAIN, VAL = blobs(80, 1), blobs(37, 2)


def loader(data, batch_size=16, shuffle=False):
    return DataLoader(TensorDataset(*data), batch_size=batch_size, shuffle=shuffle)


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, *callbacks, datamodule=None, **options):
    trainer = Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"max_epochs": 2, "logger": False, "enable_checkpointing": False, **options},
    )
    if datamodule is None:
        trainer.fit(module, loader(TRAIN, shuffle=True))
    else:
        trainer.fit(module, datamodule=datamodule)
    return trainer


def probes(**options):
    how = {"train": loader(TRAIN), "val": loader(VAL), "strict": True, **options}
    return KNNProbe(k=5, **how), LinearProbe(l2=0.01, **how)


def test_accuracies_are_those_of_the_functions_on_the_features():
    knn, linear = probes()
    module = Net()
    fit(module, knn, linear)
    module.eval()
    x, y = module(TRAIN[0]).detach(), TRAIN[1]
    features = module(VAL[0]).detach()
    votes = neighbour_vote(features, bank=x, labels=y, classes=4, k=5)
    right = sum(int(vote.argmax()) == label for vote, label in zip(votes, VAL[1].tolist(), strict=True))
    assert knn.history[-1]["knn/accuracy"] == pytest.approx(right / 37)
    weight, bias = linear_classifier(x, labels=y, classes=4, l2=0.01)
    right = sum(
        int((weight @ z + bias).argmax()) == label for z, label in zip(features, VAL[1].tolist(), strict=True)
    )
    assert linear.history[-1]["linear/accuracy"] == pytest.approx(right / 37)
    assert linear.history[-1]["linear/train_accuracy"] > 0.5
    assert [row["step"] for row in knn.history] == [0, 5, 10]
    assert knn.history[0]["knn/accuracy"] > 0.25


def test_a_run_with_the_probes_is_bitwise_the_run_without():
    states = []
    for callbacks in ((), probes(train=loader(TRAIN, shuffle=True))):
        module = Net()
        fit(module, *callbacks)
        states.append([*module.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_limits_and_epochs():
    seen = []

    def represent(module, x):
        seen.append(len(x))
        return module(x)

    knn, _ = probes(max_train=20, max_val=16, every_n_epochs=2, at_start=False, represent=represent)
    fit(Net(), knn, max_epochs=4)
    assert len(knn.history) == 2
    assert seen == [16, 4, 16] * 2


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader(TRAIN)

    def probe_dataloaders(self):
        return loader(TRAIN), loader(VAL)


def test_the_datamodules_loaders_are_the_default_and_a_checkpoint_can_watch(tmp_path):
    knn = KNNProbe(strict=True)
    best = ModelCheckpoint(tmp_path, monitor="knn/accuracy", mode="max", save_on_train_epoch_end=True)
    fit(Net(), knn, best, datamodule=Data(), enable_checkpointing=True)
    assert best.best_model_score in [pytest.approx(row["knn/accuracy"]) for row in knn.history]


@pytest.mark.parametrize("batch_size", [7, 37])  # 37: the second rank has no validation batch
def test_two_ranks_read_what_one_reads(tmp_path, batch_size):
    def dump(cls):
        class Dump(cls):
            def on_train_end(self, trainer, pl_module):
                file = tmp_path / f"{self.quantity}-{trainer.world_size}-{trainer.global_rank}.json"
                file.write_text(json.dumps(self.history[0]))

        return Dump(train=loader(TRAIN), val=loader(VAL, batch_size), strict=True)

    fit(Net(), dump(KNNProbe), dump(LinearProbe), max_epochs=1)
    fit(Net(), dump(KNNProbe), dump(LinearProbe), max_epochs=1, devices=2, strategy="ddp_fork")
    for quantity in ("knn", "linear"):
        one, a, b = (
            json.loads((tmp_path / f"{quantity}-{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
        )
        assert a == b
        assert a == pytest.approx(one)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="every_n_epochs must be a positive integer, got 0"):
        KNNProbe(every_n_epochs=0)
    with pytest.raises(ValueError, match="k and temperature must be positive, got 0"):
        KNNProbe(k=0)
    with pytest.raises(ValueError, match="train and val must be given together"):
        KNNProbe(train=loader(TRAIN))
    with pytest.raises(ValueError, match="max_val must be at least 1, got 0"):
        LinearProbe(max_val=0)
    with pytest.raises(ValueError, match="l2 must be at least 0, got -1"):
        LinearProbe(l2=-1)
    with pytest.raises(ValueError, match="KNNProbe needs labelled images: pass train and val loaders"):
        fit(Net(), KNNProbe())
    with pytest.raises(TypeError, match="represent='features' is not a method of Net"):
        fit(Net(), probes(represent="features")[0])
