"""One watchable layer: what its linear map is, where its weight is, and how its calls are seen.

Every watched layer is read as one linear map ``h_b = W h_a`` with samples in rows: a linear layer
as it stands (sequence dimensions are samples), a convolution on its patches (positions are
samples, ``h_a`` is the patch under the kernel, groups make ``W`` block diagonal), an embedding on its
output side only. Other kinds of layers are subclasses, see :mod:`lightning_sym.observe.kinds`.

Shape letters: B batch, P positions, N = B * P samples, A input width, O output width, G groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from lightning_sym.observe.products import Capture, Product
from lightning_sym.observe.samples import Geometry, Patches, Samples
from lightning_sym.observe.weights import is_parametrized, local, next_weight, sources

if TYPE_CHECKING:
    from lightning_sym.observe.hooks import LayerWatch

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Whose forward is one product of the layer's weight; a subclass with its own may use another weight.
_PLAIN: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys((nn.Linear, nn.Embedding, nn.EmbeddingBag), ("forward",)),
    **dict.fromkeys(CONVOLUTIONS, ("forward", "_conv_forward")),
}


@dataclass(frozen=True, eq=False, repr=False)
class Layer:
    """One watchable linear map of a network.

    Args:
        name: the module's name in the network, cleaned of wrappers; where a module holds several maps,
            with the map's own name behind it (``.q_proj``, ``.ih_l0``, ``.3``).
        module: the module that holds the map.
        part: of a module that holds several maps, which of them.
        in_features: A, the width of ``h_a`` (0 for an embedding, whose input is an index).
        out_features: O, the width of ``h_b``.
        groups: number of diagonal blocks of ``W``.
        span: of a weight that holds several maps, which of its outputs are this one's.
        transposed: whether the weight is kept as ``[A, O]``.
        weight_name, bias_name: the attributes that hold the weight and the bias.
        geometry: how a convolution places its kernel; None for all else.
        parent: a module that may use the layer's weight without calling the layer.
    """

    name: str
    module: nn.Module = field(repr=False)
    part: str | None
    in_features: int
    out_features: int
    groups: int = 1
    span: tuple[int, int] | None = None
    transposed: bool = False
    weight_name: str = "weight"
    bias_name: str = "bias"
    geometry: Geometry | None = None
    parent: nn.Module | None = None

    #: Whether the layer is a linear map; a normalisation's gain is not.
    linear: ClassVar[bool] = True
    #: Whether a call's rows are the batch's samples, in order.
    in_order: ClassVar[bool] = True
    #: Whether a call of the module takes the layer's input first and returns its output.
    by_call: ClassVar[bool] = True

    def __repr__(self) -> str:
        return f"Layer {self.name!r} ({self.in_features or 'index'} -> {self.out_features})"

    @property
    def is_convolution(self) -> bool:
        """Whether positions are samples and inputs are patches."""
        return self.geometry is not None

    @property
    def has_input(self) -> bool:
        """Whether there is an input side; an embedding has none."""
        return self.in_features > 0

    @property
    def in_units(self) -> int:
        """Units that feed the layer: input channels for a convolution, else A."""
        return self.in_features // (math.prod(self.geometry.kernel) if self.geometry is not None else 1)

    @property
    def in_channels(self) -> int:
        """Size of the weight's dimension 1: inputs, or the channels that feed one group of a convolution."""
        return self.in_units // self.groups

    @property
    def largest_rank(self) -> int:
        """The largest rank that ``W`` can have."""
        return min(self.out_features, self.in_features) if self.has_input else self.out_features

    @property
    def no_noise(self) -> str:
        """Why gradient noise, which is read by dimensions of the weight, is not; ``""`` where it is."""
        if not self.has_input:
            return "its input is an index"
        return "its weight is kept as [inputs, outputs]" if self.transposed else ""

    # -- the weight ---------------------------------------------------------------------------

    @property
    def holder(self) -> tuple[nn.Module, str]:
        """The module and the attribute that hold the weight."""
        return self.module, self.weight_name

    def sources(self) -> list[nn.Parameter]:
        """Return the parameters that the weight is made from; mostly one, the weight itself."""
        return sources(*self.holder)

    def parameter(self) -> nn.Parameter:
        """Return the first of them: it tells the device and the type."""
        return self.sources()[0]

    @property
    def trained(self) -> bool:
        """Whether a parameter of the weight or the bias asks for a gradient."""
        return any(p.requires_grad for p in (*self.sources(), self.bias_parameter()) if p is not None)

    def slice(self, tensor: Tensor) -> Tensor:
        """Return the part of the parameter (or of its gradient or bias) that is this layer's."""
        if self.span is None:
            return tensor
        start, end = self.span
        return tensor.narrow(1 if self.transposed and tensor.ndim > 1 else 0, start, end - start)

    def as_blocks(self, weight: Tensor, *, oriented: bool = False) -> Tensor:
        """Return a weight as ``[G, O / G, A / G]``; an embedding's as ``[1, V, O]``.

        Args:
            weight: shaped as the parameter.
            oriented: whether its outputs come first even where the parameter's inputs do.

        Raises:
            ValueError: if it is not of real floating-point numbers, or of another shape.
        """
        if not weight.is_floating_point():
            raise ValueError(f"its weight holds {str(weight.dtype).removeprefix('torch.')} numbers")
        if weight.ndim < 2:
            raise ValueError(f"its weight has shape {tuple(weight.shape)}")
        rows = weight.mT if oriented and self.transposed else weight
        rows = self.slice(rows)
        rows = self._outputs_first(rows)
        width = self.in_features or self.out_features
        expected = rows.shape[0] * width if not self.has_input else self.out_features * width // self.groups
        if rows.numel() != expected or rows.shape[0] % self.groups:
            raise ValueError(f"its weight has shape {tuple(weight.shape)}")
        return rows.reshape(self.groups, rows.shape[0] // self.groups, -1)

    def _outputs_first(self, rows: Tensor) -> Tensor:
        return rows.mT if self.transposed else rows

    def next_blocks(self) -> Tensor:
        """Return the weight that the next forward pass will use, as :meth:`as_blocks`: itself, not a copy."""
        return self.as_blocks(next_weight(*self.holder))

    def blocks(self) -> Tensor:
        """Return a detached copy of the weight that the next forward pass will use, as :meth:`as_blocks`."""
        return self.next_blocks().clone()

    def used(self) -> Tensor | None:
        """Return the weight that the last forward pass used, or None where reading it would compute it."""
        module, name = self.holder
        return None if is_parametrized(module, name) else self.as_blocks(getattr(module, name).detach())

    def gradients(self) -> list[Tensor]:
        """Return the gradient of the weight, or of each parameter of it; nothing where there is none."""
        module, name = self.holder
        parameter = module._parameters.get(name)
        gradient = None if parameter is None else parameter.grad
        if gradient is None:
            return []
        return [gradient.detach() if gradient.is_sparse else self.slice(local(gradient))]

    def bias_parameter(self) -> nn.Parameter | None:
        """Return the parameter that holds the bias (of several maps together, if they are), if any."""
        if is_parametrized(self.module, self.bias_name):
            return None
        bias = getattr(self.module, self.bias_name, None)
        return bias if isinstance(bias, Tensor) else None  # type: ignore[return-value]

    def bias(self) -> Tensor | None:
        """Return a detached copy of the bias ``[O]``, if there is one."""
        bias = self.bias_parameter()
        return None if bias is None else self.slice(local(bias)).clone()

    # -- calls --------------------------------------------------------------------------------

    def attach(self, watch: LayerWatch) -> list[Any]:
        """Show calls to a watch; return handles whose ``remove`` ends it."""
        handles: list[Any] = []
        module, name = self.holder
        if is_parametrized(module, name):
            made: Any = module.parametrizations[name]  # type: ignore[index, union-attr]
            handles.append(made.register_forward_hook(watch.keep_computed))
        capture: Capture | None = None
        if _has_own_forward(module):
            capture = watch.step.shared(("products", module), partial(Capture, module))
            handles.append(capture.attach())
        seen = watch.guard(partial(self.seen, watch, capture))
        handles.append(module.register_forward_hook(seen, with_kwargs=True))
        if self.parent is not None:
            within = watch.step.shared(("products", self.parent), partial(Capture, self.parent))
            running: list[int] = []
            handles.append(module.register_forward_pre_hook(lambda *_: running.append(1)))
            handles.append(module.register_forward_hook(lambda *_: running.clear(), always_call=True))
            handles.append(within.attach())
            within.takers.append(partial(self._taken, watch, running))
        return handles

    def _taken(self, watch: LayerWatch, running: list[int], product: Product) -> None:
        """Show a product of the layer's weight that was not made by the layer."""
        if not running and product.weight is self.module._parameters.get(self.weight_name):
            watch.use(product)
            part = None if self.span is None else partial(_last, *self.span)
            watch.see(product.x, product.result, part=part)

    def input_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the input out of what a call was given."""
        return args[0] if args else next(iter(kwargs.values()), None)

    def output_of(self, output: Any) -> Any:
        """Return the output out of what a call returned: the first, where it returned several things."""
        return output[0] if isinstance(output, list | tuple) and output else output

    def mine(self, output: Tensor) -> Tensor:
        """Return this layer's part of what its module put out."""
        return output if self.span is None else _last(*self.span, output)

    def seen(
        self,
        watch: LayerWatch,
        capture: Capture | None,
        module: nn.Module,
        args: Any,
        kwargs: Any,
        output: Any,
    ) -> None:
        """Show a call of the module to a watch."""
        y, x = self.output_of(output), self.input_of(args, kwargs)
        if not isinstance(y, Tensor):
            watch.unreadable(f"its output is of type {type(y).__name__}, not a tensor")
            return
        if self.linear and self.span is None and self._width(y) != self.out_features:
            watch.unreadable("its outputs are not those of its type")
            return
        product = None if capture is None else capture.made(y)
        if product is not None:
            x = product.x
            watch.use(product)
        part = None if self.span is None else partial(_last, *self.span)
        watch.see(x if isinstance(x, Tensor) else None, y, part=part)

    def _width(self, y: Tensor) -> int:
        """Return how many units an output has."""
        if self.geometry is None:
            return y.shape[-1] if y.ndim else 0
        size = len(self.geometry.kernel)
        return y.shape[-1 - size] if y.ndim in (size + 1, size + 2) else 0

    def batch_first(self, x: Tensor, batch: int | None) -> Tensor:
        """Return an input or output with samples first."""
        return x

    def few(self, x: Tensor, most: int) -> Tensor:
        """Return an input or output of at most so many samples."""
        single = self.geometry is not None and x.ndim == len(self.geometry.kernel) + 1
        return x if single else x[:most]

    # -- samples ------------------------------------------------------------------------------

    def inputs(self, x: Tensor, positions: int | None) -> Samples:
        """Return the input side, at most ``positions`` positions of each sample."""
        if self.geometry is not None:
            return Patches(self.geometry, x, positions)
        return Samples(_positions_second(x), positions)

    def outputs(self, y: Tensor, positions: int | None) -> Samples:
        """Return the output side (or its gradient), at the same positions."""
        if self.geometry is None:
            return Samples(_positions_second(y), positions)
        return Samples(self.geometry.batched(y).flatten(2).mT, positions)

    def units(self, x: Tensor) -> Tensor:
        """Return the units that feed the layer, ``[B, U, P]``."""
        if self.geometry is not None:
            return self.geometry.batched(x).flatten(2)
        return x.reshape(-1, x.shape[-1], 1)

    def input_rows(self, x: Tensor, positions: int | None) -> Tensor:
        """Return the input side as rows ``[N, A]``, at most ``positions`` of them per sample."""
        return self.inputs(x, positions).features().flatten(0, 1)

    def output_rows(self, y: Tensor, positions: int | None) -> Tensor:
        """Return the output side (or its gradient) as rows ``[N, O]``, as :meth:`input_rows`."""
        return self.outputs(y, positions).features().flatten(0, 1)

    def patches(self, x: Tensor) -> Tensor:
        """Return all patches of a convolution's input at once, ``[B, P, A]``.

        Raises:
            TypeError: if the layer is no convolution.
        """
        if self.geometry is None:
            raise TypeError(f"{self.name} is no convolution: it has no patches")
        return self.geometry.all_patches(x)


def _has_own_forward(module: nn.Module) -> bool:
    """Return whether a module of a known kind does more in its forward than that kind."""
    for kind, methods in _PLAIN.items():
        if isinstance(module, kind):
            return any(
                getattr(type(module), method) is not getattr(kind, method) or method in vars(module)
                for method in methods
            )
    return True


def _last(start: int, end: int, x: Tensor) -> Tensor:
    return x[..., start:end]


def _positions_second(x: Tensor) -> Tensor:
    """Return ``[..., D]`` as ``[B, P, D]``: all dimensions but the first and last are positions."""
    if x.ndim < 3:
        return x.reshape(-1, 1, x.shape[-1])
    return x.flatten(1, -2)
