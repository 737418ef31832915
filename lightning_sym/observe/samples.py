"""One side of one call of a layer as samples and positions; wide features are cut before they are copied.

Shape letters: B samples, P positions, D features, K kept features, C channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sampled_positions(count: int, most: int | None) -> list[int]:
    """Return at most ``most`` of ``count`` positions, evenly spread and always the same.

    Example:
        >>> sampled_positions(9, 3), sampled_positions(2, 3)
        ([1, 4, 7], [0, 1])
    """
    if most is None or count <= most:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * most) for i in range(most)]


class Samples:
    """Features at some positions of each sample.

    Args:
        x_BPD: all positions.
        most: how many of them to take of each sample; ``None``: all.
    """

    def __init__(self, x_BPD: Tensor, most: int | None) -> None:
        chosen = sampled_positions(x_BPD.shape[1], most)
        if len(chosen) < x_BPD.shape[1]:
            x_BPD = x_BPD[:, torch.tensor(chosen, device=x_BPD.device)]
        self._x_BPD = x_BPD
        self.count, self.positions = x_BPD.shape[:2]

    def features(self, keep: Tensor | None = None) -> Tensor:
        """Return ``[B, P, D]``, or ``[B, P, K]`` of the kept features."""
        return self._x_BPD if keep is None else self._x_BPD[..., keep]

    def norms(self) -> Tensor:
        """Return Euclidean norms over all D features, ``[B, P]``; not finite where a feature is not."""
        return _norm(self._x_BPD)


class Patches(Samples):
    """Patches under a convolution's kernel at some output positions.

    A full unfolding would be the largest tensor of the network, so single features are gathered.
    """

    def __init__(self, module: nn.Module, x: Tensor, most: int | None) -> None:
        padded, spans, extent = padded_input(module, x)
        self._x_BCS = padded.flatten(2)
        stride, dilation = _tuples(module)
        sizes = padded.shape[2:]
        steps = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
        flat_P = torch.tensor(sampled_positions(math.prod(extent), most))
        start_P, rest_P = torch.zeros_like(flat_P), flat_P
        for axis in reversed(range(len(extent))):
            start_P = start_P + rest_P % extent[axis] * stride[axis] * steps[axis]
            rest_P = rest_P // extent[axis]
        kernel = [
            torch.arange(0, span, d) * step for span, d, step in zip(spans, dilation, steps, strict=True)
        ]
        offset_k = torch.cartesian_prod(*kernel).reshape(-1, len(kernel)).sum(1)
        self._site_Pk = (start_P[:, None] + offset_k).to(x.device)
        self._size = padded.shape[2:].numel()
        self.count, self.positions = len(padded), len(flat_P)

    def features(self, keep: Tensor | None = None) -> Tensor:
        """Return ``[B, P, C * k]``, or ``[B, P, K]`` of the kept features."""
        k = self._site_Pk.shape[1]
        if keep is None:
            keep = torch.arange(self._x_BCS.shape[1] * k, device=self._site_Pk.device)
        site_PK = (keep // k) * self._size + self._site_Pk[:, keep % k]
        flat = self._x_BCS.flatten(1)
        return flat.index_select(1, site_PK.flatten()).unflatten(1, site_PK.shape)

    def norms(self) -> Tensor:
        """Return norms of whole patches, ``[B, P]``, from the squares summed over channels."""
        norm_BS = _norm(self._x_BCS, dim=1)
        return _norm(norm_BS[:, self._site_Pk])


def _norm(x: Tensor, dim: int = -1) -> Tensor:
    """Return norms along a dimension, in the type of x but at least float32: float64 where that overflows."""
    x = x if x.dtype == torch.float64 else x.float()
    found = torch.linalg.vector_norm(x, dim=dim)
    if x.dtype == torch.float64 or x.device.type == "mps" or bool(found.isfinite().all()):
        return found
    return torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64)


def _tuples(module: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return module.stride, module.dilation


def padded_input(module: Any, x: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """Return a convolution's padded input, the span of its kernel and its output positions by axis."""
    if x.ndim == len(module.kernel_size) + 1:
        x = x.unsqueeze(0)
    mode, pad = module.padding_mode, module._reversed_padding_repeated_twice
    padded = F.pad(x, pad) if mode == "zeros" else F.pad(x, pad, mode=mode)
    spans = [d * (k - 1) + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    extent = [
        (length - span) // stride + 1
        for length, span, stride in zip(padded.shape[2:], spans, module.stride, strict=True)
    ]
    return padded, spans, extent


def all_patches(module: Any, x: Tensor) -> Tensor:
    """Return all patches of a convolution's input at once, ``[B, P, C * k]``."""
    windows, spans, extent = padded_input(module, x)
    size = len(extent)
    for axis, (span, stride, dilation) in enumerate(zip(spans, module.stride, module.dilation, strict=True)):
        windows = windows.unfold(2 + axis, span, stride)[..., ::dilation]
    # [B, C, positions by axis, kernel by axis] -> [B, P, C * kernel]
    positions, kernel = range(2, 2 + size), range(2 + size, 2 + 2 * size)
    return windows.permute(0, *positions, 1, *kernel).flatten(1 + size).flatten(1, size)
