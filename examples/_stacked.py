"""Many fully connected networks of one shape, trained side by side.

Small networks leave a processor idle between operations. A stack holds the weights of K networks (seeds,
weight decays, ...) in one tensor a layer, so that one batched product serves them all; no network sees
another's numbers.

Shape letters: K networks, B samples, I and O inputs and outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]


def drawn(
    shapes: Sequence[tuple[int, int]], *, seeds: Sequence[int], gain: float, dtype: torch.dtype
) -> list[Tensor]:
    """Return Gaussian weights ``[K, I, O]`` of deviation ``gain / sqrt(I)``, each network from its seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [
        (
            torch.stack([torch.randn(inputs, outputs, generator=g, dtype=dtype) for g in generators])
            * gain
            / inputs**0.5
        ).requires_grad_()
        for inputs, outputs in shapes
    ]


class Stack:
    """Weights ``[K, I, O]`` of K networks without biases, and plain SGD on them.

    Args:
        widths: from the inputs to the outputs.
        seeds: of the initial weights, one a network; equal seeds begin alike.
        activation: of the hidden layers, elementwise; it may treat networks differently.
        gain: weights start with standard deviation ``gain / sqrt(I)``.
        dtype: of the weights.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        seeds: Sequence[int],
        activation: Activation = torch.relu,
        gain: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.widths, self.activation = list(widths), activation
        shapes = list(zip(self.widths[:-1], self.widths[1:], strict=True))
        self.weights = drawn(shapes, seeds=seeds, gain=gain, dtype=dtype)

    def forward(self, x_KBI: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the inputs of all layers and what the layers make of them (before the activation)."""
        below, above = [], []
        for k, weight in enumerate(self.weights):
            below.append(x_KBI)
            above.append(torch.bmm(x_KBI, weight))
            x_KBI = self.activation(above[-1]) if k + 1 < len(self.weights) else above[-1]
        return below, above

    def outputs(self, x_KBI: Tensor) -> Tensor:
        """Return the outputs ``[K, B, O]``."""
        return self.forward(x_KBI)[1][-1]

    def step(self, loss: Tensor, *, lr: Tensor | float, decay: Tensor | float = 0.0) -> None:
        """Make a step of SGD down the sum of the networks' losses.

        Args:
            loss: sum over networks, so that each gets its own gradient.
            lr: learning rate, one or ``[K, 1, 1]``.
            decay: weight decay as in ``torch.optim.SGD``, one or ``[K, 1, 1]``.
        """
        gradients = torch.autograd.grad(loss, self.weights)
        with torch.no_grad():
            for weight, gradient in zip(self.weights, gradients, strict=True):
                weight.sub_(lr * (gradient + decay * weight))

    def gradients(self, x_KBI: Tensor, *, loss: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], ...]:
        """Return inputs and outputs of all layers and the loss's gradient by them, sample by sample.

        Args:
            x_KBI: inputs.
            loss: from the outputs to the losses, summed over samples and networks.

        Returns:
            Inputs, outputs, gradients by inputs, gradients by outputs, each a list over layers.
        """
        x_KBI = x_KBI.detach().requires_grad_()
        below, above = self.forward(x_KBI)
        found = torch.autograd.grad(loss(above[-1]), [*below, *above])
        kept = [[tensor.detach() for tensor in tensors] for tensors in (below, above, found)]
        return kept[0], kept[1], kept[2][: len(below)], kept[2][len(below) :]


class ConvolutionStack(Stack):
    """Two convolutions (3 x 3, stride 2, padding 1), a linear layer and the output, of K networks.

    Weights of a convolution are ``[K, 9 C, O]``: those of the linear map of a patch.

    Args:
        side: pixels of a square image of one channel; images come flat, ``[K, B, side * side]``.
        channels: of the two convolutions.
        hidden: width of the linear layer.
        outputs: of the network.
        seeds: of the initial weights, one a network; equal seeds begin alike.
        gain: weights start with standard deviation ``gain / sqrt(I)``.
        dtype: of the weights.
    """

    def __init__(
        self,
        side: int,
        channels: tuple[int, int],
        *,
        hidden: int,
        outputs: int,
        seeds: Sequence[int],
        gain: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        first, second = channels
        half = (side + 1) // 2
        self.sides, self.activation = (side, half), torch.relu
        flat = second * ((half + 1) // 2) ** 2
        shapes = [(9, first), (9 * first, second), (flat, hidden), (hidden, outputs)]
        self.weights = drawn(shapes, seeds=seeds, gain=gain, dtype=dtype)
        self.widths = [side * side, flat, hidden, outputs]

    def forward(self, x_KBI: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the inputs of all layers and what they make of them; of convolutions, place by place."""
        count, batch, _ = x_KBI.shape
        below, above = [], []
        images = x_KBI.reshape(count * batch, 1, *[self.sides[0]] * 2)
        for side, weight in zip(self.sides, self.weights, strict=False):  # of the convolutions
            images = images.reshape(count * batch, -1, side, side)
            patches = F.unfold(images, 3, stride=2, padding=1).mT  # [K B, places, 9 C]
            places = patches.shape[1]
            below.append(patches.reshape(count, batch * places, -1))
            above.append(torch.bmm(below[-1], weight))
            images = self.activation(above[-1]).reshape(count * batch, places, -1).mT
        x_KBI = images.reshape(count, batch, -1)
        for k, weight in enumerate(self.weights[2:]):
            below.append(x_KBI)
            above.append(torch.bmm(x_KBI, weight))
            x_KBI = above[-1] if k else self.activation(above[-1])
        return below, above
