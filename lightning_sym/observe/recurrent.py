"""Recurrent modules: how far a gradient reaches back in time, and how saturated their gates are.

Shape letters: N samples, T positions, D features of the input, U units.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sym.observe.weights import accumulation_dtype

#: Torch's functions, and how many gates each has.
RECURRENT = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
#: One position at a time, called in a loop: input, states, both weights, biases.
CELLS = ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
#: Samples that are looked at.
SAMPLES = 8
#: How near an end of its range an activation is saturated.
NEAR = 0.01


def _some(args: tuple[Any, ...]) -> tuple[Tensor, list[Tensor], bool]:
    """Return a few samples of the input, of the initial states, and whether samples come first."""
    x, states, batch_first = args[0].detach(), args[1], bool(args[8])
    x = x[:SAMPLES] if batch_first else x[:, :SAMPLES]
    several = states if isinstance(states, list | tuple) else [states]
    return x, [state.detach()[:, :SAMPLES].contiguous() for state in several], batch_first


def reach(name: str, args: tuple[Any, ...]) -> Tensor:
    """Return squared gradients of the last position's output by the first and the last input, ``[2]``.

    Args:
        name: a key of :data:`RECURRENT`.
        args: of the call: input, states, weights, has_biases, num_layers, dropout, train, bidirectional,
            batch_first.
    """
    x, states, batch_first = _some(args)
    weights = [weight.detach() for weight in args[2]]
    call = getattr(torch, name)
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        state = states if name == "lstm" else states[0]
        y = (
            call(x, state, weights, args[3], args[4], 0.0, args[6], False, batch_first)
            if not args[7]
            else None
        )
        if y is None:
            return torch.full((2,), torch.nan, dtype=torch.float64, device=x.device)
        last_NU = y[0][:, -1] if batch_first else y[0][-1]
        turned_U = torch.arange(last_NU.shape[1], device=x.device).cos().to(last_NU.dtype)
        (gradient,) = torch.autograd.grad((last_NU * turned_U).sum(), x)
    gradient = gradient if batch_first else gradient.transpose(0, 1)
    return torch.stack([gradient[:, 0].double().square().sum(), gradient[:, -1].double().square().sum()])


def gates(name: str, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """Return how many gate values lie within 0.01 of an end of their range, and how many there are, ``[2]``.

    None where they are not known: several layers, both directions, projections, or no squashing.
    """
    weights, has_biases, layers, both, batch_first = args[2], args[3], args[4], args[7], bool(args[8])
    if name == "rnn_relu" or layers != 1 or both or len(weights) > 4:
        return None
    x, states, _ = _some(args)
    y = output.detach()[:SAMPLES] if batch_first else output.detach()[:, :SAMPLES]
    x_NTD, y_NTU = (t if batch_first else t.transpose(0, 1) for t in (x, y))
    if name == "rnn_tanh":
        return near_ends(y_NTU, squash=True)
    first_NTU = states[0].transpose(0, 1)
    before_NTU = torch.cat([first_NTU, y_NTU[:, :-1]], dim=1)
    into = x_NTD @ weights[0].detach().mT + before_NTU @ weights[1].detach().mT
    if has_biases:
        into = into + weights[2].detach() + weights[3].detach()
    parts = into.chunk(RECURRENT[name], dim=-1)
    if name == "gru":  # the third also depends on the first: left out
        return near_ends(parts[0].sigmoid()) + near_ends(parts[1].sigmoid())
    found = [near_ends(parts[i].sigmoid()) for i in (0, 1, 3)]
    return sum(found[1:], found[0]) + near_ends(parts[2].tanh(), squash=True)


def near_ends(values: Tensor, *, squash: bool = False) -> Tensor:
    """Return how many values of a sigmoid (``squash``: of a tanh) are saturated, and of how many, ``[2]``."""
    size = values.abs()
    ends = 1 - size if squash else torch.minimum(size, 1 - size)
    counts = torch.stack([(ends < NEAR).sum(), torch.tensor(ends.numel(), device=ends.device)])
    return counts.to(accumulation_dtype(values.device))
