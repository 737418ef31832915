"""What passes through torch's functions during a step, whatever module calls them.

Layers are hooked (:mod:`lightning_sym.observe.hooks`); attention weights, saturated activations, what is
added to a residual stream and noise that is drawn are seen nowhere but in the calls themselves.

Shape letters: N samples, T positions, S positions looked at, H heads, F features.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import (
    _len_torch_function_stack,
    _pop_torch_function_stack,
    _push_on_torch_function_stack,
)
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_sym.observe.clouds import chosen
from lightning_sym.observe.guard import guarded, without_frames
from lightning_sym.observe.hooks import aside, in_backward, transforming
from lightning_sym.observe.layers import watchable_layers
from lightning_sym.observe.loops import FirstUses, LoopGradients
from lightning_sym.observe.recurrent import CELLS, RECURRENT, gates, near_ends, reach
from lightning_sym.observe.weights import accumulation_dtype

#: Samples of a call that are looked at, and features of each.
SAMPLES, FEATURES = 64, 1024
#: Samples and positions of which an activation's units are looked at.
ROWS = 1024
_ADDS = {"add", "__add__", "__radd__", "add_", "__iadd__"}
_PRODUCTS = {"mul", "__mul__", "__rmul__", "mul_", "__imul__"}
_CUTS = {"relu", "relu_", "relu6", "threshold", "threshold_"}
_DRAWS = {"randn", "randn_like", "normal", "normal_"}
_NOISE, _MADE, _PURE = 1, 2, 4


def layer_names(root: nn.Module) -> dict[int, str]:
    """Return the layer of each weight, by the weight's id; recurrent modules too."""
    found = {id(p): layer.name for layer in reversed(watchable_layers(root)) for p in layer.sources()}
    for name, module in root.named_modules():
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            found.update({id(p): name for p in module.parameters(recurse=False)})
    return found


class FunctionCalls(TorchFunctionMode):
    """Shows the calls of torch's functions to whoever looks; they compute what they would anyway.

    Args:
        lookers: returns who looks.
        seconds: where time is booked, by section.
    """

    def __init__(self, lookers: Callable[[], list[FunctionWatch]], seconds: dict[str, float]) -> None:
        super().__init__()
        self._lookers, self._seconds = lookers, seconds

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        began = perf_counter()
        for looker in self._lookers():
            looker.see(func, args, kwargs or {}, result)
        self._seconds["moments"] += perf_counter() - began
        return result

    def attach(self) -> None:
        """Stand below the modes that are on: one of the user's may end before this one does."""
        above = [_pop_torch_function_stack() for _ in range(_len_torch_function_stack())]
        for mode in (self, *reversed(above)):
            _push_on_torch_function_stack(mode)

    def detach(self) -> bool:
        """Go from between the other modes; return False where one of its calls is still under way."""
        stack = [_pop_torch_function_stack() for _ in range(_len_torch_function_stack())][::-1]
        for mode in stack:
            if mode is not self:
                _push_on_torch_function_stack(mode)
        return any(mode is self for mode in stack)


class FunctionWatch:
    """Sums of what one step's calls show, by the layer that ran last before them.

    Args:
        root: the module that is trained.

    Attributes:
        sums: by ``(layer, what)``, tensors that add up over calls and ranks.
        ran: names of layers that were called, in their order.
        error: what went wrong in here, if anything; the user's step never sees it.
    """

    def __init__(self, root: nn.Module) -> None:
        self._names = layer_names(root)
        self._after = ""
        self._channels_first = False
        self.ran: dict[str, None] = {}
        self._drawn = False
        self._lines: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._tables: list[weakref.ref[Tensor]] = []
        self._points: dict[tuple[str, str], Tensor] = {}
        self._loops: dict[str, LoopGradients] = {}
        self._uses: dict[str, FirstUses] = {}
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.error: Exception | None = None

    def see(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Take in a call; an error is kept."""
        if self.error is not None or transforming():
            return
        try:
            self._see(getattr(func, "__name__", ""), args, kwargs, result)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.error = self.error or without_frames(error)

    def _guard(self, hook: Callable[..., None]) -> Callable[..., None]:
        """Return a hook on the user's graph that keeps what goes wrong in it."""
        return guarded(hook, self._fail)

    def _see(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        if name in _DRAWS and isinstance(result, Tensor):
            self._drawn = True
            self._mark(result, _NOISE | _PURE)
            return
        if name == "multi_head_attention_forward":
            self._packed_attention(args, kwargs, result[0])
            return
        if name in RECURRENT:
            self._recurrent(name, args, result)
            return
        if name in CELLS:
            self._called(self._names.get(id(args[3]), ""), result[0] if isinstance(result, tuple) else result)
            return
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        layer = self._names.get(id(weight)) if isinstance(weight, Tensor) else None
        flags = self._inherited(name, args, kwargs) if self._drawn else 0
        if layer is not None:
            self._channels_first = isinstance(weight, Tensor) and weight.ndim > 2
            self._called(layer, result)
            if name == "embedding":
                self._tables = [*(t for t in self._tables if t() is not None), weakref.ref(result)]
            elif isinstance(args[0], Tensor) and self._counts(result):
                self._sides(layer, args[0], flags)
            flags |= _MADE if flags & _NOISE else 0
        elif self._counts(result):
            self._activation(name, args, kwargs, result)
        if flags:
            self._mark(result, flags)

    def _called(self, layer: str, result: Tensor) -> None:
        self._after = layer
        self.ran.setdefault(layer)
        if self._counts(result):
            self._loops.setdefault(layer, LoopGradients(self._guard)).follow(result)

    def finish(self) -> None:
        """Add up what takes more than one call."""
        for layer, uses in self._uses.items():
            self._add("early", torch.tensor([float(uses.early)], dtype=torch.float64), layer)
        for layer, loop in self._loops.items():
            ends = loop.ends()
            if ends is not None:
                self._add("reach", ends, layer)
        for layer, what in list(self._points):
            made, data = self._points.get((layer, "made")), self._points.get((layer, "data"))
            if what == "made" and made is not None and data is not None and made.shape[1] == data.shape[1]:
                self._add("chosen", chosen(made, data), layer)
        self._uses, self._loops, self._points = {}, {}, {}

    @staticmethod
    def _counts(result: Tensor) -> bool:
        """Return whether a call belongs to the pass that is trained."""
        # A parameter that an optimizer adds to asks for gradients, too, but is made of nothing.
        return result.grad_fn is not None and not in_backward() and result.numel() > 0

    def _activation(
        self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
    ) -> None:
        if name in _CUTS and self._after:  # else it is not known of which layer
            with aside(result.device.type):
                self._add("dead", self._live(result.detach()))
        elif name in ("tanh", "sigmoid", "hardtanh", "hardsigmoid"):
            with aside(result.device.type):
                self._add("saturated", near_ends(result.detach(), squash=not name.endswith("sigmoid")))
        elif name == "softmax":
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            square = result.ndim == 3 and result.shape[-1] == result.shape[-2]
            if dim in (-1, result.ndim - 1) and (square or result.ndim == 4):
                with aside(result.device.type):
                    self._attention(result.detach())
        elif name == "scaled_dot_product_attention":
            with aside(result.device.type):
                self._scaled_product(args, kwargs)
        elif name in _ADDS and len(args) > 1:
            self._sum(args[0], args[1])

    def _live(self, result: Tensor) -> Tensor:
        """Return, of each unit of an activation, on how many samples and positions it is not 0."""
        axis = 1 if result.ndim == 2 or self._channels_first else -1
        rows_NU = result[:SAMPLES].movedim(axis, -1).flatten(0, -2)
        rows_NU = rows_NU[:: max(1, len(rows_NU) // ROWS)]
        return (rows_NU != 0).sum(0).to(accumulation_dtype(result.device))

    # -- what is added ------------------------------------------------------------------------

    def _sum(self, one: Any, other: Any) -> None:
        """Look at ``one + other``: a code and its noise, or a stream and what a block adds."""
        if not isinstance(other, Tensor) or not isinstance(one, Tensor) or one.shape != other.shape:
            return
        if one.ndim < 2 or len(one) < 2 or not self._after:
            return
        flags = [self._flags(one), self._flags(other)] if self._drawn else [0, 0]
        for part, mine, its in ((one, flags[0], flags[1]), (other, flags[1], flags[0])):
            if its & _PURE and not mine and part.requires_grad:
                with aside(part.device.type):
                    self._add("code", moments(part.detach()))
                return
        if any(f & _PURE for f in flags) or any(part.stride(0) == 0 for part in (one, other)):
            return
        if any(ref() is part for ref in self._tables for part in (one, other)):
            return  # rows of a table, of positions maybe: the same in every sample
        with aside(one.device.type):
            self._add("block", torch.stack([moments(one.detach()), moments(other.detach())]))

    # -- attention ----------------------------------------------------------------------------

    def _attention(self, weights: Tensor) -> None:
        """Add up the entropy of attention weights ``[N, H, T, S]`` (or ``[N, T, S]``) by head."""
        weights_NHTS = (weights if weights.ndim == 4 else weights.unsqueeze(1))[:16].double()
        positions, width = weights_NHTS.shape[-2:]
        if width < 2 or len(weights_NHTS) < 2:
            return
        causal = positions == width and not weights_NHTS.triu(1).any()
        seen_T = torch.full((positions,), width, dtype=torch.float64, device=weights.device)
        seen_T = seen_T.cumsum(0) / width if causal else seen_T
        several = seen_T > 1
        weights_NHTS, seen_T = weights_NHTS[..., several, :], seen_T[several]
        share_NHT = torch.special.entr(weights_NHTS).sum(-1) / seen_T.log()
        shares_H = share_NHT.sum((0, 2))
        count = torch.full_like(shares_H[:1], share_NHT.shape[0] * share_NHT.shape[2])
        self._add("attention", torch.cat([count, shares_H]))
        self._add("looks", moments(weights_NHTS))

    def _scaled_product(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        q, k, mask = given["query"], given["key"], given.get("attn_mask")
        if q.ndim != 4 or q.shape[1] != k.shape[1]:
            return
        scores = q.detach()[:16].float() @ k.detach()[:16].float().mT
        scores = scores * (given.get("scale") or 1 / math.sqrt(q.shape[-1]))
        if given.get("is_causal"):
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        if mask is not None:
            mask = mask[:16] if mask.ndim == 4 and len(mask) > 1 else mask
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        self._attention(scores.softmax(-1).nan_to_num())

    def _packed_attention(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor) -> None:
        names = ("query", "key", "value", "width", "heads", "in_proj_weight", "in_proj_bias")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        weight, bias, query = given["in_proj_weight"], given["in_proj_bias"], given["query"]
        layer = self._names.get(id(weight)) if weight is not None else None
        if layer is None:
            return
        self._after = layer.removesuffix("q_proj") + "out_proj"
        if kwargs.get("key_padding_mask") is not None or query.ndim != 3 or not self._counts(result):
            return
        with aside(result.device.type):
            width, heads = weight.shape[1], given["num_heads"] if "num_heads" in given else given["heads"]
            biases = (None, None) if bias is None else bias.detach().chunk(3)[:2]
            parts = []
            for x, rows, offset in zip((query, given["key"]), weight.detach().chunk(3), biases, strict=False):
                made = x.detach()[:, :16].to(weight.dtype) @ rows.mT
                made = made if offset is None else made + offset
                parts.append(made.unflatten(-1, (heads, width // heads)).permute(1, 2, 0, 3).float())
            scores = parts[0] @ parts[1].mT / math.sqrt(width // heads)
            mask = kwargs.get("attn_mask")
            if mask is not None and mask.ndim == 2:
                scores = scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            self._attention(scores.softmax(-1).nan_to_num())

    # -- recurrent modules --------------------------------------------------------------------

    def _recurrent(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if len(args) != 9:
            return
        packed = not isinstance(args[3], bool)  # then batch sizes stand before the states
        weights = args[3] if packed else args[2]
        self._after = self._names.get(id(weights[1]), self._after)
        self.ran.setdefault(self._after)
        if packed or not self._counts(result[0]):
            return
        with aside(result[0].device.type):
            shares = gates(name, args, result[0])
            if shares is not None:
                self._add("saturated", shares)
            self._add("reach", reach(name, args))
        uses = self._uses.setdefault(self._after, FirstUses(self._guard))
        uses.follow(result[0], batch_first=bool(args[8]))

    # -- lineage ------------------------------------------------------------------------------

    def _mark(self, tensor: Tensor, flags: int) -> None:
        self._lines[id(tensor)] = weakref.ref(tensor), flags

    def _flags(self, tensor: Any) -> int:
        found = self._lines.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else 0

    def _inherited(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        flags = 0
        for each in (*args, *kwargs.values()):
            for part in each if isinstance(each, list | tuple) else (each,):
                flags |= self._flags(part) if isinstance(part, Tensor) else 0
        return flags if name in _PRODUCTS else flags & ~_PURE

    def _sides(self, layer: str, x: Tensor, flags: int) -> None:
        """Tell what a generator made from data, where one layer gets both."""
        if self._drawn and x.ndim > 1 and len(x) > 1:
            side = "made" if flags & _MADE else "data" if not x.requires_grad else ""
            if side:
                with aside(x.device.type):
                    self._add(side, moments(x.detach()), layer)
                    if (layer, side) not in self._points:
                        self._points[layer, side] = some(x.detach())

    def _add(self, what: str, values: Tensor, layer: str | None = None) -> None:
        key = (self._after if layer is None else layer), what
        values = values.to(accumulation_dtype(values.device))
        before = self.sums.get(key)
        if before is None:
            self.sums[key] = values
        elif before.shape == values.shape:
            self.sums[key] = before + values


def some(x: Tensor) -> Tensor:
    """Return (some of) each sample's numbers, of some samples, ``[N, F]``."""
    x_NF = x[:SAMPLES].flatten(1)
    x_NF = x_NF[:, :: max(1, x_NF.shape[1] // FEATURES)][:, :FEATURES]
    return x_NF.to(accumulation_dtype(x.device))


def moments(x: Tensor) -> Tensor:
    """Return count, sums and sums of squares over samples of :func:`some`' numbers, ``[3, F]``."""
    x_NF = some(x)
    return torch.stack([torch.full_like(x_NF[0], len(x_NF)), x_NF.sum(0), x_NF.square().sum(0)])


def variances(sums: Tensor) -> Tensor:
    """Return the variances of :func:`moments`' sums, ``[..., F]``, at least 0; rounding of the mean is 0."""
    count, first, second = sums.unbind(-2)
    mean, square = first / count, second / count
    found = square - mean.square()
    return torch.where(found > 1e-14 * square, found, 0.0)
