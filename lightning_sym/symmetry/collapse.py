"""Which units of a layer have collapsed, and onto which symmetry's mirror."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_sym._names import clean_name
from lightning_sym.symmetry.kinds import Permutation, Rescaling, Rotation
from lightning_sym.symmetry.symmetry import Symmetry

_PACKED = ("q_proj", "k_proj", "v_proj")  # in the order in which attention's in_proj_weight has them


def collapsed_units(
    symmetry: Symmetry, module: nn.Module | None = None, *, tolerance: float = 1e-3
) -> Tensor:
    """Return which units lie on their mirror's fixed subspace.

    Args:
        symmetry: the symmetry whose mirrors are looked at.
        module: the network to read; by default the one that the symmetry was found on.
        tolerance: the largest distance that still counts as collapsed, at least 0.

    Returns:
        Boolean ``[symmetry.size]``. A non-finite unit has not collapsed.

    Raises:
        ValueError: if ``tolerance`` is negative.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    return symmetry.distance(module) <= tolerance


def collapse_causes(
    symmetries: Iterable[Symmetry], layer: str, module: nn.Module | None = None, *, tolerance: float = 1e-3
) -> dict[str, float]:
    """Return how large a share of a layer's units collapsed, by the symmetry that they fell into.

    The units are the rows of ``<layer>.weight`` (its output units); of attention's packed projection the
    queries', keys' and values' rows are the layers ``q_proj``, ``k_proj`` and ``v_proj``. A unit that is
    zero lies on its rescaling mirror and, with another zero unit, on a permutation mirror as well: it is
    counted as rescaling. Rotations have no units of their own: the share is that of lost directions.

    Args:
        symmetries: what :func:`~lightning_sym.symmetry.find_symmetries` returned.
        layer: name of the layer.
        module: the network to read; by default the one that the symmetries were found on.
        tolerance: the largest distance that still counts as collapsed.

    Returns:
        ``{"permutation": equal units, "rescaling": zero units, "rotation": lost directions}`` as
        fractions in ``[0, 1]``, with only those kinds that the layer's output units have.
    """
    hit: dict[str, Tensor] = {}
    lost: list[Tensor] = []
    rows = 0
    for symmetry in symmetries:
        if not isinstance(symmetry, Permutation | Rescaling | Rotation):
            continue
        acting = _acting(symmetry, layer, module)
        if not acting:
            continue
        collapsed_S = collapsed_units(symmetry, module, tolerance=tolerance)
        if isinstance(symmetry, Rotation):
            lost.append(collapsed_S.double())
            continue
        for index_SM in acting:
            rows = max(rows, int(index_SM.max()) + 1)
            mask = hit.get(symmetry.kind, torch.zeros(0, dtype=torch.bool))
            mask = torch.nn.functional.pad(mask, (0, max(0, rows - mask.numel())))
            units = index_SM[collapsed_S.cpu()].flatten()
            mask[units[units >= 0]] = True
            hit[symmetry.kind] = mask
    masks = {kind: torch.nn.functional.pad(mask, (0, rows - mask.numel())) for kind, mask in hit.items()}
    if "permutation" in masks and "rescaling" in masks:
        masks["permutation"] = masks["permutation"] & ~masks["rescaling"]
    shares = {kind: float(mask.double().mean()) for kind, mask in masks.items()}
    if lost:
        shares["rotation"] = float(torch.cat(lost).mean())
    return shares


def least_force(symmetries: Iterable[Symmetry], layer: str, forces: Mapping[str, Tensor]) -> float | None:
    r"""Return the weakest push away from a mirror that one of a layer's output units is on.

    Args:
        symmetries: what :func:`~lightning_sym.symmetry.find_symmetries` returned.
        layer: name of the layer, as for :func:`collapse_causes`.
        forces: a force on the parameters by their names, as
            :meth:`~lightning_sym.optim.syre.SyreHandle.forces` gives it.

    Returns:
        The least :math:`\lVert P f\rVert` over units and symmetries (:meth:`Symmetry.mirror_norm`), at least
        0; ``None`` if the layer's output units have no symmetry. 0: there is a mirror to be stuck on.
    """
    acting = [symmetry for symmetry in symmetries if _acting(symmetry, layer, None)]
    return min((float(symmetry.mirror_norm(forces).min()) for symmetry in acting), default=None)


def _acting(symmetry: Symmetry, layer: str, module: nn.Module | None) -> list[Tensor]:
    """Return which of a layer's output units move with each unit, ``[S, M]`` an action; -1: another's."""
    layer = clean_name(layer)
    parent, _, part = layer.rpartition(".")
    packed = f"{parent}.in_proj_weight" if parent else "in_proj_weight"
    found = []
    for action in symmetry.actions:
        if action.dim != 0:
            continue
        index_SM = action.index.flatten(0, 1)
        if action.name in (f"{layer}.weight", f"{layer}_weight"):
            found.append(index_SM)
        elif action.name == packed and part in _PACKED:
            size = symmetry._tensors(module)[packed].shape[0] // len(_PACKED)
            index_SM = index_SM - size * _PACKED.index(part)
            own_SM = (index_SM >= 0) & (index_SM < size)
            if own_SM.any():
                found.append(index_SM.masked_fill(~own_SM, -1))
    return found
