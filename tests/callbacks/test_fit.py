"""The monitors in every kind of fit: they change nothing, break nothing and leave nothing behind."""

from __future__ import annotations

import json
import math
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_sym import watch
from lightning_sym.callbacks import AlignmentMonitor, CollapseMonitor, Monitor, PlasticityMonitor, monitors
from lightning_sym.engine.schedule import LogSpaced
from lightning_sym.observe import Observation, Reading, SecondMoments
from tests.models import Classifier, SelfAttention, Witness, convnet, data, fit, images, mlp, trainer


def hooks(module: nn.Module) -> int:
    """Hooks left on a module or one inside it."""
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in module.modules()
    )


def last(monitor: Monitor) -> dict[str, float]:
    return monitor.history[-1]


def full(**settings: Any) -> list[Monitor]:
    return monitors("full", **{"every_n_steps": 2, "targets": 1, "strict": True, **settings})


@pytest.mark.parametrize("validate", [False, True])
def test_a_run_with_monitors_is_bitwise_the_run_without(validate):
    runs = []
    for callbacks in ([], full(), full(every_n_steps=LogSpaced(3))):
        torch.manual_seed(0)
        model = Classifier(convnet(), optimizer=torch.optim.AdamW, lr=1e-2)
        witness = Witness()
        run = trainer(max_epochs=3, callbacks=[*callbacks, witness])
        loaders = (images(shuffle=True), images(seed=1)) if validate else (images(shuffle=True),)
        run.fit(model, *loaders)
        runs.append(witness.seen)
        assert all(monitor.history for monitor in callbacks)
    bare = runs[0]
    for watched in runs[1:]:
        assert len(watched) == len(bare) == 12
        for a, b in zip(bare, watched, strict=True):
            assert len(a) == len(b)
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_bitwise_test_can_fail():
    """A callback that draws one random number is seen by the comparison above."""

    class Careless(Callback):
        def on_train_batch_end(self, *args):
            torch.rand(1)

    runs = []
    for callbacks in ([], [Careless()]):
        torch.manual_seed(0)
        witness = Witness()
        trainer(callbacks=[*callbacks, witness]).fit(Classifier(convnet()), images(shuffle=True))
        runs.append(witness.seen)
    same = [torch.equal(x, y) for a, b in zip(*runs, strict=True) for x, y in zip(a, b, strict=True)]
    assert not all(same)


def test_hooks_exist_in_probed_steps_only():
    class CountHooks(Classifier):
        counts: ClassVar[list[int]] = []

        def training_step(self, batch, batch_idx):
            CountHooks.counts.append(hooks(self))
            return super().training_step(batch, batch_idx)

    model = CountHooks(mlp(4, 5, 4))
    x, y = torch.randn(12, 4), torch.randint(0, 4, (12,))
    run = trainer(callbacks=[AlignmentMonitor(every_n_steps=3, strict=True)])
    run.fit(model, DataLoader(TensorDataset(x, y), batch_size=2))
    assert [count > 0 for count in CountHooks.counts] == [True, False, True, False, False, True]
    assert hooks(model) == 0


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_exception(kind):
    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise kind("stop")

    net = nn.Sequential(nn.Linear(4, 8), SelfAttention(8, 2), nn.Linear(8, 4))
    model, plain_linear = Failing(net), F.linear
    x, y = torch.randn(8, 4), torch.randint(0, 4, (8,))
    run = trainer(callbacks=full(every_n_steps=1, layers=None))
    # Lightning turns a KeyboardInterrupt into a SystemExit.
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        run.fit(model, DataLoader(TensorDataset(x, y), batch_size=4))
    assert hooks(model) == 0
    assert F.linear is plain_linear


def test_an_exception_inside_attention_leaves_nothing():
    class Raises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x[:, :, :4], x)[0]  # a wrong width

    plain_linear = F.linear
    model = Classifier(nn.Sequential(nn.Linear(4, 8), Raises()))
    x, y = torch.randn(8, 3, 4), torch.randint(0, 4, (8,))
    with pytest.raises(Exception, match=r"shape|size|dim|mat"):
        trainer(callbacks=full(every_n_steps=1)).fit(model, DataLoader(TensorDataset(x, y), batch_size=4))
    assert F.linear is plain_linear
    assert hooks(model) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"fast_dev_run": True},
        {"max_epochs": 2, "num_sanity_val_steps": 2},
        {"limit_train_batches": 1},
        {"max_steps": 3},
    ],
    ids=str,
)
def test_fits_of_every_kind_have_readings(settings):
    torch.manual_seed(0)
    model = Classifier(convnet())
    if settings.get("precision") == "64-true":
        model = model.double()
    watch = full(every_n_steps=1)
    run = trainer(**settings, callbacks=watch)
    run.fit(model, images(30), images(8))  # 8, 8, 8 and a ragged 6
    for monitor in watch:
        assert monitor.history
        row = monitor.history[0]
        assert row["step"] == 1
        assert all(math.isfinite(value) for value in row.values())
    assert "collapse/net.7/effective_rank" in watch[0].history[0]
    assert "collapse/nc4" in watch[0].history[0]
    assert "alignment/net.3/out/gwa" in watch[2].history[0]
    assert len({monitor.history[-1]["step"] for monitor in watch}) == 1


def test_accumulated_batches_are_one_observation():
    rows = []
    for accumulate, batch_size in ((1, 8), (4, 2)):
        torch.manual_seed(0)
        watch = monitors("standard", every_n_steps=1, targets=1, strict=True)
        model = Classifier(mlp(4, 6, 5, 4))
        data = torch.Generator().manual_seed(1)
        x = torch.randn(16, 4, generator=data)
        y = torch.randint(0, 4, (16,), generator=data)
        run = trainer(accumulate_grad_batches=accumulate, callbacks=watch)
        run.fit(model, DataLoader(TensorDataset(x, y), batch_size=batch_size))
        rows.append([row for monitor in watch for row in monitor.history])
    assert [r["step"] for r in rows[0]] == [1, 2] * len(watch)
    for one, many in zip(*rows, strict=True):
        assert many == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_a_batch_of_one():
    watch = monitors("standard", every_n_steps=1, targets=1, strict=True)
    run = trainer(max_steps=2, callbacks=watch)
    data = TensorDataset(torch.randn(4, 4), torch.randint(0, 4, (4,)))
    run.fit(Classifier(mlp(4, 6, 4)), DataLoader(data, batch_size=1))
    for monitor in watch:
        assert all(math.isfinite(value) for value in last(monitor).values())
    assert "collapse/net.0/effective_rank" not in last(watch[0])  # one sample has no spread


class TwoPlayers(LightningModule):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = mlp(4, 6, 4), mlp(4, 5, 4)

    def training_step(self, batch, batch_idx):
        for net, optimizer in zip((self.one, self.two), self.optimizers(), strict=True):
            loss = F.cross_entropy(net(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.one, self.two)]


def test_manual_optimization_with_two_optimizers():
    watch = monitors("standard", every_n_steps=4, strict=True)
    data = TensorDataset(torch.randn(96, 4), torch.randint(0, 4, (96,)))
    run = trainer(callbacks=watch)
    run.fit(TwoPlayers(), DataLoader(data, batch_size=16))
    # Two optimizer steps a batch: the observation is made of the batch in which a due step falls.
    assert [row["step"] for row in watch[0].history] == [2, 4, 8, 12]
    row = last(watch[2])
    assert {"alignment/one.0/in/rga", "alignment/two.2/out/gwa"} <= set(row)
    assert last(watch[1])["plasticity/two.0/relative_update"] > 0


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(4, 6), mlp(6, 7, 6), nn.Linear(6, 4)
        self.reentrant = reentrant

    def forward(self, x):
        x = self.first(x)
        if self.reentrant is None:
            return self.last(self.block(x))
        return self.last(checkpoint(self.block, x, use_reentrant=self.reentrant))


def test_activation_checkpointing_counts_every_sample_once():
    rows = []
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        watch = monitors("standard", every_n_steps=1, strict=True)
        data = torch.Generator().manual_seed(1)
        x, y = torch.randn(8, 4, generator=data), torch.randint(0, 4, (8,), generator=data)
        run = trainer(max_steps=1, callbacks=watch)
        run.fit(Classifier(Checkpointed(reentrant)), DataLoader(TensorDataset(x, y), batch_size=8))
        rows.append({k: v for monitor in watch for k, v in monitor.history[0].items()})
    assert rows[1] == pytest.approx(rows[0], rel=1e-5)
    assert rows[2].keys() >= rows[0].keys() - {
        k for k in rows[0] if k.endswith(("dormant_units", "dead_units", "saturated"))
    }
    assert {k: rows[2][k] for k in rows[2] if "units" not in k and "score" not in k} == pytest.approx(
        {k: rows[0][k] for k in rows[2] if "units" not in k and "score" not in k}, rel=1e-5
    )


def test_compiled_submodules_are_seen():
    rows = []
    for compile_it in (False, True):
        torch.manual_seed(0)
        model = Classifier(mlp(4, 6, 5, 4))
        if compile_it:
            model.net = torch.compile(model.net, backend="eager")
        watch = monitors("standard", every_n_steps=2, strict=True)
        data = torch.Generator().manual_seed(1)
        x, y = torch.randn(32, 4, generator=data), torch.randint(0, 4, (32,), generator=data)
        trainer(callbacks=watch).fit(model, DataLoader(TensorDataset(x, y), batch_size=8))
        rows.append([row for monitor in watch for row in monitor.history])
    assert [set(row) for row in rows[0]] == [set(row) for row in rows[1]]
    for a, b in zip(*rows, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)


def test_several_loggers_get_every_reading_at_the_right_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [TensorBoardLogger(tmp_path, name="tb"), CSVLogger(tmp_path, name="csv")]
    watch = full()
    model = Classifier(convnet())
    run = trainer(max_epochs=2, logger=loggers, log_every_n_steps=1, callbacks=watch)
    run.fit(model, images())
    events = EventAccumulator(loggers[0].log_dir).Reload()
    scalars = events.Tags()["scalars"]
    for monitor in watch:
        for key in monitor.history[0]:
            if key not in ("step", "fit", "plasticity/trainability"):
                assert [e.step for e in events.Scalars(key)] == [0, 1, 3, 5, 7], key
    assert "plasticity/trainability" in scalars
    assert any("spectrum" in tag for tag in events.Tags()["histograms"])
    # The step is that under which self.log files the same batch's loss.
    by_step = {e.step: e.value for e in events.Scalars("loss")}
    assert [float(loss) for loss in model.losses] == pytest.approx([by_step[i] for i in range(8)])
    table = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    assert "alignment/net.0/in/rga" in table


def test_early_stopping_and_checkpoints_watch_readings(tmp_path):
    stop = EarlyStopping("collapse/score", mode="max", patience=1, check_on_train_epoch_end=True)
    keep = ModelCheckpoint(tmp_path, monitor="alignment/mean", mode="max", save_on_train_epoch_end=True)
    run = trainer(max_epochs=5, enable_checkpointing=True, callbacks=[*full(every_n_steps=1), stop, keep])
    run.fit(Classifier(convnet()), images())
    assert keep.best_model_score is not None
    assert math.isfinite(float(stop.best_score))


def test_a_resumed_run_reads_what_an_unbroken_one_reads(tmp_path):
    def run(epochs: int, watch: list[Monitor], path: str | None = None) -> Any:
        torch.manual_seed(0)
        keep = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1, save_on_train_epoch_end=True)
        fit = trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=[*watch, keep])
        fit.fit(Classifier(mlp(64, 8, 6, 4), momentum=0.9), flat, ckpt_path=path)
        return keep

    source = images()
    x, y = source.dataset.tensors
    flat = DataLoader(TensorDataset(x.flatten(1), y), batch_size=8)
    unbroken = monitors("standard", every_n_steps=3, strict=True)
    run(4, unbroken)
    half = monitors("standard", every_n_steps=3, strict=True)
    keep = run(2, half)
    resumed = monitors("standard", every_n_steps=3, strict=True)
    run(4, resumed, path=keep.last_model_path)
    for a, b in zip(unbroken, resumed, strict=True):
        assert [row["step"] for row in b.history] == [1, 3, 6, 9, 12, 15]
        assert a.history == b.history


def test_a_frozen_layer_and_one_without_gradient():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.live = nn.Linear(4, 6), nn.Linear(6, 4)
            self.detached, self.unused = nn.Linear(6, 3), nn.Linear(6, 3)
            self.frozen.requires_grad_(False)

        def forward(self, x):
            x = self.frozen(x)
            self.detached(x).detach()
            return self.live(x)

    watch = monitors("standard", every_n_steps=1, layers="*")  # frozen ones on request
    data = TensorDataset(torch.randn(8, 4), torch.randint(0, 4, (8,)))
    with pytest.warns(UserWarning, match=r"never ran have no readings.*net\.unused.*step 1"):
        trainer(max_steps=1, callbacks=watch).fit(Classifier(Branches()), DataLoader(data, batch_size=8))
    row = {k: v for monitor in watch for k, v in last(monitor).items()}
    assert row["plasticity/net.frozen/relative_update"] == 0
    assert not any("net.unused" in key for key in row)
    # No gradient: what needs none is there, what needs one is not.
    assert "alignment/net.detached/out/rwa" in row
    assert "alignment/net.detached/out/rga" not in row
    assert "plasticity/net.detached/zero_gradients" not in row
    # Frozen before any trainable layer: its output carries no gradient.
    assert "alignment/net.frozen/in/rwa" in row
    assert "alignment/net.frozen/in/rga" not in row


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_are_readings(value):
    x, y = torch.randn(8, 4), torch.randint(0, 4, (8,))
    x[2, 1] = value
    watch = monitors("full", every_n_steps=1, targets=1, strict=True)
    data = DataLoader(TensorDataset(x, y), batch_size=8)
    trainer(max_epochs=3, callbacks=watch).fit(Classifier(mlp(4, 6, 4)), data)
    row = watch[0].history[0]
    assert row["collapse/net.0/nonfinite"] == 1 / 8
    assert math.isfinite(row["collapse/net.0/effective_rank"])
    assert watch[2].history[0]["alignment/net.0/nonfinite"] > 0


def test_an_error_of_ours_is_one_warning():
    class Faulty(CollapseMonitor):
        def _read_layer(self, layer):
            raise ArithmeticError("boom")

    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.randint(0, 4, (8,))), batch_size=2)
    with pytest.warns(UserWarning, match=r"Faulty failed in .*net\.0 at step 1.*boom") as caught:
        trainer(callbacks=[Faulty(every_n_steps=1)]).fit(Classifier(mlp(4, 6, 4)), data)
    assert sum("boom" in str(w.message) for w in caught) == 1
    with pytest.raises(ArithmeticError, match="boom"):
        trainer(callbacks=[Faulty(every_n_steps=1, strict=True)]).fit(Classifier(mlp(4, 6, 4)), data)


@pytest.mark.parametrize(
    ("monitor", "message"),
    [
        (lambda: CollapseMonitor(targets=7), r"targets=7 is not in the batch, which is a list of 2 entries"),
        (lambda: CollapseMonitor(targets=0), r"targets=0 must lead to a tensor of class indices.*float32"),
        (lambda: CollapseMonitor(targets="label"), r"targets='label' is not in the batch"),
        (lambda: PlasticityMonitor(inputs="image"), r"inputs='image' is not in the batch"),
        (lambda: monitors("full", inputs=5), r"inputs=5 is not in the batch"),
    ],
)
def test_places_that_the_first_batch_lacks_are_refused_before_its_step(monitor, message):
    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.randint(0, 4, (8,))), batch_size=2)
    fit = trainer(callbacks=[monitor()])
    with pytest.raises(ValueError, match=message):
        fit.fit(Classifier(mlp(4, 6, 4)), data)
    assert fit.global_step == 0
    net, optimizer = fit.model, torch.optim.SGD(fit.model.parameters(), 0.1)
    with pytest.raises(ValueError, match=message), watch(net, optimizer, [monitor()]) as watching:
        watching.batch(next(iter(data)))


def test_a_function_of_the_batch_is_asked_where_it_is_needed_and_its_failure_is_one_warning():
    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.randint(0, 4, (8,))), batch_size=2)
    asked = []

    def labels(batch):
        asked.append(len(batch))
        raise KeyError("label")

    with pytest.warns(UserWarning, match="KeyError: 'label'"):
        trainer(callbacks=[CollapseMonitor(targets=labels)]).fit(Classifier(mlp(4, 6, 4)), data)
    assert len(asked) == 1


class Words(torch.utils.data.Dataset):
    """Batches that are dicts, as language models have them."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"x": torch.randn(4), "y": index % 4}


class DictClassifier(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["y"]), batch_idx)


def test_the_full_preset_reads_batches_that_are_dicts():
    fit = trainer(callbacks=monitors("full", every_n_steps=2, targets="y", inputs="x", strict=True))
    fit.fit(DictClassifier(mlp(4, 6, 4)), DataLoader(Words(), batch_size=4))
    assert fit.callback_metrics["plasticity/trainability"] > 0
    assert "collapse/nc4" in fit.callback_metrics
    # Without inputs= it is the entry that forward names, and a wrong place is named.
    guessed = trainer(callbacks=monitors("full", every_n_steps=2, targets="y", strict=True))
    guessed.fit(DictClassifier(mlp(4, 6, 4)), DataLoader(Words(), batch_size=4))
    assert guessed.callback_metrics["plasticity/trainability"] > 0
    wrong = monitors("full", every_n_steps=2, targets="y", inputs="z", strict=True)
    with pytest.raises(ValueError, match=r"inputs='z' is not in the batch.*'x', 'y'"):
        trainer(callbacks=wrong).fit(DictClassifier(mlp(4, 6, 4)), DataLoader(Words(), batch_size=4))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CollapseMonitor(every_n_steps=0), "every_n_steps.*0"),
        (lambda: PlasticityMonitor(every_n_steps=-3), "every_n_steps.*-3"),
        (lambda: AlignmentMonitor(moments="cooked"), "moments.*cooked"),
        (lambda: CollapseMonitor(layers=[]), "layers"),
        (lambda: CollapseMonitor(max_layers=0), "max_layers.*0"),
        (lambda: CollapseMonitor(tolerance=1.5), "tolerance.*1.5"),
        (lambda: PlasticityMonitor(threshold=-1), "threshold.*-1"),
        (lambda: PlasticityMonitor(trainability_steps=-1), "trainability_steps.*-1"),
        (lambda: monitors("everything"), "preset.*everything"),
    ],
)
def test_bad_arguments_are_refused_at_once(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()


def test_unknown_layers_are_refused_before_the_first_batch():
    model = Classifier(mlp(4, 6, 4))
    with pytest.raises(ValueError, match=r"layers='net\.9'.*net\.\d"):
        trainer(callbacks=[CollapseMonitor(layers="net.9")]).fit(model, images())
    assert not model.losses


def test_a_module_with_nothing_to_watch_is_told():
    class Bare(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.Flatten(), nn.LayerNorm(64)))

    with pytest.warns(UserWarning, match=r"Bare has no layer to watch: LayerNorm \(128 in net\.1\.weight"):
        done = fit(Bare(), CollapseMonitor(), loader=images(), max_epochs=1)
    assert done.global_step == 4
    with pytest.raises(ValueError, match=r"layers='net\.1' matches no layer"):
        trainer(callbacks=[CollapseMonitor(layers="net.1")]).fit(Bare(), images())


class Write(Callback):
    """Leaves every monitor's history in a file a rank."""

    def __init__(self, folder: Any, watch: list[Monitor]) -> None:
        self.folder, self.watch = folder, watch

    def on_fit_end(self, trainer, pl_module):
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k != "loss"}
        found = {"history": [m.history for m in self.watch], "metrics": metrics}
        (self.folder / f"{trainer.world_size}-{trainer.global_rank}.json").write_text(json.dumps(found))


class Strided(Sampler[int]):
    """Rank r of R gets samples r, r + R, ...: the ranks' batches join to one rank's."""

    def __init__(self, size: int) -> None:
        self.size = size

    def place(self) -> tuple[int, int]:
        up = torch.distributed.is_initialized()
        return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if up else (0, 1)

    def __iter__(self):
        rank, world = self.place()
        return iter(range(rank, self.size, world))

    def __len__(self) -> int:
        return self.size // self.place()[1]


def test_two_ranks_read_what_one_reads_on_the_joined_batch(tmp_path):
    data = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 4, generator=data), torch.randint(0, 4, (32,), generator=data)
    for devices in (1, 2):
        torch.manual_seed(0)
        watch = list(monitors("full", every_n_steps=2, targets=1, strict=True))
        watch[1] = PlasticityMonitor(every_n_steps=2, strict=True)
        run = trainer(
            devices=devices,
            use_distributed_sampler=False,
            strategy="ddp_fork" if devices == 2 else "auto",
            callbacks=[*watch, Write(tmp_path, watch)],
        )
        loader = DataLoader(TensorDataset(x, y), batch_size=8 // devices, sampler=Strided(32))
        run.fit(Classifier(mlp(4, 6, 5, 4)), loader)
    one, first, second = (
        json.loads((tmp_path / name).read_text()) for name in ("1-0.json", "2-0.json", "2-1.json")
    )
    assert first == second
    assert first["metrics"].keys() == one["metrics"].keys()
    for single, double in zip(one["history"], first["history"], strict=True):
        assert [row["step"] for row in double] == [1, 2, 4]
        for a, b in zip(single, double, strict=True):
            assert b == pytest.approx(a, rel=1e-4, abs=1e-5)


class SpectrumGap(Monitor):
    """The monitor of one's own from the documentation."""

    quantity = "gap"
    outputs = SecondMoments("outputs")
    needs = (outputs,)

    def read(self, seen: Observation):
        for layer in seen.layers:
            top, second = layer[self.outputs].eigenvalues[:2]
            yield Reading(layer.name, "", top / second)


def test_a_monitor_of_ones_own():
    gap = SpectrumGap(every_n_steps=1, strict=True)
    trainer(max_steps=2, callbacks=[gap]).fit(Classifier(convnet()), images())
    assert all(last(gap)[f"gap/net.{i}"] >= 1 for i in (0, 3, 7, 9))


def test_callbacks_are_built_from_plain_values():
    """LightningCLI's parser can build every monitor and print its help."""
    from jsonargparse import ArgumentParser

    for kind in (CollapseMonitor, AlignmentMonitor, PlasticityMonitor):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(kind, "monitor")
        config = parser.parse_args(["--monitor.every_n_steps=7", "--monitor.layers=net.*"])
        built = parser.instantiate(config).monitor
        assert built.layers == "net.*"
        assert "optimizer steps" in parser.format_help()


def test_collapse_names_the_symmetry_that_units_fell_into():
    net = mlp(4, 8, 6, 4, act=nn.ReLU)
    with torch.no_grad():
        net[0].weight[1], net[0].bias[1] = net[0].weight[0], net[0].bias[0]  # twins, in and out
        net[2].weight[:, 1] = net[2].weight[:, 0]
        net[2].weight[3], net[2].bias[3], net[4].weight[:, 3] = 0, 0, 0  # a unit at zero
    watch = CollapseMonitor(causes=True, strict=True, every_n_steps=1)
    data = TensorDataset(torch.randn(8, 4), torch.randint(0, 4, (8,)))
    trainer(max_steps=2, callbacks=[watch]).fit(Classifier(net), DataLoader(data, batch_size=4))
    for row in watch.history:
        assert row["collapse/net.0/permutation"] == 2 / 8
        assert row["collapse/net.0/rescaling"] == 0
        assert row["collapse/net.2/rescaling"] == 1 / 6
        assert row["collapse/net.2/permutation"] == 0
    assert watch._symmetries is None


def test_causes_are_those_of_the_network_in_training_even_after_a_fit_that_failed():
    class Fails(Classifier):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("user")

    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.randint(0, 4, (8,))), batch_size=8)
    monitor = CollapseMonitor(every_n_steps=1, causes=True, strict=True)
    with pytest.raises(RuntimeError, match="user"):
        trainer(callbacks=[monitor]).fit(Fails(mlp(4, 6, 4)), data)
    model = Classifier(mlp(4, 6, 4))
    with torch.no_grad():
        model.net[0].weight[1:], model.net[0].bias[1:] = model.net[0].weight[0], model.net[0].bias[0]
        model.net[2].weight[:, 1:] = model.net[2].weight[:, :1]
    trainer(callbacks=[monitor], max_epochs=1).fit(model, data)
    assert last(monitor)["collapse/net.0/permutation"] == 1


class GradientSize(Monitor):
    """Trace of the second moment of per-sample gradients."""

    gradients = SecondMoments("output_gradients")
    needs = (gradients,)

    def read(self, seen: Observation):
        for layer in seen.layers:
            yield Reading(layer.name, "", layer[self.gradients].second.trace())


def test_the_loss_scale_is_undone():
    """Under a GradScaler gradients come scaled; what is read are gradients of per-sample losses."""
    sizes = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        torch.manual_seed(0)
        net = mlp(4, 6, 3)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        x, y = data(8)
        with watch(net, optimizer, GradientSize(every_n_steps=1, strict=True), scaler=scaler) as watching:
            watching.batch((x, y))
            loss = nn.functional.cross_entropy(net(x), y)
            (loss if scaler is None else scaler.scale(loss)).backward()
            optimizer.step() if scaler is None else scaler.step(optimizer)
        sizes.append(watching.monitors[0].history[0]["gradientsize/2"])
    assert sizes[0] > 0
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-6)


def test_a_monitor_can_watch_a_second_run():
    watch = CollapseMonitor(every_n_steps=3, strict=True)
    for _ in range(2):
        trainer(max_steps=4, callbacks=[watch]).fit(Classifier(convnet()), images())
    assert [row["step"] for row in watch.history] == [1, 3, 1, 3]
