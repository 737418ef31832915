"""Multilayer perceptrons on the digits: 64 pixels, ten classes.

A fit of 300 steps ends above 93 % on held-out digits where it is healthy. The sick are held against the
healthy twin of the same seed, batches and budget; what looks sick and is not is held against it as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from . import data, truths
from .common import (
    Batches,
    Case,
    Loss,
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

Spoil = Callable[[nn.Sequential], None]
Activation = Callable[[], nn.Module]


def low_rank() -> data.Split:
    """Return digits that vary in three directions."""
    return data.projected(data.digits(), 3)


def perceptron(widths: tuple[int, ...], act: Activation, *, dropout: float = 0.0) -> nn.Sequential:
    """Return linear layers of these widths with an activation between them."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layers.append(nn.Linear(a, b))
        if i < len(widths) - 2:
            layers.append(act())
            if dropout:
                layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


def task(
    seed: int,
    *,
    split: Callable[[], data.Split] = data.digits,
    widths: tuple[int, ...] = (64, 64, 64, 10),
    act: Activation = nn.ReLU,
    dropout: float = 0.0,
    spoil: Spoil | None = None,
    optimizer: Optimizer | None = None,
    loss: Loss = cross_entropy,
    schedule: Callable[[int], float] | None = None,
    steps: int = 300,
    size: int = 64,
    noise: float = 0.0,
    curvature: float | None = None,
) -> Task:
    """Return a perceptron that is to learn digits.

    Args:
        seed: of batches and noisy labels (weights: torch's).
        split: the data.
        widths: of the layers, inputs first.
        act: the activation.
        dropout: after each.
        spoil: changes the network before training.
        optimizer: Adam with a step of 2e-3 by default.
        loss: of network and batch.
        schedule: factor of the learning rate by step.
        steps: of the optimizer.
        size: of a batch.
        noise: share of the training labels that are drawn anew.
        curvature: a learning rate: measure the sharpness on the whole training set too.
    """
    chosen = split()
    net = perceptron(widths, act, dropout=dropout)
    if spoil is not None:
        spoil(net)
    labels = data.noisy_labels(chosen.y, noise, classes=widths[-1], seed=seed) if noise else chosen.y
    module = Net(net, loss, optimizer or adam(2e-3, decay=0.0), schedule=schedule)
    examine = [
        truths.classifier(chosen.x, labels, prefix="train_"),
        truths.units(lambda module: module(chosen.x_held)),
        truths.gradients(lambda: (chosen.x[:128], labels[:128])),
        truths.movement(module),
        truths.still(module, "net.0.*"),
        lambda module: {"output_directions": _output_directions(module, chosen.x_held)},
    ]
    if curvature is not None:
        examine.append(truths.sharpness(lambda: (chosen.x, labels), curvature))
    return Task(
        module=module,
        loaders=[Batches(chosen.x, labels, size=size, seed=seed)],
        steps=steps,
        outcome=truths.classifier(chosen.x_held, chosen.y_held),
        examine=truths.both(*examine),
        targets=1,
    )


def _output_directions(module: nn.Module, x: torch.Tensor) -> float:
    with truths.calm(module):
        return truths.directions(module(x)) if module(x).isfinite().all() else float("nan")


def linears(net: nn.Module) -> list[nn.Linear]:
    """Return the linear layers in order."""
    return [child for child in net.modules() if isinstance(child, nn.Linear)]


def bias(value: float, only: int | None = None) -> Spoil:
    """Return what sets the biases of the hidden layers, or of one of them."""

    def spoil(net: nn.Sequential) -> None:
        for i, layer in enumerate(linears(net)[:-1]):
            if only is None or i == only:
                nn.init.constant_(layer.bias, value)

    return spoil


def gain(factor: float, *, last: float | None = None) -> Spoil:
    """Return what draws weights of deviation ``factor / sqrt(inputs)``, and multiplies the last layer's."""

    def spoil(net: nn.Sequential) -> None:
        layers = linears(net)
        for layer in layers:
            nn.init.normal_(layer.weight, std=factor / layer.in_features**0.5)
            nn.init.zeros_(layer.bias)
        if last is not None:
            layers[-1].weight.data.mul_(last)

    return spoil


def constant(net: nn.Sequential) -> None:
    """Give every unit of a hidden layer the same weights."""
    for layer in linears(net)[:-1]:
        nn.init.constant_(layer.weight, 1.0 / layer.in_features)
        nn.init.zeros_(layer.bias)
    last = linears(net)[-1]
    nn.init.constant_(last.weight, 0.1)
    nn.init.normal_(last.bias, std=0.1)


def copied_pairs(net: nn.Sequential) -> None:
    """Make the second half of each hidden layer's units a copy of the first, in and out."""
    layers = linears(net)
    for layer, reader in itertools.pairwise(layers):
        half = layer.out_features // 8 * 7
        count = layer.out_features - half
        repeat = -(-half // count)
        source = torch.arange(count).repeat(repeat)[:half]
        for tensor in (layer.weight.data, layer.bias.data):
            tensor[:half] = tensor[half:][source]
        reader.weight.data[:, :half] = reader.weight.data[:, half:][:, source]


def early_spike(step: int) -> float:
    """Return a factor of the learning rate: a hundredfold for ten steps from the fortieth on."""
    return 150.0 if 40 <= step < 50 else 1.0


def squared(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the square error against one-hot labels."""
    x, y = batch
    return mean_square(net, (x, nn.functional.one_hot(y, 10).float()))


FULL = 1438  # training samples: full-batch descent
LEAKY: Activation = partial(nn.LeakyReLU, 0.2)  # a unit that cannot die: the loss goes on growing
DEEP = (64, *(48,) * 10, 10)

CASES = [
    # --- healthy -----------------------------------------------------------------------------------
    Case("mlp/plain", "mlp", "Two hidden layers of ReLU, Adam.", task, (over("accuracy", 0.93),)),
    Case(
        *("mlp/tanh", "mlp", "Tanh throughout, the same budget."),
        partial(task, act=nn.Tanh),
        (over("accuracy", 0.93),),
    ),
    Case(
        "mlp/neural_collapse",
        "mlp",
        "Trained far beyond 100 % train accuracy with decay: classes collapse onto their means, as in "
        "networks that generalise.",
        partial(task, steps=1200, optimizer=adam(2e-3, decay=0.05)),
        (over("train_accuracy", 0.999), over("accuracy", 0.98, of_control=True)),
        control="mlp/plain",
    ),
    Case(
        "mlp/low_rank_input",
        "mlp",
        "The inputs have rank 3 of 64: no layer can show more, and the task is solved as far as they allow.",
        partial(task, split=low_rank, steps=400),
        (over("accuracy", 0.6), under("loss", 1.2)),
    ),
    Case(
        "mlp/strong_decay",
        "mlp",
        "Decay that shrinks the weights to a fraction of their start and costs no accuracy.",
        partial(task, optimizer=adam(2e-3, decay=1.0), steps=500),
        (over("accuracy", 0.98, of_control=True),),
        control="mlp/plain",
    ),
    Case(
        "mlp/tiny_data",
        "mlp",
        "Forty samples, all of them in each batch: ranks are bounded by 40 samples.",
        partial(task, split=partial(data.digits, samples=40), size=40, steps=200),
        (over("train_accuracy", 0.999), over("accuracy", 0.55)),
    ),
    Case(
        "mlp/early",
        "mlp",
        "Stopped after 25 steps: little is learned yet, and it is on its way.",
        partial(task, steps=25),
        (over("accuracy", 0.3), under("accuracy", 0.9)),
    ),
    Case(
        "mlp/binary_head",
        "mlp",
        "Zeros against ones: two outputs, of which the difference alone counts.",
        partial(task, split=partial(data.digits, classes=2), widths=(64, 64, 64, 2), steps=200),
        (over("accuracy", 0.98),),
    ),
    Case(
        "mlp/label_noise",
        "mlp",
        "Two labels in five drawn anew: the training loss stays high, the digits are learned.",
        partial(task, noise=0.4, steps=200),
        (over("accuracy", 0.8), under("train_accuracy", 0.9)),
    ),
    Case(
        "mlp/heavy_dropout",
        "mlp",
        "Half of the units dropped each step.",
        partial(task, dropout=0.5, steps=500),
        (over("accuracy", 0.95, of_control=True),),
        control="mlp/plain",
    ),
    Case(
        "mlp/small_batch",
        "mlp",
        "Four samples a batch: readings are of few samples.",
        partial(task, size=4, optimizer=adam(5e-4), steps=1000),
        (over("accuracy", 0.93, of_control=True),),
        control="mlp/plain",
    ),
    Case(
        "mlp/saturating_but_fine",
        "mlp",
        "Tanh units driven to their ends by long training at a high rate, at full accuracy: they decide.",
        partial(task, act=nn.Tanh, optimizer=adam(1.5e-2), steps=500),
        (over("accuracy", 0.97, of_control=True), over("saturated", 0.1)),
        control="mlp/plain",
    ),
    Case(
        "mlp/wide_sparse",
        "mlp",
        "A wide layer with biases of -0.1: a good part of the units fires rarely, none is missed.",
        partial(task, widths=(64, 256, 10), spoil=bias(-0.1)),
        (over("accuracy", 0.98, of_control=True), under("never_fire", 0.35)),
        control="mlp/plain",
    ),
    Case(
        "mlp/slow_sgd",
        "mlp",
        "Plain descent with a modest rate: gradient noise, no adaptive scaling.",
        partial(task, optimizer=sgd(0.1, momentum=0.9), steps=300),
        (over("accuracy", 0.98, of_control=True),),
        control="mlp/plain",
    ),
    Case(
        "mlp/full_batch_stable",
        "mlp",
        "Full-batch descent well below the edge of stability.",
        partial(task, loss=squared, act=nn.Tanh, optimizer=sgd(0.05), size=FULL, steps=300, curvature=0.05),
        (under("lr_sharpness", 1.2), over("accuracy", 0.5)),
    ),
    # --- sick --------------------------------------------------------------------------------------
    Case(
        "mlp/dead_by_bias",
        "mlp",
        "Biases of -5 in both hidden layers: no unit ever fires.",
        partial(task, spoil=bias(-5.0)),
        (over("never_fire", 0.9), under("accuracy", 0.5, of_control=True)),
        *("dead_units", "initialisation"),
        also=("rank_collapse", "vanishing_gradients", "frozen"),
        control="mlp/plain",
    ),
    Case(
        "mlp/dead_by_rate",
        "mlp",
        "Ten steps at 150 times the learning rate: most units are thrown where they never fire again.",
        partial(task, schedule=early_spike),
        (over("never_fire", 0.6), under("accuracy", 0.9, of_control=True)),
        *("dead_units", "learning rate"),
        also=("rank_collapse", "divergence", "exploding_gradients", "vanishing_gradients"),
        control="mlp/plain",
        leaves=under("accuracy", 0.8, of_control=True),
    ),
    Case(
        "mlp/equal_by_constant",
        "mlp",
        "All units of a layer begin equal, and a permutation symmetry keeps them equal.",
        partial(task, spoil=constant),
        (over("twins", 0.9), under("accuracy", 0.7, of_control=True)),
        *("equal_units", "initialisation"),
        also=("rank_collapse",),
        control="mlp/plain",
    ),
    Case(
        "mlp/equal_by_copies",
        "mlp",
        "Seven of eight units are copies of another, in and out: few are left, and training parts none.",
        partial(task, spoil=copied_pairs, widths=(64, 32, 32, 10)),
        (over("twins", 0.6), under("accuracy", 0.9, of_control=True)),
        *("equal_units", "initialisation"),
        also=("rank_collapse",),
        control="mlp/plain",
    ),
    Case(
        "mlp/vanish_by_decay",
        "mlp",
        "Decay that outweighs the gradient: all weights go to zero.",
        partial(task, optimizer=sgd(0.1, decay=0.3), steps=400),
        (under("shrunk", 0.05), under("accuracy", 0.6, of_control=True)),
        *("weights_vanish", "decay"),
        also=("rank_collapse", "vanishing_gradients"),
        control="mlp/plain",
        leaves=under("accuracy", 0.9, of_control=True),
    ),
    Case(
        "mlp/rank_by_decay",
        "mlp",
        "L2 on the factors of a deep product lowers its rank: two or three directions of nine are left.",
        partial(
            task, act=nn.Identity, widths=(64, 64, 64, 64, 10), optimizer=sgd(0.1, decay=0.065), steps=500
        ),
        (under("output_directions", 0.65, of_control=True), under("accuracy", 0.8, of_control=True)),
        *("rank_collapse", "decay"),
        also=("weights_vanish",),
        control="mlp/linear",
        leaves=under("accuracy", 0.85, of_control=True),
    ),
    Case(
        "mlp/linear",
        "mlp",
        "A deep linear network without decay.",
        partial(task, act=nn.Identity, widths=(64, 64, 64, 64, 10), optimizer=sgd(0.1), steps=500),
        (over("accuracy", 0.9),),
    ),
    Case(
        "mlp/rank_by_depth",
        "mlp",
        "Thirty layers of ReLU and no normalisation: all inputs lie on one ray before training begins.",
        partial(task, widths=(64, *(48,) * 30, 10), spoil=gain(2**0.5), steps=200, optimizer=sgd(0.01)),
        (over("start/cosine", 0.98), under("accuracy", 0.6, of_control=True)),
        *("rank_collapse", "depth"),
        also=("vanishing_gradients", "dead_units"),
        control="mlp/plain",
    ),
    Case(
        "mlp/diverge",
        "mlp",
        "A rate far beyond what is stable, with momentum: the loss leaves all bounds.",
        partial(task, loss=squared, act=LEAKY, optimizer=sgd(30.0, momentum=0.9), steps=100),
        (over("diverged", 0.5),),
        *("divergence", "learning rate"),
        also=("exploding_gradients",),
        control="mlp/plain",
        leaves=under("accuracy", 0.8, of_control=True),
    ),
    Case(
        "mlp/diverge_finite",
        "mlp",
        "Adam with a step of 1: the loss climbs to a multiple of that of guessing and stays there, a number.",
        partial(task, act=LEAKY, optimizer=adam(1.0), steps=200),
        (over("diverged", 0.5), over("finite", 0.99)),
        *("divergence", "learning rate"),
        also=("exploding_gradients", "rank_collapse"),
        control="mlp/plain",
        leaves=over("loss", 4.0, of_control=True),
    ),
    Case(
        "mlp/explode_by_depth",
        "mlp",
        "Fifteen tanh layers of gain 6: gradients grow layer by layer, beyond what a step can use.",
        partial(task, widths=(64, *(48,) * 15, 10), act=nn.Tanh, spoil=gain(6.0), optimizer=sgd(0.02)),
        (over("start/gradient", 300.0), under("accuracy", 0.5, of_control=True)),
        *("exploding_gradients", "initialisation"),
        also=("saturation", "divergence"),
        control="mlp/plain",
    ),
    Case(
        "mlp/vanish_in_sigmoids",
        "mlp",
        "Ten layers of sigmoids: the gradient is divided by four and more at each.",
        partial(task, widths=DEEP, act=nn.Sigmoid),
        (under("start/gradient_ratio", 1e-4), under("accuracy", 0.5, of_control=True)),
        *("vanishing_gradients", "depth"),
        also=("rank_collapse",),
        control="mlp/plain",
    ),
    Case(
        "mlp/vanish_in_small_tanh",
        "mlp",
        "Ten tanh layers of gain 0.3 under plain descent: nothing arrives at the first.",
        partial(task, widths=DEEP, act=nn.Tanh, spoil=gain(0.3), optimizer=sgd(0.1)),
        (under("start/gradient", 1e-3, of_control=True), under("accuracy", 0.5, of_control=True)),
        *("vanishing_gradients", "initialisation"),
        also=("rank_collapse",),
        control="mlp/plain",
    ),
    Case(
        "mlp/saturated",
        "mlp",
        "Weights thirty times too large before tanh: every unit sits at an end and its slope is nothing.",
        partial(task, act=nn.Tanh, spoil=gain(30.0, last=1 / 30), optimizer=sgd(0.1)),
        (over("saturated", 0.85), under("accuracy", 0.9, of_control=True)),
        *("saturation", "initialisation"),
        also=("vanishing_gradients", "frozen"),
        control="mlp/tanh",
    ),
    Case(
        "mlp/frozen_left_out",
        "mlp",
        "The first layer's parameters were not handed to the optimizer; through its six units all must pass.",
        partial(task, widths=(64, 6, 64, 10), optimizer=adam(2e-3, without=("0.",))),
        (over("still_there", 0.99), under("accuracy", 0.95, of_control=True)),
        *("frozen", "wiring"),
        layers=("*net.0*",),
        control="mlp/narrow",
    ),
    Case(
        "mlp/narrow",
        "mlp",
        "A first layer of six units, trained.",
        partial(task, widths=(64, 6, 64, 10)),
        (over("accuracy", 0.75),),
    ),
    Case(
        "mlp/edge",
        "mlp",
        "Full-batch descent at a rate whose curvature has climbed to two over the rate.",
        partial(task, loss=squared, act=nn.Tanh, optimizer=sgd(1.2), size=FULL, steps=500, curvature=1.2),
        (over("lr_sharpness", 1.85), over("accuracy", 0.5)),
        *("edge_of_stability", "learning rate"),
        control="mlp/full_batch_stable",
    ),
]
