"""Do two networks represent the same samples alike, layer by layer?

Shape letters: N samples, D features of a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sym.functional.hierarchy import gram_alignment
from lightning_sym.observe.layers import Layer, choose_layers


def layer_features(
    module: nn.Module,
    x: Any,
    *,
    layers: str | Sequence[str] | None = None,
    max_layers: int = 12,
    function: Callable[[Any], Any] | None = None,
) -> dict[str, Tensor]:
    """Return what layers put out on some samples, before any activation that follows.

    The pass is made as the module stands: put it into evaluation mode before, or dropout and batch
    statistics play a part. No gradients are kept.

    Args:
        module: the network.
        x: what its forward takes, of N samples.
        layers: a glob, or globs, on module names; ``None``: all, at most ``max_layers``.
        max_layers: how many layers to read when ``layers`` is ``None``, evenly spread over depth.
        function: what to call on ``x``; by default the module.

    Returns:
        ``[N, D]`` by layer, in the network's order; positions and channels count as features. Layers
        that did not run (and the projections inside of attention) are missing; of one that ran several
        times it is the last.

    Raises:
        ValueError: if a glob matches no layer.
    """
    chosen, _ = choose_layers(module, layers, max_layers=max_layers, frozen=True)
    chosen = [layer for layer in chosen if layer.by_call]
    found: dict[str, Tensor] = {}

    def hook(layer: Layer) -> Callable[..., None]:
        def read(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found[layer.name] = (
                layer.mine(output.detach()).flatten(1).clone()
            )  # an in-place activation may follow

        return read

    with contextlib.ExitStack() as stack, torch.no_grad():
        for layer in chosen:
            stack.callback(layer.module.register_forward_hook(hook(layer)).remove)
        (module if function is None else function)(x)
    return {layer.name: found[layer.name] for layer in chosen if layer.name in found}


def representation_alignment(
    a: nn.Module,
    b: nn.Module,
    x: Any,
    *,
    x_of_b: Any = None,
    layers: str | Sequence[str] | None = None,
    max_layers: int = 12,
    center: bool = True,
) -> dict[tuple[str, str], float]:
    """Return how alike each layer of one network and each of another represent some samples.

    Both networks run in evaluation mode, which is put back.

    Args:
        a: a network.
        b: another, of any architecture.
        x: what their forwards take.
        x_of_b: the same samples as ``b`` sees them, if it sees them otherwise.
        layers: a glob, or globs, on module names; ``None``: all, at most ``max_layers`` of each.
        max_layers: see ``layers``.
        center: see :func:`~lightning_sym.functional.gram_alignment`.

    Returns:
        ``{(layer of a, layer of b): likeness}`` in [0, 1]; NaN where features are constant.

    Raises:
        ValueError: if a glob matches no layer.
    """
    features = []
    for module, samples in ((a, x), (b, x if x_of_b is None else x_of_b)):
        modes = [(child, child.training) for child in module.modules()]
        module.eval()
        try:
            features.append(layer_features(module, samples, layers=layers, max_layers=max_layers))
        finally:
            for child, mode in modes:
                child.training = mode
    return {
        (name, other): float(gram_alignment(x_ND, y_ND, center=center))
        for name, x_ND in features[0].items()
        for other, y_ND in features[1].items()
    }
