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
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from lightning_sym._names import clean_name as clean_name
from lightning_sym.observe.samples import Patches, Samples, all_patches
from lightning_sym.observe.weights import is_parametrized, local, next_weight, sources

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")


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

    #: Whether the layer is a linear map; a normalisation's gain is not.
    linear: ClassVar[bool] = True

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

    # -- the weight ---------------------------------------------------------------------------

    @property
    def holder(self) -> tuple[nn.Module, str]:
        """The module and the attribute that hold the weight (for attention, all projections' together)."""
        if self.part is None:
            return self.module, "weight"
        if self.part == "out_proj":
            return self.module.out_proj, "weight"  # type: ignore[return-value]
        packed = self.module._parameters.get("in_proj_weight") is not None
        return self.module, "in_proj_weight" if packed else f"{self.part[0]}_proj_weight"

    def sources(self) -> list[nn.Parameter]:
        """Return the parameters that the weight is made from; mostly one, the weight itself."""
        return sources(*self.holder)

    def parameter(self) -> nn.Parameter:
        """Return the first of them: it tells the device, the type and whether the layer is trained."""
        return self.sources()[0]

    @property
    def trained(self) -> bool:
        """Whether a parameter of the weight asks for a gradient."""
        return any(p.requires_grad for p in self.sources())

    def slice(self, tensor: Tensor) -> Tensor:
        """Return the rows of the parameter (or of its gradient or bias) that are this layer's."""
        packed = self.part in ATTENTION_PARTS[:3] and self.holder[1] == "in_proj_weight"
        if packed or (self.part in ATTENTION_PARTS[:3] and tensor.ndim == 1):
            start = ATTENTION_PARTS.index(self.part) * self.out_features  # type: ignore[arg-type]
            return tensor[start : start + self.out_features]
        return tensor

    def as_blocks(self, weight: Tensor) -> Tensor:
        """Return a weight as ``[G, O / G, A / G]``; an embedding's as ``[1, V, O]``.

        Raises:
            ValueError: if it is not of real floating-point numbers, or of another shape.
        """
        if not weight.is_floating_point():
            raise ValueError(f"its weight holds {str(weight.dtype).removeprefix('torch.')} numbers")
        rows = self.slice(weight)
        width = self.in_features or self.out_features
        expected = rows.shape[0] * width if not self.has_input else self.out_features * width // self.groups
        if rows.ndim < 2 or rows.numel() != expected:
            raise ValueError(f"its weight has shape {tuple(weight.shape)}")
        return rows.reshape(self.groups, rows.shape[0] // self.groups, -1)

    def blocks(self) -> Tensor:
        """Return a detached copy of the weight that the next forward pass will use, as :meth:`as_blocks`."""
        return self.as_blocks(next_weight(*self.holder)).clone()

    def bias_parameter(self) -> nn.Parameter | None:
        """Return the parameter that holds the bias (for attention, all projections' together), if any."""
        module, name = self.holder
        name = "bias" if name == "weight" else "in_proj_bias"
        if is_parametrized(module, name):
            return None
        bias = getattr(module, name, None)
        return bias if isinstance(bias, Tensor) else None  # type: ignore[return-value]

    def bias(self) -> Tensor | None:
        """Return a detached copy of the bias ``[O]``, if there is one."""
        bias = self.bias_parameter()
        return None if bias is None else self.slice(local(bias)).clone()

    # -- samples ------------------------------------------------------------------------------

    def inputs(self, x: Tensor, positions: int | None) -> Samples:
        """Return the input side, at most ``positions`` positions of each sample."""
        if self.is_convolution:
            return Patches(self.module, x, positions)
        return Samples(_positions_second(x), positions)

    def outputs(self, y: Tensor, positions: int | None) -> Samples:
        """Return the output side (or its gradient), at the same positions."""
        if not self.is_convolution:
            return Samples(_positions_second(y), positions)
        size = len(self.module.kernel_size)  # type: ignore[arg-type]
        y = y.unsqueeze(0) if y.ndim == size + 1 else y
        return Samples(y.flatten(2).mT, positions)

    def input_rows(self, x: Tensor, positions: int | None) -> Tensor:
        """Return the input side as rows ``[N, A]``, at most ``positions`` of them per sample."""
        return self.inputs(x, positions).features().flatten(0, 1)

    def output_rows(self, y: Tensor, positions: int | None) -> Tensor:
        """Return the output side (or its gradient) as rows ``[N, O]``, as :meth:`input_rows`."""
        return self.outputs(y, positions).features().flatten(0, 1)

    def patches(self, x: Tensor) -> Tensor:
        """Return all patches of a convolution's input at once, ``[B, P, A]``."""
        return all_patches(self.module, x)


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
        made_from = sources(module, "weight")
        if not made_from or any(isinstance(p, nn.UninitializedParameter) for p in made_from):
            continue
        if isinstance(module, nn.Linear):
            yield Layer(name, module, None, module.in_features, module.out_features)
        elif isinstance(module, CONVOLUTIONS):
            width = module.in_channels * math.prod(module.kernel_size)
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


def _positions_second(x: Tensor) -> Tensor:
    """Return ``[..., D]`` as ``[B, P, D]``: all dimensions but the first and last are positions."""
    if x.ndim < 3:
        return x.reshape(-1, 1, x.shape[-1])
    return x.flatten(1, -2)
