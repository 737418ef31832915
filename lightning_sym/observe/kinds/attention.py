"""The projections inside of ``nn.MultiheadAttention``, and those that one linear layer holds together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_sym.observe.layer import Layer
from lightning_sym.observe.products import linear_calls
from lightning_sym.observe.weights import is_parametrized

if TYPE_CHECKING:
    from lightning_sym.observe.hooks import LayerWatch

ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")
#: Names of layers that put out queries, keys and values one behind the other.
FUSED = ("qkv", "to_qkv", "qkv_proj", "in_proj_qkv", "c_attn", "Wqkv")


@dataclass(frozen=True, eq=False, repr=False)
class Projection(Layer):
    """One of the four projections of an ``nn.MultiheadAttention``."""

    by_call = False

    @property
    def holder(self) -> tuple[nn.Module, str]:
        """The module and the attribute that hold the weight (mostly all projections' together)."""
        if self.part == "out_proj":
            return self.module.out_proj, "weight"  # type: ignore[return-value]
        packed = self.module._parameters.get("in_proj_weight") is not None
        return self.module, "in_proj_weight" if packed else f"{self.part[0]}_proj_weight"  # type: ignore[index]

    def slice(self, tensor: Tensor) -> Tensor:
        """Return the rows of the parameter (or of its gradient or bias) that are this projection's."""
        if self.part != "out_proj" and (self.holder[1] == "in_proj_weight" or tensor.ndim == 1):
            start = ATTENTION_PARTS.index(self.part) * self.out_features  # type: ignore[arg-type]
            return tensor[start : start + self.out_features]
        return tensor

    def bias_parameter(self) -> nn.Parameter | None:
        """Return the parameter that holds the bias, mostly all projections' together."""
        holder, name = self.holder
        name = "bias" if name == "weight" else "in_proj_bias"
        bias = None if is_parametrized(holder, name) else getattr(holder, name, None)
        return bias if isinstance(bias, Tensor) else None  # type: ignore[return-value]

    def batch_first(self, x: Tensor, batch: int | None) -> Tensor:
        """Return a tensor with samples first: attention works on ``[P, B, width]``, flat on its output."""
        return x.reshape(-1, batch or 1, x.shape[-1]).transpose(0, 1)

    def few(self, x: Tensor, most: int) -> Tensor:
        """Return all samples: they are not first."""
        return x

    def attach(self, watch: LayerWatch) -> list[Any]:
        """Show calls to a watch; return handles whose ``remove`` ends it."""
        shown, (holder, name) = _Shown(self, watch), self.holder
        handles: list[Any] = []
        if is_parametrized(holder, name):
            made: Any = holder.parametrizations[name]  # type: ignore[index, union-attr]
            handles.append(made.register_forward_hook(watch.keep_computed))
        return [
            *handles,
            self.module.register_forward_pre_hook(watch.guard(shown.enter), with_kwargs=True),
            # always_call: an exception must not leave our replacement of F.linear behind.
            self.module.register_forward_hook(shown.leave, always_call=True),
            shown,
        ]


class _Shown:
    """Sees the products of an attention module while it runs."""

    def __init__(self, layer: Projection, watch: LayerWatch) -> None:
        self.layer, self.watch = layer, watch

    def enter(self, module: Any, args: Any, kwargs: Any) -> None:
        """Begin."""
        if not self.watch.open():
            return
        query = args[0] if args else kwargs.get("query")
        self.watch.batch = 1
        if isinstance(query, Tensor) and query.ndim == 3:
            self.watch.batch = query.shape[0 if module.batch_first else 1]
        linear_calls.enter(self)

    def leave(self, *_: Any) -> None:
        """End; harmless if it did not begin."""
        linear_calls.leave(self)

    remove = leave

    def see_product(self, x: Tensor, weight: Tensor, result: Tensor) -> None:
        """Take in ``result = F.linear(x, weight)`` if the weight is, or holds, this projection's."""
        layer, owner = self.layer, weight._base if weight._base is not None else weight
        holder, name = layer.holder
        parameter = holder._parameters.get(name)
        if parameter is None or owner is not parameter:
            return
        # A packed product holds several projections: a slice of its rows is ours.
        offset = (weight.storage_offset() - parameter.storage_offset()) // weight.shape[1]
        packed = parameter.shape[0] > layer.out_features
        first = ATTENTION_PARTS.index(layer.part) * layer.out_features if packed else 0  # type: ignore[arg-type]
        start = int(first - offset)
        if 0 <= start < weight.shape[0]:
            self.watch.see(x, result, part=partial(_columns, start, start + layer.out_features))


def _columns(start: int, end: int, x: Tensor) -> Tensor:
    return x[..., start:end]


def projections(name: str, module: nn.MultiheadAttention) -> Iterator[Layer]:
    """Yield the projections of an attention module."""
    prefix = f"{name}." if name else ""
    widths = (module.embed_dim, module.kdim, module.vdim, module.embed_dim)
    for part, width in zip(ATTENTION_PARTS, widths, strict=True):
        yield Projection(f"{prefix}{part}", module, part, width, module.embed_dim)


def split(layer: Layer, parent: nn.Module | None) -> Iterator[Layer]:
    """Yield a linear layer, or the three projections that it holds one behind the other.

    A layer is split if it is called as such layers are (``qkv``, ``c_attn``, ...) and puts out three times
    what it takes in. Where heads come first (``head_first``), or queries are more than keys, it is one map.
    """
    width = layer.in_features
    if layer.name.rpartition(".")[2] not in FUSED:
        yield layer
        return
    layer = replace(layer, parent=parent)  # some call F.linear with its weight and biases of their own
    if layer.out_features != 3 * width or getattr(parent, "head_first", False):
        yield layer
        return
    for i, part in enumerate(ATTENTION_PARTS[:3]):
        span = (i * width, (i + 1) * width)
        yield replace(layer, name=f"{layer.name}.{part}", part=part, out_features=width, span=span)
