"""What a monitor wants observed of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_sym.observe.moments import Moments

Targets = int | str | Callable[[Any], Tensor] | None


@dataclass(frozen=True)
class Wants:
    """What a monitor wants observed.

    Args:
        inputs, outputs, input_gradients, output_gradients: sums to keep of each stream.
        activity: mean size and liveness of each input unit.
        updates: relative size of the optimizer's step.
        zero_gradients: share of exact zeros in the weight's gradient.
        outgoing: the weight of the layer that reads this layer's units, where that is plain.
        gradient_noise: how per-sample gradients of weight and bias scatter
            (:class:`~lightning_sym.observe.gradient_noise.GradientNoise`), from all positions.
        targets: where the labels are in a batch: an index, a key or a function of the batch.
        max_positions: positions per sample that count as samples (None: all).
        max_width: widest moment matrix (None: no limit); of wider sides a fixed random subset of
            features is kept.
        max_patch_width: the same for a convolution's patches, which are kernel-size times as wide as
            its channels and overlap.
        max_noise_width: widest side of a weight of which ``gradient_noise`` keeps a matrix (None: no limit);
            of wider ones the diagonal, which is cheaper.
        max_held_bytes: memory for inputs that wait for their gradient, with ``gradient_noise`` (None: no
            limit); layers beyond it have no noise reading at that step.
    """

    inputs: Moments = Moments.NONE
    outputs: Moments = Moments.NONE
    input_gradients: Moments = Moments.NONE
    output_gradients: Moments = Moments.NONE
    activity: bool = False
    updates: bool = False
    zero_gradients: bool = False
    outgoing: bool = False
    gradient_noise: bool = False
    targets: Targets = None
    max_positions: int | None = 16
    max_width: int | None = 512
    max_patch_width: int | None = 256
    max_noise_width: int | None = 512
    max_held_bytes: int | None = 2**30

    def __or__(self, other: Wants) -> Wants:
        merged: dict[str, Any] = {}
        for spec in dataclasses.fields(self):
            mine, theirs = getattr(self, spec.name), getattr(other, spec.name)
            if spec.name.startswith("max_"):
                merged[spec.name] = None if mine is None or theirs is None else max(mine, theirs)
            elif spec.name == "targets":
                merged[spec.name] = mine if mine is not None else theirs
            else:
                merged[spec.name] = mine | theirs
        return Wants(**merged)
