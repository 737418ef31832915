"""By which mechanism has a network learned features?"""

from __future__ import annotations

import math


def mechanism(
    alignment_before: float, *, alignment_after: float, norm_ratio: float, tolerance: float = 0.1
) -> str:
    """Name the mechanism of feature learning between two times.

    Args:
        alignment_before: cosine of u and w, in [-1, 1].
        alignment_after: the same later.
        norm_ratio: product of the norms later over before, positive.
        tolerance: the least change of the alignment's size, or relative change of norms, that counts.

    Returns:
        ``"alignment"`` if the cosine's size rose, ``"disalignment"`` if it fell, ``"rescaling"`` if
        only norms changed, ``"none"`` if neither did.

    Raises:
        ValueError: if ``norm_ratio`` is not positive, ``tolerance`` is negative or one of them not finite, or
            an alignment is not in [-1, 1].
    """
    if not 0 < norm_ratio < math.inf:
        raise ValueError(f"norm_ratio must be positive, got {norm_ratio!r}")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be at least 0, got {tolerance!r}")
    for name, value in (("alignment_before", alignment_before), ("alignment_after", alignment_after)):
        if not abs(value) <= 1 + 1e-6:  # NaN would read as "unchanged"
            raise ValueError(f"{name} must be a cosine in [-1, 1], got {value!r}")
    change = abs(alignment_after) - abs(alignment_before)
    if abs(change) > tolerance:
        return "alignment" if change > 0 else "disalignment"
    return "rescaling" if abs(norm_ratio - 1) > tolerance else "none"
