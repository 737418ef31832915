"""Which layers can be watched, and what each one's linear map is.

Every watched layer is read as one linear map ``h_b = W h_a`` with samples in rows: a linear layer
as it stands (sequence dimensions are samples), a convolution on its patches (positions are
samples, ``h_a`` is the patch under the kernel, groups make ``W`` block diagonal), attention as its
query, key, value and output projections, an embedding on its output side only.

Shape letters: B batch, P positions, N = B * P samples, A input width, O output width, G groups.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sym._names import clean_name as clean_name

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")


def local(tensor: Tensor) -> Tensor:
    """Return a plain detached tensor; a sharded one is gathered, on every rank alike."""
    tensor = tensor.detach()
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather is not None else tensor


@dataclass(frozen=True, eq=False)
class Layer:
    """One watchable linear map of a network.

    Args:
        name: the module's name in the network, cleaned of wrappers; attention projections add
            ``.q_proj`` and so on.
        module: the module that holds the map.
        part: for ``nn.MultiheadAttention``, which of its projections.
        in_features: A, the width of ``h_a`` (0 for an embedding, whose input is an index).
        out_features: O, the width of ``h_b``.
        groups: number of diagonal blocks of ``W``.
    """

    name: str
    module: nn.Module = field(repr=False)
    part: str | None
    in_features: int
    out_features: int
    groups: int = 1

    @property
    def is_convolution(self) -> bool:
        """Whether positions are samples and inputs are patches."""
        return isinstance(self.module, CONVOLUTIONS)

    @property
    def has_input(self) -> bool:
        """Whether there is an input side; an embedding has none."""
        return self.in_features > 0

    @property
    def in_units(self) -> int:
        """Units that feed the layer: input channels for a convolution, else A."""
        return int(self.module.in_channels) if self.is_convolution else self.in_features  # type: ignore[arg-type]

    @property
    def in_channels(self) -> int:
        """Size of the weight's dimension 1: inputs, or the channels that feed one group of a convolution."""
        return self.in_units // self.groups

    def parameter(self) -> nn.Parameter:
        """Return the parameter that holds the weight (for attention, all projections' together)."""
        module = self.module
        if self.part is None:
            return module.weight  # type: ignore[return-value]
        if self.part == "out_proj":
            return module.out_proj.weight  # type: ignore[union-attr, return-value]
        if module.in_proj_weight is not None:
            return module.in_proj_weight  # type: ignore[return-value]
        return getattr(module, f"{self.part[0]}_proj_weight")

    def slice(self, tensor: Tensor) -> Tensor:
        """Return the rows of the parameter (or of its gradient or bias) that are this layer's."""
        packed = self.part in ATTENTION_PARTS[:3] and self.module.in_proj_weight is not None
        if packed or (self.part in ATTENTION_PARTS[:3] and tensor.ndim == 1):
            start = ATTENTION_PARTS.index(self.part) * self.out_features  # type: ignore[arg-type]
            return tensor[start : start + self.out_features]
        return tensor

    def blocks(self) -> Tensor:
        """Return a detached copy of the weight, ``[G, O / G, A / G]``; an embedding's is ``[1, V, O]``."""
        weight = self.slice(local(self.parameter())).clone()
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def bias_parameter(self) -> nn.Parameter | None:
        """Return the parameter that holds the bias (for attention, all projections' together), if any."""
        module = self.module
        if self.part is None:
            return getattr(module, "bias", None)
        if self.part == "out_proj":
            return module.out_proj.bias  # type: ignore[union-attr, return-value]
        return module.in_proj_bias  # type: ignore[return-value]

    def bias(self) -> Tensor | None:
        """Return a detached copy of the bias ``[O]``, if there is one."""
        bias = self.bias_parameter()
        return None if bias is None else self.slice(local(bias)).clone()

    def input_rows(self, x: Tensor, positions: int | None) -> Tensor:
        """Return the input side as samples, ``[N, A]``, at most ``positions`` of them per sample."""
        if not self.is_convolution:
            return sequence_rows(x, positions)
        padded, spans, extent = self._padded(x)
        module, size = self.module, len(extent)
        # One output position at a time: a full unfold would be the largest tensor of the network.
        patches = []
        for flat in sampled_positions(_product(extent), positions):
            window: list[slice] = []
            rest = flat
            for axis in reversed(range(size)):
                rest, index = divmod(rest, extent[axis])
                start = index * module.stride[axis]  # type: ignore[index]
                window.insert(0, slice(start, start + spans[axis], module.dilation[axis]))  # type: ignore[index]
            patches.append(padded[(slice(None), slice(None), *window)].flatten(1))
        return torch.stack(patches, dim=1).flatten(0, 1)  # [B, P, A] -> [N, A]

    def _padded(self, x: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Return a convolution's padded input, the span of its kernel and its output positions by axis."""
        module = self.module
        if x.ndim == len(module.kernel_size) + 1:  # type: ignore[arg-type]
            x = x.unsqueeze(0)
        mode = module.padding_mode
        pad = module._reversed_padding_repeated_twice
        padded = F.pad(x, pad) if mode == "zeros" else F.pad(x, pad, mode=mode)  # type: ignore[arg-type]
        spans = [d * (k - 1) + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True)]  # type: ignore[arg-type]
        extent = [
            (length - span) // stride + 1
            for length, span, stride in zip(padded.shape[2:], spans, module.stride, strict=True)  # type: ignore[arg-type]
        ]
        return padded, spans, extent

    def patches(self, x: Tensor) -> Tensor:
        """Return all patches of a convolution's input at once, ``[B, P, A]``."""
        windows, spans, extent = self._padded(x)
        module, size = self.module, len(extent)
        for axis, (span, stride, dilation) in enumerate(
            zip(spans, module.stride, module.dilation, strict=True)  # type: ignore[arg-type]
        ):
            windows = windows.unfold(2 + axis, span, stride)[..., ::dilation]
        # [B, C, positions by axis, kernel by axis] -> [B, P, C * kernel]
        positions, kernel = range(2, 2 + size), range(2 + size, 2 + 2 * size)
        return windows.permute(0, *positions, 1, *kernel).flatten(1 + size).flatten(1, size)

    def output_rows(self, y: Tensor, positions: int | None) -> Tensor:
        """Return the output side (or its gradient) as samples, ``[N, O]``, as :meth:`input_rows`."""
        if not self.is_convolution:
            return sequence_rows(y, positions)
        size = len(self.module.kernel_size)  # type: ignore[arg-type]
        if y.ndim == size + 1:
            y = y.unsqueeze(0)
        flat = y.flatten(2)
        chosen = sampled_positions(flat.shape[2], positions)
        if len(chosen) < flat.shape[2]:
            flat = flat[:, :, torch.tensor(chosen, device=y.device)]
        return flat.transpose(1, 2).flatten(0, 1)


def _product(numbers: Sequence[int]) -> int:
    total = 1
    for number in numbers:
        total *= number
    return total


def sampled_positions(count: int, most: int | None) -> list[int]:
    """Return at most ``most`` of ``count`` positions, evenly spread and always the same.

    Example:
        >>> sampled_positions(9, 3), sampled_positions(2, 3)
        ([1, 4, 7], [0, 1])
    """
    if most is None or count <= most:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * most) for i in range(most)]


def sequence_rows(x: Tensor, positions: int | None) -> Tensor:
    """Return ``[..., D]`` as rows ``[N, D]``; all dimensions but the first and last are positions."""
    if x.ndim == 1:
        return x.unsqueeze(0)
    if x.ndim == 2:
        return x
    x = x.flatten(1, -2)
    chosen = sampled_positions(x.shape[1], positions)
    if len(chosen) < x.shape[1]:
        x = x[:, torch.tensor(chosen, device=x.device)]
    return x.flatten(0, 1)


def watchable_layers(module: nn.Module) -> list[Layer]:
    """Return every layer of a network that can be watched, in the order of registration."""
    return list(_watchable(module))


def _watchable(root: nn.Module) -> Iterator[Layer]:
    inside_attention: set[nn.Module] = set()
    for name, module in root.named_modules():
        name = clean_name(name)
        if module in inside_attention:
            continue
        if isinstance(module, nn.MultiheadAttention):
            inside_attention.update(module.children())
            prefix = f"{name}." if name else ""
            widths = (module.embed_dim, module.kdim, module.vdim, module.embed_dim)
            for part, width in zip(ATTENTION_PARTS, widths, strict=True):
                yield Layer(f"{prefix}{part}", module, part, width, module.embed_dim)
            continue
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or isinstance(weight, nn.UninitializedParameter):
            continue
        if isinstance(module, nn.Linear):
            yield Layer(name, module, None, module.in_features, module.out_features)
        elif isinstance(module, CONVOLUTIONS):
            width = module.in_channels * _product(module.kernel_size)
            yield Layer(name, module, None, width, module.out_channels, module.groups)
        elif isinstance(module, nn.Embedding):
            yield Layer(name, module, None, 0, module.embedding_dim)


#: Modules that pass units on one by one, in place.
_UNITWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid),
    *(nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool2d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)


def readers(root: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return which layer alone reads a layer's units, where an ``nn.Sequential`` makes that plain."""
    found: dict[nn.Module, nn.Module] = {}
    for sequential in root.modules():
        if type(sequential) is not nn.Sequential:
            continue
        last: nn.Module | None = None
        for child in sequential:
            same = type(child) in (nn.Linear, *CONVOLUTIONS) and getattr(child, "groups", 1) == 1
            if same:
                width = getattr(child, "in_features", None) or getattr(child, "in_channels", None)
                if last is not None and width == _out_units(last):
                    found[last] = child
                last = child
            elif type(child) not in _UNITWISE:
                last = None
    return found


def _out_units(module: nn.Module) -> int:
    return int(getattr(module, "out_features", None) or module.out_channels)  # type: ignore[arg-type]


def evenly(count: int, most: int) -> list[int]:
    """Return at most ``most`` of ``count`` numbers: the first, the last and an even spread between.

    Example:
        >>> evenly(7, 3), evenly(2, 3), evenly(5, 1)
        ([0, 3, 6], [0, 1], [4])
    """
    if count <= most:
        return list(range(count))
    if most == 1:
        return [count - 1]
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def choose_names(names: Sequence[str], layers: str | Sequence[str] | None, *, max_layers: int) -> set[str]:
    """Choose among names of layers, as ``layers`` and ``max_layers`` of every monitor say.

    Args:
        names: all there are, in the network's order.
        layers: a glob or globs on them, or ``None`` for all.
        max_layers: the most that ``None`` chooses: first, last and an even spread between.

    Raises:
        ValueError: if a glob matches nothing (the nearest names are told).
    """
    if layers is None:
        return {names[i] for i in evenly(len(names), max_layers)}
    globs = [layers] if isinstance(layers, str) else list(layers)
    for glob in globs:
        if not any(fnmatch.fnmatchcase(name, glob) for name in names):
            nearest = difflib.get_close_matches(glob, names, n=3, cutoff=0.0)
            raise ValueError(f"layers={glob!r} matches no layer; the nearest names are {nearest}")
    return {name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in globs)}


def choose_layers(
    module: nn.Module, layers: str | Sequence[str] | None, *, max_layers: int
) -> tuple[list[Layer], int]:
    """Choose the layers to watch.

    Args:
        module: the network.
        layers: a glob or globs on layer names, or ``None`` for all.
        max_layers: the most that ``None`` chooses: first, last and an even spread between.

    Returns:
        The chosen layers in the network's order, and how many there were to choose from.

    Raises:
        ValueError: if nothing can be watched, or a glob matches nothing (the nearest names are told).
    """
    every = watchable_layers(module)
    if not every:
        raise ValueError(
            f"{type(module).__name__} has no layer to watch: none of its modules is a Linear, Conv1d/2d/3d, "
            "MultiheadAttention or Embedding"
        )
    chosen = choose_names([layer.name for layer in every], layers, max_layers=max_layers)
    return [layer for layer in every if layer.name in chosen], len(every)
