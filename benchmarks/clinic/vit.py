"""Vision transformers on the digits' images: sixteen patches of 2x2 and a class token."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import data, truths
from .attention import Block, attention_entropy, block_effects, scaled_queries
from .common import Batches, Case, Loss, Measures, Net, Optimizer, Task, adam, cross_entropy, over, sgd, under

Spoil = Callable[["ViT"], None]


class ViT(nn.Module):
    """Patches, a class token, blocks, a head on the token.

    Args:
        width: of the stream.
        depth: blocks.
        classes: outputs.
        pooled: read the mean of all positions instead of the token.
        scale: multiplies the logits; what the network says before training is subtracted then.
        options: of :class:`~benchmarks.clinic.attention.Block`.
    """

    def __init__(
        self, *, width: int = 32, depth: int = 3, classes: int = 10, pooled: bool = False, **options: Any
    ) -> None:
        super().__init__()
        options = {"heads": 4, "causal": False, "dropout": 0.0, **options}
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.place = nn.Parameter(torch.randn(1, 17, width) * 0.2)
        self.blocks = nn.ModuleList(Block(width, **options) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        self.pooled = pooled

    def stream(self, x: Tensor) -> Tensor:
        """Return the first block's input, ``[N, 17, E]``."""
        patches = self.patch(x).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(x), -1, -1), patches], dim=1) + self.place

    def features(self, x: Tensor) -> Tensor:
        """Return the last block's output, ``[N, 17, E]``."""
        x = self.stream(x)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.norm(self.features(x))
        return self.head(x.mean(1) if self.pooled else x[:, 0])


class Scaled(nn.Module):
    """A network whose output's change since the start is multiplied: the kernel regime where it is large.

    Args:
        net: the network.
        scale: the factor.
    """

    def __init__(self, net: ViT, scale: float) -> None:
        super().__init__()
        self.net, self.scale = net, scale
        self.start = copy.deepcopy(net).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled change of the logits."""
        return self.scale * (self.net(x) - self.start(x))


def task(
    seed: int,
    *,
    net: Callable[[], ViT] = ViT,
    classes: int = 10,
    samples: int | None = None,
    noise: float = 0.0,
    spoil: Spoil | None = None,
    wrap: Callable[[ViT], nn.Module] = lambda net: net,
    loss: Loss = cross_entropy,
    optimizer: Optimizer | None = None,
    steps: int = 250,
    size: int = 64,
) -> Task:
    """Return a vision transformer that is to learn digits.

    Args:
        seed: of batches and noisy labels (weights: torch's).
        net: makes the network.
        classes: digits below it alone.
        samples: train on the first so many.
        noise: share of the training labels that are drawn anew.
        spoil: changes the network before training.
        wrap: puts it into another.
        loss: of network and batch.
        optimizer: Adam with a step of 3e-3 by default.
        steps: of the optimizer.
        size: of a batch.
    """
    split = data.digits(images=True, classes=classes, samples=samples)
    vit = net()
    if spoil is not None:
        spoil(vit)
    labels = data.noisy_labels(split.y, noise, classes=classes, seed=seed) if noise else split.y
    module = Net(wrap(vit), loss, optimizer or adam(3e-3))
    few = split.x_held[:128]

    def inside(module: Net) -> Measures:
        with truths.calm(module):
            features = vit.features(few)
            tokens = sum(truths.likeness(rows - rows.mean(-1, keepdim=True)) for rows in features) / len(
                features
            )
            found = attention_entropy(vit.blocks, vit.stream(few)) | block_effects(
                vit.blocks, vit.stream(few)
            )
            return {**found, "token_cosine": tokens, "cosine": truths.likeness(features[:, 0])}

    return Task(
        module=module,
        loaders=[Batches(split.x, labels, size=size, seed=seed)],
        steps=steps,
        outcome=truths.classifier(split.x_held, split.y_held),
        examine=truths.both(
            truths.classifier(split.x, labels, prefix="train_"),
            truths.units(lambda module: module(split.x_held)),
            truths.movement(module),
            inside,  # type: ignore[arg-type]
        ),
        targets=1,
    )


def sharp(net: ViT) -> None:
    """Make attention one-hot: queries and keys a thirtyfold."""
    scaled_queries(net.blocks, 30.0)


def blind(net: ViT) -> None:
    """Make attention uniform, for good: queries and keys of zero."""
    scaled_queries(net.blocks, 0.0)


def silent(net: ViT) -> None:
    """Make the middle block's perceptron silent and its attention nothing: the block adds a constant."""
    middle = net.blocks[1]
    nn.init.constant_(middle.mlp[0].bias, -30.0)  # type: ignore[index, union-attr, arg-type]
    for part in (middle.attention.v, middle.attention.out):  # type: ignore[union-attr]
        nn.init.zeros_(part.weight)  # type: ignore[arg-type, union-attr]
        nn.init.zeros_(part.bias)  # type: ignore[arg-type, union-attr]


def zero_head(net: ViT) -> None:
    """Begin with a head of zeros, as many do."""
    nn.init.zeros_(net.head.weight)
    nn.init.zeros_(net.head.bias)


ATTENTION_ONLY = partial(ViT, residual=False, perceptron=False, depth=8, pooled=True)
ONE_BLOCK = partial(ViT, depth=1, heads=1)

CASES = [
    Case(
        "vit/plain",
        "vit",
        "Three blocks, a class token.",
        task,
        (over("accuracy", 0.9), under("token_cosine", 0.95)),
    ),
    Case(
        "vit/early",
        "vit",
        "Stopped after 60 steps: attention is still nearly uniform, as it began.",
        partial(task, steps=60),
        (over("accuracy", 0.15), under("accuracy", 0.9), over("entropy_mean", 0.6)),
    ),
    Case(
        "vit/zero_head",
        "vit",
        "A head of zeros at the start: in the first step nothing below it gets a gradient.",
        partial(task, spoil=zero_head),
        (over("accuracy", 0.9, of_control=True),),
        control="vit/plain",
    ),
    Case(
        "vit/heavy_dropout",
        "vit",
        "Forty percent of the attention weights dropped each step.",
        partial(task, net=partial(ViT, dropout=0.4), steps=300),
        (over("accuracy", 0.93, of_control=True),),
        control="vit/plain",
    ),
    Case(
        "vit/pooled",
        "vit",
        "The mean over positions is read and the class token is one of them: positions grow alike, rightly.",
        partial(task, net=partial(ViT, pooled=True)),
        (over("accuracy", 0.9),),
    ),
    Case(
        "vit/tiny_data",
        "vit",
        "Fifty images until they are known by heart.",
        partial(task, samples=50, size=50, steps=150),
        (over("train_accuracy", 0.999), over("accuracy", 0.35)),
    ),
    Case(
        "vit/one_block",
        "vit",
        "One block of one head.",
        partial(task, net=ONE_BLOCK, steps=400),
        (over("accuracy", 0.8),),
    ),
    # --- sick ------------------------------------------------------------------------------------
    Case(
        "vit/attention_uniform",
        "vit",
        "Queries and keys of zero: each is the other's gradient, so attention stays uniform for good.",
        partial(task, spoil=blind),
        (over("entropy_least", 0.999), under("accuracy", 0.93, of_control=True)),
        *("attention_collapse", "initialisation"),
        also=(
            "weights_vanish",
            "frozen",
            "vanishing_gradients",
            "equal_units",
            "dead_units",
            "rank_collapse",
        ),
        layers=("*attention*",),
        control="vit/plain",
    ),
    Case(
        "vit/attention_one_hot",
        "vit",
        "Queries and keys thirty times too large: each position looks at one other, for good.",
        partial(task, spoil=sharp, optimizer=adam(1e-3)),
        (under("entropy_most", 0.2), under("accuracy", 0.93, of_control=True)),
        *("attention_collapse", "initialisation"),
        also=("exploding_gradients", "saturation"),
        layers=("*attention*",),
        control="vit/slower",
    ),
    Case("vit/slower", "vit", "A lower rate.", partial(task, optimizer=adam(1e-3)), (over("accuracy", 0.8),)),
    Case(
        "vit/rank_by_depth",
        "vit",
        "Eight layers of attention with nothing added to the stream: all positions become one.",
        partial(task, net=ATTENTION_ONLY, optimizer=adam(1e-3)),
        (over("start/token_cosine", 0.99), under("accuracy", 0.6, of_control=True)),
        *("rank_collapse", "depth"),
        also=("vanishing_gradients", "attention_collapse"),
        control="vit/slower",
    ),
    Case(
        "vit/dead_block",
        "vit",
        "The middle block's perceptron never fires and its values and output projection are zero.",
        partial(task, spoil=silent),
        (under("block_least", 1e-3), over("accuracy", 0.7, of_control=True)),
        *("dead_block", "initialisation"),
        also=(
            "dead_units",
            "weights_vanish",
            "frozen",
            "vanishing_gradients",
            "rank_collapse",
            "attention_collapse",
        ),
        layers=("*blocks.1*",),
        control="vit/plain",
    ),
    Case(
        "vit/lazy",
        "vit",
        "The output's change is multiplied by 300, the rate divided by as much: weights stay in place.",
        partial(task, wrap=partial(Scaled, scale=300.0), optimizer=adam(1e-5), steps=300),
        (under("moved", 0.01), over("accuracy", 0.3), under("accuracy", 0.97, of_control=True)),
        *("lazy_training", "scale"),
        control="vit/plain",
    ),
    Case(
        "vit/diverge",
        "vit",
        "Plain descent at a rate of 50: the head is thrown about.",
        partial(task, optimizer=sgd(50.0, momentum=0.9), steps=100),
        (over("diverged", 0.5),),
        *("divergence", "learning rate"),
        also=("exploding_gradients", "dead_units", "attention_collapse", "rank_collapse"),
        control="vit/plain",
        leaves=over("loss", 4.0, of_control=True),
    ),
    Case(
        "vit/vanish_by_decay",
        "vit",
        "Decoupled decay of 40 at a step of 3e-3: an eighth of every weight goes each step.",
        partial(task, optimizer=adam(3e-3, decay=40.0)),
        (under("shrunk", 0.2), under("accuracy", 0.5, of_control=True)),
        *("weights_vanish", "decay"),
        also=("rank_collapse", "vanishing_gradients", "attention_collapse"),
        control="vit/plain",
        leaves=under("accuracy", 0.8, of_control=True),
    ),
]
