"""Is the network losing its ability to learn?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from typing_extensions import override

from lightning_sym.callbacks.base import Monitor, at_least
from lightning_sym.engine.batch import Locator, locate, rows_of
from lightning_sym.engine.history import LAST_ROWS, Keep
from lightning_sym.engine.probe import gathered
from lightning_sym.engine.schedule import Schedule
from lightning_sym.engine.trainability import trainability
from lightning_sym.functional.rank import effective_rank_from_eigenvalues
from lightning_sym.functional.units import dormant_fraction_from_scores
from lightning_sym.observe import (
    Activity,
    Observation,
    Reading,
    SecondMoments,
    Weight,
    WeightUpdate,
    ZeroGradients,
)
from lightning_sym.observe.observation import LayerObservation

#: Most samples, of all ranks together, that the trainability probe trains on.
SAMPLES = 256
_INPUTS, _ACTIVITY = SecondMoments("inputs"), Activity()
_WEIGHT, _UPDATE, _ZEROS = Weight(), WeightUpdate(), ZeroGradients()


class PlasticityMonitor(Monitor):
    """Dormant and dead units, weight growth, update sizes and feature rank, layer by layer.

    Units are those that *feed* the layer: the previous layer's neurons after their activation, or a
    convolution's input channels. A layer fed by raw data has no unit readings.

    Logs:
        ``plasticity/<layer>/dormant_units``: fraction of input units whose mean ``|x|`` is at most
            ``threshold`` of the layer's average (Sokar et al., 2023, arXiv 2302.12902), in [0, 1].
        ``plasticity/<layer>/dead_units``: fraction of input units that were 0 on every sample.
        ``plasticity/<layer>/weight_norm``: Frobenius norm of the weight before the step.
        ``plasticity/<layer>/relative_update``: ``||W_after - W_before|| / ||W_before||``; momentum,
            decay and adaptive scaling included.
        ``plasticity/<layer>/zero_gradients``: share of exact zeros in the weight's gradient, in
            [0, 1], over ranks' mean gradient and after clipping.
        ``plasticity/<layer>/feature_rank``: effective rank of the layer's centred inputs, in
            [1, min(samples - 1, width)], or 0 for constant inputs; it depends on how many samples
            there are, so compare only readings of equal batches.
        ``plasticity/<layer>/nonfinite``: share of samples with a NaN or Inf; only when there are any.
        ``plasticity/dormant_units``, ``plasticity/feature_rank``: means over layers.
        ``plasticity/trainability``: with ``trainability_steps``, at epoch ends: how far a copy of the
            module gets on random targets, over how far a freshly initialised twin gets
            (:func:`~lightning_sym.engine.trainability.trainability`); 1 is as good as new. Its inputs are
            those of the last batch, at most 256 samples of all ranks; where they can't be cut into samples,
            each rank's own, and the mean over ranks is read.

    Args:
        every_n_steps: an interval in optimizer steps, or a schedule. Step 1 is always due.
        layers: a glob, or a list of globs, on module names; ``None``: all, at most ``max_layers``.
        max_layers: how many layers to watch when ``layers`` is ``None``.
        threshold: a unit with at most this share of its layer's mean activity is dormant.
        trainability_steps: optimizer steps of the trainability probe at each epoch's end; 0: no probe.
        trainability_lr: its learning rate (Adam).
        inputs: where the probe finds the module's input in a batch: an index, a key, or a function;
            ``None``: what its ``forward`` names, or the first entry.
        forward: what the probe calls on it: a method of the module, or a function of (module, input).
        seed: of the probe's targets and of its fresh twin.
        keep: rows of :attr:`history` that a checkpoint holds, or a folder for it
            (:class:`~lightning_sym.callbacks.base.Monitor`).
        deferred: compute readings in a thread while training goes on, and publish them 4 steps later
            (:class:`~lightning_sym.callbacks.Monitor`).
        name: first part of its keys instead of ``plasticity``.
        strict: raise what goes wrong in here instead of warning once and going on.

    Raises:
        ValueError: if an argument is out of its range.
    """

    quantity: ClassVar[str] = "plasticity"
    takes_inputs = True
    defers = True
    needs = (_INPUTS, _ACTIVITY, _WEIGHT, _UPDATE, _ZEROS)

    def __init__(
        self,
        *,
        every_n_steps: int | Schedule = 100,
        layers: str | list[str] | None = None,
        max_layers: int = 12,
        threshold: float = 0.025,
        trainability_steps: int = 0,
        trainability_lr: float = 1e-3,
        inputs: Locator = None,
        forward: str | Callable[..., Any] = "forward",
        seed: int = 0,
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
        at_least("threshold", threshold, 0)
        at_least("trainability_steps", trainability_steps, 0)
        if not trainability_lr > 0:
            raise ValueError(f"trainability_lr must be positive, got {trainability_lr}")
        self.threshold = threshold
        self.trainability_steps, self.trainability_lr = trainability_steps, trainability_lr
        self.runs_module = self.reads_epochs = trainability_steps > 0
        self.module_readings = "trainability"
        self.inputs, self.forward, self.seed = inputs, forward, seed

    @override
    def read(self, seen: Observation) -> Iterator[Reading]:
        dormant, ranks = [], []
        for layer in seen.layers:
            for what, value in self._read_layer(layer):
                dormant += [value] if what == "dormant_units" and layer.trained else []
                ranks += [value] if what == "feature_rank" and layer.trained else []
                yield Reading(layer.name, what, value)
        for what, values in (("dormant_units", dormant), ("feature_rank", ranks)):
            if values:
                yield Reading("", what, sum(values) / len(values))

    @override
    def read_epoch(self, seen: Observation) -> Iterator[Reading]:
        run = seen.run
        found = run.ranks.attempt(lambda: locate(run.batch, self.inputs, run.function(self.forward)))
        uncut = torch.tensor([float(not rows_of((found.args, found.kwargs)))], dtype=torch.float64)
        arguments = found if float(run.ranks.total(uncut)) else gathered(run, found, SAMPLES)
        value = run.ranks.attempt(
            lambda: trainability(
                run.sandbox,
                arguments,
                forward=self.forward,
                steps=self.trainability_steps,
                lr=self.trainability_lr,
                seed=self.seed,
            )
        )
        yield Reading("", "trainability", run.mean(value))

    def _read_layer(self, layer: LayerObservation) -> Iterator[tuple[str, float]]:
        activity, inputs = layer.get(_ACTIVITY), layer.get(_INPUTS)
        if activity is not None and not layer.fed_by_data:
            scores = dormant_fraction_from_scores(activity.mean, threshold=self.threshold)
            yield "dormant_units", float(scores)
            yield "dead_units", float((activity.live == 0).double().mean())
        if (weight := layer.get(_WEIGHT)) is not None:
            yield "weight_norm", weight.norm
        for what, found in (("relative_update", _UPDATE), ("zero_gradients", _ZEROS)):
            if (value := layer.get(found)) is not None:
                yield what, value
        if inputs is not None and inputs.n > 1:
            yield "feature_rank", float(effective_rank_from_eigenvalues(inputs.eigenvalues))
        if inputs is not None and inputs.nonfinite:
            yield "nonfinite", inputs.nonfinite
