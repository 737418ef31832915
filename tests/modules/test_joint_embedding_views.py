"""Which views a loss sees, what a batch must be, and how long a run's schedule is."""

import math
import types

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_sym.datamodules import MultiViewDataModule
from lightning_sym.losses import CrossCovarianceLoss, barlow_twins_loss, nt_xent_loss, vicreg_loss
from lightning_sym.modules import BarlowTwins, JointEmbedding, SimCLR, VICReg, _parts
from lightning_sym.modules._views import pairs_of
from tests.models import trainer

CLASSES = {"barlow_twins": BarlowTwins, "simclr": SimCLR, "vicreg": VICReg}
LOSSES = {"barlow_twins": barlow_twins_loss, "simclr": nt_xent_loss, "vicreg": vicreg_loss}
TINY = {"projector": (16, 8), "optimizer": "sgd", "lr": 0.05, "schedule": "constant", "rank_check": "off"}


def made(name="simclr", backbone="test_resnet", **options):
    torch.manual_seed(0)
    return CLASSES[name](backbone, **{**TINY, **options})


def views(*sizes, n=6):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64) for size in sizes]


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("sizes", [(16, 16, 8, 8, 8), (8, 16, 8), (16, 16, 16), (8, 12, 16)], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_every_view_is_paired_with_every_global_view(name, sizes, joint):
    """The slow twin is SwAV's and DINO's double loop over (global, other), in float64."""
    module = made(name, joint_forward=joint).double().eval()
    batch = views(*sizes)
    embeddings = [module.projector(module.backbone(view)) for view in batch]
    total, count = 0.0, 0
    for g, large in enumerate(embeddings):
        if sizes[g] != max(sizes):
            continue
        for v, other in enumerate(embeddings):
            if v != g:
                total, count = total + LOSSES[name](large, other).item(), count + 1
    assert module.views_loss((batch, None)).item() == pytest.approx(total / count, rel=1e-9)


def test_two_local_views_are_never_paired():
    large, small = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 4)
    assert pairs_of([large, small, small, small]) == [(0, 1, 1), (0, 2, 1), (0, 3, 1)]
    assert pairs_of([small, large]) == [(1, 0, 1)]
    assert len(pairs_of([large] * 4)) == 6


def test_views_of_one_size_go_through_the_backbone_together():
    module = made(joint_forward=True)
    seen = []
    module.backbone.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape)))
    module.views_loss(([view.float() for view in views(16, 8, 16, 8, 8)], None))
    assert seen == [(12, 3, 16, 16), (18, 3, 8, 8)]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("backend", ["batched", "torchvision"])
def test_a_fit_on_large_and_small_crops(name, backend):
    data = MultiViewDataModule(
        "digits", local_views=2, local_size=8, image_size=16, batch_size=64, backend=backend
    )
    fit = trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=1)
    fit.fit(made(name), datamodule=data)
    assert fit.callback_metrics["train_loss"].isfinite()
    assert fit.callback_metrics["val_loss"].isfinite()


def loader(*batches):
    return DataLoader(list(batches), batch_size=None)


def pair(n=8, size=16, channels=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, channels, size, size, generator=generator) for _ in "ab"]


PLAIN = DataLoader(TensorDataset(torch.zeros(16, 3, 16, 16), torch.zeros(16)), 8)
USE = r"use MultiViewDataModule, or a loader of \(\[first, second, ...\], labels\)"
BATCHES = [
    (PLAIN, rf"with at least 2 views in a list, got a Tensor; {USE}"),
    (loader((pair()[:1], 0)), f"got 1 view; {USE}"),
    (loader({"image": pair()[0]}), rf"must be \(views, labels\), got a mapping of \['image'\]; {USE}"),
    (loader(pair()[0]), rf"must be \(views, labels\), got a Tensor; {USE}"),
    (loader(([*pair(8)[:1], *pair(6)[:1]], 0)), r"of the same samples, got \[8, 6\] samples in"),
    (loader(([torch.zeros(8, 3, 16, 16, dtype=torch.uint8)] * 2, 0)), r"got Tensor of torch.uint8; divide"),
    (loader((["a", "b"], 0)), r"views must be floating-point tensors \[B, C, H, W\], got str"),
    (
        loader((pair(channels=1), 0)),
        r"views \(.*1, 16, 16\) have channels=1, the backbone 'test_resnet' takes 3; make them alike: "
        r"backbone_options=\{'in_chans': 1\}, or channels=3 in the data module",
    ),
]  # fmt: skip


@pytest.mark.parametrize("name", ["barlow_twins", "simclr"])
@pytest.mark.parametrize(("data", "message"), BATCHES, ids=range(len(BATCHES)))
def test_a_wrong_batch_is_told_of_before_the_first_step(data, message, name):
    fit = trainer(max_epochs=1)
    with pytest.raises(ValueError, match=message):
        fit.fit(made(name), data)
    assert fit.global_step == 0


def test_backbones_that_do_not_fit_are_told_of_before_the_first_step():
    def fails(module, message, **options):
        fit = trainer(max_epochs=1, limit_val_batches=0)
        with pytest.raises(ValueError, match=message):
            fit.fit(module, datamodule=MultiViewDataModule("digits", batch_size=64, **options))
        assert fit.global_step == 0

    fails(made(), r"have channels=1, .* takes 3; make them alike", channels=1)
    fails(
        made(backbone="test_vit"),
        r"'test_vit' cannot take views .*: Input height.*; change image_size=7 ",
        image_size=7,
    )
    convolution = made(backbone=nn.Conv2d(3, 8, 3), features=8)
    fails(
        convolution,
        r"backbone Conv2d must give \[B, features\] = \[128, 8\], got \[128, 8, 30, 30\]; pool and flat",
    )
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3072, 9))
    fails(
        made(backbone=flat, features=8),
        r"\[B, features\] = \[128, 8\], got \[128, 9\]; .* give features its width",
    )
    fails(
        made(backbone=flat, features=9),
        "Sequential cannot take views .*; change image_size=16 in",
        image_size=16,
    )


def test_running_out_of_memory_is_no_misfit():
    class Hungry(nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        made(backbone=Hungry(), features=8).embed(torch.zeros(2, 3, 4, 4))

    class Late(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("of its own")
            return x.flatten(1)[:, :8]

    module = made(backbone=Late(), features=8)
    module.embed(torch.zeros(2, 3, 4, 4))
    with pytest.raises(RuntimeError, match="of its own"):
        module.embed(torch.zeros(2, 3, 4, 4))


@pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero")
def test_a_loader_without_a_batch_is_told_of():
    data = DataLoader(TensorDataset(torch.rand(6, 3, 16, 16)), batch_size=16, drop_last=True)
    with pytest.raises(ValueError, match="batch_size must leave a step, got 16 for 6 samples; lower it"):
        trainer(max_epochs=1).fit(made(), data)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield pair(4), torch.zeros(4)


def rates(module, data, **options):
    seen = []
    module.on_train_batch_start = lambda *_: seen.append(module.optimizers().param_groups[0]["lr"])
    fit = trainer(limit_val_batches=0, **options)
    fit.fit(module, data)
    return seen


def cosine(steps, *, line):
    up = [(k + 1) / line for k in range(line)]
    return up + [(1 + math.cos(math.pi * k / (steps - line))) / 2 for k in range(steps - line)]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    "length",
    [{"max_epochs": 10}, {"max_epochs": -1, "max_steps": 20}, {"max_epochs": 10, "max_steps": 99},
     {"max_epochs": 99, "max_steps": 20}, {"max_epochs": -1, "max_steps": 20, "max_time": {"hours": 9}},
     {"max_epochs": 10, "max_time": {"hours": 9}}],
    ids=str,
)  # fmt: skip
def test_the_schedule_ends_with_the_run_however_its_length_is_given(name, length):
    data = loader(*[(pair(4), 0)] * 2)
    module = made(name, schedule="cosine", warmup_epochs=1, lr=1.0, final_lr_share=0.0)
    assert rates(module, data, **length) == pytest.approx(cosine(20, line=2))


def test_an_endless_loader_needs_steps_or_time():
    module = made(schedule="cosine", warmup_epochs=3, lr=1.0)
    endless = DataLoader(Endless(), batch_size=None)
    assert rates(module, endless, max_steps=20) == pytest.approx(cosine(20, line=2))
    with pytest.raises(ValueError, match="set max_steps, max_epochs or max_time"):
        rates(made(schedule="cosine", lr=1.0), endless, max_steps=-1)


class Clock:
    """A trainer of which a hundredth of the time passes every step, and a callback that tells it."""

    def __init__(self, limit=True):
        self.step, self.limit = 0, limit
        self.callbacks = [types.SimpleNamespace(), self]
        self.strategy = types.SimpleNamespace(broadcast=lambda value: value)

    def time_elapsed(self):
        return 0.5 * self.step

    def time_remaining(self):
        return 50.0 - 0.5 * self.step if self.limit else None


def test_under_a_time_limit_the_run_is_as_long_as_its_pace_says(monkeypatch):
    """At a steady pace of a hundredth of the time a step the schedule is that of a hundred steps."""
    clock = Clock()
    assert _parts.time_share(Clock(limit=False)) is None
    clock.step = 25
    assert _parts.time_share(clock) == 0.25
    monkeypatch.setattr(_parts, "time_share", lambda _: clock.step / 100)
    module = made(schedule="cosine", warmup_epochs=2.5, lr=1.0)
    seen = []

    def start(*_):
        seen.append(module.optimizers().param_groups[0]["lr"])
        clock.step = module.trainer.global_step + 1

    clock.step = 0
    module.on_train_batch_start = start
    trainer(limit_val_batches=0, max_epochs=1000, limit_train_batches=2, max_steps=100).fit(
        module, loader(*[(pair(4), 0)] * 2)
    )
    assert seen == pytest.approx(cosine(100, line=5))
    clock.step = 200  # over time
    assert module.lr_schedulers().lr_lambdas[0](100) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", CLASSES)
def test_a_run_of_seconds_warms_up_and_ends_near_zero(name):
    module = made(name, schedule="cosine", lr=1e-3, final_lr_share=0.0)
    seen = rates(module, DataLoader(Endless(), batch_size=None), max_time={"seconds": 3}, max_steps=-1)
    assert len(seen) > 10
    assert all(0 <= rate <= 1e-3 * (1 + 1e-9) for rate in seen)
    assert seen[-1] < 0.1 * max(seen)
    assert max(seen) > 0.7e-3


def test_the_default_rate_under_steps_and_time():
    for length in ({"max_steps": 2}, {"max_time": {"seconds": 1}}, {"max_steps": 2, "max_epochs": 5}):
        module = made(lr=None)
        data = MultiViewDataModule("digits", image_size=16, batch_size=64)
        trainer(limit_val_batches=0, **length).fit(module, datamodule=data)
        assert module.optimizers().param_groups[0]["lr"] == pytest.approx(0.3 * 64 / 256)


def test_losses_of_ones_own_see_the_same_pairs():
    module = JointEmbedding(CrossCovarianceLoss(), "test_resnet", **TINY).double().eval()
    batch = views(16, 16, 8)
    a, b, c = (module.projector(module.backbone(view)) for view in batch)
    loss = module.loss
    expected = (2 * loss(a, b) + loss(a, c) + loss(b, c)) / 4
    assert module.views_loss((batch, None)).item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.filterwarnings("ignore:.*set to 0.*|.*limit_train_batches.*")
def test_no_training_batches_on_purpose_is_no_error():
    fit = trainer(max_epochs=1, limit_train_batches=0, limit_val_batches=0)
    fit.fit(made(schedule="cosine", warmup_epochs=1), [(pair(4), torch.zeros(4))])
    assert fit.global_step == 0
