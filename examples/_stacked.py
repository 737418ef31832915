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

Activation = Callable[[Tensor], Tensor]


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
        self.weights: list[Tensor] = []
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for inputs, outputs in zip(self.widths[:-1], self.widths[1:], strict=True):
            drawn = [torch.randn(inputs, outputs, generator=g, dtype=dtype) for g in generators]
            self.weights.append((torch.stack(drawn) * gain / inputs**0.5).requires_grad_())

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
