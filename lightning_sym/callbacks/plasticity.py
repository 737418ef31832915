"""Is the network losing its ability to learn?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_sym.callbacks.base import Monitor, logger_step, undisturbed
from lightning_sym.callbacks.trainability import Locator, trainability
from lightning_sym.functional.rank import effective_rank_from_eigenvalues
from lightning_sym.functional.units import dormant_fraction_from_scores
from lightning_sym.observe.moments import Moments
from lightning_sym.observe.observation import LayerObservation, Observation
from lightning_sym.observe.reading import Reading
from lightning_sym.observe.schedule import Schedule
from lightning_sym.observe.wants import Wants


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
        ``plasticity/trainability``: at epoch ends, if asked for: how far a copy of the module gets on
            random targets, over how far a freshly initialised twin gets
            (:func:`~lightning_sym.callbacks.trainability.trainability`); 1 is as good as new.

    Args:
        every_n_steps: an interval in optimizer steps, or a schedule. Step 1 is always due.
        layers: a glob, or a list of globs, on module names; ``None``: all, at most ``max_layers``.
        max_layers: how many layers to watch when ``layers`` is ``None``.
        threshold: a unit with at most this share of its layer's mean activity is dormant.
        trainability_steps: optimizer steps of the trainability probe at each epoch's end; 0: no probe.
        trainability_lr: its learning rate (Adam).
        inputs: where the probe finds the module's input in a batch: an index, a key, or a function.
        seed: of the probe's targets and of its fresh twin.
        strict: raise what goes wrong in here instead of warning once and going on.

    Raises:
        ValueError: if an argument is out of its range.
    """

    quantity: ClassVar[str] = "plasticity"
    wants = Wants(inputs=Moments.SECOND, activity=True, updates=True, zero_gradients=True)

    def __init__(
        self,
        *,
        every_n_steps: int | Schedule = 100,
        layers: str | list[str] | None = None,
        max_layers: int = 12,
        threshold: float = 0.025,
        trainability_steps: int = 0,
        trainability_lr: float = 1e-3,
        inputs: Locator = 0,
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, layers=layers, max_layers=max_layers, strict=strict)
        if not threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {threshold}")
        if trainability_steps < 0:
            raise ValueError(f"trainability_steps must be at least 0, got {trainability_steps}")
        if not trainability_lr > 0:
            raise ValueError(f"trainability_lr must be positive, got {trainability_lr}")
        self.threshold = threshold
        self.trainability_steps = trainability_steps
        self.trainability_lr = trainability_lr
        self.inputs = inputs
        self.seed = seed
        self._batch: Any = None

    @override
    def read(self, seen: Observation) -> Iterator[Reading]:
        dormant, ranks = [], []
        for layer in seen.layers:
            for what, value in self._read_layer(layer):
                dormant += [value] if what == "dormant_units" else []
                ranks += [value] if what == "feature_rank" else []
                yield Reading(f"plasticity/{layer.name}/{what}", value)
        for what, values in (("dormant_units", dormant), ("feature_rank", ranks)):
            if values:
                yield Reading(f"plasticity/{what}", sum(values) / len(values))

    def _read_layer(self, layer: LayerObservation) -> Iterator[tuple[str, float]]:
        if layer.mean_activity is not None and layer.live is not None and not layer.fed_by_data:
            scores = dormant_fraction_from_scores(layer.mean_activity, threshold=self.threshold)
            yield "dormant_units", float(scores)
            yield "dead_units", float((layer.live == 0).double().mean())
        yield "weight_norm", layer.weight_norm
        if layer.relative_update is not None:
            yield "relative_update", layer.relative_update
        if layer.zero_gradients is not None:
            yield "zero_gradients", layer.zero_gradients
        if layer.inputs is not None and layer.inputs.n > 1:
            yield "feature_rank", float(effective_rank_from_eigenvalues(layer.inputs.eigenvalues))
        if layer.nonfinite:
            yield "nonfinite", layer.nonfinite

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.trainability_steps and batch_idx == 0:
            self._batch, self._logger_step = batch, logger_step(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._batch is None:
            return
        batch, self._batch = self._batch, None
        with self.guard(trainer, "trainability"), undisturbed(pl_module):
            value = trainability(
                pl_module,
                batch,
                inputs=self.inputs,
                steps=self.trainability_steps,
                lr=self.trainability_lr,
                seed=self.seed,
            )
            shared = trainer.strategy.reduce(torch.tensor(value, device=pl_module.device), reduce_op="mean")
            readings = [Reading("plasticity/trainability", float(shared))]
            self.publish(trainer, readings, step=logger_step(trainer) - 1)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._batch = None
        super().on_exception(trainer, pl_module, exception)
