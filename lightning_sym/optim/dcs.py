r"""Constraints by symmetry: what a mirror symmetry and decay do to a network, made use of on purpose.

A factorised weight has a symmetry, decay drives it onto the symmetry's mirror, and the mirror is the
constraint (Ziyin, 2023, arXiv 2309.16932: differentiable constraints by symmetry). The paper's general form
was not seen; what is built here is derived: with projections :math:`P = O O^\top`,

.. math:: \theta = O\,(w \odot O^\top u) + (I - P)\,v, \qquad
    \ell(\theta) + \kappa\,(\lVert O^\top u \rVert^2 + \lVert w \rVert^2),

which at its minimum over factors of equal product is an :math:`L_1` penalty (``w`` a vector) or a group lasso
(``w`` a number for the group) of strength :math:`2 \kappa` on :math:`O^\top \theta`. The special case
:math:`\theta = u \odot w` is certain.

============== ============================= ============================== ==============================
kind           symmetry                      factorisation                  penalty on the weight W
============== ============================= ============================== ==============================
``sparse``     rescaling of single entries   ``U * V``                      sum of ``|W_ij|``
``group``      rescaling of units            ``u_i * V_i`` (rows)           sum of ``||W_i||``
``low_rank``   rotation                      ``U @ V``                      sum of singular values
``equal``      permutation of units          mean + ``u_i * V_i``           sum of ``||W_i - mean||``
============== ============================= ============================== ==============================
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Kind = Literal["sparse", "group", "low_rank", "equal"]
UNBALANCE = 0.1  # difference of the factors' squares at the start, over the typical size of their product
KINDS: tuple[Kind, ...] = ("sparse", "group", "low_rank", "equal")


class _Factors(nn.Module):
    """A weight made of two factors of equal size, and for ``equal`` of a mean that is not penalised."""

    def __init__(self, kind: Kind, shape: torch.Size) -> None:
        super().__init__()
        self.kind, self.shape = kind, shape

    def forward(self, first: Tensor, second: Tensor, mean: Tensor | None = None) -> Tensor:
        if self.kind == "sparse":
            return first * second
        if self.kind == "low_rank":
            return (first @ second).reshape(self.shape)
        rows = first[:, None] * second
        return (rows if mean is None else rows + mean).reshape(self.shape)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return factors with this product, nearly of least penalty.

        Factors of equal size are of least penalty, but gradient flow would then keep them equal for ever
        (the rescaling's charge), and no entry could change its sign: the first gets a little more.
        """
        rows = weight.flatten(1) if weight.ndim > 1 else weight
        if self.kind == "low_rank":
            u, s, v = torch.linalg.svd(rows, full_matrices=False)
            return u * s.sqrt(), s.sqrt()[:, None] * v
        if self.kind == "sparse":
            first = _larger(weight.abs())
            return first, weight / first
        mean = rows.mean(dim=0)
        apart = rows - mean if self.kind == "equal" else rows
        first = _larger(apart.norm(dim=1))
        second = apart / first[:, None]
        return (first, second, mean) if self.kind == "equal" else (first, second)


def _larger(size: Tensor) -> Tensor:
    """Return the larger factor of a product, its square a tenth of the typical size above the other's."""
    typical = size.square().mean().sqrt()
    charge = UNBALANCE * torch.where(typical > 0, typical, torch.ones_like(typical))
    return ((charge + (charge.square() + 4 * size.square()).sqrt()) / 2).sqrt()


def constrain(module: nn.Module, name: str = "weight", *, kind: Kind) -> list[nn.Parameter]:
    r"""Factorise a weight so that decay of its factors constrains it.

    The derived form of the module's docstring, by ``torch.nn.utils.parametrize``: the weight keeps its value,
    and the module its forward pass. Give the returned factors a group with ``weight_decay`` in an optimizer
    with *coupled* decay (SGD): a ``weight_decay`` of :math:`g` is :math:`\kappa = g / 2`, so a penalty of
    strength :math:`g` on the weight. With any other optimizer add ``g *`` :func:`penalty` to the loss. Decay
    of the mean in ``equal`` is a matter of its own and left to you. A direction of a ``low_rank`` weight that
    begins at exactly 0 stays there: both its factors are 0.

    Args:
        module: holds the weight.
        name: of the parameter, ``[O, ...]``; for all kinds but ``sparse`` its first dimension is units.
        kind: ``"sparse"``, ``"group"``, ``"low_rank"`` or ``"equal"``, see the table above.

    Returns:
        The two factors, whose decay drives the constraint.

    Raises:
        ValueError: if the kind is unknown, or the parameter is missing, has too few dimensions or is
            parametrised already.

    Example:
        >>> layer = torch.nn.Linear(3, 2, bias=False)
        >>> [tuple(factor.shape) for factor in constrain(layer, kind="group")]
        [(2,), (2, 3)]
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    weight = getattr(module, name, None)
    if not isinstance(weight, nn.Parameter) or parametrize.is_parametrized(module, name):
        raise ValueError(f"name={name!r} must be a plain parameter of {type(module).__name__}")
    if weight.ndim < 2 and kind != "sparse":
        raise ValueError(f"kind={kind!r} needs a weight of two dimensions or more, got {tuple(weight.shape)}")
    parametrize.register_parametrization(module, name, _Factors(kind, weight.shape))
    originals = module.parametrizations[name]  # type: ignore[index, union-attr]
    return [originals.original0, originals.original1]  # type: ignore[union-attr, list-item]


def penalty(factors: Iterable[Tensor]) -> Tensor:
    r"""Half the squares' sum of the factors, whose gradient is what coupled decay of strength 1 adds.

    At its minimum over factors of equal product it is the table's penalty on the weight; ``g * penalty`` in
    the loss is a ``weight_decay`` of ``g`` for optimizers that would divide decay by its own size (Adam) or
    apply it apart from the gradient (AdamW).

    Args:
        factors: what :func:`constrain` returned, of one or of several weights.

    Returns:
        Scalar ``[]``, at least 0.

    Raises:
        ValueError: if there are no factors.

    Example:
        >>> penalty([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(12.5000)
    """
    factors = list(factors)
    if not factors:
        raise ValueError("factors must hold what constrain() returned, got none")
    return sum((factor.square().sum() for factor in factors[1:]), factors[0].square().sum()) / 2


@torch.no_grad()
def finalize(module: nn.Module, name: str = "weight", *, tolerance: float = 1e-6) -> Tensor:
    """Put the weight back in one piece, with what decay drove to nothing exactly there.

    Args:
        module: whose weight was factorised by :func:`constrain`.
        name: of the parameter.
        tolerance: what counts as nothing: entries (``sparse``), norms of units (``group``), singular
            values (``low_rank``), distances from the mean (``equal``) up to it become exactly 0; singular
            values to rounding, the weight being their product with the directions.

    Returns:
        Boolean: entries, units, directions or units that were set to nothing.

    Raises:
        ValueError: if the parameter was not factorised by :func:`constrain`, or ``tolerance`` is negative.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    factors = _factors(module, name)
    weight = getattr(module, name).detach().clone()
    if factors.kind == "sparse":
        gone = weight.abs() <= tolerance
        weight[gone] = 0.0
    elif factors.kind == "low_rank":
        u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        gone = s <= tolerance
        weight = ((u * torch.where(gone, 0.0, s)) @ v).reshape(weight.shape)
    else:
        rows = weight.flatten(1)
        mean = module.parametrizations[name].original2 if factors.kind == "equal" else 0.0  # type: ignore[index, union-attr]
        gone = (rows - mean).norm(dim=1) <= tolerance  # type: ignore[operator]
        rows = torch.where(gone[:, None], torch.as_tensor(mean, dtype=rows.dtype, device=rows.device), rows)
        weight = rows.reshape(weight.shape)
    trainable = any(p.requires_grad for p in module.parametrizations[name].parameters())  # type: ignore[index, union-attr]
    parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    delattr(module, name)  # what is left there is a buffer where no gradient is recorded
    module.register_parameter(name, nn.Parameter(weight, requires_grad=trainable))
    return gone


def _factors(module: nn.Module, name: str) -> _Factors:
    if parametrize.is_parametrized(module, name):
        first = module.parametrizations[name][0]  # type: ignore[index]
        if isinstance(first, _Factors):
            return first
    raise ValueError(f"name={name!r} of {type(module).__name__} was not factorised by constrain()")
