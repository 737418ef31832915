"""syre in a Trainer: loss scaling, ranks, compiled modules, several optimizers, and what is read of it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import CollapseMonitor, Syre
from lightning_sym.optim import attach_syre
from lightning_sym.symmetry import find_symmetries
from tests.callbacks.test_fit import Strided
from tests.models import Classifier, mlp, trainer


def batches(n: int = 24, *, size: int = 6, **settings) -> DataLoader:
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 4, generator=draw), torch.randint(0, 4, (n,), generator=draw)
    return DataLoader(TensorDataset(x.double(), y), batch_size=size, **settings)


def model(**settings) -> Classifier:
    torch.manual_seed(0)
    return Classifier(mlp(4, 6, 4), **{"weight_decay": 0.2, **settings}).double()


class Weights(Callback):
    """Keeps the weights after every batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_skipped_in_a_fit_leaves_the_weights_bitwise(fused):
    """A scale of 2^40 overflows fp16 at first and is halved until it fits: so the run begins with skips."""

    class Half(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0].float(), batch[1]), batch_idx)

    torch.manual_seed(0)
    net = Half(mlp(4, 6, 4), optimizer=torch.optim.AdamW, weight_decay=0.5, fused=fused)
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-6, growth_interval=1000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    seen = Weights()
    trainer(max_epochs=4, plugins=[plugin], callbacks=[Syre(sigma=0.3), seen]).fit(net, batches())
    same = [all(torch.equal(row[n], start[n]) for n in row) for row in seen.seen]
    skipped = same.count(True)
    assert 1 <= skipped < len(same)
    assert same == [True] * skipped + [False] * (len(same) - skipped)
    moved = seen.seen[skipped]["net.0.weight"]
    assert moved.isfinite().all()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_under_a_loss_scale_the_steps_are_those_without(kind, fused):
    runs = []
    for scaled in (False, True):
        net = model().net
        optimizer = kind(net.parameters(), lr=0.01, weight_decay=0.3, fused=fused)
        attach_syre(optimizer, sigma=0.3, named_parameters=net.named_parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for x, y in batches():
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(net(x), y)).backward()
            before = [p.detach().clone() for p in net.parameters()]
            scaler.step(optimizer)
            scaler.update()
            assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
        runs.append(list(net.parameters()))
    for plain, through in zip(*runs, strict=True):
        # The scaler's reciprocal is a float32.
        torch.testing.assert_close(through, plain, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_is_skipped_by_a_real_scaler(fused):
    net = model().net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.3, fused=fused)
    attach_syre(optimizer, sigma=0.3, named_parameters=net.named_parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [p.detach().clone() for p in net.parameters()]
    for factor, stays in ((torch.inf, True), (1.0, False)):
        optimizer.zero_grad()
        scaler.scale(factor * next(net.parameters()).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        now = list(net.parameters())
        assert torch.equal(before[0], now[0]) == stays


class Dump(Callback):
    """Writes what a rank ends with."""

    def __init__(self, folder, syre) -> None:
        self.folder, self.syre = folder, syre

    def on_train_end(self, trainer, pl_module):
        state = {"weights": dict(pl_module.named_parameters()), "offsets": self.syre.handles[0].offsets()}
        plain = {k: {n: v.detach().clone() for n, v in d.items()} for k, d in state.items()}
        torch.save(plain, self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")


def test_two_ranks_have_one_offset_and_one_set_of_weights(tmp_path):
    for devices in (1, 2):
        syre = Syre(sigma=0.3, seed=7, anisotropy=0.1, start="shift")
        strategy = "ddp_fork" if devices == 2 else "auto"
        fit = trainer(
            devices=devices,
            strategy=strategy,
            use_distributed_sampler=False,
            callbacks=[syre, Dump(tmp_path, syre)],
            max_epochs=3,
        )
        fit.fit(model(), batches(size=6 // devices, sampler=Strided(24)))
    one, first, second = (torch.load(tmp_path / f, weights_only=True) for f in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert first["offsets"].keys() == {"net.0.weight", "net.2.weight"}
    for part in ("offsets", "weights"):
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), name
            torch.testing.assert_close(value, one[part][name], rtol=1e-10, atol=1e-12)


def test_a_compiled_network_has_the_offsets_and_weights_of_the_plain_one():
    runs = []
    for compiled in (False, True):
        net = model()
        if compiled:
            net.net = torch.compile(net.net, backend="aot_eager")
            assert any("_orig_mod" in name for name, _ in net.named_parameters())
        syre = Syre(sigma=0.3, seed=2, start="shift")
        trainer(callbacks=[syre], max_epochs=2).fit(net, batches())
        runs.append((syre.handles[0].offsets(), list(net.parameters())))
    (offsets, weights), (compiled_offsets, compiled_weights) = runs
    assert offsets.keys() == compiled_offsets.keys() == {"net.0.weight", "net.2.weight"}
    assert all(torch.equal(offsets[name], compiled_offsets[name]) for name in offsets)
    for a, b in zip(weights, compiled_weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class Pair(Classifier):
    """Two networks and two optimizers, each stepped by hand, the second every other batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(mlp(4, 6, 4))
        self.other = mlp(4, 5, 4)
        self.automatic_optimization = False
        self.double()

    def training_step(self, batch, batch_idx):
        for number, net in enumerate((self.net, self.other)):
            optimizer = self.optimizers()[number]
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(net(batch[0]), batch[1]))
            if number == 0 or batch_idx % 2:
                optimizer.step()

    def configure_optimizers(self):
        return [
            torch.optim.AdamW(self.net.parameters(), lr=0.01, weight_decay=0.3),
            torch.optim.SGD(self.other.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1),
        ]


def test_two_optimizers_by_hand_follow_the_papers_notation():
    pair = Pair()
    nets = [copy.deepcopy(pair.net), copy.deepcopy(pair.other)]
    syre = Syre(sigma=0.3, seed=1)
    trainer(callbacks=[syre], max_epochs=2).fit(pair, batches())
    assert [handle.names for handle in syre.handles] == [
        ["net.0.weight", "net.2.weight"],
        ["other.0.weight", "other.2.weight"],
    ]
    kinds = (
        (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.3}),
        (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    )
    for number, (net, (kind, settings)) in enumerate(zip(nets, kinds, strict=True)):
        offsets = {n.partition(".")[2]: v for n, v in syre.handles[number].offsets().items()}
        theta = {n: nn.Parameter(p.detach() - offsets.get(n, 0)) for n, p in net.named_parameters()}
        optimizer = kind(theta.values(), **settings)
        for _ in range(2):
            for index, (x, y) in enumerate(batches()):
                optimizer.zero_grad()
                phi = {n: p + offsets.get(n, 0) for n, p in theta.items()}
                F.cross_entropy(functional_call(net, phi, (x,)), y).backward()
                if number == 0 or index % 2:
                    optimizer.step()
        for n, p in (pair.net, pair.other)[number].named_parameters():
            torch.testing.assert_close(
                p.detach(), theta[n].detach() + offsets.get(n, 0), rtol=1e-10, atol=1e-12
            )


class Late(SingleDeviceStrategy):
    """Loads checkpoints after the fit's start, as sharded strategies do."""

    restore_checkpoint_after_setup = True


@pytest.mark.parametrize("late", [False, True])
def test_another_fit_with_the_callback_of_a_resumed_one_is_shifted_again(late, tmp_path):
    syre = Syre(sigma=0.3, start="shift")
    fit = trainer(callbacks=[syre], max_epochs=1)
    fit.fit(model(), batches())
    fit.save_checkpoint(tmp_path / "half.ckpt")
    unbroken, resumed = model(), model()
    trainer(callbacks=[Syre(sigma=0.3, start="shift")], max_epochs=2).fit(unbroken, batches())
    strategy = {"strategy": Late(torch.device("cpu"))} if late else {}
    trainer(callbacks=[syre], max_epochs=2, **strategy).fit(
        resumed, batches(), ckpt_path=tmp_path / "half.ckpt"
    )
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True))
    net = model(lr=0.0)
    before = net.net[0].weight.detach().clone()
    trainer(callbacks=[syre], max_steps=1).fit(net, batches())
    torch.testing.assert_close(net.net[0].weight, before + syre.handles[0].offsets()["net.0.weight"])


class Begun(Callback):
    """Keeps the weights that the first step finds."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not hasattr(self, "weights"):
            self.weights = {n: p.detach().clone() for n, p in pl_module.named_parameters()}


class Tunable(Classifier):
    """Has the attributes that tuners change."""

    def __init__(self, **settings) -> None:
        torch.manual_seed(0)
        super().__init__(mlp(4, 6, 4), weight_decay=0.2, **settings)
        self.lr, self.batch_size = 1e-3, 2
        self.double()

    def train_dataloader(self):
        return batches(size=self.batch_size)

    def val_dataloader(self):
        return batches(size=self.batch_size)


@pytest.mark.filterwarnings("ignore:.*train_dataloader.*")
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    "how", ["plain", "lr_find", "scale_batch_size", "LearningRateFinder", "BatchSizeFinder"]
)
def test_a_run_that_was_tuned_first_begins_shifted_once(how, first, tmp_path):
    """Tuners save and restore the callbacks' states, and end by an exception of their own."""
    syre, begun, module = Syre(sigma=0.3, start="shift"), Begun(), Tunable()
    start = {n: p.detach().clone() for n, p in module.named_parameters()}
    finders = {
        "LearningRateFinder": lambda: LearningRateFinder(num_training_steps=4, update_attr=False),
        "BatchSizeFinder": lambda: BatchSizeFinder(max_trials=2, steps_per_trial=1),
    }
    callbacks = [syre, begun]
    if how in finders:
        callbacks.insert(0 if first else 2, finders[how]())
    fit = trainer(max_steps=2, callbacks=callbacks, default_root_dir=tmp_path, enable_checkpointing=False)
    if how == "lr_find":
        Tuner(fit).lr_find(module, num_training=4, update_attr=False)
    if how == "scale_batch_size":
        Tuner(fit).scale_batch_size(module, max_trials=2, steps_per_trial=1)
    fit.fit(module)
    offsets = syre.handles[0].offsets()
    assert offsets["net.0.weight"].norm() > 0.1
    for name, value in begun.weights.items():
        torch.testing.assert_close(value, start[name] + offsets.get(name, 0), rtol=1e-12, atol=1e-12)


def test_a_trainer_that_fits_on_is_not_shifted_again():
    syre, net = Syre(sigma=0.3, start="shift"), model(lr=0.0)
    before = net.net[0].weight.detach().clone()
    fit = trainer(max_epochs=1, callbacks=[syre])
    fit.fit(net, batches())
    fit.fit_loop.max_epochs = 2
    fit.fit(net, batches())
    assert fit.global_step == 8
    torch.testing.assert_close(net.net[0].weight, before + syre.handles[0].offsets()["net.0.weight"])


class SaveAtOnce(Callback):
    """Writes a checkpoint before the first step."""

    def __init__(self, path) -> None:
        self.path = path

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("start", ["keep", "shift"])
def test_a_checkpoint_of_no_step_has_the_shift_in_it(start, tmp_path):
    path = tmp_path / "first.ckpt"
    net = model(lr=0.0)
    before = net.net[0].weight.detach().clone()
    syre = Syre(sigma=0.3, start=start)
    trainer(max_steps=1, callbacks=[syre, SaveAtOnce(path)]).fit(net, batches())
    resumed = model(lr=0.0)
    trainer(max_steps=1, callbacks=[Syre(sigma=0.3, start=start)]).fit(resumed, batches(), ckpt_path=path)
    moved = syre.handles[0].offsets()["net.0.weight"] if start == "shift" else 0
    torch.testing.assert_close(resumed.net[0].weight, before + moved, rtol=1e-12, atol=1e-12)


def test_a_run_that_began_without_a_shift_is_not_shifted_when_it_goes_on(tmp_path):
    fit = trainer(max_epochs=1, callbacks=[Syre(sigma=0.3)])
    fit.fit(model(), batches())
    fit.save_checkpoint(tmp_path / "half.ckpt")
    ends = []
    for start in ("keep", "shift"):
        net = model()
        trainer(max_epochs=2, callbacks=[Syre(sigma=0.3, start=start)]).fit(
            net, batches(), ckpt_path=tmp_path / "half.ckpt"
        )
        ends.append(list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_trainers_of_the_twin_package_are_served_alike(tmp_path):
    twin = pytest.importorskip("pytorch_lightning")

    class Net(twin.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net, self.lr = mlp(4, 6, 4).double(), 0.05

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.3)

    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }

    def run(epochs, path=None, *, tune=False):
        net, syre = Net(), Syre(sigma=0.3, start="shift")
        fit = twin.Trainer(max_epochs=epochs, callbacks=[syre], enable_checkpointing=False, **quiet)
        if tune:
            twin.tuner.Tuner(fit).lr_find(net, batches(), num_training=4, update_attr=False)
        fit.fit(net, batches(), ckpt_path=path)
        return fit, net

    fit, _ = run(1)
    fit.save_checkpoint(tmp_path / "half.ckpt")
    unbroken, resumed, tuned = run(2)[1], run(2, tmp_path / "half.ckpt")[1], run(2, tune=True)[1]
    torch.manual_seed(0)
    net = Classifier(mlp(4, 6, 4), optimizer=torch.optim.AdamW, lr=0.05, weight_decay=0.3).double()
    trainer(max_epochs=2, callbacks=[Syre(sigma=0.3, start="shift")]).fit(net, batches())
    for other in (resumed, tuned, net):
        for a, b in zip(unbroken.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)


def relu_model(**settings) -> Classifier:
    torch.manual_seed(0)
    return Classifier(mlp(4, 6, 4, act=nn.ReLU), **settings)


def single(**settings) -> DataLoader:
    loader = batches(**settings)
    loader.dataset.tensors = (loader.dataset.tensors[0].float(), loader.dataset.tensors[1])
    return loader


def test_the_collapse_monitor_reads_the_residual_force():
    syre, watch = Syre(sigma=0.3), CollapseMonitor(causes=True, strict=True, every_n_steps=1)
    net = relu_model(weight_decay=0.3)
    trainer(callbacks=[watch, syre], max_steps=2).fit(net, single())
    # By hand: units are rows of the first weight with columns of the second; biases have no offset.
    theta = syre.handles[0].offsets()
    units = 0.3 * torch.cat([theta["net.0.weight"], theta["net.2.weight"].T], dim=1).double()
    gaps = torch.cdist(units, units) / 2**0.5
    least = min(float(gaps[~torch.eye(6, dtype=torch.bool)].min()), float(units.norm(dim=1).min()))
    for row in watch.history:
        assert row["collapse/net.0/residual_force"] == pytest.approx(least, rel=1e-6)
        assert "collapse/net.2/residual_force" not in row  # the output's units have no symmetry
    handle_says = attach_syre(
        torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.3),
        sigma=0.3,
        named_parameters=net.named_parameters(),
    ).residual_force(find_symmetries(net, torch.randn(3, 4)))
    assert min(float(force.min()) for force in handle_says.values()) == pytest.approx(least, rel=1e-6)


def test_the_force_follows_the_decay_and_is_not_there_without_syre():
    class Schedule(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.optimizers[0].param_groups[0]["weight_decay"] /= 2

    watch = CollapseMonitor(causes=True, strict=True, every_n_steps=1)
    trainer(callbacks=[watch, Syre(sigma=0.3), Schedule()], max_steps=3).fit(
        relu_model(weight_decay=0.4), single()
    )
    forces = [row["collapse/net.0/residual_force"] for row in watch.history]
    assert forces[0] > 0
    assert forces[1] / forces[0] == pytest.approx(0.5)
    assert forces[2] / forces[1] == pytest.approx(0.5)
    bare = CollapseMonitor(causes=True, strict=True, every_n_steps=1)
    trainer(callbacks=[bare], max_steps=1).fit(relu_model(weight_decay=0.4), single())
    assert not any("residual_force" in json.dumps(row) for row in bare.history)


def test_a_force_of_nothing_is_read_as_zero():
    watch = CollapseMonitor(causes=True, strict=True, every_n_steps=1)
    trainer(callbacks=[watch, Syre(sigma=0.0)], max_steps=1).fit(relu_model(weight_decay=0.4), single())
    assert watch.history[0]["collapse/net.0/residual_force"] == 0


def test_a_monitor_of_causes_and_force_changes_nothing():
    runs = []
    for watch in ([], [CollapseMonitor(causes=True, strict=True, every_n_steps=1)]):
        net, seen = relu_model(weight_decay=0.3), Weights()
        trainer(callbacks=[*watch, Syre(sigma=0.3), seen], max_epochs=2).fit(net, single(shuffle=True))
        runs.append(seen.seen)
    for a, b in zip(*runs, strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)


def test_what_is_refused():
    net = relu_model(weight_decay=0.3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.3)
    handle = attach_syre(optimizer)
    with pytest.raises(ValueError, match=r"names the offsets have \(0\.0.*net\.0\.weight"):
        handle.residual_force(find_symmetries(net, torch.randn(3, 4)))
    with pytest.raises(ValueError, match="attached to this optimizer already"):
        attach_syre(optimizer)
    handle.remove()
    attach_syre(optimizer)
