r"""Factors of rescalings: the point of least norm, and the point nearest to other weights.

A rescaling moves the slices of a tensor a by :math:`e^{p_a s}`, one :math:`s` a unit. The squared norm
:math:`\sum_a n_a e^{2 p_a s}` is convex in all :math:`s` together, so its least point is one that every
network of the same function (up to permutations and signs) has in common.

Shape letters: B blocks, U units, A tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sym.symmetry.kinds import Rescaling
from lightning_sym.symmetry.symmetry import Action

Tensors = dict[str, Tensor]


def balance(tensors: Tensors, rescalings: Sequence[Rescaling], *, sweeps: int = 300) -> list[Tensor]:
    """Move tensors in place to the least norm that rescalings reach.

    Units without incoming or outgoing weights have no such point and stay.

    Args:
        tensors: float64, by clean names.
        rescalings: all of them; they commute.
        sweeps: at most so many passes over all; fewer where nothing moves any more.

    Returns:
        The factors by which each was moved, ``[B, U]``.
    """
    total = [torch.ones(r.blocks, r.units).double() for r in rescalings]
    for _ in range(sweeps):
        largest = 0.0
        for number, rescaling in enumerate(rescalings):
            powers_A, squares_ABU = _stacked(rescaling, tensors)
            s_BU = _least(powers_A, squares_ABU) * _damping(rescaling)
            rescaling.move_(tensors, s_BU.exp())
            total[number] *= s_BU.exp()
            largest = max(largest, float(s_BU.abs().max()))
        if largest < 1e-13:
            break
    return total


def _least(powers_A: Tensor, squares_ABU: Tensor) -> Tensor:
    """Return the s of least squared norm for each unit, by Newton's method."""
    p = powers_A[:, None, None]
    there = (squares_ABU * (p > 0)).sum(0).gt(0) & (squares_ABU * (p < 0)).sum(0).gt(0)
    s_BU = torch.zeros_like(squares_ABU[0])
    if len(size := p.abs().unique()) == 1:
        into, out = (squares_ABU * (p > 0)).sum(0), (squares_ABU * (p < 0)).sum(0)
        return torch.where(there, (out / into).log() / (4 * size), 0.0)
    for _ in range(60):
        terms = squares_ABU * (2 * p * s_BU).exp()
        slope, curve = (2 * p * terms).sum(0), (4 * p.square() * terms).sum(0)
        step = torch.where(there, slope / torch.where(there, curve, torch.ones_like(curve)), 0.0)
        s_BU = s_BU - step.clamp(-1, 1)
        if float(step.abs().max()) < 1e-15:
            break
    return s_BU


def approach(
    tensors: Tensors, goal: Tensors, rescalings: Sequence[Rescaling], *, sweeps: int = 50
) -> list[Tensor]:
    """Move tensors in place as near to others as rescalings bring them, one unit after another.

    Args:
        tensors: float64, by clean names.
        goal: likewise.
        rescalings: all of them.
        sweeps: at most so many passes over all.

    Returns:
        The factors by which each was moved, ``[B, U]``.
    """
    total = [torch.ones(r.blocks, r.units).double() for r in rescalings]
    for _ in range(sweeps):
        moved = False
        for number, rescaling in enumerate(rescalings):
            names = list(rescaling.parameters)
            before = distance(tensors, goal, names)
            if before <= 1e-24 * sum(float(goal[name].square().sum()) for name in names):
                continue
            factor_BU = _nearest(rescaling, tensors, goal).exp()
            rescaling.move_(tensors, factor_BU)
            if distance(tensors, goal, names) < before * (1 - 1e-9):
                total[number] *= factor_BU
                moved = True
            else:
                rescaling.move_(tensors, 1 / factor_BU)
        if not moved:
            break
    return total


def _nearest(rescaling: Rescaling, tensors: Tensors, goal: Tensors) -> Tensor:
    """Return the s that brings each unit nearest, 0 where no Newton step from there comes nearer."""
    powers_A, squares_ABU = _stacked(rescaling, tensors)
    products_ABU = torch.stack(
        [(a.gather(tensors[a.name]) * a.gather(goal[a.name])).sum((2, 3)) for a in _own(rescaling)]
    )
    p = powers_A[:, None, None]

    def value(s_BU: Tensor) -> Tensor:
        return ((2 * p * s_BU).exp() * squares_ABU - 2 * (p * s_BU).exp() * products_ABU).sum(0)

    s_BU = torch.zeros_like(squares_ABU[0])
    for _ in range(20):
        inner, outer = (p * s_BU).exp() * products_ABU, (2 * p * s_BU).exp() * squares_ABU
        slope = (2 * p * (outer - inner)).sum(0)
        curve = (2 * p.square() * (2 * outer - inner)).sum(0)
        step = torch.where(curve > 0, slope / torch.where(curve > 0, curve, 1.0), 0.1 * slope.sign())
        s_BU = s_BU - step.clamp(-0.5, 0.5)
        if float(step.abs().max()) < 1e-10:
            break
    s_BU = s_BU * _damping(rescaling)
    return torch.where(value(s_BU) < value(torch.zeros_like(s_BU)), s_BU, 0.0)


def distance(a: Tensors, b: Tensors, names: Sequence[str]) -> float:
    """Return the sum of squared differences of the named tensors."""
    return sum(float((a[name] - b[name]).detach().square().sum()) for name in names)


def _own(rescaling: Rescaling) -> list[Action]:
    return [action for action in rescaling.actions if not action.buffer]


def _stacked(rescaling: Rescaling, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Return powers ``[A]`` and squared norms ``[A, B, U]`` of the parameters that move."""
    own = _own(rescaling)
    squares = [action.gather(tensors[action.name]).square().sum((2, 3)) for action in own]
    return torch.tensor([action.power for action in own]).double(), torch.stack(squares)


def _damping(rescaling: Rescaling) -> float:
    """Return 1/2 where a tensor moves along two dimensions: its units are then no longer independent."""
    names = [action.name for action in _own(rescaling)]
    return 0.5 if len({(a.name, a.dim) for a in _own(rescaling)}) > len(set(names)) else 1.0
