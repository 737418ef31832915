"""Convolutional networks on the digits' 8x8 images: without normalisation (``cnn``) and with (``cnn_bn``).

Batch normalisation makes weights free in their scale: decay may shrink them to little at full accuracy. The
same shrinking without it takes the network down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from . import data, truths
from .common import Batches, Case, Loss, Net, Optimizer, Task, adam, cross_entropy, over, sgd, under

Spoil = Callable[[nn.Sequential], None]


def convolutional(
    channels: Sequence[int],
    act: Callable[[], nn.Module],
    *,
    norm: bool,
    classes: int,
    pool: Sequence[int] = (1,),
) -> nn.Sequential:
    """Return 3x3 convolutions, a normalisation and an activation after each, pooled at the end."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(zip((1, *channels), channels, strict=False)):
        layers.append(nn.Conv2d(a, b, 3, padding=1, bias=True))
        if norm:
            layers.append(nn.BatchNorm2d(b))
        layers.append(act())
        if i in pool:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels[-1], classes))


def task(
    seed: int,
    *,
    norm: bool = False,
    channels: Sequence[int] = (12, 16, 16),
    act: Callable[[], nn.Module] = nn.ReLU,
    classes: int = 10,
    samples: int | None = None,
    noise: float = 0.0,
    spoil: Spoil | None = None,
    wrap: Callable[[nn.Sequential], nn.Module] = lambda net: net,
    loss: Loss = cross_entropy,
    optimizer: Optimizer | None = None,
    schedule: Callable[[int], float] | None = None,
    steps: int = 250,
    size: int = 64,
    shift: bool = False,
    curvature: float | None = None,
) -> Task:
    """Return a convolutional network that is to learn digits.

    Args:
        seed: of batches and noisy labels (weights: torch's).
        norm: with batch normalisation.
        channels: of the convolutions.
        act: the activation.
        classes: digits below it alone.
        samples: train on the first so many.
        noise: share of the training labels that are drawn anew.
        spoil: changes the network before training.
        wrap: puts the network into another.
        loss: of network and batch.
        optimizer: Adam with a step of 4e-3 by default.
        schedule: factor of the learning rate by step.
        steps: of the optimizer.
        size: of a batch.
        shift: train on images shifted by up to a pixel.
        curvature: a learning rate: measure the sharpness on the training set too.
    """
    split = data.digits(images=True, classes=classes, samples=samples)
    net = convolutional(channels, act, norm=norm, classes=classes)
    if spoil is not None:
        spoil(net)
    labels = data.noisy_labels(split.y, noise, classes=classes, seed=seed) if noise else split.y
    module = Net(wrap(net), shifted(loss) if shift else loss, optimizer or adam(4e-3), schedule=schedule)
    examine = [
        truths.classifier(split.x, labels, prefix="train_"),
        truths.units(lambda module: module(split.x_held)),
        truths.gradients(lambda: (split.x[:128], labels[:128])),
        truths.movement(module),
        truths.still(module, "*0.weight"),
    ]
    if curvature is not None:
        examine.append(truths.sharpness(lambda: (split.x[:FEW], labels[:FEW]), curvature))
    return Task(
        module=module,
        loaders=[Batches(split.x, labels, size=size, seed=seed)],
        steps=steps,
        outcome=truths.classifier(split.x_held, split.y_held),
        examine=truths.both(*examine),
        targets=1,
    )


FEW = 256  # samples of the full-batch runs


def shifted(loss: Loss) -> Loss:
    """Return the loss on images rolled by up to a pixel each way."""

    def on_shifted(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        by = torch.randint(-1, 2, (2,)).tolist()
        return loss(net, (batch[0].roll(by, dims=(2, 3)), batch[1]))

    return on_shifted


def squared(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the square error against one-hot labels."""
    return (net(batch[0]) - nn.functional.one_hot(batch[1], 10).float()).square().mean()


class CutOff(nn.Module):
    """A network whose first part is run on detached activations, so that it never gets a gradient.

    Args:
        net: the network.
        after: how many of its children form the first part.
    """

    def __init__(self, net: nn.Sequential, after: int) -> None:
        super().__init__()
        self.first, self.rest = net[:after], net[after:]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output."""
        return self.rest(self.first(x).detach())


def parts(net: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    """Return the modules of a kind, in order."""
    return [child for child in net.modules() if isinstance(child, kind)]


def layer_bias(index: int, value: float) -> Spoil:
    """Return what sets the bias of one convolution."""
    return lambda net: nn.init.constant_(parts(net, nn.Conv2d)[index].bias, value)  # type: ignore[arg-type, return-value]


def norm_bias(index: int, value: float) -> Spoil:
    """Return what sets the bias of one batch normalisation."""
    return lambda net: nn.init.constant_(parts(net, nn.BatchNorm2d)[index].bias, value)  # type: ignore[arg-type, return-value]


def constant(net: nn.Sequential) -> None:
    """Give every channel of a convolution the same kernel."""
    for conv in parts(net, nn.Conv2d):
        kernel = torch.randn(1, *conv.weight.shape[1:]) / conv.weight[0].numel() ** 0.5  # type: ignore[index, union-attr, operator]
        conv.weight.data.copy_(kernel.mean(1, keepdim=True).abs().expand_as(conv.weight))  # type: ignore[union-attr, operator, arg-type]
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    last = parts(net, nn.Linear)[-1]
    weight = last.weight.data  # type: ignore[union-attr]
    spread = torch.randn(len(weight), 1, 4) * 0.1  # type: ignore[arg-type]
    weight.copy_(spread.expand(-1, weight.shape[1] // 4, -1).reshape_as(weight))  # type: ignore[operator, union-attr, index, arg-type]


def gain(factor: float) -> Spoil:
    """Return what draws kernels of deviation ``factor / sqrt(inputs)``."""

    def spoil(net: nn.Sequential) -> None:
        for layer in parts(net, nn.Conv2d):
            nn.init.normal_(layer.weight, std=factor / layer.weight[0].numel() ** 0.5)  # type: ignore[arg-type, index, union-attr, operator]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    return spoil


LEAKY = partial(nn.LeakyReLU, 0.2)  # a unit that cannot die: the loss goes on growing
BN = partial(task, norm=True)

CASES = [
    # --- without normalisation: healthy ---------------------------------------------------------------
    Case("cnn/plain", "cnn", "Three convolutions of ReLU.", task, (over("accuracy", 0.93),)),
    Case(
        "cnn/early",
        "cnn",
        "Stopped after 25 steps.",
        partial(task, steps=25),
        (over("accuracy", 0.2), under("accuracy", 0.9)),
    ),
    Case(
        "cnn/tiny_data",
        "cnn",
        "Fifty images until they are known by heart.",
        partial(task, samples=50, size=50, steps=200),
        (over("train_accuracy", 0.999), over("accuracy", 0.5)),
    ),
    Case(
        "cnn/shifts",
        "cnn",
        "Images shifted at random: a task that stays hard.",
        partial(task, shift=True),
        (over("accuracy", 0.9, of_control=True),),
        control="cnn/plain",
    ),
    Case(
        "cnn/strong_decay",
        "cnn",
        "Decoupled decay of 0.5, no accuracy lost.",
        partial(task, optimizer=adam(4e-3, decay=0.5), steps=350),
        (over("accuracy", 0.97, of_control=True),),
        control="cnn/plain",
    ),
    # --- without normalisation: sick ------------------------------------------------------------------
    Case(
        "cnn/dead_layer",
        "cnn",
        "The second convolution's biases are -10: its channels are silent, and what follows sees nothing.",
        partial(task, spoil=layer_bias(1, -10.0)),
        (over("never_fire", 0.99), under("accuracy", 0.5, of_control=True)),
        *("dead_units", "initialisation"),
        also=("rank_collapse", "vanishing_gradients", "frozen", "dead_block"),
        layers=("*net.2*", "*net.5*"),
        control="cnn/plain",
    ),
    Case(
        "cnn/equal_by_constant",
        "cnn",
        "All kernels of a convolution begin equal.",
        partial(task, spoil=constant),
        (over("twins", 0.9), under("accuracy", 0.9, of_control=True)),
        *("equal_units", "initialisation"),
        also=("rank_collapse",),
        control="cnn/plain",
    ),
    Case(
        "cnn/vanish_by_decay",
        "cnn",
        "L2 that outweighs the gradient.",
        partial(task, optimizer=sgd(0.1, decay=0.2), steps=350),
        (under("shrunk", 0.05), under("accuracy", 0.6, of_control=True)),
        *("weights_vanish", "decay"),
        also=("rank_collapse", "vanishing_gradients"),
        control="cnn/plain",
        leaves=under("accuracy", 0.8, of_control=True),
    ),
    Case(
        "cnn/diverge",
        "cnn",
        "A rate that throws the weights away: the loss ends far above that of guessing.",
        partial(task, act=LEAKY, optimizer=sgd(5.0, momentum=0.9), steps=100),
        (over("diverged", 0.5),),
        *("divergence", "learning rate"),
        also=("exploding_gradients",),
        control="cnn/plain",
    ),
    Case(
        "cnn/vanish_in_sigmoids",
        "cnn",
        "Eight convolutions of sigmoids.",
        partial(task, act=nn.Sigmoid, channels=(12,) * 8),
        (under("start/gradient_ratio", 1e-4), under("accuracy", 0.5, of_control=True)),
        *("vanishing_gradients", "depth"),
        also=("rank_collapse",),
        control="cnn/plain",
    ),
    Case(
        "cnn/saturated",
        "cnn",
        "Kernels forty times too large before tanh.",
        partial(task, act=nn.Tanh, spoil=gain(40.0), optimizer=sgd(0.1)),
        (over("saturated", 0.8), under("accuracy", 0.93, of_control=True)),
        *("saturation", "initialisation"),
        also=("vanishing_gradients", "exploding_gradients", "frozen"),
        control="cnn/plain",
    ),
    # --- with normalisation: healthy -----------------------------------------------------------------
    Case(
        "cnn_bn/plain", "cnn_bn", "Batch normalisation after each convolution.", BN, (over("accuracy", 0.95),)
    ),
    Case(
        "cnn_bn/shrunk_but_fine",
        "cnn_bn",
        "Decay shrinks the kernels to a fraction; normalisation makes their scale of no account.",
        partial(BN, optimizer=adam(4e-3, decay=0.8), steps=300),
        (over("accuracy", 0.93, of_control=True), under("shrunk", 0.5)),
        control="cnn_bn/plain",
    ),
    Case(
        "cnn_bn/small_batch",
        "cnn_bn",
        "Eight images a batch.",
        partial(BN, size=8, optimizer=adam(1e-3), steps=400),
        (over("accuracy", 0.93, of_control=True),),
        control="cnn_bn/plain",
    ),
    Case(
        "cnn_bn/binary_head",
        "cnn_bn",
        "Zeros against ones.",
        partial(BN, classes=2, steps=100),
        (over("accuracy", 0.98),),
    ),
    Case(
        "cnn_bn/label_noise",
        "cnn_bn",
        "Two labels in five drawn anew.",
        partial(BN, noise=0.4),
        (over("accuracy", 0.75), under("train_accuracy", 0.9)),
    ),
    Case(
        "cnn_bn/full_batch_stable",
        "cnn_bn",
        "Full-batch descent on 256 images below the edge of stability.",
        partial(BN, samples=FEW, size=FEW, loss=squared, optimizer=sgd(0.02), steps=200, curvature=0.02),
        (under("lr_sharpness", 1.2), over("accuracy", 0.5)),
    ),
    # --- with normalisation: sick --------------------------------------------------------------------
    Case(
        "cnn_bn/dead_by_norm",
        "cnn_bn",
        "The second normalisation's biases are -6: no channel behind it fires.",
        partial(BN, spoil=norm_bias(1, -6.0)),
        (over("never_fire", 0.9), under("accuracy", 0.7, of_control=True)),
        *("dead_units", "initialisation"),
        also=("rank_collapse", "vanishing_gradients", "frozen"),
        layers=("*net.3*", "*net.4*", "*net.7*"),
        control="cnn_bn/plain",
    ),
    Case(
        "cnn_bn/equal_by_constant",
        "cnn_bn",
        "All kernels of a convolution begin equal.",
        partial(BN, spoil=constant),
        (over("twins", 0.9), under("accuracy", 0.9, of_control=True)),
        *("equal_units", "initialisation"),
        also=("rank_collapse",),
        control="cnn_bn/plain",
    ),
    Case(
        "cnn_bn/detached",
        "cnn_bn",
        "The features are detached by mistake behind two narrow convolutions.",
        partial(BN, channels=(1, 2, 16), wrap=partial(CutOff, after=6)),
        (over("still_there", 0.99), under("accuracy", 0.97, of_control=True)),
        *("frozen", "wiring"),
        layers=("*first*",),
        control="cnn_bn/narrow",
    ),
    Case(
        "cnn_bn/narrow",
        "cnn_bn",
        "Convolutions of one and two channels first, trained.",
        partial(BN, channels=(1, 2, 16)),
        (over("accuracy", 0.85),),
    ),
    Case(
        "cnn_bn/edge",
        "cnn_bn",
        "Full-batch descent on 256 images whose curvature has climbed to two over the rate.",
        partial(BN, samples=FEW, size=FEW, loss=squared, optimizer=sgd(0.8), steps=200, curvature=0.8),
        (over("lr_sharpness", 1.8), over("accuracy", 0.3)),
        *("edge_of_stability", "learning rate"),
        control="cnn_bn/full_batch_stable",
    ),
]
