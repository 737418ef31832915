"""Weights of several experts in one parameter, ``[E, O, I]`` or ``[E, I, O]``; each expert is a layer.

What an expert is called with are the tokens that were routed to it: they are its samples. Which sample of
the batch a token is of is not known in there, so that halves are of tokens. An expert that got no token
in a step has no readings at that step, and nothing is said of it; only where none of them got one.

Shape letters: E experts, N tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_sym.observe.layer import Layer
from lightning_sym.observe.products import Capture

if TYPE_CHECKING:
    from lightning_sym.observe.hooks import LayerWatch

#: Takes one expert's rows out of a tensor.
Take = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Expert(Layer):
    """One expert of a stack; its part is its number."""

    in_order = by_call = False

    @property
    def no_noise(self) -> str:
        """Why gradient noise is not read: samples can't be told apart."""
        return "tokens are routed to it"

    @property
    def number(self) -> int:
        """Which expert it is."""
        return int(str(self.part))

    def slice(self, tensor: Tensor) -> Tensor:
        """Return this expert's part of the parameter, of its gradient or of the bias."""
        return tensor[self.number]

    def as_blocks(self, weight: Tensor, *, oriented: bool = False) -> Tensor:
        """Return this expert's weight as ``[1, O, I]``."""
        return super().as_blocks(weight)

    def attach(self, watch: LayerWatch) -> list[Any]:
        """Show calls to a watch; return handles whose ``remove`` ends it."""
        capture: Capture = watch.step.shared(("products", self.module), partial(Capture, self.module))
        capture.listeners.append(partial(self._note, watch))
        return [capture.attach()]

    def _note(self, watch: LayerWatch, name: str, args: Any, kwargs: Any, result: Any) -> None:
        found = _routed(self, name, args, kwargs) if isinstance(result, Tensor) and watch.open() else None
        if found is None:
            return
        x, take, transposed = found
        if not x.numel():
            return
        layer = watch.layer
        if transposed != layer.transposed:
            if layer.in_features != layer.out_features and watch.step.ranks > 1:
                order = "[experts, inputs, outputs]" if transposed else "[experts, outputs, inputs]"
                watch.unreadable(f"its weight is used as {order}; is_transposed of its module tells so")
                return
            inputs, outputs = layer.out_features, layer.in_features
            watch.turn(replace(layer, transposed=transposed, in_features=inputs, out_features=outputs))
        watch.see(x, result, part=take)


def experts(name: str, module: nn.Module) -> Iterator[Layer]:
    """Yield the experts of a module's own parameters of three dimensions.

    Whether inputs or outputs come first in an expert's weight is told by a bias ``[E, O]`` of the same name
    with ``_bias`` behind it, else by ``is_transposed`` of the module, else outputs do; a first call that
    shows another order is believed (on several ranks only if the weight is square).
    """
    for key, weight in module._parameters.items():
        if weight is None or isinstance(weight, nn.UninitializedParameter) or weight.ndim != 3:
            continue
        count, first, second = weight.shape
        if min(weight.shape) < 2 or not weight.is_floating_point():
            continue
        bias_name = "bias" if key == "weight" else f"{key}_bias"
        bias = module._parameters.get(bias_name)
        transposed = getattr(module, "is_transposed", False) is True
        if bias is not None and bias.shape == (count, second) and first != second:
            transposed = True
        inputs, outputs = (first, second) if transposed else (second, first)
        bias_name = bias_name if bias is not None and bias.shape == (count, outputs) else "_"
        for number in range(count):
            label = ".".join(filter(None, (name, key, str(number))))
            yield Expert(
                label,
                module,
                str(number),
                inputs,
                outputs,
                transposed=transposed,
                weight_name=key,
                bias_name=bias_name,
            )


def _routed(expert: Expert, name: str, args: Any, kwargs: Any) -> tuple[Tensor, Take, bool] | None:
    """Return an expert's input, how its output is taken out of the result, and how its weight was used."""
    parameter, number = expert.module._parameters.get(expert.weight_name), expert.number
    if parameter is None:
        return None
    if name == "linear" and len(args) > 1 and _is_of(args[1], parameter):
        return _one(args[0], args[1].mT, parameter, number)
    if name in ("mm", "matmul", "__matmul__", "bmm") and len(args) > 1 and _is_of(args[1], parameter):
        x, weight = args[:2]
        return _one(x, weight, parameter, number) if weight.ndim == 2 else _stacked(x, weight, number)
    if name in ("addmm", "baddbmm") and len(args) > 2 and _is_of(args[2], parameter):
        _, x, weight = args[:3]
        return _one(x, weight, parameter, number) if weight.ndim == 2 else _stacked(x, weight, number)
    if name == "einsum" and len(args) >= 2:
        return _summed(
            args[0], list(args[1] if isinstance(args[1], list | tuple) else args[1:]), parameter, number
        )
    if name in ("_grouped_mm", "grouped_mm") and len(args) > 1 and _is_of(args[1], parameter):
        ends = kwargs.get("offs", args[2] if len(args) > 2 else None)
        if args[1].ndim == 3 and isinstance(ends, Tensor):
            before, end = int(ends[number - 1]) if number else 0, int(ends[number])
            return args[0][before:end], partial(_between, before, end), _inputs_first(args[1])
    return None


def _is_of(weight: Any, parameter: Tensor) -> bool:
    return isinstance(weight, Tensor) and (weight is parameter or weight._base is parameter)


def _inputs_first(weight: Tensor) -> bool:
    """Return whether a view ``[..., I, O]`` keeps inputs before outputs in the parameter."""
    return weight.stride(-2) >= weight.stride(-1)


def _one(x: Tensor, weight_IO: Tensor, parameter: Tensor, number: int) -> tuple[Tensor, Take, bool] | None:
    """Return what is needed of a product with one expert's weight."""
    size = parameter[0].numel()
    offset = weight_IO.storage_offset() - parameter.storage_offset()
    if offset != number * size or weight_IO.numel() != size:  # another expert's, or a part of it
        return None
    return x, lambda y: y, _inputs_first(weight_IO)


def _stacked(x: Tensor, weight_EIO: Tensor, number: int) -> tuple[Tensor, Take, bool] | None:
    """Return what is needed of a batched product with all experts' weights."""
    if weight_EIO.ndim != 3:
        return None
    mine = x if x.ndim == 2 else x.select(-3, 0 if x.shape[-3] == 1 else number)
    return mine, partial(_selected, number), _inputs_first(weight_EIO)


def _selected(number: int, y: Tensor) -> Tensor:
    return y.select(-3, number)


def _between(before: int, end: int, y: Tensor) -> Tensor:
    return y[before:end]


def _summed(
    equation: str, operands: list[Any], parameter: Tensor, number: int
) -> tuple[Tensor, Take, bool] | None:
    """Return what is needed of ``einsum`` over one input and all experts' weights."""
    if len(operands) != 2 or not isinstance(equation, str) or "->" not in equation or "..." in equation:
        return None
    place = next((i for i, operand in enumerate(operands) if operand is parameter), None)
    if place is None:
        return None
    left, out = equation.replace(" ", "").split("->")
    letters = left.split(",")
    w, given = letters[place], letters[1 - place]
    expert, rest = w[0], w[1:]
    inner = [c for c in rest if c in given and c not in out]
    outer = [c for c in rest if c in out and c not in given]
    kept = given.replace(expert, "")
    if (
        expert not in out
        or len(inner) != 1
        or len(outer) != 1
        or set(out) != {*kept, expert, *outer} - set(inner)
    ):
        return None
    order = kept.replace(inner[0], "")
    x = operands[1 - place]
    x = x.select(given.index(expert), number) if expert in given else x
    x = x.permute(*[kept.index(c) for c in order], kept.index(inner[0]))

    def take(y: Tensor) -> Tensor:
        mine, names = y.select(out.index(expert), number), out.replace(expert, "")
        return mine.permute(*[names.index(c) for c in order], names.index(outer[0]))

    return x, take, rest[0] == inner[0]
