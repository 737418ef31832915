"""Small GPTs on synthetic text: a language whose next symbol hangs on the last two, and copying."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import data, truths
from .attention import Block, attention_entropy, block_effects, scaled_queries
from .common import Batches, Case, Measures, Net, Optimizer, Task, adam, over, sgd, under

Spoil = Callable[["GPT"], None]


class GPT(nn.Module):
    """Symbols and places, causal blocks, a head.

    Args:
        symbols: of the vocabulary.
        width: of the stream.
        depth: blocks.
        length: positions.
        tied: the head's weight is the embedding's.
        frozen_by_detach: the embedding is used detached, by mistake.
        options: of :class:`~benchmarks.clinic.attention.Block`.
    """

    def __init__(
        self,
        *,
        symbols: int = 16,
        width: int = 32,
        depth: int = 2,
        length: int = 24,
        tied: bool = False,
        frozen_by_detach: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        options = {"heads": 4, "causal": True, "dropout": 0.0, **options}
        self.embedding, self.place = nn.Embedding(symbols, width), nn.Embedding(length, width)
        for each in (self.embedding, self.place):
            nn.init.normal_(each.weight, std=0.3)
        self.blocks = nn.ModuleList(Block(width, **options) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.frozen_by_detach = frozen_by_detach

    def stream(self, x: Tensor) -> Tensor:
        """Return the first block's input, ``[N, T, E]``."""
        symbols = self.embedding(x)
        symbols = symbols.detach() if self.frozen_by_detach else symbols
        return symbols + self.place(torch.arange(x.shape[1], device=x.device))

    def features(self, x: Tensor) -> Tensor:
        """Return the last block's output, ``[N, T, E]``."""
        x = self.stream(x)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Return the next symbols' logits, ``[N, T, V]``."""
        return self.head(self.norm(self.features(x)))


def next_symbol(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy of the next symbols; -100 marks those that don't count."""
    return nn.functional.cross_entropy(net(batch[0]).flatten(0, 1), batch[1].flatten())


def task(
    seed: int,
    *,
    net: Callable[[], GPT] = GPT,
    text: Callable[..., data.Split] = data.markov_text,
    spoil: Spoil | None = None,
    optimizer: Optimizer | None = None,
    schedule: Callable[[int], float] | None = None,
    steps: int = 300,
    size: int = 32,
) -> Task:
    """Return a GPT that is to learn a text.

    Args:
        seed: of text and batches (weights: torch's).
        net: makes the network.
        text: makes the data.
        spoil: changes the network before training.
        optimizer: Adam with a step of 3e-3 by default.
        schedule: factor of the learning rate by step.
        steps: of the optimizer.
        size: of a batch.
    """
    split = text(seed=seed)
    gpt = net()
    if spoil is not None:
        spoil(gpt)
    module = Net(gpt, next_symbol, optimizer or adam(3e-3), schedule=schedule)
    held = split.x_held[:128]

    def inside(module: Net) -> Measures:
        with truths.calm(module):
            features = gpt.features(held)
            return {
                **attention_entropy(gpt.blocks, gpt.stream(held)),
                **block_effects(gpt.blocks, gpt.stream(held)),
                "cosine": truths.likeness(features.flatten(0, 1)[:512]),
            }

    return Task(
        module=module,
        loaders=[Batches(split.x, split.y, size=size, seed=seed)],
        steps=steps,
        outcome=truths.classifier(held, split.y_held[:128]),
        examine=truths.both(
            truths.units(lambda module: module(held)),
            truths.movement(module),
            truths.still(module, "net.embedding.weight"),
            inside,  # type: ignore[arg-type]
        ),
    )


def blind(net: GPT) -> None:
    """Make attention uniform, for good: queries and keys of zero."""
    scaled_queries(net.blocks, 0.0)


def sharp(net: GPT) -> None:
    """Make attention one-hot: queries and keys a fortyfold."""
    scaled_queries(net.blocks, 40.0)


def silent(net: GPT) -> None:
    """Make the third block's perceptron silent and its attention nothing."""
    block = net.blocks[2]
    nn.init.constant_(block.mlp[0].bias, -30.0)  # type: ignore[index, union-attr, arg-type]
    for part in (block.attention.v, block.attention.out):  # type: ignore[union-attr]
        nn.init.zeros_(part.weight)  # type: ignore[arg-type, union-attr]
        nn.init.zeros_(part.bias)  # type: ignore[arg-type, union-attr]


def one_embedding(net: GPT) -> None:
    """Give every symbol the same embedding: nothing tells them apart but the head's gradients, detached."""
    net.embedding.weight.data.copy_(
        torch.randn(1, net.embedding.embedding_dim).expand_as(net.embedding.weight)
    )


def warm(step: int) -> float:
    """Return a linear warm-up over 150 steps."""
    return min(1.0, (step + 1) / 150)


COPY = partial(task, text=data.copied_text, net=partial(GPT, length=15), size=64, optimizer=adam(4e-3))

CASES = [
    Case("gpt/plain", "gpt", "Two causal blocks.", task, (over("accuracy", 0.6),)),
    Case(
        "gpt/unused_vocabulary",
        "gpt",
        "Of 256 symbols sixteen occur: most rows of the embedding never get a gradient, rightly.",
        partial(task, net=partial(GPT, symbols=256)),
        (over("accuracy", 0.9, of_control=True),),
        control="gpt/plain",
    ),
    Case(
        "gpt/tied",
        "gpt",
        "Embedding and head share their weight.",
        partial(task, net=partial(GPT, tied=True)),
        (over("accuracy", 0.9, of_control=True),),
        control="gpt/plain",
    ),
    Case(
        "gpt/early",
        "gpt",
        "Stopped after 40 steps: it knows the symbols' frequencies and little more.",
        partial(task, steps=40),
        (under("accuracy", 0.5), under("loss", 2.85)),
    ),
    Case(
        "gpt/plateau",
        "gpt",
        "Copying: for many steps the loss stands still before attention learns to look back, which it does.",
        partial(COPY, steps=700),
        (over("accuracy", 0.6),),
    ),
    Case(
        "gpt/warm_up",
        "gpt",
        "A warm-up over half of the run: little moves at first.",
        partial(task, schedule=warm),
        (over("accuracy", 0.75, of_control=True),),
        control="gpt/plain",
    ),
    Case(
        "gpt/heavy_dropout",
        "gpt",
        "A third of the attention weights dropped each step.",
        partial(task, net=partial(GPT, dropout=0.3), steps=350),
        (over("accuracy", 0.75, of_control=True),),
        control="gpt/plain",
    ),
    # --- sick ------------------------------------------------------------------------------------
    Case(
        "gpt/attention_uniform",
        "gpt",
        "Queries and keys of zero: attention is the same mean for good, and copying cannot be learned.",
        partial(COPY, spoil=blind, steps=400),
        (over("entropy_least", 0.999), under("accuracy", 0.6, of_control=True)),
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
        control="gpt/plateau",
    ),
    Case(
        "gpt/attention_one_hot",
        "gpt",
        "Queries and keys forty times too large: each position is stuck with another by chance.",
        partial(task, spoil=sharp),
        (under("entropy_most", 0.2), under("accuracy", 0.8, of_control=True)),
        *("attention_collapse", "initialisation"),
        also=("exploding_gradients", "saturation"),
        layers=("*attention*",),
        control="gpt/plain",
    ),
    Case(
        "gpt/dead_block",
        "gpt",
        "The third of four blocks adds nothing: a silent perceptron, zero values and projection.",
        partial(task, net=partial(GPT, depth=4), spoil=silent),
        (under("block_least", 1e-3), over("accuracy", 0.5, of_control=True)),
        *("dead_block", "initialisation"),
        also=(
            "dead_units",
            "weights_vanish",
            "frozen",
            "vanishing_gradients",
            "rank_collapse",
            "attention_collapse",
        ),
        layers=("*blocks.2*",),
        control="gpt/plain",
    ),
    Case(
        "gpt/detached",
        "gpt",
        "The embedding is used detached, and all symbols began with one embedding: none can be told apart.",
        partial(task, net=partial(GPT, frozen_by_detach=True), spoil=one_embedding),
        (over("still_there", 0.99), under("accuracy", 0.6, of_control=True)),
        *("frozen", "wiring"),
        also=("rank_collapse", "equal_units", "vanishing_gradients"),
        layers=("*embedding*",),
        control="gpt/plain",
    ),
    Case(
        "gpt/diverge",
        "gpt",
        "Plain descent at a rate of 100.",
        partial(task, optimizer=sgd(100.0, momentum=0.9), steps=100),
        (over("diverged", 0.5),),
        *("divergence", "learning rate"),
        also=("exploding_gradients", "dead_units", "attention_collapse", "rank_collapse"),
        control="gpt/plain",
        leaves=over("loss", 3.0, of_control=True),
    ),
    Case(
        "gpt/vanish_by_decay",
        "gpt",
        "Decoupled decay of 40 at a step of 5e-3: a fifth of every weight goes each step.",
        partial(task, optimizer=adam(5e-3, decay=40.0)),
        (under("shrunk", 0.2), under("accuracy", 0.5, of_control=True)),
        *("weights_vanish", "decay"),
        also=("rank_collapse", "vanishing_gradients", "attention_collapse"),
        control="gpt/plain",
        leaves=under("accuracy", 0.8, of_control=True),
    ),
]
