"""Products inside of ``nn.MultiheadAttention``, which calls no sub-module for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F


class Watcher(Protocol):
    """Who is shown products while its module runs."""

    def see_product(self, x: Tensor, weight: Tensor, result: Tensor) -> None:
        """Take in ``result = F.linear(x, weight)``."""


class LinearCalls:
    """Shows ``F.linear`` calls to watchers while an attention module of theirs runs.

    A torch function mode sees the whole forward of the module as one call: what is left is to replace
    ``F.linear``, in the module that looks it up, for that long. Calls with other weights, and from other
    threads, go through untouched.
    """

    def __init__(self) -> None:
        self._watchers: dict[int, list[Watcher]] = {}  # by thread
        self._plain: Callable[..., Tensor] = F.linear
        self._lock = threading.Lock()

    def enter(self, watcher: Watcher) -> None:
        """Show calls of this thread to a watcher."""
        with self._lock:
            if not self._watchers:
                self._plain, F.linear = F.linear, self._linear  # type: ignore[assignment]
            self._watchers.setdefault(threading.get_ident(), []).append(watcher)

    def leave(self, watcher: Watcher) -> None:
        """Stop showing them; harmless if it is not shown any."""
        with self._lock:
            for thread, watchers in list(self._watchers.items()):
                if watcher in watchers:
                    watchers.remove(watcher)
                    if not watchers:
                        del self._watchers[thread]
                    if not self._watchers:
                        F.linear = self._plain  # type: ignore[assignment]

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        result = self._plain(x, weight, bias)
        for watcher in self._watchers.get(threading.get_ident(), ()):
            watcher.see_product(x, weight, result)
        return result


linear_calls = LinearCalls()
