"""Products of tensors inside of modules that call no sub-module for them.

Shape letters: A inputs, O outputs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_sym.observe.samples import Geometry


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


@dataclass(frozen=True)
class Product:
    """One product, as it was computed.

    Attributes:
        x: the input.
        weight: ``[O, A]``, or a convolution's kernel ``[O, A, ...]``.
        bias: ``[O]``, or None.
        result: the output.
        geometry: how a convolution placed its kernel.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    result: Tensor
    geometry: Geometry | None = None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
    return input, weight, bias, None


def _matmul(x: Tensor, weight: Tensor) -> tuple[Any, ...]:
    return (x, weight.mT, None, None) if weight.ndim == 2 else ()


def _addmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> tuple[Any, ...]:
    return (x, weight.mT, bias, None) if beta == alpha == 1 and bias.ndim == 1 else ()


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Any, ...]:
    kernel = tuple(weight.shape[2:])
    stride, dilation = _each(stride, kernel), _each(dilation, kernel)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [(total // 2, total - total // 2) for total in totals]
    else:
        pads = [(p, p) for p in _each(0 if padding == "valid" else padding, kernel)]
    flat = tuple(p for pair in reversed(pads) for p in pair)
    return input, weight, bias, Geometry(kernel, stride, dilation, flat)


def _each(value: Any, kernel: tuple[int, ...]) -> tuple[int, ...]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * len(kernel) if len(value) == 1 else value


_KINDS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "linear": _linear,
    "addmm": _addmm,
    **dict.fromkeys(("mm", "matmul", "__matmul__"), _matmul),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
}


class Capture(TorchFunctionMode):
    """Sees torch's functions while a module runs, in the threads that run it; changes nothing.

    Args:
        module: the module.

    Attributes:
        listeners: who is told of each call: its name, arguments, named arguments and result.
        takers: who is told of each product with a matrix or a convolution's kernel.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module
        self._hooks: list[Any] = []
        self._users = self._asked = 0
        self._last: list[Product] = []
        self.listeners: list[Callable[[str, Any, Any, Any], None]] = []
        self.takers: list[Callable[[Product], None]] = []

    def attach(self) -> Capture:
        """Begin, for one more user; :meth:`remove` ends it for one of them."""
        self._users += 1
        if not self._hooks:
            enter = self._module.register_forward_pre_hook(lambda *_: self._begin(), prepend=True)
            # always_call: an exception must not leave the mode behind
            leave = self._module.register_forward_hook(
                lambda *_: self.__exit__(None, None, None), always_call=True, prepend=True
            )
            self._hooks = [enter, leave]
        return self

    def _begin(self) -> None:
        self._last, self._asked = [], 0
        self.__enter__()

    def remove(self) -> None:
        """End it for one user."""
        self._users -= 1
        if self._users <= 0:
            self._last, self.listeners, self.takers = [], [], []
            while self._hooks:
                self._hooks.pop().remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function and take note of it."""
        result = func(*args, **(kwargs or {}))
        with contextlib.suppress(Exception):  # what it sees is the user's, of any kind
            self._note(getattr(func, "__name__", ""), args, kwargs or {}, result)
        return result

    def _note(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        for listener in self.listeners:
            listener(name, args, kwargs, result)
        if name in _KINDS and isinstance(result, Tensor):
            found = _KINDS[name](*args, **kwargs)
            if found:
                x, weight, bias, geometry = found
                self._last.append(product := Product(x, weight, bias, result, geometry))
                for taker in self.takers:
                    taker(product)

    def made(self, output: Tensor) -> Product | None:
        """Return the product whose result the module returned in its last call, and let go of all others."""
        found = [product for product in self._last if product.result is output]
        self._asked += 1
        self._last = found if self._asked < self._users else []
        return found[-1] if found else None
