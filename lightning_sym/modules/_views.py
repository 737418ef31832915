"""A batch of views: what it must be, and which pairs of them a loss sees."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

REMEDY = "use MultiViewDataModule, or a loader of ([first, second, ...], labels)"


def views_of(batch: Any) -> list[Tensor]:
    """Return the views of a batch.

    Raises:
        ValueError: if the batch is not ``(views, labels)`` with two views at least, floating tensors of as
            many samples each.
    """
    if not isinstance(batch, list | tuple) or not len(batch):
        kind = f"a mapping of {sorted(map(str, batch))}" if isinstance(batch, dict) else f"a {_kind(batch)}"
        raise ValueError(f"a batch must be (views, labels), got {kind}; {REMEDY}")
    views = batch[0]
    if not isinstance(views, list | tuple) or len(views) < 2:
        found = f"{len(views)} view" if isinstance(views, list | tuple) else f"a {_kind(views)}"
        raise ValueError(
            f"a batch must be (views, labels) with at least 2 views in a list, got {found}; {REMEDY}"
        )
    for view in views:
        if not isinstance(view, Tensor) or not view.is_floating_point() or view.ndim < 2:
            raise ValueError(
                f"views must be floating-point tensors [B, C, H, W], got {_kind(view)}; divide bytes by 255 "
                "and normalise them"
            )
    counts = [len(view) for view in views]
    if len(set(counts)) > 1:
        raise ValueError(
            f"views of a batch must be of the same samples, got {counts} samples in them; give each view "
            "every sample, in one order"
        )
    return list(views)


def pairs_of(views: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    r"""Return which pairs of views a loss sees, and how often each counts.

    The views of the largest size are global, G of V in number. The loss is the mean over all ordered
    pairs of a global view and any other (SwAV, DINO), :math:`\frac{1}{G (V - 1)} \sum_{g} \sum_{v \ne g}
    \ell(g, v)`; a pair of global ones counts in both orders, which a symmetric loss need not see twice.

    Returns:
        First, second and weight of each unordered pair, the global view of unequal ones first.

    Example:
        >>> large, small = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 4)
        >>> pairs_of([large, large, small])
        [(0, 1, 2), (0, 2, 1), (1, 2, 1)]
    """
    sizes = [view[0].numel() for view in views]
    large = [size == max(sizes) for size in sizes]
    return [
        (a, b, large[a] + large[b]) if large[a] else (b, a, 1)
        for a, b in itertools.combinations(range(len(views)), 2)
        if large[a] or large[b]
    ]


def misfit(x: Tensor, backbone: nn.Module, *, name: str, error: Exception) -> str:
    """Return a sentence on why a backbone could not take images."""
    first = next((m for m in backbone.modules() if isinstance(m, nn.Conv2d | nn.Linear)), None)
    shape = tuple(x.shape)
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(first, nn.Conv2d) and x.ndim == 4 and x.shape[1] != first.in_channels:
        return (
            f"views {shape} have channels={x.shape[1]}, the backbone {name} takes {first.in_channels}; "
            f"make them alike: backbone_options={{'in_chans': {x.shape[1]}}}, or "
            f"channels={first.in_channels} in the data module"
        )
    return (
        f"the backbone {name} cannot take views {shape}: {reason}; change image_size={x.shape[-1]} in the "
        "data module, or the backbone (backbone_options={'img_size': ...} for a vision transformer)"
    )


def check_representation(h: Any, x: Tensor, *, name: str, features: int) -> None:
    """Raise if a backbone's output is not ``[B, features]``.

    Raises:
        ValueError: if so.
    """
    if isinstance(h, Tensor) and h.shape == (len(x), features):
        return
    found = f"{list(h.shape)}" if isinstance(h, Tensor) else f"a {_kind(h)}"
    raise ValueError(
        f"the backbone {name} must give [B, features] = [{len(x)}, {features}], got {found}; pool and "
        "flatten at its end, or give features its width"
    )


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor) and not value.is_floating_point():
        return f"{type(value).__name__} of {value.dtype}"
    return type(value).__name__
