"""What is put back after a user's code has run in the sandbox: random states, settings, class attributes."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_sym.sandbox.copier import own_classes


@contextlib.contextmanager
def random_states(module: nn.Module | None, seed: int | None) -> Iterator[None]:
    """Put the random states of the CPU and the module's devices back on leaving, and seed them before."""
    tensors = () if module is None else (*module.parameters(), *module.buffers())
    devices = {tensor.device for tensor in tensors}
    generators = [torch.default_generator]
    for device in devices:
        if known := getattr(getattr(torch, device.type, None), "default_generators", ()):
            generators.append(known[device.index or 0])
        elif device.type == "mps":
            generators.append(torch.mps._get_default_mps_generator())
    with ExitStack() as stack:
        for generator in generators:
            stack.callback(generator.set_state, generator.get_state())
        stack.callback(random.setstate, random.getstate())
        if (numpy := sys.modules.get("numpy")) is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        if seed is not None:
            reseed(seed, generators)
        yield


def reseed(seed: int, generators: Iterable[torch.Generator] = (torch.default_generator,)) -> None:
    """Seed generators of torch's, Python and numpy, so that a module that draws draws the same each time."""
    for generator in generators:
        generator.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)


@contextlib.contextmanager
def settings_of(trainer: Any) -> Iterator[None]:
    """Put back what a training step may set on its trainer: optimizers' settings, the wish to stop."""
    if trainer is None:
        yield
        return
    kept: list[tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]] = []
    for optimizer in getattr(trainer, "optimizers", None) or ():
        for group in optimizer.param_groups:
            numbers = {key: value.clone() for key, value in group.items() if isinstance(value, Tensor)}
            kept.append((group, dict(group), numbers))
    stop = getattr(trainer, "should_stop", None)
    try:
        yield
    finally:
        for group, settings, numbers in kept:
            group.clear()
            group.update(settings)
            for key, value in numbers.items():
                if not torch.equal(group[key], value):
                    group[key].copy_(value)
        if stop is not None and trainer.should_stop is not stop:
            trainer.should_stop = stop


@contextlib.contextmanager
def class_counters(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put back numbers, strings and None that are attributes of the modules' own classes."""
    kept = [
        (kind, name, value)
        for kind in {kind for module in modules for kind in own_classes(module)}
        for name, value in vars(kind).items()
        if not name.startswith("__") and isinstance(value, int | float | complex | str | tuple | None)
    ]
    try:
        yield
    finally:
        for kind, name, value in kept:
            if vars(kind).get(name) is not value:
                setattr(kind, name, value)


class ProcessWide:
    """A setting of the whole process: on while any thread needs it, then as it was.

    Contexts that overlap between threads would else restore each other's setting.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make, self._lock, self._users = make, threading.Lock(), 0
        self._context: AbstractContextManager[Any] = nullcontext()

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Have the setting on inside."""
        with self._lock:
            if self._users == 0:
                self._context = self._make()
                self._context.__enter__()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._context.__exit__(None, None, None)


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


EAGER = ProcessWide(lambda: torch.compiler.set_stance("force_eager"))
PLAIN_ATTENTION = ProcessWide(lambda: sdpa_kernel(SDPBackend.MATH))
PLAIN_RECURRENCE = ProcessWide(lambda: torch.backends.cudnn.flags(enabled=False))
#: Without the fused inference path of torch's transformer layers, which hides what is inside.
NO_FAST_PATH = ProcessWide(_without_fast_path)
