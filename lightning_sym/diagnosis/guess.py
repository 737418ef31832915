"""An example input for a network that came without one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sym.symmetry import Graph

_SIDES = (32, 64, 224)  # of images, the cheapest first


def guess_example(module: nn.Module) -> tuple[tuple[Any, ...], Graph] | None:
    """Return the first guess that the network's forward takes, and the graph of that pass.

    Tried are a LightningModule's ``example_input_array``, the input size in a timm model's configuration, and
    what the first layer asks for: images or sequences of a convolution's channels, features of a linear
    layer, indices of an embedding.

    Args:
        module: the network; it is left as it is.

    Returns:
        Positional arguments of its forward, in float32, and their graph; ``None`` if no guess was right.
    """
    for guess in _guesses(module):
        try:
            return guess, Graph(module, *guess)
        except Exception:  # whatever the user's forward raises on a wrong guess
            continue
    return None


def _guesses(module: nn.Module) -> Iterator[tuple[Any, ...]]:
    own = getattr(module, "example_input_array", None)
    if own is not None:
        yield own if isinstance(own, tuple) else (own,)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> tuple[Tensor]:
        return (torch.randn(2, *shape, generator=generator),)

    config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None) or {}
    size = config.get("input_size") if isinstance(config, dict) else None
    if size is not None and not config.get("fixed_input_size", False) and len(size) == 3:
        yield draw(size[0], 64, 64)  # a quarter of the pixels or less; most take them
    if size is not None:
        yield draw(*size)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            for side in _SIDES:
                yield draw(layer.in_channels, side, side)
        elif isinstance(layer, nn.Conv1d):
            yield draw(layer.in_channels, 64)
        elif isinstance(layer, nn.Conv3d):
            yield draw(layer.in_channels, 16, 16, 16)
        elif isinstance(layer, nn.Linear):
            yield draw(layer.in_features)
            yield draw(8, layer.in_features)
        elif isinstance(layer, nn.Embedding):
            yield (torch.randint(0, layer.num_embeddings, (2, 8), generator=generator),)
        else:
            continue
        return
