"""Units that are dead by proof: constant before a ReLU, at most zero, on every way the graph knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_sym.symmetry import Affine


def certified_dead(
    constant_U: Tensor, ways: Sequence[tuple[Affine, ...]], tensors: Mapping[str, Tensor]
) -> Tensor:
    r"""Return which units no input can make positive before any of their ReLUs.

    A unit without incoming weights, or with a normalisation's gain of zero, is a constant; it is followed
    through biases and normalisations, as in evaluation (running statistics) and as in training (batch
    statistics, in which a constant becomes the normalisation's bias :math:`\beta`). It is dead if it ends at
    0 or below in both.

    Args:
        constant_U: units that the layer itself makes constant (all of their weights are exactly zero).
        ways: what :meth:`~lightning_sym.symmetry.Graph.rectified` returned.
        tensors: parameters and buffers by clean names.

    Returns:
        Boolean ``[U]``.

    Example:
        >>> tensors = {"bias": torch.tensor([0.0, 0.5, -1.0])}
        >>> certified_dead(torch.tensor([True, True, False]), [(Affine(bias="bias"),)], tensors)
        tensor([ True, False, False])
    """
    dead_U = torch.ones_like(constant_U)
    for way in ways:
        known_U = constant_U.clone()
        test_U = torch.zeros(constant_U.shape, dtype=torch.float64)
        train_U = test_U.clone()
        for affine in way:
            bias_U = _vector(affine.bias, tensors, 0.0, test_U)
            gain_U = _vector(affine.gain, tensors, 1.0, test_U)
            if bias_U is None or gain_U is None:
                known_U = torch.zeros_like(known_U)  # another number of units: they can't be told apart
                break
            if not affine.normalises:
                test_U, train_U = test_U + bias_U, train_U + bias_U
                continue
            # A constant is its own batch mean. Over units (layer normalisation) it is none any more.
            own_U = known_U if affine.mean is not None else torch.zeros_like(known_U)
            known_U = own_U | (gain_U == 0)
            mean_U = _vector(affine.mean, tensors, 0.0, test_U)
            variance_U = _vector(affine.variance, tensors, 1.0, test_U)
            if mean_U is not None and variance_U is not None:
                test_U = gain_U * (test_U - mean_U) / (variance_U + affine.eps).sqrt() + bias_U
            test_U = torch.where(gain_U == 0, bias_U, test_U)
            train_U = bias_U
        dead_U = dead_U & known_U & (test_U <= 0) & (train_U <= 0)
    return dead_U


def _vector(name: str | None, tensors: Mapping[str, Tensor], default: float, like: Tensor) -> Tensor | None:
    """Return a named vector in float64, the default where there is none; ``None`` if it has another size."""
    if name is None:
        return torch.full_like(like, default)
    found = tensors[name].detach().double().flatten().cpu()
    return found if found.shape == like.shape else None
