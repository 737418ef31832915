"""Regression by perceptrons: a product of two inputs, a linear teacher.

Errors are shares of the targets' variance: 1 is guessing the mean. The output has one unit or a few, so the
last layer's rank is small as it was built.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from . import data, truths
from .common import Batches, Case, Loss, Net, Optimizer, Task, adam, mean_square, over, sgd, under
from .mlp import bias, gain, perceptron

Spoil = Callable[[nn.Sequential], None]


class Scaled(nn.Module):
    """The difference of two networks that began equal, multiplied: the kernel regime where it is large.

    Args:
        net: the network.
        scale: the factor.
    """

    def __init__(self, net: nn.Sequential, scale: float) -> None:
        super().__init__()
        self.net, self.scale = net, scale
        self.start = [
            (w.weight.detach().clone(), w.bias.detach().clone()) for w in net if isinstance(w, nn.Linear)
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled change of the output since the start."""
        before = x
        for i, (weight, shift) in enumerate(self.start):
            before = nn.functional.linear(before if i == 0 else before.relu(), weight, shift)
        return self.scale * (self.net(x) - before)


def task(
    seed: int,
    *,
    split: Callable[..., data.Split] = data.single_index,
    widths: tuple[int, ...] = (32, 96, 96, 1),
    act: Callable[[], nn.Module] = nn.ReLU,
    spoil: Spoil | None = None,
    wrap: Callable[[nn.Sequential], nn.Module] = lambda net: net,
    loss: Loss = mean_square,
    optimizer: Optimizer | None = None,
    steps: int = 500,
    size: int = 64,
    still: str = "*0.weight",
) -> Task:
    """Return a perceptron that is to fit a function.

    Args:
        seed: of data and batches (weights: torch's).
        split: makes the data.
        widths: of the layers, inputs first.
        act: the activation.
        spoil: changes the network before training.
        wrap: puts it into another.
        loss: of network and batch.
        optimizer: Adam with a step of 3e-3 by default.
        steps: of the optimizer.
        size: of a batch.
        still: glob on parameters asked whether they moved.
    """
    chosen = split(seed=seed)
    net = perceptron(widths, act)
    if spoil is not None:
        spoil(net)
    module = Net(wrap(net), loss, optimizer or adam(3e-3))
    return Task(
        module=module,
        loaders=[Batches(chosen.x, chosen.y, size=size, seed=seed)],
        steps=steps,
        outcome=truths.regressor(chosen.x_held, chosen.y_held),
        examine=truths.both(
            truths.units(lambda module: module(chosen.x_held)),
            truths.gradients(lambda: (chosen.x[:128], chosen.y[:128])),
            truths.movement(module),
            truths.still(module, still),
        ),
    )


def robust(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return Huber's loss on targets with heavy-tailed noise added."""
    x, y = batch
    noise = torch.distributions.StudentT(2.0).sample(y.shape)
    return nn.functional.huber_loss(net(x), y + 0.5 * noise)


def small(net: nn.Sequential) -> None:
    """Begin deep linear layers small and orthogonal: a plateau, then one direction after the other."""
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain=0.35)
            nn.init.zeros_(layer.bias)


def middle_off(net: nn.Sequential) -> None:
    """Leave ``requires_grad`` off for the second of four layers, whose weights are zero."""
    nn.init.zeros_(net[2].weight)  # type: ignore[arg-type]
    net[2].requires_grad_(False)


LINEAR = (16, 32, 32, 32, 8)
EASY = partial(data.single_index, samples=1024, width=16)
TASK = partial(task, split=EASY, widths=(16, 96, 96, 1))

CASES = [
    Case(
        "regression/plain", "regression", "A product of two of sixteen inputs.", TASK, (under("error", 0.3),)
    ),
    Case(
        "regression/plateau",
        "regression",
        "A deep linear network that begins small: long plateaus, few directions at a time.",
        partial(
            task,
            split=data.linear_teacher,
            widths=LINEAR,
            act=nn.Identity,
            spoil=small,
            optimizer=sgd(0.1),
            steps=800,
        ),
        (under("error", 0.2),),
    ),
    Case(
        "regression/plateau_early",
        "regression",
        "The same, stopped on its plateau.",
        partial(
            task,
            split=data.linear_teacher,
            widths=LINEAR,
            act=nn.Identity,
            spoil=small,
            optimizer=sgd(0.1),
            steps=60,
        ),
        (over("error", 0.5), under("error", 1.1)),
    ),
    Case(
        "regression/heavy_tails",
        "regression",
        "Targets with heavy-tailed noise: losses and gradients jump.",
        partial(TASK, loss=robust, steps=800),
        (under("error", 0.5),),
    ),
    Case(
        "regression/low_rank_target",
        "regression",
        "Eight outputs of which three directions carry all: the last layer's rank is three, rightly.",
        partial(task, split=data.linear_teacher, widths=(16, 96, 96, 8), steps=500),
        (under("error", 0.1),),
    ),
    Case(
        "regression/strong_decay",
        "regression",
        "Decoupled decay of 0.3.",
        partial(TASK, optimizer=adam(3e-3, decay=0.3)),
        (under("error", 0.3),),
    ),
    # --- sick ------------------------------------------------------------------------------------
    Case(
        "regression/lazy",
        "regression",
        "The output is multiplied by 1000 and the rate divided by as much: the features stay as they began.",
        partial(TASK, wrap=partial(Scaled, scale=1000.0), optimizer=adam(3e-6)),
        (under("moved", 0.02), over("error", 2.0, of_control=True), under("error", 1.5)),
        *("lazy_training", "scale"),
        control="regression/plain",
    ),
    Case(
        "regression/lazy_sgd",
        "regression",
        "The same by plain descent, the rate divided by the scale's square.",
        partial(TASK, wrap=partial(Scaled, scale=300.0), optimizer=sgd(0.1 / 300**2)),
        (under("moved", 0.02), over("error", 2.0, of_control=True), under("error", 1.5)),
        *("lazy_training", "scale"),
        control="regression/plain",
    ),
    Case(
        "regression/diverge",
        "regression",
        "A rate beyond stability on a linear network.",
        partial(
            task, split=data.linear_teacher, widths=LINEAR, act=nn.Identity, optimizer=sgd(1.0), steps=100
        ),
        (over("diverged", 0.5),),
        *("divergence", "learning rate"),
        also=("exploding_gradients",),
        control="regression/plateau",
    ),
    Case(
        "regression/dead_by_bias",
        "regression",
        "Biases of -8 in the first layer.",
        partial(TASK, spoil=bias(-8.0, only=0)),
        (over("never_fire", 0.95), over("error", 0.9)),
        *("dead_units", "initialisation"),
        also=("rank_collapse", "vanishing_gradients", "frozen"),
        control="regression/plain",
    ),
    Case(
        "regression/vanish_by_decay",
        "regression",
        "Decay outweighs what little the target's noise-free product teaches at first.",
        partial(TASK, optimizer=sgd(0.05, decay=0.4)),
        (under("shrunk", 0.05), over("error", 0.9)),
        *("weights_vanish", "decay"),
        also=("rank_collapse", "vanishing_gradients"),
        control="regression/plain",
    ),
    Case(
        "regression/frozen_flag",
        "regression",
        "requires_grad was left off for the second of four layers, whose weights are zero.",
        partial(TASK, widths=(16, 64, 4, 64, 1), spoil=middle_off, still="net.2.*"),
        (over("still_there", 0.99), over("error", 1.5, of_control=True)),
        *("frozen", "wiring"),
        also=("weights_vanish", "rank_collapse", "dead_units", "vanishing_gradients", "equal_units"),
        layers=("*net.2*",),
        control="regression/narrow",
    ),
    Case(
        "regression/narrow",
        "regression",
        "A second layer of four units, trained.",
        partial(TASK, widths=(16, 64, 4, 64, 1)),
        (under("error", 0.6),),
    ),
    Case(
        "regression/explode_by_depth",
        "regression",
        "Twelve ReLU layers drawn three times too large: the output is astronomical, its gradient more so.",
        partial(TASK, widths=(16, *(48,) * 12, 1), spoil=gain(4.0), optimizer=adam(1e-3)),
        (over("start/gradient", 1e6), over("error", 2.0, of_control=True)),
        *("exploding_gradients", "initialisation"),
        also=("divergence",),
        control="regression/plain",
    ),
]
