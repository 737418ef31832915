"""One side of one call of a layer as samples and positions; wide features are cut before they are copied.

Shape letters: B samples, P positions, D features, K kept features, C channels.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
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

    #: Of each row, the number of its sample, where samples have several numbers of positions.
    owner: Tensor | None = None

    def __init__(self, x_BPD: Tensor, most: int | None) -> None:
        chosen = sampled_positions(x_BPD.shape[1], most)
        if len(chosen) < x_BPD.shape[1]:
            x_BPD = x_BPD[:, torch.tensor(chosen, device=x_BPD.device)]
        self._x_BPD = x_BPD
        self.count, self.positions = x_BPD.shape[:2]

    def part(self, rows: slice | Tensor) -> Samples:
        """Return some of the samples."""
        found = copy.copy(self)
        found._x_BPD = self._x_BPD[rows]
        return found._counted(found._x_BPD)

    def _counted(self, x: Tensor) -> Samples:
        self.count, self.owner = len(x), None
        return self

    def features(self, keep: Tensor | None = None) -> Tensor:
        """Return ``[B, P, D]``, or ``[B, P, K]`` of the kept features."""
        return self._x_BPD if keep is None else self._x_BPD[..., keep]

    def norms(self) -> Tensor:
        """Return norms over all D features, ``[B, P]``; not finite where a feature is not."""
        return _norm(self._x_BPD)


class Ragged(Samples):
    """Sequences of several lengths: what is behind a sequence's end is no sample.

    Args:
        x_BPD: all positions, padded.
        most: how many of them to take of each sample, evenly spread over its length; ``None``: all.
        lengths: of each sample, how many of its positions count.

    Attributes:
        owner: of each row, the number of its sample.
    """

    def __init__(self, x_BPD: Tensor, most: int | None, lengths: list[int]) -> None:
        sites = [(b, p) for b, length in enumerate(lengths) for p in sampled_positions(length, most)]
        b_N, p_N = torch.tensor(sites, device=x_BPD.device).reshape(-1, 2).unbind(1)
        super().__init__(x_BPD[b_N, p_N].unsqueeze(1), None)
        self.owner = b_N


class Products(Samples):
    """Products of the features of two inputs, ``[B, P, D * E]``; formed as far as they are asked for.

    Args:
        x_BPD: one input.
        z_BPE: the other.
        most: how many positions to take of each sample; ``None``: all.
    """

    def __init__(self, x_BPD: Tensor, z_BPE: Tensor, most: int | None) -> None:
        self._x, self._z = Samples(x_BPD, most), Samples(z_BPE, most)
        self.count, self.positions = self._x.count, self._x.positions

    def part(self, rows: slice | Tensor) -> Samples:
        """Return some of the samples."""
        found = copy.copy(self)
        found._x, found._z = self._x.part(rows), self._z.part(rows)
        found.count = found._x.count
        return found

    def features(self, keep: Tensor | None = None) -> Tensor:
        """Return ``[B, P, D * E]``, or ``[B, P, K]`` of the kept products."""
        x_BPD, z_BPE = self._x.features(), self._z.features()
        if keep is None:
            return (x_BPD[..., :, None] * z_BPE[..., None, :]).flatten(2)
        return x_BPD[..., keep // z_BPE.shape[2]] * z_BPE[..., keep % z_BPE.shape[2]]

    def norms(self) -> Tensor:
        """Return norms of all products, ``[B, P]``: the products of both inputs' norms."""
        return self._x.norms() * self._z.norms()


@dataclass(frozen=True)
class Geometry:
    """How a convolution places its kernel.

    Args:
        kernel: size of the kernel, by axis.
        stride: steps between positions.
        dilation: steps between entries of the kernel.
        padding: as ``F.pad`` takes it, the last axis first; negative where it crops.
        mode: as ``F.pad`` takes it, or ``"zeros"``.
        stuffing: steps between the input's entries, with zeros between them: a transposed convolution with
            this stride is a convolution of the stuffed input.
        extent: output positions by axis, where they are known: the padding behind is what they need.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    mode: str = "zeros"
    stuffing: tuple[int, ...] = ()
    extent: tuple[int, ...] = ()

    def batched(self, x: Tensor) -> Tensor:
        """Return a tensor with a dimension for samples, which a single sample lacks."""
        return x.unsqueeze(0) if x.ndim == len(self.kernel) + 1 else x

    def padded(self, x: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Return the padded input, the span of the kernel and the output positions by axis."""
        x = self.batched(x)
        if any(step > 1 for step in self.stuffing):
            sizes = [(n - 1) * step + 1 for n, step in zip(x.shape[2:], self.stuffing, strict=True)]
            stuffed = x.new_zeros(*x.shape[:2], *sizes)
            places: Any = (..., *[slice(None, None, step) for step in self.stuffing])
            stuffed[places] = x
            x = stuffed
        spans = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        pads = list(self.padding)
        for axis, wanted in enumerate(self.extent):
            before = pads[-2 * axis - 2]
            length = (wanted - 1) * self.stride[axis] + spans[axis]
            pads[-2 * axis - 1] = length - before - x.shape[2 + axis]
        padded = F.pad(x, pads) if self.mode == "zeros" else F.pad(x, pads, mode=self.mode)
        extent = [
            (length - span) // stride + 1
            for length, span, stride in zip(padded.shape[2:], spans, self.stride, strict=True)
        ]
        return padded, spans, extent

    def all_patches(self, x: Tensor) -> Tensor:
        """Return all patches at once, ``[B, P, C * k]``."""
        windows, spans, extent = self.padded(x)
        size = len(extent)
        for axis, (span, stride, dilation) in enumerate(zip(spans, self.stride, self.dilation, strict=True)):
            windows = windows.unfold(2 + axis, span, stride)[..., ::dilation]
        # [B, C, positions by axis, kernel by axis] -> [B, P, C * kernel]
        positions, kernel = range(2, 2 + size), range(2 + size, 2 + 2 * size)
        return windows.permute(0, *positions, 1, *kernel).flatten(1 + size).flatten(1, size)


def geometry_of(module: Any) -> Geometry:
    """Return how a module of torch's places its kernel."""
    return Geometry(
        tuple(module.kernel_size),
        tuple(module.stride),
        tuple(module.dilation),
        tuple(module._reversed_padding_repeated_twice),
        module.padding_mode,
    )


class Patches(Samples):
    """Patches under a convolution's kernel at some output positions.

    A full unfolding would be the largest tensor of the network, so single features are gathered.
    """

    def __init__(self, geometry: Geometry, x: Tensor, most: int | None) -> None:
        padded, spans, extent = geometry.padded(x)
        self._x_BCS = padded.flatten(2)
        stride, dilation = geometry.stride, geometry.dilation
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

    def part(self, rows: slice | Tensor) -> Samples:
        """Return some of the samples."""
        found = copy.copy(self)
        found._x_BCS = self._x_BCS[rows]
        return found._counted(found._x_BCS)

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
    found = x.square().sum(dim).sqrt_()  # vector_norm takes ten times as long, but over the last dimension
    if x.dtype == torch.float64 or x.device.type == "mps" or math.isfinite(float(found.sum())):
        return found
    return torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64)
