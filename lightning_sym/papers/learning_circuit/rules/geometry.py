"""What a layer of a circuit connects, and the three local products its synapses can form.

Shape letters: N samples, O upper channels, C lower channels, P lower positions, X, Y extents.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight


@dataclass(frozen=True)
class Dense:
    """A fully connected layer; what comes in is flattened.

    Args:
        features: width of its output.

    Raises:
        ValueError: if ``features`` is not a positive integer.
    """

    features: int

    def __post_init__(self) -> None:
        _positive("features", self.features)

    def on(self, shape: tuple[int, ...]) -> Geometry:
        """Return the geometry of this layer on inputs of a shape."""
        return Geometry(shape, (self.features,), (self.features, prod(shape)))


@dataclass(frozen=True)
class Conv:
    """A two-dimensional convolution.

    Args:
        channels: channels of its output.
        kernel_size: extent of its square kernel.
        stride: step of the kernel.
        padding: zeros added on every side.

    Raises:
        ValueError: if a size is not a positive integer, or the padding negative.
    """

    channels: int
    kernel_size: int = 3
    stride: int = 1
    padding: int = 0

    def __post_init__(self) -> None:
        for name in ("channels", "kernel_size", "stride"):
            _positive(name, getattr(self, name))
        if not isinstance(self.padding, int) or self.padding < 0:
            raise ValueError(f"padding must be an integer of at least 0, got {self.padding!r}")

    def on(self, shape: tuple[int, ...]) -> Geometry:
        """Return the geometry of this layer on inputs of a shape ``(C, X, Y)``."""
        if len(shape) != 3:
            raise ValueError(f"a Conv layer needs inputs of shape (C, X, Y), got {shape}")
        extents = [(n + 2 * self.padding - self.kernel_size) // self.stride + 1 for n in shape[1:]]
        if min(extents) < 1:
            raise ValueError(f"a kernel of {self.kernel_size} does not fit into inputs of shape {shape}")
        kernel = (self.channels, shape[0], self.kernel_size, self.kernel_size)
        return Geometry(shape, (self.channels, *extents), kernel, stride=self.stride, padding=self.padding)


@dataclass(frozen=True)
class Geometry:
    """A linear map between two populations, as a function of its synapses.

    Feedback synapses ``B`` are kept in the shape of the ascending weights: the descending matrix V is
    the transpose of ``B``, so that ``cos(W^T, V) = cos(W, B)``.

    Args:
        lower: shape of the lower population, without the batch.
        upper: shape of the upper population.
        weight_shape: ``(O, C * P)`` of a dense map, ``(O, C, k, k)`` of a convolution.
        stride: of the convolution.
        padding: of the convolution.
    """

    lower: tuple[int, ...]
    upper: tuple[int, ...]
    weight_shape: tuple[int, ...]
    stride: int = 1
    padding: int = 0

    @property
    def dense(self) -> bool:
        """Whether the map is fully connected."""
        return len(self.weight_shape) == 2

    @property
    def fan_in(self) -> int:
        """Synapses onto one upper neuron."""
        return prod(self.weight_shape[1:])

    def up(self, below: Tensor, weight: Tensor) -> Tensor:
        """Return what the lower population drives in the upper one, ``[N, *upper]``."""
        if self.dense:
            return F.linear(below.flatten(1), weight)
        return F.conv2d(below, weight, stride=self.stride, padding=self.padding)

    def down(self, above: Tensor, feedback: Tensor) -> Tensor:
        """Return what the upper population drives in the lower one through ``B``'s transpose."""
        if self.dense:
            return (above @ feedback).unflatten(1, self.lower)
        size = (len(above), *self.lower)
        return conv2d_input(size, feedback, above, stride=self.stride, padding=self.padding)  # type: ignore[arg-type]

    def outer(self, above: Tensor, below: Tensor) -> Tensor:
        """Return activity above times activity below at every synapse, summed over samples."""
        if self.dense:
            return above.mT @ below.flatten(1)
        return conv2d_weight(below, self.weight_shape, above, stride=self.stride, padding=self.padding)  # type: ignore[arg-type]

    def rows(self, weight: Tensor) -> Tensor:
        """Return ascending weights as ``[O, synapses]``: a row is what one upper channel receives."""
        return weight.flatten(1)

    def feedback_rows(self, feedback: Tensor) -> Tensor:
        """Return V as ``[C, synapses]``: a row is what one lower channel receives."""
        if self.dense:
            return feedback.mT.reshape(self.lower[0], -1)
        return feedback.transpose(0, 1).flatten(1)


def lateral(activity: Tensor, weight: Tensor) -> Tensor:
    """Return a lateral matrix applied to the channels of a population, at every position."""
    if activity.ndim == 2:
        return F.linear(activity, weight)
    return torch.einsum("oc,nc...->no...", weight, activity)


def lateral_outer(post: Tensor, pre: Tensor) -> Tensor:
    """Return products of two populations' channels, summed over samples and positions."""
    if post.ndim == 2:
        return post.mT @ pre
    return torch.einsum("nop,ncp->oc", post.flatten(2), pre.flatten(2))


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
