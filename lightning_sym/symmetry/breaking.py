"""How far each unit is from its symmetries' mirrors, and how many units a layer has in effect.

Shape letters: B blocks, U units of a block, S = B * U the size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_sym.functional.hierarchy import breaking_distance, unit_clusters
from lightning_sym.symmetry.kinds import Permutation
from lightning_sym.symmetry.symmetry import Symmetry, relative


def narrowed(symmetry: Symmetry, *, most: int) -> tuple[Symmetry, Tensor]:
    """Return the subgroup that moves at most ``most`` units of a block, evenly spread over them.

    Args:
        symmetry: any; of at most ``most`` units a block it is returned as it is.
        most: at least 2.

    Returns:
        The symmetry, and for each of its units its number among those of the whole, ``[B * most]``.

    Raises:
        ValueError: if ``most`` is below 2.
    """
    if most < 2:
        raise ValueError(f"most must be at least 2, got {most}")
    units, kept = symmetry.units, min(symmetry.units, most)
    keep_U = torch.arange(kept) * units // kept
    number_BU = torch.arange(symmetry.blocks)[:, None] * units + keep_U
    if kept == units:
        return symmetry, number_BU.flatten()
    actions = tuple(replace(a, index=a.index[:, keep_U.to(a.index.device)]) for a in symmetry.actions)
    return replace(symmetry, actions=actions), number_BU.flatten()


def breaking_distances(
    symmetry: Symmetry, module: nn.Module | None = None, *, scale: float | None = 1.0
) -> Tensor:
    """Return how broken the symmetry is at each of its units, in direction and in size.

    Args:
        symmetry: whose mirrors are looked at.
        module: the network to read; by default the one that the symmetry was found on.
        scale: see :func:`~lightning_sym.functional.hierarchy.breaking_distance`, which is applied to
            :meth:`Symmetry.distance` and :meth:`Symmetry.mirror_norm`.

    Returns:
        ``[S]`` float64 in [0, 1]; NaN where parameters are not finite.
    """
    norm_S = symmetry.mirror_norm(symmetry._tensors(module))
    return breaking_distance(symmetry.distance(module), norm_S, scale=scale)


def effective_units(
    symmetry: Symmetry,
    module: nn.Module | None = None,
    *,
    threshold: float = 0.1,
    scale: float | None = 1.0,
    by_direction: bool = False,
) -> int:
    r"""Return how many units are neither zero nor another one's twin.

    A unit is zero if its norm is at most ``threshold * scale``. Of the others, a group that chains of
    breaking distances of at most ``threshold`` join counts as one.

    Args:
        symmetry: a permutation; of another kind, units (for a rotation: directions) whose breaking
            distance is above ``threshold`` are counted.
        module: the network to read; by default the one that the symmetry was found on.
        threshold: in (0, 1).
        scale: see :func:`breaking_distances`; ``None``: relative to the root mean square over units.
        by_direction: compare units by :math:`\sqrt{1-\cos}` of all that moves with them instead, in
            [0, 1]: of positively homogeneous units, two in one direction act as one.

    Returns:
        In [0, S], summed over blocks. Units that are not finite are not counted.

    Raises:
        ValueError: if ``threshold`` is out of its range.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be in (0, 1), got {threshold}")
    if not isinstance(symmetry, Permutation):
        return int((breaking_distances(symmetry, module, scale=scale) > threshold).sum())
    tensors = symmetry._tensors(module)
    norm_BU = symmetry._squares(tensors).sqrt()
    size_BU = relative(norm_BU).reshape(norm_BU.shape) if scale is None else norm_BU / scale
    moved_BUU, all_BUU = symmetry._pairs(tensors)
    if by_direction:
        product_BUU = norm_BU[:, :, None] * norm_BU[:, None, :]
        cosine_BUU = (all_BUU - moved_BUU) / (2 * product_BUU)
        distance_BUU = (1 - cosine_BUU).clamp(0, 1).sqrt()
    else:
        relative_BUU = (moved_BUU / torch.where(all_BUU > 0, all_BUU, torch.ones_like(all_BUU))).sqrt()
        distance_BUU = breaking_distance(relative_BUU, (moved_BUU / 2).sqrt(), scale=scale)
    total = 0
    for distance_UU, size_U in zip(distance_BUU, size_BU, strict=True):
        alive_U = (size_U > threshold) & size_U.isfinite()
        if alive_U.any():
            total += int(unit_clusters(distance_UU[alive_U][:, alive_U][None], threshold=threshold))
    return total
