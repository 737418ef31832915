"""Gains and offsets of normalisations: what gradient noise is read of besides the layers.

Shape letters: B samples, P positions, O units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sym._names import clean_name
from lightning_sym.observe.layer import Layer

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True, eq=False, repr=False)
class Gain(Layer):
    """The gain (and offset) of a normalisation, one number a unit; observed for gradient noise alone.

    Batch, group, layer and RMS normalisation; over one dimension, if over the last ones.
    """

    linear: ClassVar[bool] = False

    def normalized(self, x: Tensor) -> Tensor:
        """Return what the gain multiplies, in at least float32; no buffer is touched."""
        module = self.module
        x = x if x.dtype == torch.float64 else x.float()
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(x, module.num_groups, eps=module.eps)
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(x, module.normalized_shape, eps=module.eps)  # type: ignore[arg-type]
        if isinstance(module, nn.RMSNorm):
            return F.rms_norm(x, module.normalized_shape, eps=module.eps)  # type: ignore[arg-type]
        if module.training or module.running_mean is None:
            return F.batch_norm(x, None, None, training=True, eps=module.eps)  # type: ignore[arg-type]
        mean, var = module.running_mean.to(x), module.running_var.to(x)  # type: ignore[operator, union-attr]
        return F.batch_norm(x, mean, var, eps=module.eps)  # type: ignore[arg-type]

    def agrees(self, x: Tensor, output: Tensor) -> bool:
        """Return whether the output is the normalised input times the gain: some subclasses do more."""
        try:
            normal = self.normalized(x)
        except RuntimeError:  # other dimensions than this class's
            return False
        if normal.shape != output.shape:
            return False
        across = normal if self._last else normal.transpose(1, -1)
        bias = self.module.bias if getattr(self.module, "bias", None) is not None else 0.0
        expected = across * self.module.weight + bias  # type: ignore[operator]
        seen = (output if self._last else output.transpose(1, -1)).to(expected.dtype)
        tolerance = 1e-3 if torch.finfo(output.dtype).eps < 1e-6 else 0.05
        return bool(
            (seen - expected).abs().nan_to_num().max() <= tolerance * expected.abs().nan_to_num().max()
        )

    @property
    def _last(self) -> bool:
        return isinstance(self.module, nn.LayerNorm | nn.RMSNorm)

    def rows(self, x: Tensor) -> Tensor:
        """Return ``[B, P, O]`` of what passes through, ``[B, ...]``."""
        if self._last:
            return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)
        return x.flatten(2).mT if x.ndim > 2 else x.unsqueeze(1)


def gains(root: nn.Module) -> list[Gain]:
    """Return the gains of a network that can be observed, in the order of registration."""
    found = []
    for name, module in root.named_modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            if len(module.normalized_shape) != 1:
                continue
        elif not isinstance(module, (*_BATCH_NORMS, nn.GroupNorm)):
            continue  # a synchronised batch norm has other statistics than its rank's
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            found.append(Gain(clean_name(name), module, None, 0, len(weight)))
    return found
