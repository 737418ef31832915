"""Do local updates go where backprop's would, and does the circuit assemble itself to make them?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import UninitializedParameter
from typing_extensions import override

from lightning_sym._names import clean_name
from lightning_sym.callbacks.base import Monitor, named
from lightning_sym.engine.history import LAST_ROWS, Keep
from lightning_sym.engine.ranks import Ranks
from lightning_sym.engine.run import Run
from lightning_sym.engine.schedule import EpochEnds, Schedule
from lightning_sym.functional.cosine import cosine, relative_distance
from lightning_sym.functional.rank import effective_rank
from lightning_sym.observe import Observation, Reading
from lightning_sym.observe.layers import choose_names
from lightning_sym.sandbox import Apart, training_loss

#: By layer its trained parameters, by name.
Layers = dict[str, dict[str, Tensor]]


class CircuitMonitor(Monitor):
    r"""Angle of a module's updates to backprop's, and how far a learning circuit has assembled itself.

    What is read depends on what the module is:

    * **A circuit**, a module with ``local_updates(batch)`` and ``backprop_loss(batch)`` such as
      :class:`~lightning_sym.papers.learning_circuit.LearningCircuit`: the update its rule makes (before
      decay and before the optimizer) against :math:`-\nabla L`, both on the step's batch at the weights
      after the step. ``local_updates`` returns changes by parameter name, the mean over the samples of all
      ranks, and this rank's outputs ``[N, ...]``; the gradient is averaged over ranks by their N.
    * **Any other module under automatic optimization**: the change :math:`\Delta\theta` of the weights in
      the step (momentum, decay and adaptive scaling included) against minus the gradient that the
      optimizer used: after clipping, read right after its step (of several evaluations in one step, the
      last). Gradient descent has 1, however it is clipped.
    * **Any module, given** ``loss``: :math:`\Delta\theta` against minus the gradient of that loss on the
      step's batch (summed over the batches of an accumulated step, averaged over ranks, which count
      alike, as under DDP) at the weights before the step. This is for rules of one's own under manual
      optimization.

    Loss and local updates run on a copy of the module with its train modes as they are, which leaves the
    module as it is (:class:`~lightning_sym.sandbox.sandbox.Sandbox`).

    A layer is a submodule that itself holds a trained matrix (two dimensions or more), with its bias; a
    matrix held by the module itself is a layer of its own. Parameters the loss does not reach, such as
    feedback weights, are left out of the angle. Parameters must be whole on every rank (one device, or
    DDP).

    Logs:
        ``circuit/<layer>/update_cosine``: of the update and backprop's, in [-1, 1]; not logged
            where one is zero or not finite, or the optimizer made no step (a gradient scaler may skip it).
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
        ``circuit/alignment`` (picture): both cosines over the readings so far.

    A reading costs a forward and a backward pass and, of a circuit, one update; without ``loss`` and on
    no circuit only a copy of the watched weights and gradients.

    Args:
        every_n_steps: an interval in optimizer steps, or a schedule. Step 1 is always due. Of a circuit also
            :class:`~lightning_sym.engine.schedule.EpochEnds`.
        loss: a method of the module, by name, that takes a batch, or a function of (module, batch). It
            returns the loss as a scalar with its graph. ``None``: see above.
        layers: a glob, or a list of globs, on the names of layers; ``None``: all, at most ``max_layers``.
        max_layers: how many layers to watch, evenly spread over depth, when ``layers`` is ``None``.
        ranks: also read effective ranks, a singular value decomposition a matrix.
        pictures: also log the picture.
        keep: rows of :attr:`history` that a checkpoint holds, or a folder for it
            (:class:`~lightning_sym.callbacks.base.Monitor`).
        name: first part of its keys instead of ``circuit``.
        strict: raise what goes wrong in here instead of warning once and going on.

    Raises:
        ValueError: if an argument is out of its range; at fit start, if a glob matches no layer, there is
            no layer, parameters are sharded, a module under manual optimization is no circuit and ``loss``
            is not given, or a schedule has no step to read.
        TypeError: at fit start, if the module has no such method.
    """

    quantity: ClassVar[str] = "circuit"

    def __init__(
        self,
        *,
        every_n_steps: int | Schedule | EpochEnds = 100,
        loss: str | Callable[[nn.Module, Any], Tensor] | None = None,
        layers: str | list[str] | None = None,
        max_layers: int = 12,
        ranks: bool = True,
        pictures: bool = True,
        keep: Keep = LAST_ROWS,
        name: str | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(
            every_n_steps=every_n_steps,
            layers=layers,
            max_layers=max_layers,
            keep=keep,
            name=name,
            strict=strict,
        )
        self.loss, self.ranks, self.pictures = loss, ranks, pictures
        self.end_run()

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "loss": named(self.loss)}

    @override
    def end_run(self) -> None:
        self._watched: Layers = {}
        self._before: list[Tensor] | None = None
        self._gradients: list[Tensor | None] | None = None
        self._batches = self._summed = 0  # of an accumulated step: begun, and of which gradients are known

    @override
    def check(self, run: Run) -> None:
        super().check(run)
        self._choose(run.module)
        circuit = self.loss is None and _is_circuit(run.module)
        if self.loss is not None:
            run.function(self.loss, argument="loss")
        elif not circuit and not run.automatic:
            raise ValueError(
                f"{type(run.module).__name__} is under manual optimization and is no circuit: its gradients "
                "need not be backprop's. Pass loss, a method of the module or a function of (module, batch)"
            )
        if isinstance(self.schedule, EpochEnds) and (not circuit or self.schedule.at_start):
            raise ValueError(
                f"every_n_steps={self.schedule!r} has no step, or no batch yet, to read the angle of updates "
                "from: give an interval in steps"
            )
        if how := run.sharding():
            raise ValueError(
                f"CircuitMonitor needs parameters whole on every rank (one device, or DDP); here they are "
                f"sharded by {how}"
            )

    @override
    def prepare(self, seen: Observation) -> None:
        self.end_run()
        run = seen.run
        self._watched = self._choose(run.module)
        if self.loss is not None or not _is_circuit(run.module):
            self._before = run.ranks.attempt(lambda: [p.detach().clone() for p in self._parameters()])

    @override
    def prepare_batch(self, seen: Observation) -> None:
        run = seen.run
        self._batches += 1
        if self.loss is None or self._before is None:
            return
        with run.sandbox.open(train=None, grad=True) as apart:
            found = self._gradient(apart, run.batch, self.loss)
            found = _mean_over_ranks(found, self._before, ranks=run.ranks, weight=1.0)
        self._gradients = found if self._gradients is None else _added(self._gradients, found)
        self._summed += 1

    @override
    def optimizer_stepped(self, run: Run, optimizer: Any) -> None:
        if self._before is None or self.loss is not None:
            return
        parameters = list(self._parameters())
        found = self._gradients or [None] * len(parameters)
        owner = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for i, (p, before) in enumerate(zip(parameters, self._before, strict=True)):
            if id(p) in owner and p.grad is not None:
                found[i] = _used_gradient(p, before, optimizer, owner[id(p)])
        self._gradients, self._summed = found, self._batches

    @override
    def read(self, seen: Observation) -> Iterator[Reading]:
        run = seen.run
        watched, before, gradients = self._watched, self._before, self._gradients
        whole = self._summed == self._batches
        if not watched:  # an epoch's end: no step was prepared
            self._watched = watched = self._choose(run.module)
        values: dict[tuple[str, str], float] = {}
        if self.loss is None and _is_circuit(run.module):
            updates, gradients = self._of_circuit(run)
            values |= self._angles(updates, gradients)
        elif before is not None and gradients is not None and whole:  # else a warning has said what failed
            after = [p.detach() for p in self._parameters()]
            values |= self._angles([a - b for a, b in zip(after, before, strict=True)], gradients)
        values |= _assembly(run.module, watched)
        if self.ranks:
            values |= _effective_ranks(watched)
        self.end_run()
        values = {key: value for key, value in values.items() if math.isfinite(value)}
        for (layer, what), value in values.items():
            yield Reading(layer, what, value)
        if self.pictures and any(what.endswith(("update_cosine", "feedback_cosine")) for _, what in values):
            from lightning_sym.plots.circuit import alignment_over_time  # light: matplotlib only when drawn

            def picture() -> Any:
                rows = [row for row in self.history if row["fit"] == self.fit]
                return alignment_over_time(rows, quantity=self.prefix)

            yield Reading("", "alignment", picture)

    def _choose(self, module: nn.Module) -> Layers:
        layers = _layers(module)
        if not layers:
            raise ValueError(
                "the module has no layer to watch: no trained parameter has two dimensions or more"
            )
        chosen = choose_names(list(layers), self.layers, max_layers=self.max_layers)
        return {name: own for name, own in layers.items() if name in chosen}

    def _parameters(self) -> Iterator[Tensor]:
        for parameters in self._watched.values():
            yield from parameters.values()

    def _gradient(self, apart: Apart, batch: Any, loss: str | Callable[..., Any]) -> Sequence[Tensor | None]:
        """Return the gradient of the copy's loss by autograd; None where the loss does not reach."""
        copied = _layers(apart.module)
        parameters = [copied[layer][name] for layer, own in self._watched.items() for name in own]
        found = training_loss(apart, apart.place(batch), loss)
        if not found.requires_grad:
            raise TypeError("loss must depend on the parameters, got a scalar tensor without a graph")
        return torch.autograd.grad(found.reshape(()), parameters, allow_unused=True)

    def _of_circuit(self, run: Run) -> tuple[list[Tensor], list[Tensor | None]]:
        parameters = list(self._parameters())
        with run.sandbox.open(train=None, grad=True) as apart:
            # First what needs no other rank: local_updates averages over ranks, and would wait for them.
            found = run.ranks.attempt(lambda: self._gradient(apart, run.batch, "backprop_loss"))
            with torch.no_grad():
                changes, outputs = apart("local_updates", apart.place(run.batch))
            weight = float(len(outputs))
            gradients = _mean_over_ranks(found, parameters, ranks=run.ranks, weight=weight)
        updates = [
            changes.get(f"{layer}.{name}", torch.zeros_like(p))
            for layer, own in self._watched.items()
            for name, p in own.items()
        ]
        return updates, gradients

    def _angles(self, updates: list[Tensor], gradients: list[Tensor | None]) -> dict[tuple[str, str], float]:
        pairs = iter(zip(updates, gradients, strict=True))
        whole: list[tuple[Tensor, Tensor]] = []
        values: dict[tuple[str, str], float] = {}
        for layer, parameters in self._watched.items():
            reached = [(a, -g) for a, g in [next(pairs) for _ in parameters] if g is not None]
            whole += reached
            if reached:
                values[layer, "update_cosine"] = float(cosine(*_sides(reached)))
        values["", "update_cosine"] = float(cosine(*_sides(whole)))
        return values


def _assembly(module: nn.Module, watched: Layers) -> dict[tuple[str, str], float]:
    """Return how far feedback and balances have come, of a module that tells."""
    values: dict[tuple[str, str], float] = {}
    cosines: list[float] = []
    for layer, (w, v) in _asked(module, "feedback_pairs").items():
        if layer in watched:
            values[layer, "feedback_cosine"] = float(cosine(w, v))
            cosines.append(values[layer, "feedback_cosine"])
    if known := [value for value in cosines if math.isfinite(value)]:
        values["", "feedback_cosine"] = sum(known) / len(known)
    for layer, pairs in _asked(module, "balances").items():
        for name, (a, b) in pairs.items() if layer in watched else ():
            values[layer, f"{name}_residual"] = float(relative_distance(a, b))
            values[layer, f"{name}_cosine"] = float(cosine(a, b))
    return values


def _effective_ranks(watched: Layers) -> dict[tuple[str, str], float]:
    return {
        (layer, f"{name}_rank"): float(effective_rank(p.detach().flatten(1), center=False))
        for layer, parameters in watched.items()
        for name, p in parameters.items()
        if p.ndim > 1 and len(p) > 1 and bool(p.detach().isfinite().all())
    }


def _is_circuit(module: Any) -> bool:
    return callable(getattr(module, "local_updates", None)) and callable(
        getattr(module, "backprop_loss", None)
    )


def _asked(module: Any, name: str) -> dict[str, Any]:
    found = getattr(module, name, None)
    with torch.no_grad():
        return found() if callable(found) else {}


def _layers(module: nn.Module) -> Layers:
    """Return by layer its trained parameters, by name."""
    found: Layers = {}
    for prefix, child in module.named_modules():
        own: dict[str, Tensor] = {
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


def _sides(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


def _added(a: list[Tensor | None], b: list[Tensor | None]) -> list[Tensor | None]:
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]


def _used_gradient(p: Tensor, before: Tensor, optimizer: Any, group: Mapping[str, Any]) -> Tensor:
    """Return the gradient that an optimizer used for a parameter in the step that it has just made.

    That is what it left in ``.grad``, but for SGD with Nesterov's momentum where it works on all parameters
    at once (``foreach``, the rule on GPUs): it adds the momentum to ``.grad`` itself. The step shows whether
    it did.
    """
    gradient = p.grad.detach().clone()  # type: ignore[union-attr]
    buffer = optimizer.state.get(p, {}).get("momentum_buffer")
    if type(optimizer) is not torch.optim.SGD or not group["nesterov"] or buffer is None:
        return gradient
    if group["weight_decay"] or group["maximize"]:  # then it works on a copy
        return gradient
    push = group["momentum"] * buffer.detach()
    step = (p.detach() - before).double() / max(float(group["lr"]), torch.finfo(torch.float64).tiny)
    added = (step + gradient).norm() < (step + gradient + push).norm()
    return gradient - push if added else gradient


def _mean_over_ranks(
    gradients: Sequence[Tensor | None], parameters: Sequence[Tensor], *, ranks: Ranks, weight: float
) -> list[Tensor | None]:
    """Return the weighted mean of gradients over ranks, in one packed all-reduce.

    None where the loss reached on no rank; a rank on which it did not reach counts as zero.
    """
    if ranks.size == 1:
        return list(gradients)
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    counts = [float(g is not None) for g in gradients]
    last = parts[0].new_tensor([*counts, weight], dtype=torch.float64)
    packed = ranks.total(torch.cat([*(g.double().flatten() * weight for g in parts), last]))
    means = (packed[: -len(last)] / packed[-1]).split([g.numel() for g in parts])
    reached = packed[-len(last) : -1].tolist()
    return [m.view_as(p) if n else None for m, p, n in zip(means, parameters, reached, strict=True)]
