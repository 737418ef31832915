"""Low-rank adapters on a frozen network: digits below five learned first, then all ten with adapters.

An adapter's output has its rank by construction, its second factor begins at zero, and most layers are frozen
on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from . import data, truths
from .common import Batches, Case, Net, Optimizer, Task, adam, cross_entropy, over, sgd, under
from .mlp import perceptron

Spoil = Callable[[nn.Sequential], None]


class Adapted(nn.Module):
    """A frozen linear layer and a trained product of two small ones.

    Args:
        base: the layer, frozen here.
        rank: of the adapter.
        scale: multiplies its output.
    """

    def __init__(self, base: nn.Linear, rank: int, *, scale: float = 2.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the adapter's added."""
        return self.base(x) + self.scale * self.b(self.a(x))


def pretrained(steps: int = 150) -> nn.Sequential:
    """Return a perceptron of ten outputs that knows the digits below five."""
    net = perceptron((64, 64, 64, 10), nn.ReLU)
    split = data.digits(classes=5)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    made = 0
    while made < steps:
        for batch in Batches(split.x, split.y, size=64):
            optimizer.zero_grad()
            cross_entropy(net, batch).backward()
            optimizer.step()
            made += 1
    return net


def task(
    seed: int,
    *,
    rank: int = 8,
    spoil: Spoil | None = None,
    optimizer: Optimizer | None = None,
    steps: int = 300,
    samples: int | None = None,
) -> Task:
    """Return a pretrained network with adapters that is to learn all ten digits.

    Args:
        seed: of batches (weights: torch's).
        rank: of the adapters.
        spoil: changes the network before training.
        optimizer: Adam with a step of 5e-3 by default.
        steps: of the optimizer.
        samples: train on the first so many.
    """
    net = pretrained()
    for i, layer in enumerate(net):
        if isinstance(layer, nn.Linear):
            net[i] = Adapted(layer, rank)
    if spoil is not None:
        spoil(net)
    split = data.digits(samples=samples)
    module = Net(net, cross_entropy, optimizer or adam(5e-3))
    return Task(
        module=module,
        loaders=[Batches(split.x, split.y, size=64, seed=seed)],
        steps=steps,
        outcome=truths.classifier(split.x_held, split.y_held),
        examine=truths.both(
            truths.classifier(split.x, split.y, prefix="train_"),
            truths.units(lambda module: module(split.x_held)),
            truths.still(module, "net.*.[ab].weight"),
        ),
        targets=1,
    )


def adapters(net: nn.Sequential) -> list[Adapted]:
    """Return the adapted layers."""
    return [layer for layer in net if isinstance(layer, Adapted)]


def both_zero(net: nn.Sequential) -> None:
    """Begin both factors at zero: each is the other's gradient, so neither ever moves."""
    for layer in adapters(net):
        nn.init.zeros_(layer.a.weight)


def no_flags(net: nn.Sequential) -> None:
    """Freeze the adapters' second factors, which are zero: nothing can be adapted."""
    for layer in adapters(net):
        layer.b.requires_grad_(False)


def equal_rows(net: nn.Sequential) -> None:
    """Begin all rows of the first factor equal: the adapter has rank one for good."""
    for layer in adapters(net):
        layer.a.weight.data[1:] = layer.a.weight.data[:1]


CASES = [
    Case("lora/plain", "lora", "Adapters of rank eight.", task, (over("accuracy", 0.88),)),
    Case(
        "lora/start",
        "lora",
        "Stopped after eight steps: the second factors are still all but zero, as they should be.",
        partial(task, steps=8),
        (under("accuracy", 0.85), under("still_there", 0.5), over("accuracy", 0.4)),
    ),
    Case(
        "lora/rank_one",
        "lora",
        "Adapters of rank one.",
        partial(task, rank=1, steps=400),
        (over("accuracy", 0.7),),
    ),
    Case(
        "lora/strong_decay",
        "lora",
        "Decoupled decay of 0.5 on the adapters.",
        partial(task, optimizer=adam(5e-3, decay=0.5)),
        (over("accuracy", 0.95, of_control=True),),
        control="lora/plain",
    ),
    Case(
        "lora/tiny_data",
        "lora",
        "Sixty digits.",
        partial(task, samples=64, steps=150),
        (over("train_accuracy", 0.999), over("accuracy", 0.6)),
    ),
    # --- sick ------------------------------------------------------------------------------------
    Case(
        "lora/both_zero",
        "lora",
        "Both factors begin at zero: neither gets a gradient.",
        partial(task, spoil=both_zero),
        (over("still_there", 0.99), under("accuracy", 0.7, of_control=True)),
        *("frozen", "initialisation"),
        also=("weights_vanish", "rank_collapse", "vanishing_gradients", "equal_units", "dead_units"),
        layers=("*.a", "*.b"),
        control="lora/plain",
    ),
    Case(
        "lora/frozen_flag",
        "lora",
        "requires_grad was left off for the second factors: the adapters add nothing for good.",
        partial(task, spoil=no_flags),
        (over("still_there", 0.49), under("accuracy", 0.7, of_control=True)),
        *("frozen", "wiring"),
        also=("weights_vanish", "vanishing_gradients", "rank_collapse", "equal_units"),
        layers=("*.a", "*.b"),
        control="lora/plain",
    ),
    Case(
        "lora/equal_rows",
        "lora",
        "All rows of the first factor begin equal and stay so: rank one of eight.",
        partial(task, spoil=equal_rows),
        (under("accuracy", 0.95, of_control=True),),
        *("equal_units", "initialisation"),
        also=("rank_collapse",),
        layers=("*.a",),
        control="lora/plain",
    ),
    Case(
        "lora/diverge",
        "lora",
        "A rate that throws the adapters away.",
        partial(task, optimizer=sgd(50.0, momentum=0.9), steps=100),
        (over("diverged", 0.5),),
        *("divergence", "learning rate"),
        also=("exploding_gradients", "dead_units", "rank_collapse"),
        control="lora/plain",
        leaves=over("loss", 4.0, of_control=True),
    ),
]
