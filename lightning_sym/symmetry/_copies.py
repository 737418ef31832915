"""A copy of the user's module that can be run without anything of the user's noticing it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_sym.sandbox.copier import Copier, NotApartError
from lightning_sym.sandbox.restore import EAGER, NO_FAST_PATH, random_states
from lightning_sym.sandbox.sandbox import copy_with
from lightning_sym.symmetry._precision import doubled


class Copied:
    """A copy of a module in double precision, on the CPU, in evaluation mode.

    No hook of the user's fires on it, global ones included; functions that captured the module (a lambda
    kept as an attribute) run the copy; what a LightningModule logs goes nowhere.

    Args:
        module: the user's.

    Attributes:
        module: the copy.
        where: the names of the modules that are running, the innermost last.
        watch: is told the name and the output of each module that has run.
        foreign: numbers of the tensors of the user's own module, which the copy should not meet.

    Raises:
        TypeError: if the module can't be copied.
        ValueError: if a parameter has no shape yet (lazy layers).
    """

    def __init__(self, module: nn.Module) -> None:
        own = [*module.parameters(), *module.buffers()]
        if any(torch.nn.parameter.is_lazy(tensor) for tensor in own):
            raise ValueError("module must have been run once: it has lazy parameters without a shape")
        self.foreign = {id(tensor) for tensor in own}
        self.where: list[str] = []
        self.watch: Callable[[str, Any], None] | None = None
        try:
            self.module = copy_with(Copier(module), module)
        except NotApartError as error:
            raise TypeError(
                f"module must be one that can be copied, got {type(module).__name__}: {error}"
            ) from error
        self.module._apply(lambda tensor: doubled(tensor.cpu()))
        self.module.eval()
        for name, child in self.module.named_modules():
            # An attribute goes before the class's method: so neither hooks nor global hooks are looked at.
            object.__setattr__(child, "_call_impl", partial(self._call, name, child))
            child._compiled_call_impl = None

    def close(self) -> None:
        """Take the copy's own references to itself off it, so that its memory is free at once."""
        for child in self.module.modules():
            vars(child).pop("_call_impl", None)

    def _call(self, name: str, child: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.where.append(name)
        try:
            for hook in child._forward_pre_hooks.values():
                hook(child, args)
            out = child.forward(*args, **kwargs)
            if self.watch is not None:
                self.watch(name, out)
            return out
        finally:
            self.where.pop()


@contextlib.contextmanager
def unnoticed(seed: int) -> Iterator[None]:
    """Run with random states of one's own, without compilation; the global ones are put back."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_states(None, seed))
        stack.enter_context(EAGER.on())
        stack.enter_context(NO_FAST_PATH.on())
        yield
