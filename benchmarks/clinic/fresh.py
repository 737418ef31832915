"""Cases unlike those that rules were tuned on: other architectures, other mistakes, other look-alikes.

They were written when the rules stood, run once, and no rule was changed after.

Shape letters: N samples, T positions, F features, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from . import data, truths
from .common import (
    Batches,
    Case,
    Check,
    Loss,
    Measures,
    Net,
    Optimizer,
    Task,
    adam,
    cross_entropy,
    mean_square,
    over,
    sgd,
    under,
)
from .fresh_nets import (
    Attentive,
    Cells,
    Experts,
    Mixer,
    Separate,
    Shuffled,
    Skips,
    Squeezing,
    Teacher,
    Unrolled,
    Words,
    deep,
)

Measure = Callable[[LightningModule], Measures]
FULL = 320


def task(
    seed: int,
    *,
    net: Callable[[], nn.Module],
    split: Callable[[], data.Split] = data.digits,
    loss: Loss = cross_entropy,
    optimizer: Optimizer | None = None,
    schedule: Callable[[int], float] | None = None,
    steps: int = 200,
    size: int = 64,
    outcome: Callable[[data.Split], Measure] | None = None,
    still: str = "",
    extra: Callable[[data.Split], Measure] | None = None,
    curvature: float | None = None,
    targets: int | None = 1,
) -> Task:
    """Return a network on a task.

    Args:
        seed: of batches (weights: torch's).
        net: makes the network.
        split: the data.
        loss: of network and batch.
        optimizer: Adam with a step of 2e-3 by default.
        schedule: factor of the learning rate by step.
        steps: of the optimizer.
        size: of a batch.
        outcome: the measure of a split; the accuracy by default.
        still: glob of parameters that are asked whether they moved.
        extra: a further measure of a split, at the start and the end.
        curvature: a learning rate: measure the sharpness on the whole training set too.
        targets: where the class labels are.
    """
    chosen = split()
    module = Net(net(), loss, optimizer or adam(2e-3), schedule=schedule)
    measure = outcome(chosen) if outcome else truths.classifier(chosen.x_held, chosen.y_held)
    examine = [
        truths.units(lambda module: module(chosen.x_held)),
        truths.gradients(lambda: (chosen.x[:64], chosen.y[:64])),
        truths.movement(module),
    ]
    if still:
        examine.append(truths.still(module, still))
    if extra is not None:
        examine.append(extra(chosen))
    if curvature is not None:
        examine.append(truths.sharpness(lambda: (chosen.x, chosen.y), curvature))
    loaders = [Batches(chosen.x, chosen.y, size=size, seed=seed)]
    return Task(module, loaders, steps, measure, truths.both(*examine), targets=targets)


def error(split: data.Split) -> Measure:
    """Return the error as a share of the targets' variance."""
    return truths.regressor(split.x_held, split.y_held)


def reconstruction(split: data.Split) -> Measure:
    """Return the error of an autoencoder as a share of the data's variance."""
    return truths.regressor(split.x_held, split.x_held)


def reconstructs(net: nn.Module, batch: Any) -> Tensor:
    """Return the mean square error of an autoencoder."""
    return F.mse_loss(net(batch[0]), batch[0])


def denoises(net: nn.Module, batch: Any) -> Tensor:
    """Return the error of what a network takes for the noise in noisy images."""
    noise, share = torch.randn_like(batch[0]), torch.rand(len(batch[0]), 1)
    return F.mse_loss(net(share.sqrt() * noise + (1 - share).sqrt() * batch[0]), noise)


def denoising(split: data.Split) -> Measure:
    """Return how well noise is told from images that are half noise."""

    def measure(module: LightningModule) -> Measures:
        with truths.calm(module):
            torch.manual_seed(3)
            noise = torch.randn_like(split.x_held)
            made = module(math.sqrt(0.5) * (noise + split.x_held))
        return {"error": float((made - noise).square().mean())}

    return measure


def rare(net: nn.Module, batch: Any) -> Tensor:
    """Return the loss of telling zeros from the other digits, one logit."""
    return F.binary_cross_entropy_with_logits(net(batch[0]).squeeze(-1), (batch[1] == 0).float())


def rare_found(split: data.Split) -> Measure:
    """Return the share of held-out digits that are told rightly."""

    def measure(module: LightningModule) -> Measures:
        with truths.calm(module):
            right = (module(split.x_held).squeeze(-1) > 0) == (split.y_held == 0)
        return {"accuracy": float(right.double().mean())}

    return measure


def focus(split: data.Split) -> Measure:
    """Return the largest attention weight of the first layer, on average."""

    def measure(module: LightningModule) -> Measures:
        with truths.calm(module):
            return {"focus": module.net.focus(split.x_held)}

    return measure


def mostly_noise() -> data.Split:
    """Return three digits of which half the labels are drawn anew."""
    split = data.digits(classes=3)
    return split._replace(y=data.noisy_labels(split.y, 0.5, classes=3))


def offset_targets() -> data.Split:
    """Return a noisy linear target with an offset, one output."""
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(1280, 12, generator=generator)
    clean = x[:, :1] - x[:, 1:2] + 5
    y = clean + torch.randn(clean.shape, generator=generator)
    return data.Split(x[:1024], y[:1024], x[1024:], clean[1024:])


def as_images(split: Callable[[], data.Split] = data.digits) -> data.Split:
    """Return digits as images."""
    return data.digits(images=True)


def rows() -> data.Split:
    """Return digits as sequences of eight rows."""
    split = data.digits()
    return split._replace(x=split.x.reshape(-1, 8, 8), x_held=split.x_held.reshape(-1, 8, 8))


def words() -> data.Split:
    """Return bags of words out of 500, of which 40 occur; the label is the commoner half."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(40, (1280, 9), generator=generator)
    y = ((x < 20).sum(1) > 4).long()
    return data.Split(x[:1024], y[:1024], x[1024:], y[1024:])


def unscaled() -> data.Split:
    """Return digits with pixels up to 4000."""
    split = data.digits()
    return split._replace(x=4000 * split.x, x_held=4000 * split.x_held)


def few() -> data.Split:
    """Return 320 digits to train on."""
    return data.digits(samples=FULL)


def without(prefix: str, lr: float) -> Optimizer:
    """Return a maker of Adam that was never given some parameters."""
    return adam(lr, without=(prefix,))


def jump(step: int) -> float:
    """Return a learning rate that a wrong schedule raises 2000-fold after 120 steps."""
    return 1.0 if step < 120 else 2000.0


IMAGES: dict[str, Any] = {"split": as_images}
HEALTHY: tuple[tuple[str, str, Callable[[int], Task], tuple[Check, ...]], ...] = (
    (
        "offset_regression",
        "One output, an offset, targets that are half noise.",
        partial(
            task,
            net=partial(deep, 12, 64, 2, 1),
            split=offset_targets,
            loss=mean_square,
            outcome=error,
            steps=300,
            targets=None,
        ),
        (under("error", 0.3),),
    ),
    ("mixer", "Positions and channels mixed in turn.", partial(task, net=Mixer), (over("accuracy", 0.85),)),
    (
        "squeezing",
        "Convolutions gated by sigmoids of their means.",
        partial(task, net=Squeezing, optimizer=adam(5e-3), **IMAGES),
        (over("accuracy", 0.7),),
    ),
    (
        "layer_scale",
        "Residual blocks whose gain begins at 1e-5.",
        partial(task, net=partial(Skips, gain=1e-5), steps=300),
        (over("accuracy", 0.9),),
    ),
    (
        "unused_words",
        "A table of 500 words of which 40 occur, a bag of them, two classes.",
        partial(task, net=Words, split=words, optimizer=adam(1e-2)),
        (over("accuracy", 0.9),),
    ),
    (
        "teacher",
        "A student learns from a frozen network's outputs.",
        partial(
            task,
            net=Teacher,
            loss=lambda net, batch: net.distil(batch[0]),  # type: ignore[no-any-return]
            outcome=lambda split: lambda module: module.net.apart(split.x_held),
            steps=300,
            targets=None,
        ),
        (under("apart", 0.3),),
    ),
    (
        "long_warm_up",
        "The rate rises from 0 over 150 of 300 steps, SGD with momentum.",
        partial(
            task,
            net=partial(deep, 64, 64, 2, 10),
            optimizer=sgd(0.1, momentum=0.9),
            schedule=lambda step: min(1.0, step / 150),
            steps=300,
        ),
        (over("accuracy", 0.9),),
    ),
    (
        "experts",
        "Four experts, the best one alone for each sample.",
        partial(task, net=Experts, steps=300),
        (over("accuracy", 0.8),),
    ),
    (
        "three_codes",
        "An autoencoder with three tanh codes.",
        partial(
            task,
            net=lambda: nn.Sequential(deep(64, 64, 1, 3, act=nn.Tanh), nn.Tanh(), deep(3, 64, 1, 64)),
            loss=reconstructs,
            outcome=reconstruction,
            steps=400,
            targets=None,
        ),
        (under("error", 0.75),),
    ),
    (
        "rare_class",
        "One logit for a class of a tenth.",
        partial(task, net=partial(deep, 64, 64, 2, 1), loss=rare, outcome=rare_found, targets=None),
        (over("accuracy", 0.97),),
    ),
    (
        "pairs",
        "Two samples a batch.",
        partial(task, net=partial(deep, 64, 48, 1, 10), size=2, optimizer=adam(5e-4), steps=1000),
        (over("accuracy", 0.75),),
    ),
    (
        "half_noise",
        "Three classes, half of the labels drawn anew.",
        partial(task, net=partial(deep, 64, 64, 2, 3), split=mostly_noise),
        (over("accuracy", 0.9),),
    ),
    (
        "denoiser",
        "The noise in images is told at all levels.",
        partial(
            task,
            net=partial(deep, 64, 128, 2, 64, act=nn.SiLU),
            loss=denoises,
            outcome=denoising,
            steps=400,
            targets=None,
        ),
        (under("error", 0.7),),
    ),
    (
        "cells",
        "A GRU cell called position by position.",
        partial(task, net=Cells, split=rows, optimizer=adam(5e-3)),
        (over("accuracy", 0.75),),
    ),
    (
        "attentive",
        "Two encoder layers with normalisation after the sum.",
        partial(task, net=Attentive, split=rows, optimizer=adam(1e-3)),
        (over("accuracy", 0.75),),
    ),
    (
        "unrolled",
        "A tanh recurrence as a loop, of orthogonal weights.",
        partial(task, net=Unrolled, split=rows),
        (over("accuracy", 0.7),),
    ),
    (
        "full_batch",
        "Full batch, plain descent, far from the edge.",
        partial(
            task,
            net=partial(deep, 64, 48, 1, 10, act=nn.Tanh),
            split=few,
            size=FULL,
            optimizer=sgd(0.2),
            steps=300,
            curvature=0.2,
        ),
        (under("lr_sharpness", 1.5),),
    ),
    (
        "shuffled",
        "Six tasks, the pixels shuffled anew for each, at a modest rate.",
        partial(task, net=partial(Shuffled, every=80), steps=480),
        (under("never_fire", 0.6),),
    ),
)
DEEP = partial(deep, 64, 48, 15, 10)

CASES = [
    *(Case(f"fresh/{name}", "fresh", about, build, checks) for name, about, build, checks in HEALTHY),
    Case(
        "fresh/sixteen",
        "fresh",
        "Sixteen layers with layer normalisation.",
        partial(task, net=partial(DEEP, norm=True), steps=300),
        (over("accuracy", 0.8),),
    ),
    Case(
        "fresh/separate",
        "fresh",
        "Three layers called by hand.",
        partial(task, net=partial(Separate, 8)),
        (over("accuracy", 0.7),),
    ),
]
