"""Is the network collapsing: fewer directions, dead units, equal units?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_sym.callbacks.base import Monitor, named, within
from lightning_sym.callbacks.symmetries import symmetries_of
from lightning_sym.engine.batch import Locator
from lightning_sym.engine.history import LAST_ROWS, Keep
from lightning_sym.engine.schedule import Schedule
from lightning_sym.functional.neural_collapse import neural_collapse_from_sums
from lightning_sym.functional.rank import (
    effective_rank_from_eigenvalues,
    numerical_rank_from_eigenvalues,
)
from lightning_sym.functional.units import distinct_units, zero_units_from_norms
from lightning_sym.observe import Activity, ClassMeans, Observation, Reading, SecondMoments, Weight
from lightning_sym.observe.kinds.lora import LowRankPair
from lightning_sym.observe.observation import LayerObservation
from lightning_sym.observe.statistics import ClassSums, SampleMoments
from lightning_sym.observe.weights import LayerWeight, kept_features
from lightning_sym.optim.syre import attached

if TYPE_CHECKING:
    from lightning_sym.optim import SyreHandle
    from lightning_sym.symmetry import Symmetry

#: Most units of a layer that are compared with each other.
MOST_COMPARED = 1024
_INPUTS, _OUTPUTS = SecondMoments("inputs"), SecondMoments("outputs")
_ACTIVITY, _WEIGHT = Activity(), Weight()
#: More directions than any layer has.
UNKNOWN = 2**62


class CollapseMonitor(Monitor):
    r"""Ranks of activations and weights, dead, zero and equal units, neural collapse.

    Logs, for every watched layer's output :math:`h_b = W h_a` (before the activation):
        ``collapse/<layer>/effective_rank``: of the centred outputs, in [1, min(samples - 1, width)];
            0 where the output does not vary.
        ``collapse/<layer>/participation_ratio``: of the outputs' covariance, in about the same range; from
            two halves of the samples, so that their number does not bias it.
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
            makes the reader plain), in [1/O, 1]. Grouped convolutions are compared within groups; of more
            than 1024 units (a vocabulary) a fixed random 1024 are compared with each other.
        ``collapse/<layer>/zero_units``: fraction of output units with zero incoming weights.
        ``collapse/<layer>/rank_used``: only where the layer is a low-rank adapter, of its product B A:
            effective rank over its rank r, in [1/r, 1], or 0 where it is zero.
    and with ``causes``, which symmetry the units fell into (weights after the step; a share is
    there for those kinds of symmetry that :func:`~lightning_sym.symmetry.find_symmetries` proves of
    the layer's output units):
        ``collapse/<layer>/permutation``: share of units that equal another, in [0, 1].
        ``collapse/<layer>/rescaling``: share of units that are zero, in and out.
        ``collapse/<layer>/rotation``: share of directions lost.
        ``collapse/<layer>/residual_force``: only where syre is at work (the callback, or ``attach_syre``
            on an optimizer): the weakest push away from a mirror of the layer's output units, weight
            decay times theta_0 across the mirror; at least 0, and 0: units can be stuck.
    with ``targets``, of the classifier, whose head is the last watched ``nn.Linear``:
        ``collapse/nc1``, ``nc2``, ``nc3``, ``nc4``: neural collapse of its inputs; each is 0 at collapse
            (:class:`~lightning_sym.functional.neural_collapse.NeuralCollapse`).
    and a summary:
        ``collapse/score``: in [0, 1], of the trained layer that is worst off (not a mean, which would hide
            one among many): the largest of three shares of it: dead input units; doubled output units
            (1 - ``distinct_units``); output directions lost, 1 - ``numerical_rank`` / what could be there:
            min(samples - 1, A, numerical rank of the layer's own input, O - 1), at least 1. An input of few
            directions is thus no loss, nor is the one direction of the outputs that a softmax does not see.
            0: nothing lost anywhere; 1: a layer with nothing left.
        ``collapse/samples``: the least number of samples that a layer's output was read on. Ranks and
            the score depend on it: compare readings of equal ``samples``, and mind a ragged last batch.
    with ``histograms``:
        ``collapse/<layer>/spectrum`` (histogram): log10 of the covariance's eigenvalues over the largest.

    Args:
        every_n_steps: an interval in optimizer steps, or a schedule. Step 1 is always due.
        layers: a glob, or a list of globs, on module names; ``None``: all, at most ``max_layers``.
        max_layers: how many layers to watch when ``layers`` is ``None``.
        targets: where the class labels are in a batch: an index, a key or a function of the batch.
        tolerance: ``1 - cosine`` up to which two units' weights are the same; 0.01 is 8 degrees.
        rtol: relative cut of ``numerical_rank`` and ``zero_units``.
        causes: find the network's symmetries at the first due step (seconds for a large network, on
            a copy) and name what collapsed units fell into.
        inputs: where ``causes`` finds the module's input in a batch: an index, a key or a function;
            ``None``: what its ``forward`` names, or the first entry.
        forward: what ``causes`` calls on it: a method of the module, or a function of (module, input).
        histograms: also log each layer's covariance spectrum.
        keep: rows of :attr:`history` that a checkpoint holds, or a folder for it
            (:class:`~lightning_sym.callbacks.base.Monitor`).
        deferred: compute readings in a thread while training goes on, and publish them 4 steps later
            (:class:`~lightning_sym.callbacks.Monitor`).
        name: first part of its keys instead of ``collapse``.
        strict: raise what goes wrong in here instead of warning once and going on.

    Raises:
        ValueError: if an argument is out of its range.
    """

    quantity: ClassVar[str] = "collapse"
    takes_inputs = True

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
        inputs: Locator = None,
        forward: str | Callable[..., Any] = "forward",
        histograms: bool = False,
        keep: Keep = LAST_ROWS,
        deferred: bool = False,
        name: str | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(
            every_n_steps=every_n_steps,
            layers=layers,
            max_layers=max_layers,
            keep=keep,
            deferred=deferred,
            name=name,
            strict=strict,
        )
        within("tolerance", tolerance, 0, 1)
        within("rtol", rtol, 0, 1)
        self.targets = targets
        self.tolerance = tolerance
        self.rtol = rtol
        self.causes = self.runs_module = causes
        self.module_readings = "causes"
        self.defers = not causes  # symmetries are tried on the module as it stands
        self.inputs, self.forward = inputs, forward
        self.histograms = histograms
        self.classes = ClassMeans(targets)
        self.needs = (_INPUTS, _OUTPUTS, _ACTIVITY, _WEIGHT)
        self.needs += (self.classes,) if targets is not None else ()
        self.end_run()

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "targets": named(self.targets)}

    @override
    def end_run(self) -> None:
        self._symmetries: list[Symmetry] | None = None
        self._syre: list[SyreHandle] = []
        self._forces: dict[tuple[Any, ...], float | None] = {}

    @override
    def prepare(self, seen: Observation) -> None:
        if self.causes and self._symmetries is None:
            self._symmetries = []
            self._symmetries = symmetries_of(seen.run, inputs=self.inputs, forward=self.forward)
            self._syre = [handle for optimizer in seen.run.optimizers for handle in attached(optimizer)]

    @override
    def read(self, seen: Observation) -> Iterator[Reading]:
        scores, counts = [], []
        for layer in seen.layers:
            found = dict(self._read_layer(layer))
            for what, value in found.items():
                yield Reading(layer.name, what, value)
            if self._symmetries:
                for what, value in self._read_causes(layer):
                    yield Reading(layer.name, what, value)
            outputs = layer.get(_OUTPUTS)
            if outputs is None and "distinct_units" not in found:
                continue
            if layer.trained:  # a frozen teacher makes no student look better
                scores.append(self._score(layer, outputs, found))
                counts += [outputs.n] if outputs is not None else []
            if self.histograms and outputs is not None:
                values = outputs.eigenvalues
                values = values[values > 0]
                if len(values):
                    yield Reading(layer.name, "spectrum", (values / values[0]).log10())
            if (classes := layer.get(self.classes)) is not None:
                yield from self._read_classes(classes)
        if scores:
            yield Reading("", "score", max(scores))
            yield Reading("", "samples", float(min(counts, default=0)))

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
        outputs: SampleMoments | None = layer.get(_OUTPUTS)
        if outputs is not None and outputs.n > 1:
            yield "effective_rank", float(effective_rank_from_eigenvalues(outputs.eigenvalues))
            if math.isfinite(outputs.participation_ratio):
                yield "participation_ratio", outputs.participation_ratio
            rank = numerical_rank_from_eigenvalues(outputs.eigenvalues, rtol=self.rtol)
            yield "numerical_rank", float(rank)
        activity = layer.get(_ACTIVITY)
        if activity is not None and not layer.fed_by_data:
            yield "dead_units", float((activity.live == 0).double().mean())
        if outputs is not None and outputs.nonfinite:
            yield "nonfinite", outputs.nonfinite
        weight: LayerWeight | None = layer.get(_WEIGHT)
        if weight is None:
            return
        squares = weight.singular_values.square()
        if squares.isfinite().all():
            yield "weight_effective_rank", float(effective_rank_from_eigenvalues(squares))
            yield "weight_stable_rank", float(squares.sum() / squares[0]) if squares[0] > 0 else 0.0
            if isinstance(layer.layer, LowRankPair):
                yield "rank_used", float(effective_rank_from_eigenvalues(squares)) / layer.layer.largest_rank
        if layer.layer.has_input:  # an embedding's rows are inputs, not units
            yield "distinct_units", self._distinct(weight)
            yield "zero_units", float(zero_units_from_norms(weight.row_norms, rtol=self.rtol))

    def _distinct(self, weight: LayerWeight) -> float:
        groups, rows, _ = weight.blocks.shape
        if groups == 1 and rows > MOST_COMPARED:  # a vocabulary: pairs grow with its square
            keep = kept_features(rows, MOST_COMPARED, weight.blocks.device)
            outgoing = None if weight.outgoing is None else weight.outgoing[:, keep]
            bias = None if weight.bias is None else weight.bias[keep]
            weight = LayerWeight(weight.blocks[:, keep], bias, outgoing)
        if groups > 1 and rows == 1:
            return 1.0  # depthwise: no two units share an input
        biases = [None] * groups if weight.bias is None else weight.bias.chunk(groups)
        if weight.row_grams is not None:  # mostly enough to tell that no two are near
            grams = zip(weight.row_grams, biases, strict=True)
            if not any(_near(gram, bias, tolerance=self.tolerance) for gram, bias in grams):
                return 1.0
        if groups == 1:
            units = distinct_units(weight.blocks[0], weight.bias, weight.outgoing, tolerance=self.tolerance)
            return float(units)
        shares = [
            float(distinct_units(block, bias, tolerance=self.tolerance))
            for block, bias in zip(weight.blocks, biases, strict=True)
        ]
        return sum(shares) / groups

    def _score(
        self, layer: LayerObservation, outputs: SampleMoments | None, found: dict[str, float]
    ) -> float:
        """Return the worst share lost; a finite number whatever was read."""
        lost = [found.get("dead_units", 0.0), 1.0 - found.get("distinct_units", 1.0)]
        if outputs is not None and "numerical_rank" in found:
            could = min(outputs.n - 1, layer.layer.out_features - 1, len(outputs.eigenvalues))
            could = min(could, layer.layer.largest_rank)
            if layer.layer.has_input:
                could = min(could, self._carried(layer.get(_INPUTS)))
            lost.append(1.0 - min(found["numerical_rank"] / max(could, 1), 1.0))
        return max((value for value in lost if math.isfinite(value)), default=0.0)

    def _carried(self, inputs: SampleMoments | None) -> int:
        """Return how many directions a layer's input has; of a wide side that is sampled a lower bound."""
        if inputs is None or inputs.n < 2:
            return UNKNOWN
        rank = int(numerical_rank_from_eigenvalues(inputs.eigenvalues, rtol=self.rtol))
        return rank if rank < len(inputs.eigenvalues) or inputs.keep is None else UNKNOWN

    @staticmethod
    def _read_classes(classes: ClassSums) -> Iterator[Reading]:
        found = neural_collapse_from_sums(classes.counts, classes.sums, classes.second, classes.weight)
        yield Reading("", "nc4", classes.disagreements / float(classes.counts.sum()))
        for name in ("nc1", "nc2", "nc3"):
            value = getattr(found, name)
            if value is not None and value.isfinite():
                yield Reading("", name, value)


def _near(gram_UU: Tensor, bias_U: Tensor | None, *, tolerance: float) -> bool:
    """Return whether two units may agree, or be zero, by the products of their weights, rounding allowed."""
    if bias_U is not None:
        gram_UU = gram_UU + torch.outer(bias_U, bias_U).to(gram_UU)
    size_U = gram_UU.diagonal().clamp_min(0.0).sqrt()
    if not bool(size_U.min() > 1e-2 * size_U.max()):  # also where one is not finite
        return True
    cosine_UU = (gram_UU / size_U).div_(size_U[:, None]).fill_diagonal_(-1.0)
    return not bool(cosine_UU.max() < 1 - tolerance - 1e-3)
