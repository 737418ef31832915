"""Which layers of a network can be watched, and which layer reads which.

A module is looked at in this order: types that the user registered, torch's own layers, what looks like
a linear layer, stacks of experts. What is none of these is named by
:func:`~lightning_sym.observe.coverage.coverage`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_sym._names import clean_name as clean_name
from lightning_sym.observe.choice import (
    choose_layers as choose_layers,
    choose_names as choose_names,
    evenly as evenly,
)
from lightning_sym.observe.kinds.adapted import adapted, look_alike
from lightning_sym.observe.kinds.attention import ATTENTION_PARTS as ATTENTION_PARTS, projections, split
from lightning_sym.observe.kinds.bilinear import BilinearLayer
from lightning_sym.observe.kinds.experts import experts
from lightning_sym.observe.kinds.lora import pairs
from lightning_sym.observe.kinds.recurrent import maps
from lightning_sym.observe.kinds.transposed import TRANSPOSED, transposed_convolution
from lightning_sym.observe.layer import CONVOLUTIONS, Layer as Layer
from lightning_sym.observe.samples import geometry_of
from lightning_sym.observe.weights import sources


def watchable_layers(module: nn.Module) -> list[Layer]:
    """Return every layer of a network that can be watched, in the order of registration.

    Lazily initialised layers are among them once they have their shapes.
    """
    return list(_watchable(module))


def _watchable(root: nn.Module) -> Iterator[Layer]:
    inside_attention: set[nn.Module] = set()
    modules = dict(root.named_modules())
    for name, module in modules.items():
        if module in inside_attention:
            continue
        parent = modules.get(name.rpartition(".")[0])
        name = clean_name(name)
        if (layer := adapted(name, module)) is not None:
            yield layer
        elif isinstance(module, nn.MultiheadAttention):
            inside_attention.update(module.children())
            yield from projections(name, module)
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
            yield from maps(name, module)
        elif (layer := _of_torch(name, module) or look_alike(name, module)) is not None:
            linear = not layer.is_convolution and layer.has_input and type(layer) is Layer
            yield from split(layer, parent) if linear else (layer,)
        elif type(module).__module__.partition(".")[0] != "torch":
            yield from experts(name, module)
        yield from pairs(name, module)


def _of_torch(name: str, module: nn.Module) -> Layer | None:
    """Return the layer of a module of torch's kinds, or of a subclass; the weight's own shape counts."""
    made_from = sources(module, "weight")
    if not made_from or any(is_lazy(p) for p in made_from):
        return None
    own = module._parameters.get("weight")
    shape = own.shape if own is not None and own.is_floating_point() else None
    if isinstance(module, nn.Linear):
        rows, width = (
            shape if shape is not None and len(shape) == 2 else (module.out_features, module.in_features)
        )
        return Layer(name, module, None, width, rows)
    if isinstance(module, CONVOLUTIONS):
        geometry = geometry_of(module)
        channels, outputs = module.in_channels, module.out_channels
        if shape is not None and len(shape) == 2 + len(geometry.kernel):
            channels, outputs = shape[1] * module.groups, shape[0]
        width = channels * math.prod(geometry.kernel)
        return Layer(name, module, None, width, outputs, module.groups, geometry=geometry)
    if isinstance(module, TRANSPOSED):
        return transposed_convolution(name, module)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Layer(name, module, None, 0, module.embedding_dim)
    if isinstance(module, nn.Bilinear):
        return BilinearLayer(
            name, module, None, module.in1_features * module.in2_features, module.out_features
        )
    return None


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
