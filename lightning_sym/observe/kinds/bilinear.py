"""Bilinear layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_sym.observe.layer import Layer
from lightning_sym.observe.samples import Products, Samples

if TYPE_CHECKING:
    from lightning_sym.observe.hooks import LayerWatch


@dataclass(frozen=True, eq=False, repr=False)
class BilinearLayer(Layer):
    """``y_o = x^T W_o z``, read as a linear map of the products of both inputs' features, ``[D * E]``.

    The units that feed it are those of the first input, then those of the second.
    """

    by_call = False

    @property
    def no_noise(self) -> str:
        """Why gradient noise is not read."""
        return "it multiplies two inputs"

    @property
    def in_units(self) -> int:
        """Units of both inputs."""
        return int(self.module.in1_features) + int(self.module.in2_features)  # type: ignore[arg-type]

    def attach(self, watch: LayerWatch) -> list[Any]:
        """Show calls to a watch; return handles whose ``remove`` ends it."""
        return [self.module.register_forward_hook(watch.guard(partial(self._both, watch)), with_kwargs=True)]

    def _both(self, watch: LayerWatch, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs = [*args, *(kwargs[key] for key in ("input1", "input2") if key in kwargs)]
        if len(inputs) == 2 and all(isinstance(x, Tensor) for x in (*inputs, output)):
            both = torch.cat([x.detach() for x in inputs], dim=-1)
            watch.see(both, output, from_data=not any(x.requires_grad for x in inputs))

    def inputs(self, x: Tensor, positions: int | None) -> Samples:
        """Return the products of both inputs."""
        width = int(self.module.in1_features)  # type: ignore[arg-type]
        x = x.flatten(1, -2) if x.ndim > 2 else x.reshape(-1, 1, x.shape[-1])
        return Products(x[..., :width], x[..., width:], positions)
