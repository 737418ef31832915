"""SharpnessMonitor: against whole Hessians, in every setting of a fit, and without a trace in it."""

import json
import random
import warnings

import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import SharpnessMonitor
from lightning_sym.callbacks.sharpness import line_of
from tests.models import Classifier, SelfAttention, convnet, data, fit, images, mlp

ALL = 10_000  # as many vectors as there are parameters, or more: exact


def classifier(net=None, **settings):
    torch.manual_seed(0)
    return Classifier(net or mlp(4, 6, 3, act=nn.Tanh), **settings)


def exact(module, x, y):
    """The whole Hessian in float64, by autograd, in evaluation mode."""
    module = module.double().eval()
    named = {k: p for k, p in module.net.named_parameters() if p.requires_grad}

    def loss(flat):
        parts = flat.split([p.numel() for p in named.values()])
        values = {k: v.view_as(p) for (k, p), v in zip(named.items(), parts, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(module.net, values, (x.double(),)), y)

    flat = torch.cat([p.detach().flatten() for p in named.values()])
    return torch.autograd.functional.hessian(loss, flat), loss(flat)


def test_readings_are_those_of_the_whole_hessian():
    module = classifier(lr=0.1, momentum=0.5)
    for p in module.net[2].parameters():
        p.requires_grad = p.ndim == 2  # one bias is frozen
    x, y = data(10, seed=1)
    monitor = SharpnessMonitor(
        data=(x, y), vectors=ALL, lanczos_steps=ALL, per_layer=True, every_n_steps=2, strict=True
    )
    fit(module, monitor, max_steps=4)
    row = monitor.history[-1]
    assert row["step"] == 4
    full, loss = exact(module, x, y)
    size = len(full)
    assert size == 4 * 6 + 6 + 18
    assert row["sharpness/trace"] == pytest.approx(float(full.trace()), rel=1e-5)
    assert row["sharpness/trace_error"] == 0
    top = float(torch.linalg.eigvalsh(full)[-1])
    assert row["sharpness/top"] == pytest.approx(top, rel=1e-5)
    assert row["sharpness/top_error"] < 1e-4 * top
    assert row["sharpness/loss"] == pytest.approx(float(loss), rel=1e-5)
    assert row["sharpness/line"] == pytest.approx(3 / 0.1)
    assert row["sharpness/ratio"] == pytest.approx(top / 30, rel=1e-5)
    assert row["sharpness/net.0/trace"] == pytest.approx(float(full.diagonal()[:30].sum()), rel=1e-5)
    assert row["sharpness/net.2/trace"] == pytest.approx(float(full.diagonal()[30:].sum()), rel=1e-5)
    assert monitor.products == 2 * size
    assert monitor.seconds > 0
    assert monitor.gradients > 1


def test_few_vectors_and_steps_are_right_within_their_errors():
    module = classifier(mlp(4, 30, 3, act=nn.Tanh), lr=0.0)
    x, y = data(24)
    monitor = SharpnessMonitor(data=(x, y), vectors=20, lanczos_steps=12, every_n_steps=1, strict=True)
    fit(module, monitor, max_epochs=10)
    full, _ = exact(module, x, y)
    rows = monitor.history
    values = torch.tensor([row["sharpness/trace"] for row in rows], dtype=torch.float64)
    errors = torch.tensor([row["sharpness/trace_error"] for row in rows], dtype=torch.float64)
    assert len(set(values.tolist())) == len(rows) == 30  # other vectors at each step
    assert float(values.std() / errors.mean()) == pytest.approx(1, abs=0.35)
    assert abs(float(values.mean() - full.trace())) < 3.5 * float(errors.mean()) / 30**0.5
    top = float(torch.linalg.eigvalsh(full)[-1])
    for row in rows:
        assert row["sharpness/top"] == pytest.approx(top, rel=1e-3)
        assert row["sharpness/line"] == float("inf")
        assert row["sharpness/ratio"] == 0
    assert monitor.products == 32


class Part(LightningModule):
    """A part that is a LightningModule, and writes to the logger from its forward."""

    def forward(self, x):
        self.logger.log_metrics({"inside": float(x.detach().mean())})
        return x


class Scheduled(Classifier):
    """With such a part, and a rate that is halved at each step."""

    def __init__(self, net, **settings):
        super().__init__(net, **settings)
        self.part = Part()

    def forward(self, x):
        return self.part(self.net(x))

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def test_line_is_that_of_the_next_step_and_parts_are_muted_too(tmp_path):
    class Count(CSVLogger):
        inside = 0

        def log_metrics(self, metrics, step=None):
            self.inside += "inside" in metrics

    logger = Count(tmp_path)
    monitor = SharpnessMonitor(every_n_steps=1, strict=True)
    fit(Scheduled(mlp(4, 6, 3), lr=0.1), monitor, max_steps=3, logger=logger)
    assert [row["sharpness/line"] for row in monitor.history] == pytest.approx([40, 80, 160])
    assert logger.inside == 3


class Busy(Classifier):
    """A training step with everything in it that could leave a trace."""

    def __init__(self, net, **settings):
        super().__init__(net, **settings)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(4)
        self.register_buffer("calls", torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.calls += 1
        x = x * (1 + 0.1 * random.random() + 0.1 * np.random.rand() + 0.1 * torch.rand(()))  # noqa: NPY002
        out = self(x)
        self.accuracy(out, y)
        loss = nn.functional.cross_entropy(out, y)
        self.seen.append(loss)  # graph and all
        self.log("loss", loss.item(), prog_bar=True)
        self.log_dict({"accuracy": self.accuracy})
        self.logger.log_metrics({"by_hand": loss.item()}, step=int(self.calls))
        self.logger.experiment.log_metrics({"raw": 1.0}, step=int(self.calls))
        self.optimizers().param_groups[0]["lr"] *= 0.99
        return {"loss": loss, "out": out.detach()}


def test_a_run_with_the_monitor_is_bitwise_the_run_without(tmp_path):
    states, logs = [], []
    for name in ("without", "with"):
        monitor = SharpnessMonitor(every_n_steps=1, vectors=2, lanczos_steps=2, strict=True)
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        module = Busy(convnet(), momentum=0.9, weight_decay=0.01)
        logger = CSVLogger(tmp_path, name=name)
        run = fit(
            module,
            *([monitor] if name == "with" else []),
            loader=images(shuffle=True),
            logger=logger,
            log_every_n_steps=1,
        )
        state = run.optimizers[0].state_dict()
        momenta = [entry["momentum_buffer"] for entry in state["state"].values()]
        grads = [torch.zeros(()) if p.grad is None else p.grad for p in module.parameters()]
        numbers = [*module.state_dict().values(), *momenta, *grads, torch.stack(module.seen)]
        numbers += [torch.tensor([random.random(), np.random.rand()])]  # noqa: NPY002
        numbers += [torch.get_rng_state(), torch.tensor(state["param_groups"][0]["lr"])]
        states.append(numbers)
        kept = {k: v for k, v in run.callback_metrics.items() if "sharpness" not in k}
        logs.append(kept)
        assert len(module.seen) == run.global_step == 12
        assert type(module) is Busy
        assert module.training
        if name == "with":
            assert len(monitor.history) == 12
            assert all(np.isfinite(list(row.values())).all() for row in monitor.history)
            lines = next(tmp_path.rglob("with/**/metrics.csv")).read_text().splitlines()
            column = lines[0].split(",").index("by_hand")
            assert sum(line.split(",")[column] != "" for line in lines[1:]) == 12
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert logs[0].keys() == logs[1].keys()
    assert all(torch.equal(logs[0][k], logs[1][k]) for k in logs[0])


def test_dropout_is_off_and_normalisation_runs_on_its_statistics():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2),
        nn.BatchNorm2d(2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(18, 4),
    )
    module = classifier(net, lr=0.01)
    x, y = next(iter(images()))
    monitor = SharpnessMonitor(data=(x, y), vectors=3, lanczos_steps=25, every_n_steps=8, strict=True)
    fit(module, monitor, loader=images(), max_steps=8)
    full, loss = exact(module, x, y)
    row = monitor.history[-1]
    assert row["sharpness/loss"] == pytest.approx(float(loss), rel=1e-5)
    assert row["sharpness/top"] == pytest.approx(float(torch.linalg.eigvalsh(full)[-1]), rel=1e-3)
    spread = max(row["sharpness/trace_error"], 1e-3 * float(full.trace().abs()))
    assert abs(row["sharpness/trace"] - float(full.trace())) < 10 * spread


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_any_precision_reads_the_full_one(precision):
    module = classifier(lr=0.05)
    x, y = data(8, seed=2)
    probe = (x.bfloat16() if precision == "bf16-true" else x.double() if "64" in precision else x, y)
    monitor = SharpnessMonitor(
        data=probe, vectors=ALL, lanczos_steps=ALL, every_n_steps=3, seed=1, strict=True
    )
    fit(module, monitor, max_steps=3, precision=precision)
    full, _ = exact(module, x.bfloat16() if precision == "bf16-true" else x, y)
    row = monitor.history[-1]
    assert row["sharpness/trace"] == pytest.approx(float(full.trace()), rel=1e-4)
    assert row["sharpness/top"] == pytest.approx(float(torch.linalg.eigvalsh(full)[-1]), rel=1e-4)


def test_accumulation_reads_the_loss_itself_once_a_step():
    module = classifier(lr=0.05)
    x, y = (part[:8] for part in data())  # the first batch is the probe
    monitor = SharpnessMonitor(vectors=ALL, lanczos_steps=ALL, every_n_steps=1, strict=True)
    fit(module, monitor, accumulate_grad_batches=3, max_epochs=2)
    assert [row["step"] for row in monitor.history] == [1, 2]
    full, _ = exact(module, x, y)
    assert monitor.history[-1]["sharpness/trace"] == pytest.approx(float(full.trace()), rel=1e-5)


def test_attention_has_second_derivatives():
    from tests.models import Flatten

    net = nn.Sequential(SelfAttention(4, 2), Flatten(), nn.Linear(4, 3))
    module = classifier(net, lr=0.05)
    x, y = torch.randn(8, 5, 4), data(8)[1]
    monitor = SharpnessMonitor(data=(x, y), vectors=ALL, lanczos_steps=ALL, every_n_steps=2, strict=True)
    fit(module, monitor, loader=DataLoader(TensorDataset(x, y), 4), max_steps=2)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        full, _ = exact(module, x, y)
    assert monitor.history[-1]["sharpness/trace"] == pytest.approx(float(full.trace()), rel=1e-4)
    top = float(torch.linalg.eigvalsh(full)[-1])
    assert monitor.history[-1]["sharpness/top"] == pytest.approx(top, rel=1e-4)


def test_compiled_modules_are_read_eagerly():
    torch.manual_seed(0)
    net = mlp(4, 6, 3, act=nn.Tanh)
    module = Classifier(torch.compile(net, backend="eager"))
    x, y = data(8)
    monitor = SharpnessMonitor(data=(x, y), vectors=ALL, per_layer=True, every_n_steps=3, strict=True)
    fit(module, monitor, max_steps=3)
    full, _ = exact(classifier(net), x, y)
    row = monitor.history[-1]
    assert row["sharpness/trace"] == pytest.approx(float(full.trace()), rel=1e-5)
    assert row["sharpness/net.2/trace"] == pytest.approx(float(full.diagonal()[30:].sum()), rel=1e-5)


class ByHand(LightningModule):
    """Manual optimization of two losses, with a method that gives one."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = mlp(4, 5, 3, act=nn.Tanh)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.probe_loss(batch))
        optimizer.step()

    def probe_loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.mark.parametrize("loss", ["probe_loss", lambda module, batch: module.probe_loss(batch)])
def test_manual_optimization_needs_a_loss(loss):
    torch.manual_seed(0)
    module, (x, y) = ByHand(), (part[:8] for part in data())
    monitor = SharpnessMonitor(loss=loss, vectors=ALL, lanczos_steps=ALL, every_n_steps=1, strict=True)
    fit(module, monitor, max_steps=2)
    full, _ = exact(module, x, y)
    row = monitor.history[-1]
    assert row["sharpness/trace"] == pytest.approx(float(full.trace()), rel=1e-5)
    assert "sharpness/line" not in row  # Adam has no such line
    with pytest.raises(ValueError, match="loss='training_step' makes steps of its own"):
        fit(ByHand(), SharpnessMonitor())


def test_line_is_where_descent_on_a_quadratic_turns():
    for momentum, nesterov in ((0.0, False), (0.6, False), (0.6, True)):
        for factor, diverges in ((0.97, False), (1.03, True)):
            x = torch.ones(1, dtype=torch.float64, requires_grad=True)
            optimizer = torch.optim.SGD([x], lr=0.1, momentum=momentum, nesterov=nesterov)
            curvature = factor * line_of([optimizer])
            for _ in range(400):
                optimizer.zero_grad()
                (curvature / 2 * x.square()).sum().backward()
                optimizer.step()
            assert (abs(x.item()) > 1) == diverges, (momentum, nesterov, factor)
    x, y = torch.ones(1), torch.ones(1)
    assert line_of([torch.optim.SGD([x], lr=0.1, momentum=0.5, dampening=0.5)]) == pytest.approx(60)
    assert line_of([torch.optim.SGD([x], lr=0.1, maximize=True)]) is None
    assert line_of([torch.optim.SGD([{"params": [x]}, {"params": [y], "lr": 1.0}], lr=0.1)]) is None
    two = [{"params": [x], "weight_decay": 0.1}, {"params": [y]}]
    assert line_of([torch.optim.SGD(two, lr=0.1)]) == pytest.approx(20)
    assert line_of([torch.optim.AdamW([x], lr=0.1)]) is None


def test_two_ranks_read_what_one_reads(tmp_path):
    class Dump(SharpnessMonitor):
        def on_train_end(self, trainer, pl_module):
            file = tmp_path / f"{self.seed}-{trainer.world_size}-{trainer.global_rank}.json"
            file.write_text(json.dumps(self.history))

    def options(seed):
        settings = {"every_n_steps": 1, "vectors": 5, "lanczos_steps": 20, "strict": True}
        return {**settings, "seed": seed, "name": f"sharpness{seed}"}

    probe = data(11, seed=3)
    monitors = [Dump(**options(0)), Dump(data=probe, **options(1)), Dump(samples=4, **options(2))]
    fit(classifier(), *monitors, loader=DataLoader(TensorDataset(*data()), 24), max_epochs=2)
    monitors = [Dump(**options(0)), Dump(data=probe, **options(1)), Dump(samples=4, **options(2))]
    loader = DataLoader(TensorDataset(*data()), 12)
    fit(classifier(), *monitors, loader=loader, max_epochs=2, devices=2, strategy="ddp_fork")
    for seed in range(3):
        one, a, b = (
            json.loads((tmp_path / f"{seed}-{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
        )
        assert a == b
        assert len(a) == len(one) == 2
        if seed == 2:  # the first samples of both ranks are others than those of one
            assert a[0]["sharpness2/loss"] != pytest.approx(one[0]["sharpness2/loss"], rel=1e-6)
            continue
        for row, expected in zip(a, one, strict=True):
            assert row == pytest.approx(expected, rel=1e-3)


def test_a_fault_on_one_rank_stops_no_other(tmp_path):
    class Fails(Classifier):
        def training_step(self, batch, batch_idx):
            if not self.training and self.global_rank == 1:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    class Dump(SharpnessMonitor):
        def on_train_end(self, trainer, pl_module):
            (tmp_path / str(trainer.global_rank)).write_text(f"{trainer.global_step} {len(self.history)}")

    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(*data()), 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first rank's says that it failed on the other
        fit(Fails(mlp(4, 6, 3)), Dump(every_n_steps=1), loader=loader, devices=2, strategy="ddp_fork")
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["3 0", "3 0"]


@pytest.mark.parametrize("shuffle", [False, True])
def test_resuming_goes_on_with_the_same_probe(tmp_path, shuffle):
    def loader():
        return DataLoader(TensorDataset(*data(32)), 8, shuffle=shuffle)

    def monitor():
        settings = {"keep": tmp_path / "kept"} if shuffle else {}
        return SharpnessMonitor(every_n_steps=1, vectors=3, lanczos_steps=3, strict=True, **settings)

    first = monitor()
    fit(classifier(), first, loader=loader(), max_epochs=1).save_checkpoint(tmp_path / "c.ckpt")
    second = monitor()
    module = classifier()
    torch.manual_seed(7)  # another order: the probe is the first one's all the same
    fit(module, second, loader=loader(), max_epochs=2, ckpt_path=tmp_path / "c.ckpt")
    assert len(second.history) == 8
    if not shuffle:
        whole = monitor()
        fit(classifier(), whole, loader=loader(), max_epochs=2)
        assert second.history == whole.history
    kept, probe = first.held.samples[0], second.held.samples[0]
    assert all(torch.equal(a, b) for a, b in zip(kept, probe, strict=True))
    loss = exact(module, *probe)[1]
    assert second.history[-1]["sharpness/loss"] == pytest.approx(float(loss), rel=1e-5)
    module = classifier()
    torch.manual_seed(8)
    fit(module, second, loader=loader(), max_epochs=1)  # another run has a probe of its own
    assert torch.equal(second.held.samples[0][0], first.held.samples[0][0]) != shuffle


def test_bad_input_is_named():
    for options, message in (
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"vectors": -1}, "vectors must be at least 0, got -1"),
        ({"lanczos_steps": -2}, "lanczos_steps must be at least 0, got -2"),
        ({"vectors": 0, "lanczos_steps": 0}, "vectors or lanczos_steps must be positive"),
        ({"vectors": 0, "per_layer": True}, "per_layer=True needs vectors"),
    ):
        with pytest.raises(ValueError, match=message):
            SharpnessMonitor(**options)
    with pytest.raises(TypeError, match="loss='probe_loss' is not a method of Classifier"):
        fit(classifier(), SharpnessMonitor(loss="probe_loss"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss": lambda module, batch: module(batch[0])},
            r"loss=.* must return a scalar tensor, .* got \(8, 3\)",
        ),
        ({"loss": lambda module, batch: None}, "loss=.* must return a scalar tensor, .* got NoneType"),
        ({"loss": lambda module, batch: torch.ones(())}, "loss must depend on the parameters"),
    ],
)
def test_a_bad_loss_is_one_warning_unless_strict(options, message):
    with pytest.warns(UserWarning, match=f"SharpnessMonitor failed in read at step 1: .*{message}") as seen:
        run = fit(classifier(), SharpnessMonitor(every_n_steps=1, **options))
    assert len([w for w in seen if "SharpnessMonitor" in str(w.message)]) == 1
    assert run.global_step == 9
    with pytest.raises((TypeError, ValueError), match=message):
        fit(classifier(), SharpnessMonitor(strict=True, **options))


def test_a_batch_that_can_not_be_stored_asks_for_data():
    class Odd:
        def __init__(self, x, y):
            self.x, self.y = x, y

    class OnOdd(Classifier):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch.x), batch.y)

    def loader():
        return DataLoader(
            TensorDataset(*data()),
            8,
            collate_fn=lambda rows: Odd(*(torch.stack(c) for c in zip(*rows, strict=True))),
        )

    with pytest.raises(TypeError, match="made of tensors, numbers and strings, got Odd; pass data"):
        fit(OnOdd(mlp(4, 6, 3)), SharpnessMonitor(strict=True), loader=loader())
    x, y = data(8)
    torch.manual_seed(0)
    module = OnOdd(mlp(4, 6, 3, act=nn.Tanh))
    monitor = SharpnessMonitor(data=Odd(x, y), vectors=ALL, every_n_steps=3, strict=True)
    fit(module, monitor, loader=loader(), max_steps=3)
    full, _ = exact(module, x, y)
    assert monitor.history[-1]["sharpness/trace"] == pytest.approx(float(full.trace()), rel=1e-5)


def test_readings_reach_loggers_and_metrics(tmp_path):
    logger = CSVLogger(tmp_path)
    run = fit(classifier(), SharpnessMonitor(strict=True), logger=logger)
    assert "sharpness/top" in run.callback_metrics
    assert "sharpness/ratio" in next(tmp_path.rglob("metrics.csv")).read_text()
