"""The loss along the straight line between two networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sym.symmetry.symmetry import named_tensors


@dataclass(frozen=True)
class Barrier:
    """What :func:`loss_barrier` returns.

    Attributes:
        at: places on the line, from 0 (a) to 1 (b), ``[P]`` float64.
        losses: the loss there, ``[P]`` float64.
        excess: the loss less the straight line between the losses of the ends, ``[P]``; 0 at the ends.
        height: the largest excess, at least 0; NaN if a loss is.
    """

    at: Tensor = field(repr=False)
    losses: Tensor = field(repr=False)
    excess: Tensor = field(repr=False)
    height: float


@torch.no_grad()
def loss_barrier(
    model_a: nn.Module,
    model_b: nn.Module | Mapping[str, Tensor],
    loss: Callable[[nn.Module], Any],
    *,
    points: int = 11,
    prepare: Callable[[nn.Module], Any] | None = None,
) -> Barrier:
    r"""Return how high the loss rises on the straight line from one network to another.

    .. math:: B = \max_{\alpha\in[0,1]}\;
        L\bigl((1-\alpha)\theta_a + \alpha\theta_b\bigr) - (1-\alpha) L(\theta_a) - \alpha L(\theta_b)

    (Frankle et al., 2020, arXiv 1912.05671; Entezari et al., 2022, arXiv 2110.06296), over ``points``
    evenly spaced :math:`\alpha`. Floating-point buffers (running statistics) are interpolated as parameters
    are; others are a's.

    Args:
        model_a: one end; left as it is, a copy of it walks the line, in the mode that it is in.
        model_b: the other end, or its tensors by clean names (:attr:`Match.tensors`).
        loss: takes the network and returns its loss, a scalar.
        points: on the line, both ends included, at least 3.
        prepare: is called with the network at each point before the loss, to set running statistics anew
            (Jordan et al., 2023, arXiv 2211.08403).

    Returns:
        Places, losses, excess and height.

    Raises:
        ValueError: if ``points`` is below 3, the ends differ in names or shapes, or the loss is no scalar.
        TypeError: if ``model_a`` is no module.
    """
    if not isinstance(model_a, nn.Module):
        raise TypeError(f"model_a must be a torch.nn.Module, got {type(model_a).__name__}")
    if points < 3:
        raise ValueError(f"points must be at least 3, got {points}")
    walker = copy.deepcopy(model_a)
    own = named_tensors(walker)
    start = {name: tensor.detach().clone() for name, tensor in own.items()}
    end = dict(model_b) if isinstance(model_b, Mapping) else named_tensors(model_b)
    for name, tensor in start.items():
        if name not in end or end[name].shape != tensor.shape:
            found = f"shape {tuple(end[name].shape)}" if name in end else "none"
            raise ValueError(f"model_b must have {name!r} of shape {tuple(tensor.shape)}, got {found}")
    at_P = torch.linspace(0, 1, points, dtype=torch.float64)
    losses = []
    for share in at_P.tolist():
        for name, tensor in own.items():
            if tensor.is_floating_point():
                tensor.copy_(
                    torch.lerp(start[name].double(), end[name].detach().to(tensor.device).double(), share)
                )
            else:
                tensor.copy_(start[name])
        if prepare is not None:
            prepare(walker)
        value = torch.as_tensor(loss(walker))
        if value.numel() != 1:
            raise ValueError(f"loss must return a scalar, got shape {tuple(value.shape)}")
        losses.append(float(value))
    losses_P = torch.tensor(losses, dtype=torch.float64)
    excess_P = losses_P - torch.lerp(losses_P[0], losses_P[-1], at_P)
    excess_P[0] = excess_P[-1] = excess_P[0] * 0  # exactly 0, or NaN
    return Barrier(at_P, losses_P, excess_P, float(excess_P.max()))
