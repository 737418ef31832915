"""The sick ones among the fresh cases."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn
from torch.nn import functional as F

from .common import Case, Check, Task, adam, cross_entropy, over, sgd, under
from .fresh import DEEP, FULL, few, focus, jump, rows, task, unscaled, without
from .fresh_nets import Attentive, Separate, Skips, Teacher, Unrolled, deep

#: Name, kind, cause, what it is, what else is true of it, how to build it, its checks and its control.
SICK: tuple[
    tuple[str, str, str, str, tuple[str, ...], Callable[[int], Task], tuple[Check, ...], str], ...
] = (
    (
        "dead_among_sixteen",
        "dead_units",
        "initialisation",
        "The tenth of sixteen layers has biases of -20.",
        ("rank_collapse", "vanishing_gradients", "frozen"),
        partial(task, net=partial(DEEP, bias=(9, -20.0), norm=True), steps=300),
        (over("never_fire", 0.99),),
        "sixteen",
    ),
    (
        "zeros",
        "equal_units",
        "initialisation",
        "Every weight and bias begins at zero.",
        ("frozen", "dead_units", "rank_collapse"),
        partial(task, net=partial(deep, 64, 64, 2, 10, zero=True)),
        (under("accuracy", 0.3),),
        "long_warm_up",
    ),
    (
        "without_gradient",
        "frozen",
        "wiring",
        "A hidden layer runs under no_grad.",
        ("vanishing_gradients",),
        partial(task, net=partial(Separate, 8, blind=True), still="net.middle.*"),
        (over("still_there", 0.99),),
        "separate",
    ),
    (
        "forgotten",
        "frozen",
        "wiring",
        "The optimizer was never given the layers in the middle.",
        (),
        partial(task, net=partial(Separate, 8), optimizer=without("middle", 2e-3), still="net.middle.*"),
        (over("still_there", 0.99),),
        "separate",
    ),
    (
        "sigmoids",
        "vanishing_gradients",
        "depth",
        "Ten layers of sigmoids, SGD with momentum.",
        ("rank_collapse", "frozen"),
        partial(task, net=partial(deep, 64, 48, 10, 10, act=nn.Sigmoid), optimizer=sgd(0.1, momentum=0.9)),
        (under("accuracy", 0.3), under("gradient_ratio", 1e-3)),
        "sixteen",
    ),
    (
        "gain",
        "exploding_gradients",
        "initialisation",
        "Twelve layers whose weights are four times too large.",
        ("divergence", "saturation"),
        partial(task, net=partial(deep, 64, 48, 12, 10, act=nn.SiLU, gain=4.0), optimizer=adam(1e-3)),
        (over("start/loss", 100.0),),
        "sixteen",
    ),
    (
        "wrong_schedule",
        "divergence",
        "learning rate",
        "The rate jumps 2000-fold after 120 steps.",
        ("dead_units", "exploding_gradients"),
        partial(
            task,
            net=partial(deep, 64, 64, 2, 10, act=nn.SiLU),
            optimizer=sgd(0.05, momentum=0.9),
            schedule=jump,
        ),
        (under("accuracy", 0.5),),
        "long_warm_up",
    ),
    (
        "all_decay",
        "weights_vanish",
        "decay",
        "A decay that is mistaken by a factor of a thousand, SGD.",
        ("rank_collapse", "vanishing_gradients", "dead_units"),
        partial(
            task, net=partial(deep, 64, 64, 2, 10, act=nn.Tanh), optimizer=sgd(0.1, decay=0.5), steps=300
        ),
        (under("shrunk", 0.1), under("accuracy", 0.5)),
        "long_warm_up",
    ),
    (
        "unscaled",
        "saturation",
        "initialisation",
        "Pixels up to 4000 into a tanh.",
        ("vanishing_gradients",),
        partial(task, net=partial(deep, 64, 64, 2, 10, act=nn.Tanh), split=unscaled),
        (over("saturated", 0.8),),
        "long_warm_up",
    ),
    (
        "shut_gate",
        "dead_block",
        "initialisation",
        "The gain of one block is zero, and never asks for gradients.",
        ("frozen",),
        partial(task, net=partial(Skips, shut=2), still="net.gains.2"),
        (over("still_there", 0.99),),
        "layer_scale",
    ),
    (
        "no_keys",
        "attention_collapse",
        "initialisation",
        "Queries and keys are zero and stay so.",
        ("frozen", "weights_vanish", "rank_collapse", "equal_units"),
        partial(task, net=partial(Attentive, keys=0.0), split=rows, optimizer=adam(1e-3), extra=focus),
        (under("focus", 0.13),),
        "attentive",
    ),
    (
        "loud_keys",
        "attention_collapse",
        "initialisation",
        "Queries and keys are forty times too large.",
        ("saturation", "exploding_gradients"),
        partial(task, net=partial(Attentive, keys=40.0), split=rows, optimizer=adam(1e-4), extra=focus),
        (over("focus", 0.9),),
        "attentive",
    ),
    (
        "kernel",
        "lazy_training",
        "scale",
        "An output 300 times as large as its network's, centred at the start.",
        (),
        partial(
            task, net=partial(Teacher, centred=300.0), optimizer=sgd(2e-6), steps=300, loss=cross_entropy
        ),
        (under("moved", 0.01), over("accuracy", 0.4)),
        "long_warm_up",
    ),
    (
        "at_the_edge",
        "edge_of_stability",
        "learning rate",
        "Full batch, plain descent, as fast as it goes.",
        (),
        partial(
            task,
            net=partial(deep, 64, 48, 1, 10, act=nn.Tanh),
            split=few,
            size=FULL,
            loss=lambda net, batch: F.mse_loss(net(batch[0]), F.one_hot(batch[1], 10).float()),
            optimizer=sgd(2.0),
            steps=500,
            curvature=2.0,
        ),
        (over("lr_sharpness", 1.8),),
        "full_batch",
    ),
    (
        "shrinking_loop",
        "vanishing_gradients",
        "initialisation",
        "A recurrence whose weights are ten times too small, SGD.",
        ("rank_collapse",),
        partial(task, net=partial(Unrolled, gain=0.05), split=rows, optimizer=sgd(0.02)),
        (under("accuracy", 0.6, of_control=True),),
        "unrolled",
    ),
)

CASES = [
    Case(f"fresh/{name}", "fresh", about, build, checks, sick, cause, also, control=f"fresh/{control}")
    for name, sick, cause, about, also, build, checks, control in SICK
]
