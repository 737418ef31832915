"""Do local updates go where backprop's would, and does the circuit assemble itself to make them?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import UninitializedParameter
from typing_extensions import override

from lightning_sym._names import clean_name
from lightning_sym.callbacks._quiet import method, quietly
from lightning_sym.callbacks.base import Probe, undisturbed
from lightning_sym.functional.cosine import cosine, relative_distance
from lightning_sym.functional.rank import effective_rank
from lightning_sym.observe.layers import choose_names
from lightning_sym.observe.reading import Reading
from lightning_sym.observe.schedule import Schedule

Tensors = dict[str, Tensor]


class CircuitMonitor(Probe):
    r"""Angle of a module's updates to backprop's, and how far a learning circuit has assembled itself.

    What is read depends on what the module is:

    * **A circuit**, a module with ``local_updates(batch)`` and ``backprop_loss(batch)`` such as
      :class:`~lightning_sym.modules.LearningCircuit`: the update its rule makes (before decay and before
      the optimizer) against :math:`-\nabla L`, both on the step's batch at the weights after the step.
    * **Any other module under automatic optimization**: the change :math:`\Delta\theta` of the weights in
      the step (momentum, decay and adaptive scaling included) against minus the gradient that the
      optimizer was given, before clipping. Gradient descent has 1.
    * **Any module, given** ``loss``: :math:`\Delta\theta` against minus the gradient of that loss on the
      step's batch (summed over the batches of an accumulated step, averaged over ranks) at the weights
      before the step. This is for rules of one's own under manual optimization.

    A layer is a submodule that itself holds a trained matrix (two dimensions or more), with its bias; a
    matrix held by the module itself is a layer of its own. Parameters the loss does not reach, such as
    feedback weights, are left out of the angle. Parameters must be whole on every rank (one device, or
    DDP).

    Logs:
        ``circuit/<layer>/update_cosine``: of the update and backprop's, in [-1, 1]; NaN where one is zero.
        ``circuit/update_cosine``: the same of all watched layers as one vector.
        ``circuit/<layer>/<parameter>_rank``: effective rank of each matrix of the layer, in
            [0, min of its dimensions] (:func:`~lightning_sym.functional.effective_rank`, not centred);
            a convolution's is that of its ``[O, C * k * k]``.
    and, of a module with ``feedback_pairs()`` and ``balances()`` (by layer; a circuit has both):
        ``circuit/<layer>/feedback_cosine``: :math:`\cos(W^T, V)`, in [-1, 1].
        ``circuit/feedback_cosine``: its mean over the watched layers.
        ``circuit/<layer>/<pair>_residual``: :math:`\lVert A - B\rVert_F / (\lVert A\rVert_F + \lVert
            B\rVert_F)` of matrices that self-assembly makes equal, in [0, 1]: ``WWt_RRt``,
            :math:`s W W^T` and :math:`R R^T`; ``VVt_LLt``, :math:`s V V^T` and :math:`L L^T`;
            ``VRt_LWt``, :math:`V_l R_{l+1}^T` and :math:`L_l W_{l+1}^T` (of ``four_synapse``, a
            reconstruction); ``W_Vt`` (of Kolen-Pollack).
        ``circuit/<layer>/<pair>_cosine``: of the same matrices, in [-1, 1]: equal but for their scale.
    and a picture, where a logger takes it:
        ``circuit/alignment``: both cosines over the readings so far.

    A reading costs a forward and a backward pass and, of a circuit, one update; without ``loss`` and on
    no circuit only a copy of the watched weights and gradients.

    Args:
        every_n_steps: an interval in optimizer steps, or a schedule. Step 1 is always due.
        loss: a method of the module, by name, that takes a batch, or a function of (module, batch). It
            returns the loss as a scalar with its graph; it must not log or count. ``None``: see above.
        layers: a glob, or a list of globs, on the names of layers; ``None``: all, at most ``max_layers``.
        max_layers: how many layers to watch, evenly spread over depth, when ``layers`` is ``None``.
        ranks: also read effective ranks, a singular value decomposition a matrix.
        pictures: also log the picture.
        strict: raise what goes wrong in here instead of warning once and going on.

    Raises:
        ValueError: if an argument is out of its range; at fit start, if a glob matches no layer, there is
            no layer, or a module under manual optimization is no circuit and ``loss`` is not given.
        TypeError: at fit start, if the module has no such method.
    """

    quantity: ClassVar[str] = "circuit"

    def __init__(
        self,
        *,
        every_n_steps: int | Schedule = 100,
        loss: str | Callable[[LightningModule, Any], Tensor] | None = None,
        layers: str | list[str] | None = None,
        max_layers: int = 12,
        ranks: bool = True,
        pictures: bool = True,
        strict: bool = False,
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, strict=strict)
        if max_layers < 1:
            raise ValueError(f"max_layers must be at least 1, got {max_layers}")
        if layers is not None and not layers:
            raise ValueError(f"layers must be a glob, a non-empty list of globs or None, got {layers!r}")
        self.loss, self.layers, self.max_layers = loss, layers, max_layers
        self.ranks, self.pictures = ranks, pictures
        self._forget()

    @property
    @override
    def state_key(self) -> str:
        loss = self.loss if isinstance(self.loss, str | None) else getattr(self.loss, "__qualname__", "")
        return self._generate_state_key(every_n_steps=repr(self.schedule), loss=loss, layers=self.layers)

    def _forget(self) -> None:
        self._watched: dict[str, dict[str, Tensor]] = {}
        self._loss: Callable[[Any], Tensor] | None = None
        self._before: list[Tensor] | None = None
        self._gradients: list[Tensor | None] | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle what is watched, so that a mistake shows before the first step."""
        self._forget()
        self._watched = _choose(_layers(pl_module), self.layers, max_layers=self.max_layers)
        if self.loss is not None:
            self._loss = method(pl_module, self.loss, argument="loss")
        elif not _is_circuit(pl_module) and not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} is under manual optimization and is no circuit: its gradients "
                "need not be backprop's. Pass loss, a method of the module or a function of (module, batch)"
            )

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._armed is None or (self._loss is None and _is_circuit(pl_module)):
            return
        with self.guard(trainer, "measure"), undisturbed(pl_module):  # one place, so one warning
            if self._before is None:
                self._before = [p.detach().clone() for p in self._parameters()]
            if self._loss is not None:  # of an accumulated step, once a batch
                found = self._gradient(trainer, pl_module, lambda: self._loss_of(batch))
                self._gradients = found if self._gradients is None else _added(self._gradients, found)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self._armed is None or self._before is None or self._loss is not None:
            return
        if self._gradients is None:  # of an optimizer with several evaluations, the first
            self._gradients = [None if p.grad is None else p.grad.clone() for p in self._parameters()]

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._forget()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._forget()

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Iterable[Reading]:
        before, gradients, self._before, self._gradients = self._before, self._gradients, None, None
        if self._loss is None and _is_circuit(pl_module):
            updates, gradients = self._of_circuit(trainer, pl_module, batch)
        elif before is None or gradients is None:
            raise RuntimeError("the step's gradients were not seen: their reading failed, or there was none")
        else:
            after = [p.detach() for p in self._parameters()]
            updates = [a - b for a, b in zip(after, before, strict=True)]
        readings = [*self._angles(updates, gradients), *self._assembly(pl_module)]
        if self.ranks:
            readings.extend(self._ranks())
        if self.pictures:
            from lightning_sym.plots.circuit import alignment_over_time  # light: matplotlib only when drawn

            readings.append(Reading("circuit/alignment", lambda: alignment_over_time(self.history)))
        return readings

    def _parameters(self) -> Iterator[Tensor]:
        for parameters in self._watched.values():
            yield from parameters.values()

    def _loss_of(self, batch: Any) -> Tensor:
        loss: Any = self._loss(batch) if self._loss is not None else None
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise TypeError(f"loss must return a scalar tensor with a graph, got {_described(loss)}")
        return loss.reshape(())

    def _gradient(
        self, trainer: Trainer, module: LightningModule, loss: Callable[[], Tensor], *, weight: float = 1.0
    ) -> list[Tensor | None]:
        """Return the gradient of a loss by autograd, averaged over ranks by their weights.

        ``.grad``, buffers and modes stay as they are. None where the loss does not reach.
        """
        with quietly(trainer, module, batch_statistics=None), torch.enable_grad():
            parameters = list(self._parameters())
            found = torch.autograd.grad(loss(), parameters, allow_unused=True)
        return _mean_over_ranks(found, parameters, weight=weight)

    def _of_circuit(
        self, trainer: Trainer, module: Any, batch: Any
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        with quietly(trainer, module, batch_statistics=None):
            changes, outputs = module.local_updates(batch)  # already the mean over all ranks' samples
        gradients = self._gradient(
            trainer, module, lambda: module.backprop_loss(batch), weight=float(len(outputs))
        )
        updates = [
            changes.get(f"{layer}.{name}", torch.zeros_like(p))
            for layer, parameters in self._watched.items()
            for name, p in parameters.items()
        ]
        return updates, gradients

    def _angles(self, updates: list[Tensor], gradients: list[Tensor | None]) -> Iterator[Reading]:
        pairs = iter(zip(updates, gradients, strict=True))
        whole: list[tuple[Tensor, Tensor]] = []
        for layer, parameters in self._watched.items():
            reached = [(a, -g) for a, g in [next(pairs) for _ in parameters] if g is not None]
            whole += reached
            if reached:
                yield Reading(f"circuit/{layer}/update_cosine", cosine(*_sides(reached)))
        yield Reading("circuit/update_cosine", cosine(*_sides(whole)))

    def _assembly(self, module: Any) -> Iterator[Reading]:
        cosines: list[float] = []
        for layer, (w, v) in _asked(module, "feedback_pairs").items():
            if layer in self._watched:
                cosines.append(float(cosine(w, v)))
                yield Reading(f"circuit/{layer}/feedback_cosine", cosines[-1])
        if cosines:
            yield Reading("circuit/feedback_cosine", sum(cosines) / len(cosines))
        for layer, pairs in _asked(module, "balances").items():
            for name, (a, b) in pairs.items() if layer in self._watched else ():
                yield Reading(f"circuit/{layer}/{name}_residual", relative_distance(a, b))
                yield Reading(f"circuit/{layer}/{name}_cosine", cosine(a, b))

    def _ranks(self) -> Iterator[Reading]:
        for layer, parameters in self._watched.items():
            for name, p in parameters.items():
                if p.ndim > 1 and len(p) > 1:
                    rank = effective_rank(p.detach().flatten(1), center=False)
                    yield Reading(f"circuit/{layer}/{name}_rank", rank)


def _is_circuit(module: Any) -> bool:
    return callable(getattr(module, "local_updates", None)) and callable(
        getattr(module, "backprop_loss", None)
    )


def _asked(module: Any, name: str) -> dict[str, Any]:
    found = getattr(module, name, None)
    return found() if callable(found) else {}


def _layers(module: LightningModule) -> dict[str, Tensors]:
    """Return by layer its trained parameters, by name."""
    found: dict[str, Tensors] = {}
    for prefix, child in module.named_modules():
        own = {
            name: p
            for name, p in child.named_parameters(recurse=False)
            if p.requires_grad and not isinstance(p, UninitializedParameter)
        }
        if not any(p.ndim > 1 for p in own.values()):
            continue
        if clean_name(prefix):
            found[clean_name(prefix)] = own
        else:
            found |= {name: {name: p} for name, p in own.items() if p.ndim > 1}
    return found


def _choose(
    layers: dict[str, Tensors], globs: str | list[str] | None, *, max_layers: int
) -> dict[str, Tensors]:
    if not layers:
        raise ValueError("the module has no layer to watch: no trained parameter has two dimensions or more")
    chosen = choose_names(list(layers), globs, max_layers=max_layers)
    return {name: own for name, own in layers.items() if name in chosen}


def _sides(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


def _added(a: list[Tensor | None], b: list[Tensor | None]) -> list[Tensor | None]:
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]


def _mean_over_ranks(
    gradients: Sequence[Tensor | None], parameters: list[Tensor], *, weight: float
) -> list[Tensor | None]:
    """Return the weighted mean of gradients over ranks, in one packed all-reduce.

    None where the loss reached on no rank; a rank on which it did not reach counts as zero.
    """
    if not gradients or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return list(gradients)
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    counts = [float(g is not None) for g in gradients]
    last = parts[0].new_tensor([*counts, weight], dtype=torch.float64)
    packed = torch.cat([*(g.double().flatten() * weight for g in parts), last])
    dist.all_reduce(packed)
    means = (packed[: -len(last)] / packed[-1]).split([g.numel() for g in parts])
    reached = packed[-len(last) : -1].tolist()
    return [m.view_as(p) if n else None for m, p, n in zip(means, parameters, reached, strict=True)]


def _described(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
