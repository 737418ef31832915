"""Readings that are computed in a thread of their own while training goes on.

A monitor's ``read`` may run there if it is a function of what was observed alone (``Monitor.defers``): sums,
and copies of weights, which the training steps that follow don't touch. Numbers are the same, bit for bit:
the thread computes with as many threads and under the same flags as the fit's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch


class Deferred:
    """Calls that are made one after the other in a thread; :meth:`join` ends it.

    Args:
        calls: what is called, by a key of its own.

    Attributes:
        seconds: time that the calls took in the thread.
    """

    def __init__(self, calls: Mapping[str, Callable[[], Any]]) -> None:
        self._calls, self.seconds = calls, 0.0
        self._found: dict[str, tuple[Any, Exception | None]] = {}
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="lightning_sym readings", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        began = perf_counter()
        torch.set_num_threads(self._threads)  # a new thread's own number is another one
        with torch.no_grad():
            for key, call in self._calls.items():
                try:
                    self._found[key] = call(), None
                except Exception as error:
                    self._found[key] = None, error
        self.seconds = perf_counter() - began

    def join(self) -> None:
        """Wait for the thread to end."""
        self._thread.join()

    def result(self, key: str) -> Any:
        """Return what a call returned, once the thread has ended; raises what it raised."""
        found, error = self._found.pop(key)
        if error is not None:
            raise error
        return found
