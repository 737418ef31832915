"""A reading: one value under one key, on its way to the loggers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Value = float | Tensor | Callable[[], Any]


@dataclass(frozen=True)
class Reading:
    """One value to log.

    Args:
        key: ``<quantity>/<layer>/<what>`` or, for a summary, ``<quantity>/<what>``.
        value: a float or 0-d tensor (a scalar), a tensor of one dimension or more (drawn as a
            histogram where the logger can), a string (text) or a callable without arguments that
            returns a matplotlib figure (called on rank zero only, where a logger takes figures).
    """

    key: str
    value: Value | str

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
