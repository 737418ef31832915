"""Transposed convolutions.

Shape letters: B samples, C input channels, O output channels, G groups, k kernel positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_sym.observe.layer import Layer
from lightning_sym.observe.samples import Geometry

if TYPE_CHECKING:
    from lightning_sym.observe.hooks import LayerWatch

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, eq=False, repr=False)
class TransposedConvolution(Layer):
    """A transposed convolution, read as the convolution of its input with zeros stuffed between the entries.

    ``h_b`` is the output at one position (its channels, as of any convolution), ``h_a`` the patch of the
    stuffed and padded input under the kernel, ``W`` the flipped kernel ``[O, C * k]``, so
    that ``h_b = W h_a`` and ``g_a = W^T g_b``. Of a stride of two or more, which entries of a patch are zeros
    depends on the position.
    """

    @property
    def no_noise(self) -> str:
        """Why gradient noise is not read."""
        return "it is a transposed convolution"

    def as_blocks(self, weight: Tensor, *, oriented: bool = False) -> Tensor:
        """Return a weight ``[C, O / G, ...]`` as ``[G, O / G, C / G * k]``.

        Raises:
            ValueError: if it is of another shape.
        """
        if weight.ndim < 3 or weight.shape[0] % self.groups:
            raise ValueError(f"its weight has shape {tuple(weight.shape)}")
        blocks = weight.unflatten(0, (self.groups, -1)).transpose(1, 2)
        blocks = blocks.flip(tuple(range(3, blocks.ndim))).flatten(2)
        return super().as_blocks(blocks.flatten(0, 1))

    def seen(
        self, watch: LayerWatch, capture: Any, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        """Show a call to a watch; its output size, which may be asked for, tells how it is padded."""
        x = self.input_of(args, kwargs)
        if isinstance(x, Tensor) and isinstance(output, Tensor) and self.geometry is not None:
            watch.layer = replace(self, geometry=_geometry(module, tuple(output.shape)))
        super().seen(watch, None, module, args, kwargs, output)


def _geometry(module: Any, shape: tuple[int, ...] | None = None) -> Geometry:
    """Return how the kernel is placed on the stuffed input; the padding behind is what the output needs."""
    size = len(module.kernel_size)
    pads: list[int] = []
    for axis in reversed(range(size)):
        span = module.dilation[axis] * (module.kernel_size[axis] - 1)
        before = span - module.padding[axis]
        pads += [before, before + module.output_padding[axis]]
    kernel, steps = tuple(module.kernel_size), tuple(module.stride)
    geometry = Geometry(kernel, (1,) * size, tuple(module.dilation), tuple(pads), stuffing=steps)
    return geometry if shape is None else replace(geometry, extent=shape[-size:])


def transposed_convolution(name: str, module: Any) -> Layer:
    """Return the layer of a transposed convolution."""
    weight = module._parameters.get("weight")
    inputs, outputs = module.in_channels, module.out_channels
    if weight is not None and weight.ndim == 2 + len(module.kernel_size):
        inputs, outputs = weight.shape[0], weight.shape[1] * module.groups
    geometry = _geometry(module)
    width = inputs
    for k in geometry.kernel:
        width *= k
    return TransposedConvolution(name, module, None, width, outputs, module.groups, geometry=geometry)
