"""KNNProbe and LinearProbe: accuracies, ranks, silence, refusals."""

import json
import math
import signal
import warnings

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import KNNProbe, LinearProbe
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

    def pooled(self, x):
        return self.net(x).mean(dim=0)

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
    with pytest.raises(ValueError, match="KNNProbe needs labelled samples: pass train and val loaders"):
        fit(Net(), KNNProbe())
    with pytest.raises(TypeError, match="represent='features' is not a method of Net"):
        fit(Net(), probes(represent="features")[0])
    with pytest.raises(ValueError, match="KNNProbe and KNNProbe would both log under knn/"):
        fit(Net(), probes()[0], KNNProbe(k=1, train=loader(TRAIN), val=loader(VAL)))
    for batch, message in (
        ((VAL[0], VAL[1][:, None]), r"targets=1 must lead to one class index a sample, got \(16, 1\)"),
        (
            (VAL[0], VAL[1] * 1.5),
            "targets=1 must lead to a tensor of class indices, got a tensor of torch.float",
        ),
        ((VAL[0], torch.full((37,), -1)), "no labelled samples: 80 to learn from, 0 to judge on"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(Net(), probes(val=loader(batch))[0])
    with pytest.raises(
        ValueError, match="represent='pooled' must return a row of features for each of 16 labels"
    ):
        fit(Net(), probes(represent="pooled")[0])


def test_two_probes_of_one_kind_with_names_of_their_own():
    first, second = (KNNProbe(k=k, train=loader(TRAIN), val=loader(VAL), name=f"knn_{k}") for k in (1, 50))
    trainer = fit(Net(), first, second)
    for probe, key in ((first, "knn_1/accuracy"), (second, "knn_50/accuracy")):
        assert float(trainer.callback_metrics[key]) == pytest.approx(probe.history[-1][key])
    assert first.history[-1]["knn_1/accuracy"] != second.history[-1]["knn_50/accuracy"]


def last(data_of_train, data_of_val, **options):
    knn, linear = probes(train=data_of_train, val=data_of_val, **options)
    fit(Net(), knn, linear)
    return [{key: value for key, value in probe.history[-1].items() if "/" in key} for probe in (knn, linear)]


def test_unlabelled_samples_are_left_out():
    def hidden(data, value):
        x, y = data[0].clone(), data[1].clone()
        x[::3] += 100  # they would be noticed
        return x, y.index_fill(0, torch.arange(0, len(y), 3), value)

    labelled = [[part[torch.arange(len(part)) % 3 > 0] for part in data] for data in (TRAIN, VAL)]
    expected = last(*(loader(data) for data in labelled))
    assert last(loader(hidden(TRAIN, -1)), loader(hidden(VAL, -100))) == expected
    limited = {"max_train": 20, "max_val": 9}
    expected = last(*(loader(data) for data in labelled), **limited)
    assert last(loader(hidden(TRAIN, -1)), loader(hidden(VAL, -1)), **limited) == expected
    nothing = [hidden(data, -1) for data in (TRAIN, VAL)]
    first_batch = [(x, torch.cat([torch.full((16,), -1), y[16:]])) for x, y in nothing]
    assert all(0 < value < 1 for row in last(*map(loader, first_batch)) for value in row.values())


def test_only_labelled_samples_are_run():
    rows = []

    def represent(module, x):
        rows.append(len(x))
        return module(x)

    half = (TRAIN[0], TRAIN[1].index_fill(0, torch.arange(0, 80, 2), -1))
    fit(Net(), probes(train=loader(half), represent=represent)[0], max_epochs=1)
    assert rows[:5] == [8] * 5


def test_batches_of_any_form():
    class Form(torch.utils.data.Dataset):
        def __init__(self, data, make):
            self.data, self.make = data, make

        def __len__(self):
            return len(self.data[0])

        def __getitem__(self, index):
            return self.make(self.data[0][index], self.data[1][index])

    expected = last(loader(TRAIN), loader(VAL))
    forms = [
        (lambda x, y: (x, y, 0), {}),
        (lambda x, y: (0, {"image": x}, y), {"inputs": lambda batch: batch[1]["image"], "targets": 2}),
        (lambda x, y: {"x": x, "label": y.int(), "path": "a"}, {"targets": "label"}),
        (lambda x, y: {"image": x, "label": y}, {"inputs": "image", "targets": "label"}),
    ]
    for make, where in forms:
        train, val = (DataLoader(Form(data, make), 16) for data in (TRAIN, VAL))
        assert last(train, val, **where) == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])  # the square of the last is not finite
@pytest.mark.parametrize("where", ["weights", "one sample"])
def test_features_that_are_not_finite_have_no_accuracy(value, where):
    module, x = Net(), VAL[0].clone()
    if where == "weights":
        knn, linear = probes(represent=lambda module, x: nn.functional.linear(x, module.net[0].weight))
        module.net[0].weight.data.fill_(value)
    else:
        x[5] = value
        knn, linear = probes(val=loader((x, VAL[1])), represent=lambda module, x: x)
    fit(module, knn, linear)
    rows = [*knn.history, *linear.history]
    found = [value for row in rows for key, value in row.items() if key.endswith("accuracy")]
    assert len(found) == 9
    assert all(math.isnan(value) for value in found)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_probes_read_in_every_precision(precision):
    rows = {}
    for each in ("32-true", precision):
        knn, linear = probes()
        fit(Net(), knn, linear, precision=each, max_epochs=1)
        rows[each] = [*knn.history, *linear.history]
    assert len(rows[precision]) == len(rows["32-true"]) == 4
    for row, expected in zip(rows[precision], rows["32-true"], strict=True):
        assert row == pytest.approx(expected, abs=0.15)


class Watched(Net):
    """Counts calls, fires a hook, logs in its forward and captured itself."""

    def __init__(self):
        super().__init__()
        self.calls, self.fired = 0, 0
        self.features = lambda x: self.net(x)
        self.net.register_forward_hook(self.count)

    def count(self, *_):
        self.fired += 1

    def forward(self, x):
        self.calls += 1
        self.log("calls", float(self.calls))
        return self.features(x)


def test_nothing_of_the_module_or_the_loaders_notices_them():
    runs = []
    for watched in (False, True):
        module = Watched()
        torch.manual_seed(1)
        drawn = torch.Generator().manual_seed(3)  # shared by the fit's loader and the probes'
        data = DataLoader(TensorDataset(*TRAIN), 16, shuffle=True, generator=drawn)
        callbacks = probes(train=data) if watched else ()
        trainer = Trainer(
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=False,
            max_epochs=2,
            callbacks=list(callbacks),
        )
        trainer.fit(module, data)
        calls = float(trainer.callback_metrics["calls"])
        runs.append(
            (module.calls, module.fired, calls, [*module.state_dict().values(), torch.get_rng_state()])
        )
    assert runs[0][:3] == runs[1][:3]
    assert runs[0][0] == 10
    assert all(torch.equal(a, b) for a, b in zip(runs[0][3], runs[1][3], strict=True))


def test_a_second_run_is_as_a_first_one_and_a_resumed_run_as_one_never_stopped(tmp_path):
    used, fresh = probes(), probes()
    fit(Net(), *used)
    for probe, other in zip(used, fresh, strict=True):
        fit(Net(), probe)
        fit(Net(), other)
        assert [row["fit"] for row in probe.history] == [1] * 3 + [2] * 3
        assert [{**row, "fit": 1} for row in probe.history[3:]] == other.history
    whole, first, second = probes()[0], probes()[0], probes()[0]
    steady = {"loader": loader(TRAIN)}
    resume(Net(), whole, 4, **steady)
    resume(Net(), first, 2, **steady).save_checkpoint(tmp_path / "c.ckpt")
    resume(Net(), second, 4, ckpt_path=tmp_path / "c.ckpt", **steady)
    assert [row["step"] for row in second.history] == [0, 5, 10, 15, 20]
    assert second.history == whole.history


def resume(module, probe, epochs, *, loader, ckpt_path=None):
    torch.manual_seed(0)
    module.net[3].p = 0.0
    trainer = Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        max_epochs=epochs,
        callbacks=[probe],
    )
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def test_a_rank_without_labelled_samples(tmp_path):
    """All that is labelled is in the batches of the first rank."""
    y = VAL[1].clone()
    for k in (1, 3):
        y[10 * k : 10 * (k + 1)] = -1

    class Dump(KNNProbe):
        def on_train_end(self, trainer, pl_module):
            file = tmp_path / f"{trainer.world_size}-{trainer.global_rank}.json"
            file.write_text(json.dumps(self.history[0]))

    for options in ({"devices": 1}, {"devices": 2, "strategy": "ddp_fork"}):
        probe = Dump(train=loader(TRAIN), val=loader((VAL[0], y), 10), strict=True)
        fit(Net(), probe, max_epochs=1, **options)
    one, a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert a == b == pytest.approx(one)


@pytest.mark.parametrize("fault", ["raises", "is of another width", "is not finite", "is judged on NaN"])
def test_a_fault_on_one_rank_is_known_on_all(tmp_path, fault):
    class Faulty(Net):
        def represent(self, x):
            if self.global_rank == 1 and fault == "raises":
                raise RuntimeError("no features today")
            if fault == "is not finite":
                return self(x) / (1 - self.global_rank)
            if fault == "is judged on NaN":
                return x
            return self(x).repeat(1, 1 + self.global_rank)

    class Dump(KNNProbe):
        def on_fit_start(self, trainer, pl_module):
            signal.alarm(60)  # ends this rank if it hangs

        def on_train_end(self, trainer, pl_module):
            said = " ".join(str(warning.message) for warning in caught)
            file = tmp_path / f"{trainer.global_rank}.json"
            file.write_text(json.dumps([self.history, trainer.global_step, said]))

    x = VAL[0].clone()
    if fault == "is judged on NaN":
        x[10:20] = math.nan  # the second batch, which is the second rank's
    probe = Dump(train=loader(TRAIN), val=loader((x, VAL[1]), 10), represent="represent")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Faulty(), probe, max_epochs=1, devices=2, strategy="ddp_fork")
    (history, steps, said), other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert steps == other[1] == 3
    if fault in ("is not finite", "is judged on NaN"):
        assert len(history) == 2
        assert all(math.isnan(row["knn/accuracy"]) for row in [*history, *other[0]])
    else:
        assert history == other[0] == []
        assert ("on rank 1: RuntimeError: no features today" if fault == "raises" else "on all ranks") in said
