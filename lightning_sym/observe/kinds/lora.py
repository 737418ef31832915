"""Low-rank adapters: a trained product B A beside a weight that is mostly frozen.

Shape letters: r rank, A inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_sym.observe.layer import Layer
from lightning_sym.observe.weights import is_parametrized, local, next_weight, sources

if TYPE_CHECKING:
    from lightning_sym.observe.hooks import LayerWatch


@dataclass(frozen=True, eq=False, repr=False)
class LowRankPair(Layer):
    """The product ``W = B A`` of two linear layers called one after the other, of rank r at most.

    ``h_a`` is what A takes in and ``h_b`` what B puts out, before the adapter's scale.
    """

    by_call = False

    first: nn.Module = field(default_factory=nn.Identity, repr=False)
    second: nn.Module = field(default_factory=nn.Identity, repr=False)

    @property
    def no_noise(self) -> str:
        """Why gradient noise is not read: both factors are layers of their own."""
        return "its weight is a product of two"

    @property
    def largest_rank(self) -> int:
        """r: the number of rows of A."""
        return int(sources(self.first, "weight")[-1].shape[0])

    @property
    def holder(self) -> tuple[nn.Module, str]:
        """A's."""
        return self.first, "weight"

    def sources(self) -> list[nn.Parameter]:
        """Return the parameters of both factors."""
        return [*sources(self.first, "weight"), *sources(self.second, "weight")]

    def next_blocks(self) -> Tensor:
        """Return the product of the weights that the next forward pass will use."""
        return self.as_blocks(next_weight(self.second, "weight") @ next_weight(self.first, "weight"))

    def used(self) -> Tensor | None:
        """Return the product of the weights that the last forward pass used."""
        if any(is_parametrized(factor, "weight") for factor in (self.first, self.second)):
            return None
        with torch.no_grad():
            return self.as_blocks(self.second.weight @ self.first.weight)  # type: ignore[operator]

    def gradients(self) -> list[Tensor]:
        """Return the gradients of both factors."""
        return [local(p.grad) for p in self.sources() if p.grad is not None]

    def bias_parameter(self) -> nn.Parameter | None:
        """Return B's bias, if it has one (A's has to be none)."""
        return getattr(self.second, "bias", None)

    def attach(self, watch: LayerWatch) -> list[Any]:
        """Show calls to a watch; return handles whose ``remove`` ends it."""
        entered: list[Any] = []

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            entered[:] = [self.input_of(args, kwargs)]

        return [
            self.first.register_forward_pre_hook(watch.guard(enter), with_kwargs=True),
            self.second.register_forward_hook(watch.guard(partial(self._leave, watch, entered))),
        ]

    def _leave(
        self, watch: LayerWatch, entered: list[Any], module: nn.Module, args: Any, output: Any
    ) -> None:
        x = entered.pop() if entered else None
        if isinstance(x, Tensor) and isinstance(output, Tensor):
            watch.see(x, output)


def pairs(name: str, module: nn.Module) -> Iterator[Layer]:
    """Yield the pairs of a module with ``lora_A`` and ``lora_B``: linear layers, or mappings of such."""
    firsts, seconds = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
    if isinstance(firsts, nn.Linear) and isinstance(seconds, nn.Linear):
        found: dict[str, tuple[nn.Module, nn.Module]] = {"": (firsts, seconds)}
    elif isinstance(firsts, nn.ModuleDict) and isinstance(seconds, nn.ModuleDict):
        found = {f".{key}": (firsts[key], seconds[key]) for key in firsts if key in seconds}
    else:
        return
    for key, (first, second) in found.items():
        widths = [getattr(first, "in_features", None), getattr(second, "out_features", None)]
        if isinstance(first, nn.Linear) and isinstance(second, nn.Linear) and first.bias is None:
            label = f"{name}.lora{key}" if name else f"lora{key}"
            part = f"lora{key}"
            yield LowRankPair(label, module, part, *widths, first=first, second=second)  # type: ignore[arg-type]


def added(module: nn.Module) -> Tensor | None:
    """Return what a layer adds to its weight by itself, scale times B A of its own parameters, or None."""
    a, b = module._parameters.get("lora_A"), module._parameters.get("lora_B")
    scale = getattr(module, "scaling", 1.0)
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or not isinstance(scale, int | float):
        return None
    with torch.no_grad():
        return scale * (local(b) @ local(a))
