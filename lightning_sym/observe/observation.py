"""What a step showed: one object, read by every monitor; everything in it is computed once.

Shape letters: A input width, O output width, G groups, K kept features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_sym.observe.gradient_noise import GradientNoise
from lightning_sym.observe.moments import Stream, accumulation_dtype, kept_features

if TYPE_CHECKING:
    from lightning_sym.observe.layers import Layer
    from lightning_sym.observe.recorder import Recorder


class ClassSums(NamedTuple):
    """Sums of a head's inputs: ``counts [K]``, ``sums [K, A]``, ``second [A, A]``.

    ``disagreements`` counts samples nearest to another class mean than the head's choice.
    """

    counts: Tensor
    sums: Tensor
    second: Tensor
    disagreements: float


class LayerObservation:
    """What one layer showed in one optimizer step.

    Attributes:
        name: the layer's name.
        inputs, outputs: streams of ``h_a`` and ``h_b``, or None if not asked for or never seen.
        input_gradients, output_gradients: streams of ``g_a = W^T g_b`` and ``g_b``, gradients of
            per-sample losses with respect to neuron values: the loss's batch mean, the gradient
            accumulation's division and the loss scale are undone. None if no gradient came.
        blocks: the weight before the step, ``[G, O / G, A / G]`` (an embedding: ``[1, V, O]``).
        bias: the bias before the step, or None.
        calls: forward calls of the layer in this step, over all ranks.
        fed_by_data: whether no input of the layer carried a gradient (raw data, frozen layers).
        mean_activity: mean ``|x|`` of each input unit, or None.
        live: share of samples and positions at which each input unit is not zero, or None.
        relative_update: ``||W_after - W_before|| / ||W_before||``, or None.
        zero_gradients: share of exact zeros in the weight's gradient, or None if it had none.
        classes: sums of the input by class, of the classifier's head, or None.
        outgoing: weight of the one layer that reads this layer's units, ``[M, O, ...]``, where that
            is plain from an ``nn.Sequential``, or None.
        gradient_noise: how per-sample gradients of weight and bias scatter, or None.
        no_noise: why there is no ``gradient_noise`` though it was asked for, as far as this rank knows.
        weight_norm: Frobenius norm of the weight before the step.
    """

    def __init__(self, recorder: Recorder, *, updates: bool) -> None:
        layer = recorder.layer
        self._max_width = recorder.wants.max_width
        self.layer: Layer = layer
        self.name = layer.name
        self.calls = int(recorder.calls)
        streams = {side: Stream(sums) for side, sums in recorder.sums.items()}

        def seen(side: str) -> Stream | None:
            stream = streams.get(side)
            return stream if stream is not None and (stream.n or stream.nonfinite) else None

        self.inputs, self.outputs = seen("inputs"), seen("outputs")
        self.input_gradients, self.output_gradients = seen("input_gradients"), seen("output_gradients")
        self.blocks, self.bias = recorder.blocks, recorder.bias
        self.fed_by_data = recorder.fed_by_data
        count = float(recorder.activity_count)
        self.mean_activity = recorder.activity[0] / count if count and recorder.activity.numel() else None
        self.live = recorder.activity[1] / count if count and recorder.activity.numel() else None
        zeros, entries = (float(v) for v in recorder.zero_gradients)
        self.zero_gradients = zeros / entries if entries else None
        self.classes: ClassSums | None = None
        if recorder.class_counts.sum() > 0:
            self.classes = ClassSums(
                recorder.class_counts,
                recorder.class_sums,
                recorder.class_second,
                float(recorder.disagreements),
            )
        self.outgoing = recorder.outgoing
        self.gradient_noise = GradientNoise.of(recorder.noise)
        self.no_noise = recorder.noise.reason if recorder.noise is not None else ""
        self.weight_norm = _norm(self.blocks)
        self.relative_update: float | None = None
        if updates and self.weight_norm > 0:
            self.relative_update = _norm(layer.blocks() - self.blocks) / self.weight_norm

    @property
    def nonfinite(self) -> float:
        """Largest share of samples with a NaN or Inf among the layer's streams, in ``[0, 1]``."""
        streams = (self.inputs, self.outputs, self.input_gradients, self.output_gradients)
        return max((stream.nonfinite for stream in streams if stream is not None), default=0.0)

    @cached_property
    def _exact_blocks(self) -> Tensor:
        return self.blocks.to(accumulation_dtype(self.blocks.device))

    @cached_property
    def weight_singular_values(self) -> Tensor:
        """Singular values of W (of all its blocks), descending.

        NaN where an entry is not finite. Where the shorter side is wider than ``max_width``, those of
        a fixed random subset of its rows.
        """
        blocks = self._exact_blocks
        if blocks.shape[1] > blocks.shape[2]:
            blocks = blocks.mT
        keep = kept_features(blocks.shape[1], self._max_width)
        if keep is not None:
            blocks = blocks[:, keep.to(blocks.device)]
        gram = blocks @ blocks.mT
        if not gram.isfinite().all():  # eigvalsh raises on these
            return torch.full_like(gram[:, 0].flatten(), torch.nan)
        values = torch.linalg.eigvalsh(gram).flatten().clamp_min(0.0).sqrt()
        return values.sort(descending=True).values

    def gram(self, side: str) -> Tensor:
        """Return ``Z_a = W^T W`` (``"in"``) or ``Z_b = W W^T`` (``"out"``) on the kept features.

        Args:
            side: ``"in"`` or ``"out"``.

        Returns:
            ``[K, K]``, over the same features as the streams of that side.
        """
        return self._grams[side]

    @cached_property
    def _grams(self) -> dict[str, Tensor]:
        from lightning_sym.observe.recorder import dense_columns

        blocks = self._exact_blocks
        grams = {}
        into = self.inputs or self.input_gradients
        if into is not None:
            columns_OK = dense_columns(blocks, into.keep)
            grams["in"] = columns_OK.mT @ columns_OK
        out = self.outputs or self.output_gradients
        if out is not None:
            grams["out"] = _row_gram(blocks, out.keep)
        return grams


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=accumulation_dtype(tensor.device)))


def _row_gram(blocks: Tensor, keep: Tensor | None) -> Tensor:
    """Return ``W W^T`` of the kept rows of a block-diagonal matrix, ``[K, K]``."""
    groups, rows, _ = blocks.shape
    index = torch.arange(groups * rows, device=blocks.device) if keep is None else keep
    chosen = blocks.flatten(0, 1)[index]
    group = index // rows
    return torch.where(group[:, None] == group, chosen @ chosen.mT, 0.0)


@dataclass
class Observation:
    """One optimizer step, seen by all monitors that were due.

    Attributes:
        step: optimizer steps made, this one included.
        layers: what was seen, in the network's order; layers that never ran are not among them.
        silent: names of watched layers that never ran in this step.
        head: name of the classifier layer, if ``targets`` were given.
        current: the layer that is being read, for error messages.
        seconds: time spent so far, by section.
    """

    step: int
    every: list[LayerObservation]
    silent: list[str]
    head: str | None
    seconds: dict[str, float] = field(repr=False)
    current: str = ""

    @property
    def layers(self) -> Iterator[LayerObservation]:
        """The layers one after the other; remembers which is being read."""
        for layer in self.every:
            self.current = layer.name
            yield layer
        self.current = ""

    def only(self, names: set[str]) -> Observation:
        """Return a view on some of the layers that shares all that is computed."""
        return Observation(
            self.step,
            [layer for layer in self.every if layer.name in names],
            [name for name in self.silent if name in names],
            self.head,
            self.seconds,
        )
