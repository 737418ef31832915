"""A reading: one value on its way to the history and the loggers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Value = float | Tensor | str | Callable[[], Any]


@dataclass(frozen=True)
class Reading:
    """One value to log, under ``<quantity>/<layer>/<what>``; empty parts are left out.

    Args:
        layer: name of the layer, or ``""`` for a summary of the network.
        what: what was read of it, or ``""`` where the monitor's quantity says it.
        value: a number or 0-d tensor (a scalar), a tensor of one dimension or more (a histogram where
            the logger draws them), a string (text) or a callable without arguments that returns a
            matplotlib figure (called on rank 0 only, where a logger takes figures).
    """

    layer: str
    what: str
    value: Value

    def key(self, quantity: str) -> str:
        """Return the key under which it is logged.

        Example:
            >>> Reading("net.0", "rank", 3.0).key("collapse"), Reading("", "score", 0.1).key("collapse")
            ('collapse/net.0/rank', 'collapse/score')
        """
        return "/".join(part for part in (quantity, self.layer, self.what) if part)

    @property
    def is_scalar(self) -> bool:
        """Whether the value is one number."""
        if isinstance(self.value, Tensor):
            return self.value.ndim == 0
        return isinstance(self.value, float | int)

    @property
    def scalar(self) -> float:
        """The value as a float; only for scalars."""
        value = self.value
        return float(value.detach().to(torch.float64)) if isinstance(value, Tensor) else float(value)  # type: ignore[arg-type]
