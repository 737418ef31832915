"""Layers that a user registers, and those that look like a linear layer without being one of torch's.

Shape letters: A inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_sym.observe.layer import Layer
from lightning_sym.observe.weights import sources


@dataclass(frozen=True)
class Adapter:
    """Where a layer's input, output and weight are; for :func:`register_layer`.

    Args:
        weight: the attribute that holds the weight: a parameter ``[O, A]`` (more dimensions are flattened
            behind the first), or what a parametrization makes.
        transposed: whether it is ``[A, O]``.
        bias: the attribute that holds the bias ``[O]``, if the layer has one.
        input: returns the input ``[B, ..., A]`` out of the positional and the named arguments of a call; by
            default the first argument.
        output: returns the output ``[B, ..., O]``, ``h_b = W h_a`` and the bias, out of what a call returned;
            by default that itself. It must be a tensor that goes on, since its gradient is read.

    Example:
        >>> import torch
        >>> from lightning_sym.observe import Adapter, register_layer, watchable_layers
        >>> class Projector(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.matrix = nn.Parameter(torch.randn(8, 3))
        ...
        ...     def forward(self, step, x):
        ...         return {"features": x @ self.matrix}
        >>> register_layer(
        ...     Projector,
        ...     Adapter(
        ...         weight="matrix",
        ...         transposed=True,
        ...         input=lambda args, kwargs: args[1],
        ...         output=lambda returned: returned["features"],
        ...     ),
        ... )
        >>> watchable_layers(nn.Sequential(Projector()))
        [Layer '0' (8 -> 3)]
        >>> register_layer(Projector, None)  # not any more
    """

    weight: str = "weight"
    transposed: bool = False
    bias: str = "bias"
    input: Callable[[tuple[Any, ...], dict[str, Any]], Tensor] | None = None
    output: Callable[[Any], Tensor] | None = None


#: Adapters by the type of module that they are for.
_ADAPTERS: dict[type[nn.Module], Adapter] = {}


def register_layer(kind: type[nn.Module], adapter: Adapter | None) -> None:
    """Have layers of a type watched as an adapter says, in all fits that begin from now on.

    A registered type comes before the kinds that are known without. What an adapter says is checked
    at the first due step: where the output is not ``W h + b``, what needs the weight has no reading.

    Args:
        kind: a subclass of ``nn.Module``; its own subclasses are watched as well.
        adapter: where input, output and weight are (:class:`Adapter`); ``None`` ends it.

    Raises:
        TypeError: if one of them is of another type.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind must be a subclass of nn.Module, got {kind!r}")
    if adapter is None:
        _ADAPTERS.pop(kind, None)
    elif isinstance(adapter, Adapter):
        _ADAPTERS[kind] = adapter
    else:
        raise TypeError(f"adapter must be an Adapter or None, got {adapter!r}")


@dataclass(frozen=True, eq=False, repr=False)
class AdaptedLayer(Layer):
    """A layer that an adapter describes."""

    adapter: Adapter = field(default_factory=Adapter, repr=False)

    def input_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the input out of what a call was given."""
        found = self.adapter.input
        return super().input_of(args, kwargs) if found is None else found(args, kwargs)

    def output_of(self, output: Any) -> Any:
        """Return the output out of what a call returned."""
        return output if self.adapter.output is None else self.adapter.output(output)


def adapted(name: str, module: nn.Module) -> Layer | None:
    """Return the layer of a module of a registered type, or None."""
    adapter = next((_ADAPTERS[kind] for kind in type(module).__mro__ if kind in _ADAPTERS), None)
    if adapter is None:
        return None
    made_from = sources(module, adapter.weight)
    own = module._parameters.get(adapter.weight)
    if not made_from or any(is_lazy(p) for p in made_from):
        return None
    shape = own.shape if own is not None else made_from[-1].shape
    if len(shape) < 2:
        raise ValueError(
            f"the weight of layer {name!r}, {adapter.weight!r} of {type(module).__name__} as its adapter "
            f"says, must have two dimensions, got shape {tuple(shape)}"
        )
    outputs, inputs = (shape[1], shape[0]) if adapter.transposed else (shape[0], shape[1:].numel())
    return AdaptedLayer(
        name,
        module,
        None,
        inputs,
        outputs,
        transposed=adapter.transposed,
        weight_name=adapter.weight,
        bias_name=adapter.bias,
        adapter=adapter,
    )


def look_alike(name: str, module: nn.Module) -> Layer | None:
    """Return the layer of a module that looks like a linear one, or None.

    That is a module with a ``weight`` of two dimensions as a parameter of its own which

    * tells its widths (``in_features`` and ``out_features``, or ``in_channels`` and ``out_channels``, as
      torch_geometric's layers do), or
    * is called ``Conv1D`` (transformers': the weight is ``[inputs, outputs]``).
    """
    weight = module._parameters.get("weight")
    if weight is None or is_lazy(weight) or weight.ndim != 2:
        return None
    shape = tuple(weight.shape)
    for inputs, outputs in (("in_features", "out_features"), ("in_channels", "out_channels")):
        widths = getattr(module, outputs, None), getattr(module, inputs, None)
        if widths == shape:
            return Layer(name, module, None, shape[1], shape[0])
        if widths == shape[::-1]:
            return Layer(name, module, None, shape[0], shape[1], transposed=True)
    if type(module).__name__ == "Conv1D":
        return Layer(name, module, None, shape[0], shape[1], transposed=True)
    return None
