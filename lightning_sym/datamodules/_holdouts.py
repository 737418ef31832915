"""Which centres are left out of training.

Shape letters: N centres, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Predicate = Callable[[Tensor, Tensor], Tensor]
HOLDOUTS = ("center", "corner", "random")


def make_holdout(
    holdout: str | Predicate, *, size: int, holdout_size: int | float | None, seed: int
) -> tuple[Predicate, int | float | None]:
    """Return a predicate on ``(x, y)`` that is true where a centre is held out, and the extent used.

    Raises:
        ValueError: if the name or the extent is not one there is.
        TypeError: if ``holdout`` is neither a name nor callable, or the extent is of the wrong type.
    """
    if callable(holdout):
        if holdout_size is not None:
            raise ValueError(
                f"holdout_size is for named hold-outs, not for a predicate, got {holdout_size!r}"
            )
        return holdout, None
    if not isinstance(holdout, str):
        raise TypeError(f"holdout must be one of {HOLDOUTS} or a predicate (x, y) -> mask, got {holdout!r}")
    if holdout not in HOLDOUTS:
        raise ValueError(f"holdout must be one of {HOLDOUTS} or a predicate, got {holdout!r}")
    if holdout == "random":
        fraction = 0.2 if holdout_size is None else holdout_size
        if not isinstance(fraction, float) or not 0 < fraction < 1:
            raise ValueError(
                f"holdout_size must be a fraction in (0, 1) of the cells for holdout='random', "
                f"got {fraction!r}"
            )
        return _random(size, fraction, seed), fraction
    default = 17 / 28 if holdout == "center" else 20 / 32  # the paper's: 17 of 28, 20 of 32 pixels
    side = round(default * size) if holdout_size is None else holdout_size
    if isinstance(side, bool) or not isinstance(side, int):
        raise TypeError(
            f"holdout_size must be a number of pixels (int) for holdout={holdout!r}, got {side!r}"
        )
    if not 1 <= side < size:
        raise ValueError(
            f"holdout_size must be in [1, size - 1] = [1, {size - 1}], or nothing is left to "
            f"{'test' if side < 1 else 'train'} on, got {side}"
        )
    low = (size - side + 1) // 2 if holdout == "center" else size - side
    return _square(low, low + side - 1), side


def _square(low: int, high: int) -> Predicate:
    def inside(x: Tensor, y: Tensor) -> Tensor:
        return (x >= low) & (x <= high) & (y >= low) & (y <= high)

    return inside


def _random(size: int, fraction: float, seed: int) -> Predicate:
    """Hold out whole cells, one a pixel: a continuous centre belongs to the nearest pixel's."""
    generator = torch.Generator().manual_seed(seed)
    out_P = torch.zeros(size * size, dtype=torch.bool)
    out_P[torch.randperm(size * size, generator=generator)[: round(fraction * size * size)]] = True

    def inside(x: Tensor, y: Tensor) -> Tensor:
        present = ~(x.isnan() | y.isnan())
        cell = y.nan_to_num().round().long() * size + x.nan_to_num().round().long()
        return out_P.to(x.device)[cell] & present

    return inside
