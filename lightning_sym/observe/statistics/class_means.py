"""What a classifier's head is fed, by class.

Shape letters: N samples, C classes, A features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lightning_sym.functional.nearest_mean import nearest_mean_disagreements
from lightning_sym.observe.statistics.statistic import Statistic, Tally
from lightning_sym.observe.step import Targets
from lightning_sym.observe.weights import accumulation_dtype

if TYPE_CHECKING:
    from lightning_sym.observe.call import Call
    from lightning_sym.observe.hooks import LayerWatch
    from lightning_sym.observe.layers import Layer


class ClassSums(NamedTuple):
    """Sums of a head's inputs: ``counts [C]``, ``sums [C, A]``, ``second [A, A]``, and its weight ``[C, A]``.

    ``disagreements`` counts samples nearest to another class mean than the head's choice.
    """

    counts: Tensor
    sums: Tensor
    second: Tensor
    disagreements: float
    weight: Tensor


@dataclass(frozen=True)
class ClassMeans(Statistic):
    """Class means and total second moment of the inputs of the head: the last ``nn.Linear`` of the layers.

    Samples with a negative label (``ignore_index``, unlabelled ones) or a feature that is not finite are
    left out.

    Args:
        targets: where the labels are in a batch: an index, a key or a function of the batch.
    """

    targets: Targets
    uses_weight: ClassVar[bool] = True

    def where(self, layers: Sequence[Layer]) -> list[Layer]:
        """Return the head alone."""
        linear = [layer for layer in layers if layer.part is None and isinstance(layer.module, nn.Linear)]
        return linear[-1:]

    def begin(self, watch: LayerWatch) -> Tally:
        """Return the empty sums."""
        return ClassTally(self, watch)


class ClassTally(Tally):
    """Sums by class, and the features until the class means are known."""

    def __init__(self, what: ClassMeans, watch: LayerWatch) -> None:
        self.what, self.watch = what, watch
        classes, width = watch.layer.out_features, watch.layer.in_features
        kind: Any = {"dtype": accumulation_dtype(watch.device), "device": watch.device}
        self.counts_C = torch.zeros(classes, **kind)
        self.sums_CA = torch.zeros(classes, width, **kind)
        self.second_AA = torch.zeros(width, width, **kind)
        self.disagreements = torch.zeros(1, **kind)
        self._features: list[Tensor] = []

    def forward(self, call: Call) -> None:
        """Add a call's inputs by their labels."""
        labels, x_NA = self.watch.step.labels(self.what.targets), call.x
        if x_NA is None or x_NA.ndim != 2 or labels.shape != x_NA.shape[:1]:
            shape = None if x_NA is None else tuple(x_NA.shape)
            raise ValueError(
                f"targets={self.what.targets!r} must give one label a row of the head's input {shape}, "
                f"got {tuple(labels.shape)}"
            )
        if len(labels) and int(labels.max()) >= len(self.counts_C):
            raise ValueError(
                f"targets={self.what.targets!r} must give class indices below {len(self.counts_C)}, "
                f"got {int(labels.max())}"
            )
        x_NA = x_NA.to(self.sums_CA.dtype)
        fine_N = x_NA.isfinite().all(dim=1) & (labels >= 0)
        x_NA, labels = x_NA[fine_N], labels[fine_N].long()
        self.counts_C.index_add_(0, labels, torch.ones_like(x_NA[:, 0]))
        self.sums_CA.index_add_(0, labels, x_NA)
        self.second_AA.addmm_(x_NA.mT, x_NA)
        self._features.append(x_NA)

    def tensors(self) -> list[Tensor]:
        """Return the sums."""
        return [self.counts_C, self.sums_CA, self.second_AA]

    def second_pass(self) -> list[Tensor]:
        """Count samples nearest to another class mean than the head says; the means are global by now."""
        weight, bias = self.watch.weight().blocks[0], self.watch.weight().bias
        for x_NA in self._features:
            self.disagreements += nearest_mean_disagreements(x_NA, self.counts_C, self.sums_CA, weight, bias)
        self._features = []
        return [self.disagreements]

    def result(self) -> ClassSums | None:
        """Return the sums, or None if no labelled sample came."""
        if not self.counts_C.sum() > 0:
            return None
        weight = self.watch.weight().blocks[0]
        return ClassSums(self.counts_C, self.sums_CA, self.second_AA, float(self.disagreements), weight)
