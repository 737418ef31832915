"""CircuitMonitor: against loops and single derivatives, any module's updates, ranks, resumption, silence."""

import json
import math

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import CircuitMonitor
from lightning_sym.papers.learning_circuit import LearningCircuit
from lightning_sym.papers.learning_circuit.rules import Conv, FourSynapse
from lightning_sym.sandbox import Sandbox
from tests.models import Classifier, convnet, images, mlp, trainer


def data(n=24, *, seed=0, features=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, features, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def fit(module, *callbacks, loader=None, ckpt_path=None, **options):
    run = trainer(callbacks=list(callbacks), **{"max_epochs": 3, **options})
    run.fit(module, loader or DataLoader(TensorDataset(*data()), 8), ckpt_path=ckpt_path)
    return run


def circuit(rule="four_synapse", **settings):
    return LearningCircuit((4,), layers=[6, 5, 3], rule=rule, activation="tanh", seed=1, **settings)


def classifier(**settings):
    torch.manual_seed(0)
    return Classifier(mlp(4, 9, 7, 3, act=nn.ReLU), **settings)


def angle(a, b):
    """Cosine by a loop over numbers."""
    pairs = list(zip(a.double().flatten().tolist(), b.double().flatten().tolist(), strict=True))
    dot = sum(x * y for x, y in pairs)
    return dot / math.sqrt(sum(x * x for x, _ in pairs) * sum(y * y for _, y in pairs))


def apart(a, b):
    return float((a - b).norm() / (a.norm() + b.norm()))


def manual_gradients(module, x, y):
    """Gradients of a circuit's mean loss, one sample's derivative after the other."""
    total = {}
    for k in range(len(x)):
        loss = module.backprop_loss((x[k : k + 1], y[k : k + 1]))
        names, parameters = zip(*module.named_parameters(), strict=True)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        for name, g in zip(names, found, strict=True):
            if g is not None:
                total[name] = total.get(name, 0) + g.double() / len(x)
    return total


@pytest.mark.parametrize("rule", ["four_synapse", "kolen_pollack", "feedback_alignment"])
def test_a_circuit_is_read_as_by_loops(rule):
    module = circuit(FourSynapse(0.4, laterals="random") if rule == "four_synapse" else rule)
    x, y = data(8)
    monitor = CircuitMonitor(every_n_steps=1, strict=True)
    fit(module, monitor, loader=DataLoader(TensorDataset(x, y), 8), max_steps=2)
    row = monitor.history[-1]
    gradients = manual_gradients(module, x, y)
    changes, _ = module.local_updates((x, y))
    joined = ([], [])
    for k in range(3):
        names = [f"layers.{k}.{name}" for name in ("W", "bias")]
        ours = torch.cat([changes[name].flatten() for name in names])
        theirs = torch.cat([-gradients[name].flatten() for name in names])
        assert row[f"circuit/layers.{k}/update_cosine"] == pytest.approx(angle(ours, theirs), abs=1e-6)
        joined[0].append(ours), joined[1].append(theirs)
    assert row["circuit/update_cosine"] == pytest.approx(angle(*map(torch.cat, joined)), abs=1e-6)
    pairs = []
    for k in (1, 2):
        layer = module.layers[k]
        pairs.append(angle(layer.W.detach(), layer.B.detach()))
        assert row[f"circuit/layers.{k}/feedback_cosine"] == pytest.approx(pairs[-1], abs=1e-6)
        sigma = torch.linalg.svdvals(layer.W.detach().double())
        p = sigma / sigma.sum()
        expected = float((-(p * p.log()).sum()).exp())
        assert row[f"circuit/layers.{k}/W_rank"] == pytest.approx(expected, rel=1e-4)
    assert row["circuit/feedback_cosine"] == pytest.approx(sum(pairs) / 2, abs=1e-6)
    assert "circuit/layers.0/feedback_cosine" not in row
    assert ("circuit/layers.1/R_rank" in row) == (rule == "four_synapse")


def test_residuals_are_those_of_the_matrices_written_out():
    module = LearningCircuit(
        (2, 6, 6), layers=[Conv(4, kernel_size=3), Conv(3, kernel_size=2), 7, 3],
        rule=FourSynapse(0.4, laterals="random"), activation="tanh",
    )  # fmt: skip
    x = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    monitor = CircuitMonitor(every_n_steps=1, strict=True)
    fit(module, monitor, loader=DataLoader(TensorDataset(x, data(8)[1]), 8), max_steps=1)
    row = monitor.history[-1]
    w, r, b, lat = (module.get_parameter(f"layers.1.{n}").detach().double() for n in "WRBL")
    assert row["circuit/layers.1/VVt_LLt_residual"] == pytest.approx(
        apart(0.4 * torch.einsum("ocxy,odxy->cd", b, b), lat @ lat.T), rel=1e-5
    )
    assert row["circuit/layers.1/WWt_RRt_residual"] == pytest.approx(
        apart(0.4 * torch.einsum("ocxy,pcxy->op", w, w), r @ r.T), rel=1e-5
    )
    vr, lw = torch.einsum("ocxy,po->cpxy", b, r), torch.einsum("cd,pdxy->cpxy", lat, w)
    assert row["circuit/layers.1/VRt_LWt_residual"] == pytest.approx(apart(vr, lw), rel=1e-5)
    assert row["circuit/layers.1/VRt_LWt_cosine"] == pytest.approx(angle(vr, lw), abs=1e-6)
    w, r, b, lat = (module.get_parameter(f"layers.3.{n}").detach().double() for n in "WRBL")
    assert row["circuit/layers.3/VRt_LWt_residual"] == pytest.approx(apart(b.T @ r.T, lat @ w.T), rel=1e-5)


def test_backprop_agrees_with_itself_and_kolen_pollack_comes_to():
    reference, learned = (CircuitMonitor(every_n_steps=1, strict=True) for _ in range(2))
    fit(circuit("backprop"), reference, max_epochs=2)
    for row in reference.history:
        cosines = [value for key, value in row.items() if key.endswith("update_cosine")]
        assert len(cosines) == 4
        assert cosines == pytest.approx([1.0] * 4, abs=1e-6)
        assert not any("feedback" in key or "residual" in key for key in row)
    fit(circuit("kolen_pollack", lr=0.5, decay=0.1), learned, max_epochs=30)
    first, last = learned.history[0], learned.history[-1]
    assert first["circuit/feedback_cosine"] < 0.5
    assert last["circuit/feedback_cosine"] > 0.99
    assert last["circuit/layers.1/W_Vt_residual"] < 0.05 < first["circuit/layers.1/W_Vt_residual"]


def test_gradient_descent_has_one_and_adam_its_closed_form():
    plain, adam = (CircuitMonitor(every_n_steps=1, strict=True) for _ in range(2))
    fit(classifier(), plain, max_steps=3)
    for row in plain.history:
        assert row["circuit/update_cosine"] == pytest.approx(1, abs=1e-5)
        assert row["circuit/net.2/update_cosine"] == pytest.approx(1, abs=1e-5)
    module = classifier(optimizer=torch.optim.Adam, lr=1e-3, eps=1e-30)
    x, y = next(iter(DataLoader(TensorDataset(*data()), 8)))
    layer = module.net[2]
    found = torch.autograd.grad(F.cross_entropy(module(x), y), [layer.weight, layer.bias])
    g = torch.cat([f.flatten() for f in found]).double()
    n = int((g != 0).sum())
    fit(module, adam, max_steps=1)  # Adam's first step is the gradient's sign
    expected = float(g.abs().sum() / g.norm() / n**0.5)
    assert adam.history[0]["circuit/net.2/update_cosine"] == pytest.approx(expected, abs=1e-4)
    assert "circuit/net.2/weight_rank" in adam.history[0]


def test_momentum_is_an_angle_worked_out_by_hand():
    module = classifier(momentum=0.9)
    seen = []

    class Gradients(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append([p.grad.clone() for p in (pl_module.net[0].weight, pl_module.net[0].bias)])

    monitor = CircuitMonitor(every_n_steps=1, strict=True)
    fit(module, Gradients(), monitor, max_steps=2)
    one, two = (torch.cat([g.flatten() for g in gradients]) for gradients in seen)
    row = monitor.history[1]
    assert row["circuit/net.0/update_cosine"] == pytest.approx(angle(two + 0.9 * one, two), abs=1e-5)


class OwnRule(LightningModule):
    """A linear network with fixed random feedback, a rule of one's own under manual optimization."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        generator = torch.Generator().manual_seed(0)
        self.w1 = nn.Parameter(torch.randn(5, 4, generator=generator))
        self.w2 = nn.Parameter(torch.randn(3, 5, generator=generator))
        self.register_buffer("feedback", torch.randn(5, 3, generator=generator))
        self.norm = nn.BatchNorm1d(3)
        self.asked = 0

    def objective(self, batch):
        self.asked += 1
        return (batch[0] @ self.w1.T @ self.w2.T - F.one_hot(batch[1], 3)).square().sum(1).mean() / 2

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        with torch.no_grad():
            h = x @ self.w1.T
            e = (h @ self.w2.T - F.one_hot(y, 3)) / len(x)
            self.w1.grad, self.w2.grad = self.feedback @ e.T @ x, e.T @ h
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD([self.w1, self.w2], lr=0.01)


@pytest.mark.parametrize("how", ["objective", lambda module, batch: module.objective(batch)])
def test_a_rule_of_ones_own_against_a_named_loss(how, monkeypatch):
    opened = []
    run_apart = Sandbox.open
    monkeypatch.setattr(Sandbox, "open", lambda self, **o: opened.append(o) or run_apart(self, **o))
    module = OwnRule()
    x, y = data(8)
    w1, w2 = module.w1.detach().clone(), module.w2.detach().clone()
    e = x @ w1.T @ w2.T - F.one_hot(y, 3)
    expected = angle(module.feedback @ e.T @ x, w2.T @ e.T @ x)
    monitor = CircuitMonitor(every_n_steps=4, loss=how, strict=True)
    fit(module, monitor, loader=DataLoader(TensorDataset(x, y), 8), max_epochs=7)
    assert [row["step"] for row in monitor.history] == [1, 4]
    assert len(opened) == 2  # steps that are not due pay nothing
    assert module.asked == 0  # a copy was
    row = monitor.history[0]
    assert row["circuit/w1/update_cosine"] == pytest.approx(expected, abs=1e-5)
    assert row["circuit/w2/update_cosine"] == pytest.approx(1, abs=1e-5)
    assert row["circuit/w1/w1_rank"] <= 4
    assert not any("norm" in key for key in row)


def test_accumulated_steps_are_compared_with_all_their_batches():
    monitors = [
        CircuitMonitor(every_n_steps=1, strict=True),
        CircuitMonitor(every_n_steps=1, loss=loss_of, strict=True, name="named"),
    ]
    fit(classifier(), *monitors, accumulate_grad_batches=3)
    for monitor in monitors:
        assert [row["step"] for row in monitor.history] == [1, 2, 3]
        angles = [row[f"{monitor.prefix}/update_cosine"] for row in monitor.history]
        assert angles == pytest.approx([1.0] * 3, abs=1e-5)


def loss_of(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


class Freeze(Callback):
    """Puts some submodule into evaluation mode: modes are not the monitor's to change."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1 and hasattr(pl_module, "net"):
            pl_module.net[1].eval()


@pytest.mark.parametrize("kind", ["own loss", "named loss", "circuit"])
def test_a_run_with_the_monitor_is_bitwise_the_run_without(kind):
    states = []
    for watched in (False, True):
        torch.manual_seed(0)
        module = Classifier(convnet(), momentum=0.9)
        if kind == "circuit":
            module = LearningCircuit((1, 8, 8), layers=[Conv(3, stride=2), 5, 4], momentum=0.9)
        loss = loss_of if kind == "named loss" else None
        monitor = CircuitMonitor(every_n_steps=1, loss=loss, strict=True)
        fit(module, *[monitor] * watched, Freeze(), loader=images(shuffle=True))
        optimizer = [t for s in module.trainer.optimizers[0].state.values() for t in s.values()]
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        losses = getattr(module, "losses", [])
        states.append(
            ([*module.state_dict().values(), *optimizer, *gradients, *losses], torch.get_rng_state())
        )
        if watched:
            assert len(monitor.history) == 12
    assert torch.equal(states[0][1], states[1][1])
    assert len(states[0][0]) == len(states[1][0])
    assert all(torch.equal(a, b) for a, b in zip(states[0][0], states[1][0], strict=True))


@pytest.mark.parametrize("kind", ["own loss", "named loss", "circuit"])
def test_two_ranks_read_what_one_reads(kind, tmp_path):
    class Dump(CircuitMonitor):
        def on_train_end(self, trainer, pl_module):
            file = tmp_path / f"{trainer.world_size}-{trainer.global_rank}.json"
            file.write_text(json.dumps(self.history))

    options = {"every_n_steps": 1, "loss": loss_of if kind == "named loss" else None, "strict": True}
    for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
        loader = DataLoader(TensorDataset(*data()), 24 // devices)
        module = circuit() if kind == "circuit" else classifier(momentum=0.9)
        fit(module, Dump(**options), loader=loader, devices=devices, strategy=strategy)
    one, a, b = (json.loads((tmp_path / name).read_text()) for name in ("1-0.json", "2-0.json", "2-1.json"))
    assert a == b
    assert len(one) == 3
    for row, expected in zip(a, one, strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_half_precision_reads_nearly_the_same():
    rows = []
    for precision in ("32-true", "bf16-mixed"):
        for module, loss in ((classifier(), loss_of), (circuit("kolen_pollack"), None)):
            monitor = CircuitMonitor(every_n_steps=1, loss=loss, strict=True)
            fit(module, monitor, max_steps=1, precision=precision)
            rows.append(monitor.history[-1])
    assert rows[2] == pytest.approx(rows[0], rel=0.05, abs=0.02)
    assert rows[3] == pytest.approx(rows[1], rel=0.05, abs=0.02)


def test_a_resumed_run_goes_on_with_the_history(tmp_path):
    whole = CircuitMonitor(every_n_steps=2, strict=True)
    fit(circuit(), whole, max_epochs=4)
    fit(circuit(), CircuitMonitor(every_n_steps=2), max_epochs=2).save_checkpoint(tmp_path / "c.ckpt")
    torch.load(tmp_path / "c.ckpt", weights_only=True)
    second = CircuitMonitor(every_n_steps=2, strict=True)
    fit(circuit(), second, max_epochs=4, ckpt_path=tmp_path / "c.ckpt")
    assert second.history == whole.history


def test_layers_are_chosen():
    for options, names in (
        ({"layers": "layers.[02]"}, {"layers.0", "layers.2"}),
        ({"layers": ["layers.1"]}, {"layers.1"}),
        ({"max_layers": 2}, {"layers.0", "layers.2"}),
        ({"max_layers": 1}, {"layers.2"}),
    ):
        monitor = CircuitMonitor(ranks=False, strict=True, **options)
        fit(circuit(), monitor, max_steps=1)
        assert {key.split("/")[1] for key in monitor.history[0] if key.count("/") == 2} == names
        assert not any(key.endswith("_rank") for key in monitor.history[0])


def test_the_picture_reaches_loggers_that_take_it(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fit(circuit(), CircuitMonitor(strict=True), logger=TensorBoardLogger(tmp_path))
    events = EventAccumulator(str(next(tmp_path.rglob("events*"))))
    events.Reload()
    assert events.Tags()["images"] == ["circuit/alignment"]
    assert "circuit/layers.1/feedback_cosine" in events.Tags()["scalars"]
    assert "circuit/update_cosine" in run.callback_metrics


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="max_layers must be at least 1, got 0"):
        CircuitMonitor(max_layers=0)
    with pytest.raises(
        ValueError, match=r"layers must be a glob, a non-empty list of globs or None, got \[\]"
    ):
        CircuitMonitor(layers=[])
    with pytest.raises(ValueError, match="layers='layer' matches no layer; the nearest names are"):
        fit(circuit(), CircuitMonitor(layers="layer"))
    with pytest.raises(ValueError, match="OwnRule is under manual optimization and is no circuit"):
        fit(OwnRule(), CircuitMonitor())
    with pytest.raises(TypeError, match="loss='goal' is not a method of OwnRule"):
        fit(OwnRule(), CircuitMonitor(loss="goal"))
    with pytest.raises(ValueError, match="no layer to watch"):
        fit(Classifier(nn.BatchNorm1d(4)), CircuitMonitor())


def test_a_fault_in_a_run_is_a_warning_unless_strict():
    def vector(module, batch):
        return module(batch[0]).sum(1)

    with pytest.raises(TypeError, match=r"loss=vector must return a scalar tensor, .* got \(8,\)"):
        fit(classifier(), CircuitMonitor(loss=vector, strict=True))
    with pytest.warns(UserWarning, match="CircuitMonitor failed in prepare_batch at step 0: TypeError"):
        fit(classifier(), CircuitMonitor(loss=vector), max_steps=2)
