"""Is the network collapsing: fewer directions, dead units, equal units?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_sym.callbacks.base import Monitor, undisturbed
from lightning_sym.callbacks.trainability import Locator
from lightning_sym.functional.neural_collapse import neural_collapse_from_sums
from lightning_sym.functional.rank import (
    effective_rank_from_eigenvalues,
    numerical_rank_from_eigenvalues,
    participation_ratio_from_covariance,
)
from lightning_sym.functional.units import distinct_units, zero_units
from lightning_sym.observe.moments import Moments
from lightning_sym.observe.observation import ClassSums, LayerObservation, Observation
from lightning_sym.observe.reading import Reading
from lightning_sym.observe.schedule import Schedule
from lightning_sym.observe.wants import Wants
from lightning_sym.optim.syre import SyreHandle, attached

if TYPE_CHECKING:
    from lightning_sym.symmetry import Symmetry


class CollapseMonitor(Monitor):
    r"""Ranks of activations and weights, dead, zero and equal units, neural collapse.

    Logs, for every watched layer's output :math:`h_b = W h_a` (before the activation):
        ``collapse/<layer>/effective_rank``: of the centred outputs, in [1, min(samples - 1, width)];
            0 where the output does not vary.
        ``collapse/<layer>/participation_ratio``: of the outputs' covariance, in the same range.
        ``collapse/<layer>/numerical_rank``: singular values above ``rtol`` of the largest.
        ``collapse/<layer>/dead_units``: fraction of the units *feeding* the layer that were 0 on
            every sample, in [0, 1]; not for layers fed by raw data.
        ``collapse/<layer>/nonfinite``: share of samples with a NaN or Inf; only when there are any.
    of its weight, before the step:
        ``collapse/<layer>/weight_effective_rank``: in [1, min(O, A)].
        ``collapse/<layer>/weight_stable_rank``: squared Frobenius over squared spectral norm, in
            the same range.
        ``collapse/<layer>/distinct_units``: fraction of output units left when those that agree are
            counted once (incoming weights and bias, and outgoing weights where an ``nn.Sequential``
            makes the reader plain), in [1/O, 1]. Grouped convolutions are compared within groups.
        ``collapse/<layer>/zero_units``: fraction of output units with zero incoming weights.
    and with ``causes``, which symmetry the units fell into (weights after the step; a share is
    there for those kinds of symmetry that :func:`~lightning_sym.symmetry.find_symmetries` proves of
    the layer's output units):
        ``collapse/<layer>/permutation``: share of units that equal another, in [0, 1].
        ``collapse/<layer>/rescaling``: share of units that are zero, in and out.
        ``collapse/<layer>/rotation``: share of directions lost.
        ``collapse/<layer>/residual_force``: only where syre is at work (the callback, or ``attach_syre``
            on an optimizer): the weakest push away from a mirror of the layer's output units, weight
            decay times theta_0 across the mirror; at least 0, and 0: units can be stuck.
    of the classifier, when ``targets`` are given; its head is the last watched ``nn.Linear``:
        ``collapse/nc1`` to ``collapse/nc4``: neural collapse of its inputs; each is 0 at collapse
            (:class:`~lightning_sym.functional.neural_collapse.NeuralCollapse`).
    and a summary:
        ``collapse/score``: in [0, 1]; the mean over layers of the worst of three shares: dead input
            units, doubled output units (1 - ``distinct_units``), output directions out of use
            (1 - ``numerical_rank`` / its bound min(samples - 1, O, A)). 0: nothing lost; 1: nothing
            left.

        ``collapse/samples``: the least number of samples that a layer's output was read on. Ranks and
            the score depend on it: compare readings of equal ``samples``, and mind a ragged last batch.

    Args:
        every_n_steps: an interval in optimizer steps, or a schedule. Step 1 is always due.
        layers: a glob, or a list of globs, on module names; ``None``: all, at most ``max_layers``.
        max_layers: how many layers to watch when ``layers`` is ``None``.
        targets: where the class labels are in a batch: an index, a key or a function of the batch.
        tolerance: ``1 - cosine`` up to which two units' weights are the same; 0.01 is 8 degrees.
        rtol: relative cut of ``numerical_rank`` and ``zero_units``.
        causes: find the network's symmetries at the first due step (seconds for a large network, on
            a copy) and name what collapsed units fell into.
        inputs: where ``causes`` finds the module's input in a batch: an index, a key or a function.
        histograms: also log each layer's covariance spectrum (log10, relative) as a histogram.
        strict: raise what goes wrong in here instead of warning once and going on.

    Raises:
        ValueError: if an argument is out of its range.
    """

    quantity: ClassVar[str] = "collapse"
    wants = Wants(outputs=Moments.SECOND, activity=True, outgoing=True)

    def __init__(
        self,
        *,
        every_n_steps: int | Schedule = 100,
        layers: str | list[str] | None = None,
        max_layers: int = 12,
        targets: int | str | Callable[[Any], Tensor] | None = None,
        tolerance: float = 1e-2,
        rtol: float = 1e-3,
        causes: bool = False,
        inputs: Locator = 0,
        histograms: bool = False,
        strict: bool = False,
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, layers=layers, max_layers=max_layers, strict=strict)
        for name, value in (("tolerance", tolerance), ("rtol", rtol)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        self.targets = targets
        self.tolerance = tolerance
        self.rtol = rtol
        self.causes = causes
        self.inputs = inputs
        self.histograms = histograms
        self._symmetries: list[Symmetry] | None = None
        self._syre: list[SyreHandle] = []
        self._forces: dict[tuple[Any, ...], float | None] = {}
        self.wants = dataclasses.replace(type(self).wants, targets=targets)

    @override
    def read(self, seen: Observation) -> Iterator[Reading]:
        scores = []
        for layer in seen.layers:
            found = dict(self._read_layer(layer))
            for what, value in found.items():
                yield Reading(f"collapse/{layer.name}/{what}", value)
            if self._symmetries:
                for what, value in self._read_causes(layer):
                    yield Reading(f"collapse/{layer.name}/{what}", value)
            scores.append(self._score(layer, found))
            if self.histograms and layer.outputs is not None:
                values = layer.outputs.eigenvalues
                values = values[values > 0]
                if len(values):
                    yield Reading(f"collapse/{layer.name}/spectrum", (values / values[0]).log10())
            if layer.classes is not None:
                yield from self._read_classes(layer.classes, layer.blocks[0])
        if scores:
            yield Reading("collapse/score", sum(scores) / len(scores))
            counts = [layer.outputs.n for layer in seen.every if layer.outputs is not None]
            yield Reading("collapse/samples", float(min(counts, default=0)))

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.causes and self._symmetries is None:
            self._symmetries = []
            with self.guard(trainer, "the search for symmetries"), undisturbed(pl_module):
                from lightning_sym.callbacks._symmetries import symmetries_of

                self._symmetries = symmetries_of(trainer, pl_module, batch, inputs=self.inputs)
                self._syre = [handle for optimizer in trainer.optimizers for handle in attached(optimizer)]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._forget()  # a fit that ended in an exception left its own

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        self._forget()

    def _forget(self) -> None:
        self._symmetries, self._syre, self._forces = None, [], {}

    def _read_causes(self, layer: LayerObservation) -> Iterator[tuple[str, float]]:
        from lightning_sym.symmetry import collapse_causes, least_force

        symmetries = self._symmetries or []
        yield from collapse_causes(symmetries, layer.name, tolerance=self.tolerance).items()
        if self._syre:
            # theta_0 stands still: as long as the decays do, so does the force.
            key = (layer.name, *(decay for handle in self._syre for decay in handle.decays))
            if key not in self._forces:
                forces = {name: force for handle in self._syre for name, force in handle.forces().items()}
                self._forces[key] = least_force(symmetries, layer.name, forces)
            force = self._forces[key]
            if force is not None:
                yield "residual_force", force

    def _read_layer(self, layer: LayerObservation) -> Iterator[tuple[str, float]]:
        stream = layer.outputs
        if stream is not None and stream.n > 1:
            yield "effective_rank", float(effective_rank_from_eigenvalues(stream.eigenvalues))
            yield "participation_ratio", float(participation_ratio_from_covariance(stream.covariance()))
            rank = numerical_rank_from_eigenvalues(stream.eigenvalues, rtol=self.rtol)
            yield "numerical_rank", float(rank)
        if layer.live is not None and not layer.fed_by_data:
            yield "dead_units", float((layer.live == 0).double().mean())
        if layer.nonfinite:
            yield "nonfinite", layer.nonfinite
        squares = layer.weight_singular_values.square()
        if squares.isfinite().all():
            yield "weight_effective_rank", float(effective_rank_from_eigenvalues(squares))
            yield "weight_stable_rank", float(squares.sum() / squares[0]) if squares[0] > 0 else 0.0
        if layer.layer.has_input:  # an embedding's rows are inputs, not units
            yield "distinct_units", self._distinct(layer)
            weight = layer.blocks.flatten(0, 1)
            yield "zero_units", float(zero_units(weight, layer.bias, rtol=self.rtol))

    def _distinct(self, layer: LayerObservation) -> float:
        groups, rows, _ = layer.blocks.shape
        if groups > 1 and rows == 1:
            return 1.0  # depthwise: no two units share an input
        if groups == 1:
            found = distinct_units(layer.blocks[0], layer.bias, layer.outgoing, tolerance=self.tolerance)
            return float(found)
        biases = [None] * groups if layer.bias is None else layer.bias.chunk(groups)
        shares = [
            float(distinct_units(block, bias, tolerance=self.tolerance))
            for block, bias in zip(layer.blocks, biases, strict=True)
        ]
        return sum(shares) / groups

    @staticmethod
    def _score(layer: LayerObservation, found: dict[str, float]) -> float:
        lost = [found.get("dead_units", 0.0), 1.0 - found.get("distinct_units", 1.0)]
        if layer.outputs is not None and "numerical_rank" in found:
            width = min(layer.layer.out_features, len(layer.outputs.eigenvalues))
            if layer.layer.has_input:
                width = min(width, layer.layer.in_features)
            bound = min(layer.outputs.n - 1, width)
            lost.append(1.0 - min(found["numerical_rank"] / bound, 1.0))
        return max((value for value in lost if math.isfinite(value)), default=0.0)

    @staticmethod
    def _read_classes(classes: ClassSums, weight: Tensor) -> Iterator[Reading]:
        found = neural_collapse_from_sums(classes.counts, classes.sums, classes.second, weight)
        yield Reading("collapse/nc4", classes.disagreements / float(classes.counts.sum()))
        for name in ("nc1", "nc2", "nc3"):
            value = getattr(found, name)
            if value is not None and value.isfinite():
                yield Reading(f"collapse/{name}", value)
