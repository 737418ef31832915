"""The hierarchy of symmetry breakings: distances, phases of the loss, roles of layers, likeness of runs.

Shape letters: N samples, D and E features, B blocks, U units of a block, T readings, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sym.functional._checks import as_matrix, as_real, check_number, check_same_shape, promoted


class Phase(NamedTuple):
    """One phase of the loss: from a reading on."""

    what: str  #: "drop" or "plateau"
    seen: int  #: the reading at which it was known
    after: int  #: the reading that it was compared with: the phase began between the two


def breaking_distance(distance: Tensor, norm: Tensor, *, scale: float | None = 1.0) -> Tensor:
    r"""How far units are from a symmetric state, in direction and in size.

    .. math:: \Delta = \min(d,\; \lVert P\theta\rVert / \text{scale},\; 1)

    with the relative distance d of parameters from their mirror and the length of what points away
    from it. Small weights in random directions are symmetric by the second (they are near zero, a
    symmetric point), twins of any size by the first.

    Args:
        distance: d, relative, in [0, 1], any shape.
        norm: :math:`\lVert P\theta\rVert`, at least 0, of the same shape.
        scale: length that counts as fully broken: 1 is that of a unit's incoming weights at the usual
            initialisation (variance 1 / inputs); ``None``: d alone.

    Returns:
        In [0, 1], 0 where symmetric; NaN where an input is not finite.

    Raises:
        TypeError: if an input is not a real floating-point tensor.
        ValueError: if shapes differ or ``scale`` is not positive.

    Example:
        >>> breaking_distance(torch.tensor([1.0, 0.2]), torch.tensor([0.1, 5.0]), scale=1.0)
        tensor([0.1000, 0.2000])
    """
    distance, norm = promoted(as_real(distance, name="distance"), as_real(norm, name="norm"))
    check_same_shape(distance, norm, names="distance and norm")
    if scale is not None:
        check_number("scale", scale, above=0)
    found = distance if scale is None else torch.minimum(distance, norm / scale)
    return torch.where(distance.isfinite() & norm.isfinite(), found.clamp(max=1), torch.nan)


def unit_clusters(distances: Tensor, *, threshold: float) -> Tensor:
    """Number of groups of units that chains of short distances join.

    Args:
        distances: of every pair of units of a block, ``[B, U, U]``, symmetric; the diagonal is not read.
        threshold: the largest distance that joins two units.

    Returns:
        ``[B]`` whole numbers in [1, U], as floats since those of a block with a NaN off its diagonal
        are NaN. Infinite distances join nothing.

    Raises:
        TypeError: if ``distances`` is not a real floating-point tensor.
        ValueError: if ``distances`` is not ``[B, U, U]`` or ``threshold`` is not a finite number.

    Example:
        >>> unit_clusters(torch.tensor([[[0.0, 0.1, 1.0], [0.1, 0.0, 1.0], [1.0, 1.0, 0.0]]]), threshold=0.5)
        tensor([2.])
    """
    distances = as_real(distances, name="distances")
    check_number("threshold", threshold)
    if distances.ndim != 3 or distances.shape[1] != distances.shape[2] or not distances.numel():
        raise ValueError(f"distances must be [B, U, U], got {tuple(distances.shape)}")
    units = distances.shape[1]
    eye_UU = torch.eye(units, dtype=torch.bool, device=distances.device)
    joined_BUU = (distances <= threshold) | eye_UU
    label_BU = torch.arange(units, device=distances.device).expand(len(distances), units)
    while True:
        least_BU = torch.where(joined_BUU, label_BU[:, None, :], units).amin(2)
        if torch.equal(least_BU, label_BU):
            # A group keeps exactly one unit with its own label.
            count_B = (label_BU == torch.arange(units, device=label_BU.device)).sum(dim=1)
            unknown_B = (distances.isnan() & ~eye_UU).flatten(1).any(dim=1)
            return torch.where(unknown_B, torch.nan, count_B.to(distances.dtype))
        label_BU = least_BU


def loss_phases(
    steps: Sequence[float],
    losses: Sequence[float],
    *,
    steep: float = 1.0,
    flat: float = 0.25,
    window: float = 1.3,
) -> list[Phase]:
    r"""Drops and plateaus of a loss, as they show in its log-log picture.

    The slope at a reading is :math:`-\Delta\ln L / \Delta\ln t` against the last reading that is at
    least a factor ``window`` earlier. A drop begins where it passes ``steep`` (the loss falls faster
    than 1 / t), a plateau where it falls below ``flat``. What is known is never taken back: more
    readings only add phases.

    Args:
        steps: positive and increasing, ``[T]``.
        losses: ``[T]``; readings that are not positive and finite are passed over.
        steep: see above.
        flat: see above, less than ``steep``.
        window: a factor above 1.

    Returns:
        The phases in order, drops and plateaus in turn.

    Raises:
        ValueError: if the lengths differ, a step is not finite or an argument is out of its range.

    Example:
        >>> [phase.what for phase in loss_phases([1, 2, 4, 8, 16], [1, 1, 0.1, 0.01, 0.01])]
        ['plateau', 'drop', 'plateau']
    """
    if len(steps) != len(losses):
        raise ValueError(f"steps and losses must be of one length, got {len(steps)} and {len(losses)}")
    if not all(math.isfinite(step) for step in steps):
        raise ValueError("steps must be finite numbers")
    if not (flat < steep and 1 < window < math.inf):
        raise ValueError(f"flat must be less than steep and window above 1, got {flat}, {steep} and {window}")
    phases: list[Phase] = []
    earlier: list[int] = []
    for t, (step, loss) in enumerate(zip(steps, losses, strict=True)):
        if not (0 < loss < math.inf and step > 0):
            continue
        before = next((s for s in reversed(earlier) if steps[s] * window <= step), None)
        earlier.append(t)
        if before is None:
            continue
        slope = -math.log(loss / losses[before]) / math.log(step / steps[before])
        now = phases[-1].what if phases else ""
        what = "drop" if slope > steep else "plateau" if slope < flat else now
        if what != now:
            phases.append(Phase(what, t, before))
    return phases


def depth_roles(ranks: Sequence[float], *, tolerance: float = 0.1) -> list[str]:
    """What each layer does to the rank of its representation.

    Args:
        ranks: of the representations in order of depth, ``[L + 1]``.
        tolerance: the least relative change that counts, in (0, 1).

    Returns:
        ``[L]``: "expansion" (the rank rises), "reduction" (it falls) or "transmission" (it stays; also
        where a rank is zero).

    Raises:
        ValueError: if a rank is not finite, which has no role, or ``tolerance`` is out of its range.

    Example:
        >>> depth_roles([10, 30, 12, 12])
        ['expansion', 'reduction', 'transmission']
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be in (0, 1), got {tolerance}")
    if not all(math.isfinite(rank) for rank in ranks):
        raise ValueError(f"ranks must be finite numbers, got {[float(rank) for rank in ranks]}")
    roles = []
    for k in range(len(ranks) - 1):
        ratio = ranks[k + 1] / ranks[k] if ranks[k] > 0 else math.nan
        up, down = ratio > 1 + tolerance, ratio < 1 - tolerance
        roles.append("expansion" if up else "reduction" if down else "transmission")
    return roles


def gram_alignment(a: Tensor, b: Tensor, *, center: bool = True) -> Tensor:
    r"""Likeness of two representations of the same samples: cosine of their Gram matrices.

    .. math:: \frac{\langle A A^\top, B B^\top\rangle}{\lVert A A^\top\rVert_F \lVert B B^\top\rVert_F}

    1 where inner products between samples agree up to a factor, whatever the two bases. Centred, it is
    the linear CKA of Kornblith et al. (2019).

    Args:
        a: ``[N, D]``; computed in float64.
        b: ``[N, E]``.
        center: subtract each one's mean over samples first.

    Returns:
        Scalar ``[]`` in ``[0, 1]``; NaN where one is zero (constant, if centred) or not finite.

    Raises:
        ValueError: if they are not matrices of one number of rows.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
        >>> gram_alignment(x, 3 * x.flip(1))
        tensor(1., dtype=torch.float64)
    """
    a_ND, b_NE = as_matrix(a, name="a").double(), as_matrix(b, name="b").double()
    if len(a_ND) != len(b_NE):
        raise ValueError(f"a and b must be of the same samples, got {len(a_ND)} and {len(b_NE)} rows")
    grams = []
    for x in (a_ND, b_NE):
        c = x - x.mean(0) if center else x
        gram_NN = c @ c.mT
        still = c.norm() <= 1e-12 * x.norm()
        grams.append(torch.full_like(gram_NN, torch.nan) if still else gram_NN / gram_NN.norm())
    return (grams[0] * grams[1]).sum().clamp(0, 1)
