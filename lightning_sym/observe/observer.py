"""One observer a trainer: it arms the hooks on a due step, reduces once, and lets all monitors read."""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_sym.observe.gradient_noise import HeldMemory
from lightning_sym.observe.layers import Layer, choose_layers, readers
from lightning_sym.observe.observation import LayerObservation, Observation
from lightning_sym.observe.recorder import Recorder, has_compiled
from lightning_sym.observe.wants import Targets, Wants


def find_targets(batch: Any, targets: Targets) -> Tensor | None:
    """Return the labels in a batch, or None where ``targets`` is None.

    Raises:
        ValueError: if the batch has no such entry.
    """
    if targets is None:
        return None
    try:
        found = targets(batch) if callable(targets) else batch[targets]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"targets={targets!r} is not in the batch of type {type(batch).__name__}") from error
    if not isinstance(found, Tensor) or found.is_floating_point():
        raise ValueError(
            f"targets={targets!r} must lead to a tensor of class indices, got {type(found).__name__}"
        )
    return found


def batch_size(batch: Any) -> int | None:
    """Return the length of the first tensor in a batch, or None if there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    items: Sequence[Any] = ()
    if isinstance(batch, Mapping):
        items = list(batch.values())
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        items = batch
    for item in items:
        if (size := batch_size(item)) is not None:
            return size
    return None


class Observer:
    """The one pair of eyes of a trainer; monitors join it and are handed observations.

    Not for users: :class:`~lightning_sym.callbacks.base.Monitor` talks to it.

    Attributes:
        seconds: time spent in our code since the fit began, by section: ``hooks`` (registering,
            snapshots), ``moments``, ``reduction``, ``spectra`` (the monitors' arithmetic),
            ``logging``.
        probes: observations made.
        held_bytes: memory that the last observation's sums and weight snapshots took.
    """

    _of: ClassVar[weakref.WeakKeyDictionary[Trainer, Observer]] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self.monitors: list[Any] = []
        self.seconds = dict.fromkeys(("hooks", "moments", "reduction", "spectra", "logging"), 0.0)
        self.probes = 0
        self.held_bytes = 0
        self._layers: dict[Any, list[Layer]] = {}
        self._recorders: dict[str, Recorder] = {}
        self._due: list[Any] = []
        self._armed_at: int | None = None
        self._stance: Any = None
        self._batch: Any = None
        self._paused = False
        self._warned: set[str] = set()

    @classmethod
    def of(cls, trainer: Trainer) -> Observer:
        """Return the trainer's observer, made on first asking."""
        if trainer not in cls._of:
            cls._of[trainer] = cls()
        return cls._of[trainer]

    def join(self, monitor: Any, module: nn.Module) -> None:
        """Add a monitor before the fit starts."""
        if monitor not in self.monitors:
            self.monitors.append(monitor)

    def leave(self, monitor: Any) -> None:
        """Remove a monitor, and every hook with it."""
        self.stop()
        if monitor in self.monitors:
            self.monitors.remove(monitor)
        self._layers.pop(monitor, None)

    def start(self, monitor: Any, trainer: Trainer, module: nn.Module) -> None:
        """Choose the monitor's layers; user errors are raised here, before the first batch."""
        layers, total = choose_layers(module, monitor.layers, max_layers=monitor.max_layers)
        self._layers[monitor] = layers
        if len(layers) < total and monitor.layers is None:
            names = ", ".join(layer.name for layer in layers)
            rank_zero_info(
                f"{type(monitor).__name__} watches {len(layers)} of {total} layers: {names}. "
                "Choose others with layers=, or more with max_layers=."
            )

    def watch(self, monitor: Any, layers: list[Layer]) -> None:
        """Have other layers observed for a monitor than those chosen at the start, from now on."""
        self._layers[monitor] = layers

    def _leads(self, monitor: Any) -> bool:
        return bool(self.monitors) and self.monitors[0] is monitor

    def batch_start(self, monitor: Any, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Arm the hooks if the coming optimizer step is due for any monitor."""
        if not self._leads(monitor):
            return
        if self._armed_at is None:
            self._due = [m for m in self.monitors if m.due(trainer)]
            if not self._due:
                return
            for due in self._due:
                due.prepare(trainer, module, batch)
            self._arm(trainer, module)
        else:
            for recorder in self._recorders.values():
                recorder.finish_batch()
        self._batch = batch
        self._scale = self._per_sample_scale(trainer, batch)

    @staticmethod
    def _per_sample_scale(trainer: Trainer, batch: Any) -> float:
        """Return what turns gradients of the step's loss into gradients of per-sample losses."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss_scale = float(scaler.get_scale()) if scaler is not None else 1.0
        accumulated = (
            trainer.accumulate_grad_batches if trainer.lightning_module.automatic_optimization else 1
        )
        return (batch_size(batch) or 1) * accumulated / loss_scale

    def _arm(self, trainer: Trainer, module: LightningModule) -> None:
        began = time.perf_counter()
        self._armed_at = trainer.global_step
        self._logger_step = int(trainer.fit_loop.epoch_loop._batches_that_stepped)
        least = {spec.name: 1 for spec in dataclasses.fields(Wants) if spec.name.startswith("max_")}
        wants = Wants(**least)  # type: ignore[arg-type]
        chosen: dict[str, Layer] = {}
        for monitor in self._due:
            wants = wants | monitor.wants
            chosen |= {layer.name: layer for layer in self._layers[monitor]}
        self._wants = wants
        self._head = self._find_head(chosen) if wants.targets is not None else None
        if has_compiled(module):
            self._stance = torch.compiler.set_stance("force_eager")
        reads = readers(module) if wants.outgoing else {}
        memory = HeldMemory(wants.max_held_bytes)
        noisy = {x.name for m in self._due if m.wants.gradient_noise for x in self._layers[m]}
        for name, layer in chosen.items():
            recorder = Recorder(
                layer,
                dataclasses.replace(wants, gradient_noise=name in noisy),  # too dear to share unasked
                scale=lambda: self._scale,
                labels=lambda: find_targets(self._batch, self._wants.targets),
                classes=layer.out_features if name == self._head else 0,
                seconds=self.seconds,
                reader=reads.get(layer.module) if layer.part is None else None,
                samples=lambda: batch_size(self._batch),
                memory=memory,
                paused=lambda: self._paused,
            )
            recorder.attach()
            self._recorders[name] = recorder
        self.held_bytes = sum(recorder.held_bytes for recorder in self._recorders.values())
        self.seconds["hooks"] += time.perf_counter() - began

    @staticmethod
    def _find_head(chosen: dict[str, Layer]) -> str | None:
        linear = [name for name, layer in chosen.items() if isinstance(layer.module, nn.Linear)]
        return linear[-1] if linear else None

    def pause(self, paused: bool) -> None:
        """Look away while validation runs, which may be between the batches of an accumulated step."""
        self._paused = paused

    def before_optimizer_step(self, monitor: Any) -> None:
        """Read the gradients as the optimizer is about to use them."""
        if self._armed_at is None or not self._leads(monitor):
            return
        for recorder in self._recorders.values():
            try:
                recorder.read_gradient()
            except Exception as error:
                recorder.error = recorder.error or error

    def batch_end(self, monitor: Any, trainer: Trainer, module: LightningModule) -> None:
        """After the armed optimizer step: reduce, let the due monitors read, take the hooks off."""
        if self._armed_at is None or not self._leads(monitor) or trainer.global_step == self._armed_at:
            return
        recorders, due = list(self._recorders.values()), self._due
        for recorder in recorders:
            recorder.finish_batch()
        began = time.perf_counter()
        self.stop()
        self.seconds["hooks"] += time.perf_counter() - began
        began = time.perf_counter()
        _sum_over_ranks([tensor for recorder in recorders for tensor in recorder.tensors()])
        if self._head is not None:
            # The class means are known only now; one more small sum, where targets are asked for.
            head = next(r for r in recorders if r.layer.name == self._head)
            head.count_disagreements()
            _sum_over_ranks([head.disagreements])
        self.seconds["reduction"] += time.perf_counter() - began
        self._report_errors(recorders, due, trainer.global_step)
        began = time.perf_counter()
        layers = [LayerObservation(r, updates=self._wants.updates) for r in recorders if float(r.calls) > 0]
        silent = [r.layer.name for r in recorders if not float(r.calls)]
        self.seconds["spectra"] += time.perf_counter() - began
        if silent:
            self._warn(
                f"layers that never ran in step {trainer.global_step} have no readings: {', '.join(silent)}"
            )
        seen = Observation(trainer.global_step, layers, silent, self._head, self.seconds)
        self.probes += 1
        for member in due:
            names = {layer.name for layer in self._layers[member]}
            member.take(trainer, seen.only(names), step=self._logger_step)

    def _report_errors(self, recorders: list[Recorder], due: list[Any], step: int) -> None:
        for recorder in recorders:
            if recorder.error is None:
                continue
            if any(monitor.strict for monitor in due):
                raise recorder.error
            error = recorder.error
            self._warn(
                f"observing layer {recorder.layer.name} failed at step {step}: "
                f"{type(error).__name__}: {error}. The fit goes on; pass strict=True to raise instead."
            )

    def _warn(self, message: str) -> None:
        kind = message.partition(" at step ")[0].partition(" in step ")[0]
        if kind not in self._warned:
            self._warned.add(kind)
            rank_zero_warn(message)

    def stop(self) -> None:
        """Take every hook off; harmless if there are none."""
        for recorder in self._recorders.values():
            recorder.detach()
        self._recorders = {}
        self._due, self._armed_at, self._batch, self._paused = [], None, None, False
        if self._stance is not None:
            stance, self._stance = self._stance, None
            stance.__exit__(None, None, None)


def _sum_over_ranks(tensors: list[Tensor]) -> None:
    """Sum tensors over all ranks in place, in one packed all-reduce."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    packed = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(packed)
    for tensor, part in zip(tensors, packed.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
