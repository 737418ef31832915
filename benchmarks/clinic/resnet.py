"""Residual networks on the digits' images: six blocks of two convolutions with normalisation.

A block adds to a stream that goes on without it. One block of six can be dead and the accuracy hardly knows;
the truth then is that taking the block out changes no output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from . import data, truths
from .common import Batches, Case, Loss, Measures, Net, Optimizer, Task, adam, cross_entropy, over, sgd, under

Spoil = Callable[["ResNet"], None]


class Block(nn.Module):
    """Two convolutions with normalisation, added to what comes in.

    Args:
        width: channels.
        drop: probability of leaving the block out in a training step.
    """

    def __init__(self, width: int, *, drop: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1, self.act = nn.BatchNorm2d(width), nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream with the block added."""
        if self.training and self.drop and float(torch.rand(())) < self.drop:
            return x
        return x + self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))


class ResNet(nn.Module):
    """A stem, blocks with one stride between them, a linear head.

    Args:
        width: channels.
        depth: blocks.
        classes: outputs.
        drop: probability of leaving a block out in training.
    """

    def __init__(self, *, width: int = 16, depth: int = 6, classes: int = 10, drop: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.ModuleList(Block(width, drop=drop) for _ in range(depth))
        self.head = nn.Linear(width * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = nn.functional.max_pool2d(x, 2) if i == len(self.blocks) // 2 else x
            x = block(x)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def task(
    seed: int,
    *,
    classes: int = 10,
    depth: int = 6,
    width: int = 16,
    drop: float = 0.0,
    samples: int | None = None,
    noise: float = 0.0,
    spoil: Spoil | None = None,
    loss: Loss = cross_entropy,
    optimizer: Optimizer | None = None,
    steps: int = 150,
    size: int = 64,
    pretrain: int = 0,
) -> Task:
    """Return a residual network that is to learn digits.

    Args:
        seed: of batches and noisy labels (weights: torch's).
        classes: digits below it alone.
        depth: blocks.
        width: channels.
        drop: probability of leaving a block out in training.
        samples: train on the first so many.
        noise: share of the training labels that are drawn anew.
        spoil: changes the network before training.
        loss: of network and batch.
        optimizer: Adam with a step of 3e-3 by default.
        steps: of the optimizer.
        size: of a batch.
        pretrain: steps on the digits below five before ``spoil``.
    """
    split = data.digits(images=True, classes=classes, samples=samples)
    net = ResNet(classes=classes, depth=depth, width=width, drop=drop)
    if pretrain:
        learn(net, pretrain)
    if spoil is not None:
        spoil(net)
    labels = data.noisy_labels(split.y, noise, classes=classes, seed=seed) if noise else split.y
    module = Net(net, loss, optimizer or adam(3e-3))
    return Task(
        module=module,
        loaders=[Batches(split.x, labels, size=size, seed=seed)],
        steps=steps,
        outcome=truths.classifier(split.x_held, split.y_held),
        examine=truths.both(
            truths.classifier(split.x, labels, prefix="train_"),
            truths.units(lambda module: module(split.x_held)),
            truths.movement(module),
            truths.still(module, "net.stem.0.weight"),
            lambda module: block_effects(module, split.x_held),
        ),
        targets=1,
    )


def learn(net: ResNet, steps: int) -> None:
    """Train a network on the digits below five, in place."""
    split = data.digits(images=True, classes=5)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    batches = Batches(split.x, split.y, size=64)
    made = 0
    while made < steps:
        for batch in batches:
            optimizer.zero_grad()
            cross_entropy(net, batch).backward()
            optimizer.step()
            made += 1
            if made == steps:
                return


def block_effects(module: Net, x: Tensor) -> Measures:
    """Return how much the logits change, at least and at most, when a block adds its mean to every sample.

    Relative to the logits' deviation; ``blocks_idle`` is the number of blocks below a thousandth: they tell
    samples apart no more than a constant does.
    """
    effects = []
    with truths.calm(module):
        whole = module(x)
        for block in module.net.blocks:  # type: ignore[union-attr]
            hook = block.norm2.register_forward_hook(
                lambda _, __, out: out.mean(0, keepdim=True).expand_as(out)
            )
            effects.append(float((module(x) - whole).norm() / (whole - whole.mean(0)).norm()))
            hook.remove()
    idle = sum(effect < 1e-3 for effect in effects)
    return {"block_least": min(effects), "block_most": max(effects), "blocks_idle": float(idle)}


def silent(index: int) -> Spoil:
    """Return what makes one block's ReLU silent for good, and the block's output zero."""

    def spoil(net: ResNet) -> None:
        nn.init.constant_(net.blocks[index].norm1.bias, -10.0)  # type: ignore[arg-type, union-attr]

    return spoil


def shut(index: int) -> Spoil:
    """Return what makes one block's last normalisation and convolution zero: neither gets a gradient."""

    def spoil(net: ResNet) -> None:
        nn.init.zeros_(net.blocks[index].norm2.weight)  # type: ignore[arg-type, union-attr]
        nn.init.zeros_(net.blocks[index].conv2.weight)  # type: ignore[arg-type, union-attr]

    return spoil


def zero_residuals(net: ResNet) -> None:
    """Begin every block as the identity, as is usual: its last normalisation has gain zero."""
    for block in net.blocks:
        nn.init.zeros_(block.norm2.weight)  # type: ignore[arg-type, union-attr]


def frozen_middle(net: ResNet) -> None:
    """Leave ``requires_grad`` off for the stem and the first blocks of an untrained network."""
    nn.init.normal_(net.stem[0].weight, std=0.01)  # type: ignore[arg-type]
    net.stem.requires_grad_(False)
    for block in list(net.blocks)[:5]:
        block.requires_grad_(False)


def fine_tuned(net: ResNet) -> None:
    """Freeze all but the head, on purpose."""
    net.requires_grad_(False)
    nn.init.normal_(net.head.weight, std=0.02)
    net.head.requires_grad_(True)


def constant(net: ResNet) -> None:
    """Give all kernels of the stem and of the blocks' convolutions one value."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            kernel = torch.rand(1, 1, 3, 3) / module.in_channels
            module.weight.data.copy_(kernel.expand_as(module.weight))


CASES = [
    Case(
        "resnet/plain",
        "resnet",
        "Six residual blocks.",
        task,
        (over("accuracy", 0.95), under("blocks_idle", 0.5)),
    ),
    Case(
        "resnet/zero_residuals",
        "resnet",
        "Every block begins as the identity and takes part later.",
        partial(task, spoil=zero_residuals),
        (over("accuracy", 0.96, of_control=True), under("blocks_idle", 0.5), over("start/blocks_idle", 5.5)),
        control="resnet/plain",
    ),
    Case(
        "resnet/zero_residuals_early",
        "resnet",
        "The same, stopped after 20 steps.",
        partial(task, spoil=zero_residuals, steps=20),
        (over("accuracy", 0.25), over("start/blocks_idle", 5.5), under("blocks_idle", 0.5)),
    ),
    Case(
        "resnet/stochastic_depth",
        "resnet",
        "Each block is left out of a third of the steps.",
        partial(task, drop=0.33, steps=200),
        (over("accuracy", 0.96, of_control=True),),
        control="resnet/plain",
    ),
    Case(
        "resnet/frozen_backbone",
        "resnet",
        "Learned on the digits below five, then all but the head frozen on purpose to learn all ten.",
        partial(task, spoil=fine_tuned, pretrain=120, optimizer=adam(1e-2)),
        (over("accuracy", 0.8), over("still_there", 0.99)),
    ),
    Case(
        "resnet/strong_decay",
        "resnet",
        "Decoupled decay that shrinks every kernel, harmless under normalisation.",
        partial(task, optimizer=adam(3e-3, decay=0.7), steps=250),
        (over("accuracy", 0.96, of_control=True), under("shrunk", 0.9)),
        control="resnet/plain",
    ),
    Case(
        "resnet/tiny_data",
        "resnet",
        "Fifty images until they are known by heart.",
        partial(task, samples=50, size=50, steps=100),
        (over("train_accuracy", 0.999), over("accuracy", 0.5)),
    ),
    # --- sick ------------------------------------------------------------------------------------
    Case(
        "resnet/dead_block",
        "resnet",
        "The fourth block's ReLU is silent: the block adds a constant and nothing else.",
        partial(task, spoil=silent(3)),
        (over("never_fire", 0.99), under("block_least", 1e-3)),
        *("dead_block", "initialisation"),
        also=("dead_units", "rank_collapse", "frozen", "vanishing_gradients"),
        layers=("*blocks.3*",),
        control="resnet/plain",
    ),
    Case(
        "resnet/dead_block_shut",
        "resnet",
        "The third block's last convolution and its gain are zero: each keeps the other from ever moving.",
        partial(task, spoil=shut(2)),
        (under("block_least", 1e-3), over("blocks_idle", 0.5)),
        *("dead_block", "initialisation"),
        also=(
            "weights_vanish",
            "rank_collapse",
            "frozen",
            "vanishing_gradients",
            "equal_units",
            "dead_units",
        ),
        layers=("*blocks.2*",),
        control="resnet/plain",
    ),
    Case(
        "resnet/frozen_flag",
        "resnet",
        "requires_grad was left off for an untrained stem and five of six blocks.",
        partial(task, spoil=frozen_middle, width=4),
        (over("still_there", 0.99), under("accuracy", 0.93, of_control=True)),
        *("frozen", "wiring"),
        layers=("*stem*", "*blocks.[0-4]*"),
        control="resnet/narrow",
    ),
    Case(
        "resnet/narrow",
        "resnet",
        "Four channels, all trained.",
        partial(task, width=4),
        (over("accuracy", 0.8),),
    ),
    Case(
        "resnet/diverge",
        "resnet",
        "A rate of 30: the head is thrown about and the loss stays far above that of guessing.",
        partial(task, optimizer=sgd(30.0, momentum=0.9), steps=80),
        (over("diverged", 0.5), under("accuracy", 0.6, of_control=True)),
        *("divergence", "learning rate"),
        also=("exploding_gradients", "dead_units", "rank_collapse"),
        control="resnet/plain",
        leaves=over("loss", 4.0, of_control=True),
    ),
    Case(
        "resnet/equal_by_constant",
        "resnet",
        "All channels begin with one kernel.",
        partial(task, spoil=constant),
        (over("twins", 0.8), under("accuracy", 0.9, of_control=True)),
        *("equal_units", "initialisation"),
        also=("rank_collapse",),
        control="resnet/plain",
    ),
]
