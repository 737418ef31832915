r"""Noether charges taken apart: what the quadratic form of a charge makes of parameters and of noise.

The charge of a rescaling, rotation or scale is :math:`C = \sum_a p_a \Theta_a\Theta_a^\top` over the tensors
a that move with powers :math:`p_a` (of factors, its diagonal: one number a unit). With a covariance of
gradients in the place of :math:`\Theta_a\Theta_a^\top`, the same form says how noise moves C (Ziyin et
al., 2023, arXiv 2308.06671; 2024, arXiv 2402.07193).

Shape letters: B blocks, U units of a block, D length of the tensor along the dimension that moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_sym.symmetry.kinds import Rotation
from lightning_sym.symmetry.symmetry import Action, Symmetry, plain


def power(action: Action) -> float:
    """Return the weight of an action in the charge."""
    return action.power


def quadratic_form(
    symmetry: Symmetry,
    moment: Callable[[Action], Tensor | None],
    weight: Callable[[Action], float] = power,
) -> Tensor | None:
    r"""Return :math:`\sum_a w_a M_a` over the parameters that a symmetry moves.

    Args:
        symmetry: a rescaling, rotation or scale.
        moment: gives :math:`M_a` of an action, :func:`own_moment` or :func:`unit_moment`; None: unknown.
        weight: :math:`w_a`; by default the powers, which gives the charge. Actions of weight 0 are not
            asked for.

    Returns:
        ``[B, U]``, of a rotation ``[B, U, U]``, float64; None if a moment is unknown.
    """
    shape = (symmetry.blocks, symmetry.units, *([symmetry.units] if isinstance(symmetry, Rotation) else []))
    total = torch.zeros(shape, dtype=torch.float64)
    for action in symmetry.actions:
        if action.buffer or not (w := weight(action)):
            continue
        found = moment(action)
        if found is None:
            return None
        total = total.to(found.device) + w * found
    return total


def incoming(action: Action) -> float:
    """Return an action's weight on the side that a factor multiplies."""
    return max(action.power, 0.0)


def outgoing(action: Action) -> float:
    """Return an action's weight on the side that makes up for a factor."""
    return max(-action.power, 0.0)


def own_moment(symmetry: Symmetry, tensors: Mapping[str, Tensor]) -> Callable[[Action], Tensor]:
    r"""Return the moment of the tensors themselves: squared norms, of a rotation :math:`\Theta\Theta^\top`.

    Args:
        symmetry: a rescaling, rotation or scale.
        tensors: a vector in parameter space by clean parameter names.
    """

    def moment(action: Action) -> Tensor:
        tensor = plain(tensors[action.name])
        if isinstance(symmetry, Rotation):
            rows_BUD = action.gather(tensor.double()).flatten(2)
            return rows_BUD @ rows_BUD.mT
        others = [dim for dim in range(tensor.ndim) if dim != action.dim]
        norm_D = (
            torch.linalg.vector_norm(tensor, dim=others, dtype=torch.float64) if others else tensor.double()
        )
        return norm_D.square()[action.index.to(tensor.device)].sum(2)

    return moment


def unit_moment(symmetry: Symmetry, action: Action, second: Tensor, *, start: int = 0) -> Tensor | None:
    """Return a second moment along a tensor's dimension, brought down to the units of an action.

    Args:
        symmetry: a rescaling, rotation or scale.
        action: which positions along the dimension are which unit's.
        second: ``[D, D]``, or only its diagonal ``[D]``; position 0 of it is ``start`` of the tensor.
        start: see ``second``.

    Returns:
        ``[B, U]``, of a rotation ``[B, U, U]``; None if that needs more than a diagonal, or positions
        that ``second`` does not have.
    """
    index_BUM = action.index.to(second.device) - start
    if int(index_BUM.min()) < 0 or int(index_BUM.max()) >= len(second):
        return None
    second = second.double()
    if not isinstance(symmetry, Rotation):
        diagonal_D = second.diagonal() if second.ndim == 2 else second
        return diagonal_D[index_BUM].sum(2)
    if second.ndim == 1:
        return None
    return second[index_BUM[:, :, None], index_BUM[:, None]].sum(3)
