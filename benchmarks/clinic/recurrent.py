"""Recurrent networks that must remember a sequence's first symbol to its end.

Gates that are wide open are what remembering asks for: saturation alone is no sickness here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from . import data, truths
from .common import Batches, Case, Measures, Net, Optimizer, Task, adam, cross_entropy, over, sgd, under

Spoil = Callable[["Reader"], None]


class Reader(nn.Module):
    """A recurrent layer and a head on its last state.

    Args:
        kind: ``"lstm"``, ``"gru"``, ``"tanh"`` or ``"relu"``.
        width: of the state.
        inputs: of a position.
        classes: outputs.
    """

    def __init__(self, kind: str = "lstm", *, width: int = 32, inputs: int = 8, classes: int = 4) -> None:
        super().__init__()
        if kind in ("lstm", "gru"):
            made: nn.RNNBase = (nn.LSTM if kind == "lstm" else nn.GRU)(inputs, width, batch_first=True)
        else:
            made = nn.RNN(inputs, width, nonlinearity=kind, batch_first=True)
        self.rnn, self.head = made, nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.rnn(x)[0][:, -1])


def task(
    seed: int,
    *,
    net: Callable[[], Reader] = Reader,
    length: int = 12,
    samples: int = 1024,
    spoil: Spoil | None = None,
    optimizer: Optimizer | None = None,
    steps: int = 300,
    size: int = 64,
    clip: float | None = None,
) -> Task:
    """Return a reader that is to remember the first symbol.

    Args:
        seed: of data and batches (weights: torch's).
        net: makes the network.
        length: positions.
        samples: sequences to train on.
        spoil: changes the network before training.
        optimizer: Adam with a step of 5e-3 by default.
        steps: of the optimizer.
        size: of a batch.
        clip: largest norm of the gradient.
    """
    split = data.recall(length=length, samples=samples, seed=seed)
    reader = net()
    if spoil is not None:
        spoil(reader)
    module = Net(reader, cross_entropy, optimizer or adam(5e-3))
    return Task(
        module=module,
        loaders=[Batches(split.x, split.y, size=size, seed=seed)],
        steps=steps,
        outcome=truths.classifier(split.x_held, split.y_held),
        examine=truths.both(
            truths.gradients(lambda: (split.x[:128], split.y[:128])),
            truths.movement(module),
            truths.still(module, "net.rnn.*"),
            lambda module: reach(module, split.x_held[:128], split.y_held[:128]),  # type: ignore[arg-type]
            lambda module: gates(module.net.rnn, split.x_held[:128]),  # type: ignore[union-attr, arg-type]
        ),
        targets=1,
        trainer={} if clip is None else {"gradient_clip_val": clip},
    )


def reach(module: Net, x: Tensor, y: Tensor) -> Measures:
    """Return the gradient that arrives at the first position, over that at the last."""
    twin = copy.deepcopy(module)
    x = x.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(twin.loss((x, y)), x)
    first, last = float(slope[:, 0].norm()), float(slope[:, -1].norm())
    return {"reach": first / last if last > 0 else 0.0}


def gates(rnn: nn.RNNBase, x: Tensor) -> Measures:
    """Return the share of gate values within 0.01 of an end, by the recurrence written out; 0 without gates.

    ``gates``: of an LSTM's four gates, on the mean; ``forget``: of its forget gate alone; for a plain
    network of its state.
    """
    rnn = copy.deepcopy(rnn).requires_grad_(False)
    state, cell = torch.zeros(2, len(x), rnn.hidden_size).unbind(0)
    w_in, w_state, b_in, b_state = rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0
    ends: list[list[float]] = []
    for t in range(x.shape[1]):
        if isinstance(rnn, nn.LSTM):
            i, f, g, o = (x[:, t] @ w_in.T + b_in + state @ w_state.T + b_state).chunk(4, dim=1)  # type: ignore[operator, union-attr]
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            cell = f * cell + i * g
            state = o * cell.tanh()
            near = [torch.minimum(i, 1 - i), torch.minimum(f, 1 - f), 1 - g.abs(), torch.minimum(o, 1 - o)]
            ends.append([float((each < 0.01).double().mean()) for each in near])
        elif isinstance(rnn, nn.RNN) and rnn.nonlinearity == "tanh":
            state = (x[:, t] @ w_in.T + b_in + state @ w_state.T + b_state).tanh()  # type: ignore[operator, union-attr]
            ends.append([float((1 - state.abs() < 0.01).double().mean())] * 4)
        else:
            ends.append([0.0] * 4)
    table = torch.tensor(ends).mean(0)
    return {"gates": float(table.mean()), "forget": float(table[1])}


def forget_bias(value: float) -> Spoil:
    """Return what sets the forget gate's bias."""

    def spoil(net: Reader) -> None:
        width = net.rnn.hidden_size
        nn.init.constant_(net.rnn.bias_ih_l0[width : 2 * width], value)  # type: ignore[index, arg-type]

    return spoil


def scaled(factor: float, *, inputs: float | None = None) -> Spoil:
    """Return what multiplies the recurrent weights, and the input's by ``inputs``."""

    def spoil(net: Reader) -> None:
        net.rnn.weight_hh_l0.data.mul_(factor)  # type: ignore[union-attr, operator]
        if inputs is not None:
            net.rnn.weight_ih_l0.data.mul_(inputs)  # type: ignore[union-attr, operator]

    return spoil


def shut(net: Reader) -> None:
    """Shut the forget gates and make the recurrent weights small, so that the state does not carry either."""
    forget_bias(-10.0)(net)
    scaled(0.1)(net)


def orthogonal(factor: float) -> Spoil:
    """Return what makes the recurrent weights a multiple of an orthogonal matrix."""
    return lambda net: nn.init.orthogonal_(net.rnn.weight_hh_l0, gain=factor)  # type: ignore[arg-type, return-value]


LEARNT = (over("accuracy", 0.9),)

CASES = [
    Case("recurrent/plain", "recurrent", "An LSTM.", partial(task, spoil=forget_bias(1.0)), LEARNT),
    Case(
        "recurrent/open_gates",
        "recurrent",
        "Forget gates held open by a bias of 6: saturated, which is what remembering asks for.",
        partial(task, spoil=forget_bias(6.0)),
        (over("accuracy", 0.95, of_control=True), over("forget", 0.5)),
        control="recurrent/plain",
    ),
    Case("recurrent/gru", "recurrent", "A GRU.", partial(task, net=partial(Reader, "gru")), LEARNT),
    Case(
        "recurrent/plateau",
        "recurrent",
        "A longer sequence: for many steps nothing seems to be learned, then all is.",
        partial(task, length=16, spoil=forget_bias(1.0), steps=600),
        LEARNT,
    ),
    Case(
        "recurrent/small_batch",
        "recurrent",
        "Four sequences a batch.",
        partial(task, size=4, spoil=forget_bias(1.0), optimizer=adam(2e-3), steps=700),
        (over("accuracy", 0.85),),
    ),
    Case(
        "recurrent/early",
        "recurrent",
        "Stopped after 12 steps: nothing has been learned yet, though all is in order.",
        partial(task, spoil=forget_bias(1.0), steps=12),
        (under("accuracy", 0.8), over("reach", 1e-3)),
    ),
    Case(
        "recurrent/clipped",
        "recurrent",
        "Gradients clipped at a norm of 0.05.",
        partial(task, spoil=forget_bias(1.0), clip=0.05),
        (over("accuracy", 0.95, of_control=True),),
        control="recurrent/plain",
    ),
    # --- sick ------------------------------------------------------------------------------------
    Case(
        "recurrent/vanish_in_tanh",
        "recurrent",
        "A tanh network with small recurrent weights: the last step's gradient does not reach the first.",
        partial(task, net=partial(Reader, "tanh"), spoil=scaled(0.2)),
        (under("start/reach", 1e-6), under("accuracy", 0.6, of_control=True)),
        *("vanishing_gradients", "initialisation"),
        layers=("*rnn*",),
        control="recurrent/plain",
    ),
    Case(
        "recurrent/forgetful",
        "recurrent",
        "Forget gates held shut by a bias of -10: memory and gradient are wiped each step.",
        partial(task, spoil=shut, length=20),
        (under("start/reach", 1e-6), under("accuracy", 0.6, of_control=True)),
        *("vanishing_gradients", "initialisation"),
        also=("saturation",),
        layers=("*rnn*",),
        control="recurrent/plain",
    ),
    Case(
        "recurrent/explode",
        "recurrent",
        "Recurrent ReLU, weights 2.2 times an orthogonal matrix: gradients grow with each step back.",
        partial(task, net=partial(Reader, "relu"), spoil=orthogonal(2.2), length=20, optimizer=sgd(0.01)),
        (over("start/gradient", 1000.0, of_control=True), under("accuracy", 0.6, of_control=True)),
        *("exploding_gradients", "initialisation"),
        also=("divergence", "dead_units"),
        control="recurrent/plain",
    ),
    Case(
        "recurrent/saturated",
        "recurrent",
        "Weights fifty times too large: most gates sit at an end.",
        partial(task, spoil=scaled(50.0, inputs=50.0)),
        (over("start/gates", 0.6), under("accuracy", 0.8, of_control=True)),
        *("saturation", "initialisation"),
        also=("vanishing_gradients", "exploding_gradients"),
        layers=("*rnn*",),
        control="recurrent/plain",
    ),
    Case(
        "recurrent/frozen_left_out",
        "recurrent",
        "The recurrent layer was not handed to the optimizer.",
        partial(task, optimizer=adam(5e-3, without=("rnn",))),
        (over("still_there", 0.99), under("accuracy", 0.8, of_control=True)),
        *("frozen", "wiring"),
        layers=("*rnn*",),
        control="recurrent/plain",
    ),
    Case(
        "recurrent/diverge",
        "recurrent",
        "Plain descent at a rate of 200.",
        partial(task, optimizer=sgd(200.0, momentum=0.9), spoil=forget_bias(1.0), steps=100),
        (over("diverged", 0.5),),
        *("divergence", "learning rate"),
        also=("exploding_gradients", "saturation"),
        control="recurrent/plain",
        leaves=over("loss", 4.0, of_control=True),
    ),
]
