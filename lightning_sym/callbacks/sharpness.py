"""How sharp is the point that training is at, and is the learning rate small enough for it?"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from typing_extensions import override

from lightning_sym._names import clean_name
from lightning_sym.callbacks._quiet import cut, method, rows_of
from lightning_sym.callbacks._stand_in import loss_of, second_derivatives, stand_in, whole
from lightning_sym.callbacks.base import Probe
from lightning_sym.functional.curvature import (
    Product,
    hessian_product,
    hutchinson_trace,
    lanczos_top,
    stability_line,
)
from lightning_sym.observe.reading import Reading
from lightning_sym.observe.schedule import Schedule

_STORABLE = (Tensor, str, int, float, bool, type(None))  # what a checkpoint is loaded with safely


class SharpnessMonitor(Probe):
    r"""Trace and largest eigenvalue of the Hessian of the loss, beside the line of stability.

    On a fixed probe batch, in evaluation mode and full precision, by all parameters that are trained. All is
    done on a copy of the module: parameters, gradients, buffers, metrics, optimizers and random states stay
    as they are, and what the copy logs is lost.

    Logs:
        ``sharpness/trace``: of the Hessian, estimated by Hutchinson's method; exact where there are no more
            parameters than ``vectors``.
        ``sharpness/trace_error``: its standard error.
        ``sharpness/top``: the largest eigenvalue, by Lanczos' method, from below.
        ``sharpness/top_error``: an eigenvalue lies within that distance of it.
        ``sharpness/loss``: of the probe batch.
        ``sharpness/line``: gradient descent on a quadratic diverges where its curvature is above it:
            :math:`2/\eta` for plain SGD at the learning rate of the next step, with momentum
            :math:`(2 + 2\mu)/\eta` (:func:`~lightning_sym.functional.stability_line`). Weight decay adds
            itself to the curvature and is not in ``top``. For any other optimizer than
            ``torch.optim.SGD`` (Adam divides each slope by its own size), and where groups of parameters
            have different settings, no single curvature decides: neither this nor the next is logged.
        ``sharpness/ratio``: ``top`` over ``line``; about 1 at the edge of stability (Cohen et al., 2021,
            arXiv 2103.00065).
        ``sharpness/<layer>/trace``: on request, of each layer's own block, at no further cost.

    Cost: a gradient of the probe batch with its graph (1.2 plain gradients) and ``vectors + lanczos_steps``
    Hessian-vector products (2.5 each). With what the long vectors take themselves, the defaults cost a timm
    ResNet-18 on as many samples as its batch has (64, on a CPU) 58 training steps a reading, 6 % of a fit at
    every 1000 steps (``benchmarks/sharpness.py``). Memory: the graph of the gradient, a copy of the
    parameters and ``lanczos_steps`` vectors of their number.

    The loss must be the mean over samples: ranks each take their share of the probe batch, and products are
    averaged over ranks. Parameters must be whole on every rank (one device, or DDP).

    Args:
        every_n_steps: an interval in optimizer steps, or a schedule.
        data: a batch as the training step gets it; ``None``: the first batch of the fit, of all ranks.
        samples: at most so many of its samples, over all ranks, if it is made of tensors with a row for each;
            ``None``: all.
        loss: how to get the loss of a batch. By default ``training_step`` is called, by ``batch_idx=0``, with
            ``log`` and loggers muted. Or another method that takes a batch, or a function of (module, batch).
            The module is the copy. Must be set under manual optimization.
        vectors: random vectors for the trace; 0: no trace.
        lanczos_steps: for the eigenvalue; 0: none.
        per_layer: log the trace of each layer's block too.
        seed: of the vectors (other ones at each step), and of what the loss draws.
        strict: raise what goes wrong in here instead of warning once and going on.

    Attributes:
        products: Hessian-vector products of the last reading.
        seconds: that it took.
        gradients: the same over the time of one gradient with its graph.

    Raises:
        ValueError: if an argument is out of its range; at fit start, if ``training_step`` optimizes by
            hand or parameters are sharded.
        TypeError: at fit start, if the module has no such method.
    """

    quantity: ClassVar[str] = "sharpness"

    def __init__(
        self,
        *,
        every_n_steps: int | Schedule = 1000,
        data: Any = None,
        samples: int | None = 256,
        loss: str | Callable[[LightningModule, Any], Any] = "training_step",
        vectors: int = 8,
        lanczos_steps: int = 12,
        per_layer: bool = False,
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, strict=strict)
        if samples is not None and samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        for name, value in (("vectors", vectors), ("lanczos_steps", lanczos_steps)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if vectors + lanczos_steps == 0:
            raise ValueError("vectors or lanczos_steps must be positive, got 0 and 0")
        if per_layer and not vectors:
            raise ValueError("per_layer=True needs vectors of at least 1, got 0")
        self.data, self.samples, self.loss = data, samples, loss
        self.vectors, self.lanczos_steps, self.per_layer = vectors, lanczos_steps, per_layer
        self.seed = seed
        self.products, self.seconds, self.gradients = 0, 0.0, 0.0
        self._structure: Any = None
        self._parts: list[list[Any]] | None = None  # the leaves of each rank's share of the probe batch

    @property
    @override
    def state_key(self) -> str:
        how = self.loss if isinstance(self.loss, str) else self.loss.__qualname__
        return self._generate_state_key(every_n_steps=repr(self.schedule), loss=how, seed=self.seed)

    @override
    def state_dict(self) -> dict[str, Any]:
        parts = self._parts if self.data is None else None
        return {**super().state_dict(), "parts": parts}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._parts = state_dict["parts"]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        method(pl_module, self.loss, argument="loss")
        if self.loss == "training_step" and not pl_module.automatic_optimization:
            raise ValueError(
                "loss='training_step' makes steps of its own under manual optimization; pass the name of a "
                "method that takes a batch and returns the loss, or a function of (module, batch)"
            )
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
            raise ValueError(
                "SharpnessMonitor needs parameters whole on every rank: one device or DDP, got "
                f"{type(trainer.strategy).__name__}"
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step < self._last or trainer.global_step == 0:  # a new run: it has its own probe
            self._parts = None
        self._structure = None
        super().on_train_start(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._structure is None:
            leaves, self._structure = tree_flatten(batch if self.data is None else self.data)
            with self.guard(trainer, "the probe batch"):
                if self.data is not None:
                    self._parts = self._shared(leaves, trainer.world_size)
                elif self._parts is None:
                    self._parts = self._gathered(leaves, trainer.world_size)

    def _gathered(self, leaves: list[Any], ranks: int) -> list[list[Any]]:
        """Return the leaves of all ranks' first batches, in the order of ranks."""
        odd = sorted({type(leaf).__name__ for leaf in leaves if not isinstance(leaf, _STORABLE)})
        if odd:
            raise TypeError(
                f"a probe batch must be made of tensors, numbers and strings, got {', '.join(odd)}; pass data"
            )
        if rows_of(leaves) and self.samples is not None:
            leaves = cut(leaves, slice(max(1, self.samples // ranks)))
        leaves = tree_map(_kept, leaves)
        if ranks == 1:
            return [leaves]
        parts: list[Any] = [None] * ranks
        dist.all_gather_object(parts, leaves)
        return parts

    def _shared(self, leaves: list[Any], ranks: int) -> list[list[Any]]:
        """Return the leaves of given data, split where they have a row for each sample."""
        if rows := rows_of(leaves):
            rows = rows if self.samples is None else min(rows, self.samples)
            if rows >= ranks:
                bounds = [rows * rank // ranks for rank in range(ranks + 1)]
                return [cut(leaves, slice(a, b)) for a, b in itertools.pairwise(bounds)]
            leaves = cut(leaves, slice(rows))
        return [leaves] * ranks

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Iterable[Reading]:
        began = time.perf_counter()
        copy = stand_in(pl_module, trainer)
        named = [(name, p) for name, p in copy.named_parameters() if p.requires_grad]
        parameters = [p for _, p in named]
        with second_derivatives(trainer, copy, seed=self.seed):
            loss, product = self._prepare(trainer, copy, parameters)
            gradient = (time.perf_counter() - began) or 1.0
            readings = list(self._read(trainer, named, product))
        readings.append(Reading("sharpness/loss", loss))
        self.seconds = time.perf_counter() - began
        self.gradients = self.seconds / gradient
        return [*readings, *self._stability(trainer, readings)]

    def _prepare(
        self, trainer: Trainer, copy: LightningModule, parameters: Sequence[Tensor]
    ) -> tuple[float, Product]:
        """Return the loss of the probe batch and the product with its Hessian, over all ranks.

        What goes wrong on one rank is told to all of them before any waits for the others.
        """
        error: Exception | None = None
        total = torch.zeros(2, dtype=torch.float64)
        own: list[tuple[float, Product]] = []
        try:
            if not parameters:
                raise ValueError("the module has no parameters that are trained")
            if self._parts is None:
                raise RuntimeError("there is no probe batch: taking it failed")
            sizes = [rows_of(leaves) or 1 for leaves in self._parts]
            ranks, rank = trainer.world_size, trainer.global_rank
            for leaves, size in list(zip(self._parts, sizes, strict=True))[rank::ranks]:
                share = tree_unflatten([whole(leaf) for leaf in leaves], self._structure)
                loss = loss_of(copy, move_data_to_device(share, copy.device), how=self.loss)
                weight = size / sum(sizes)
                own.append((weight, hessian_product(loss, parameters)))
                total[0] += weight * float(loss.detach())
        except Exception as failure:
            error = failure
            total[1] = 1.0
        _sum_over_ranks(total, copy.device)
        if error is not None:
            raise error
        if total[1] > 0:
            raise RuntimeError("the loss failed on another rank")

        def product(vector_P: Tensor) -> Tensor:
            self.products += 1
            found = torch.zeros_like(vector_P)
            for weight, multiply in own:
                found.add_(multiply(vector_P), alpha=weight)
            return _sum_over_ranks(found, found.device)

        return float(total[0]), product

    def _read(
        self, trainer: Trainer, named: Sequence[tuple[str, Tensor]], product: Product
    ) -> Iterator[Reading]:
        self.products = 0
        sizes = [p.numel() for _, p in named]
        first = named[0][1]
        seed = self.seed + 1_000_003 * trainer.global_step  # others at each step: averages over time gain
        options: dict[str, Any] = {"seed": seed, "device": first.device, "dtype": first.dtype}
        if self.vectors:
            trace = hutchinson_trace(product, sizes, vectors=self.vectors, **options)
            yield Reading("sharpness/trace", trace.value)
            yield Reading("sharpness/trace_error", trace.error)
            if self.per_layer:
                for layer, value in _by_layer([name for name, _ in named], trace.blocks).items():
                    yield Reading(f"sharpness/{layer}/trace", value)
        if self.lanczos_steps:
            top = lanczos_top(product, sum(sizes), steps=self.lanczos_steps, **options)
            yield Reading("sharpness/top", top.value)
            yield Reading("sharpness/top_error", top.error)

    def _stability(self, trainer: Trainer, readings: list[Reading]) -> Iterator[Reading]:
        line = line_of(trainer.optimizers)
        if line is not None:
            yield Reading("sharpness/line", line)
            for reading in readings:
                if reading.key == "sharpness/top":
                    yield Reading("sharpness/ratio", reading.scalar / line)


def line_of(optimizers: list[torch.optim.Optimizer]) -> float | None:
    """Return the line of stability of one ``torch.optim.SGD`` with one setting; ``None`` for all else."""
    if len(optimizers) != 1 or type(optimizers[0]) is not torch.optim.SGD:
        return None
    names = ("lr", "momentum", "dampening", "nesterov", "maximize")
    settings = {tuple(float(group[name]) for name in names) for group in optimizers[0].param_groups}
    if len(settings) != 1:
        return None
    lr, momentum, dampening, nesterov, maximize = settings.pop()
    if maximize or not (lr >= 0 and 0 <= momentum < 1 and 0 <= dampening <= 1):
        return None
    return stability_line(lr, momentum=momentum, dampening=dampening, nesterov=bool(nesterov))


def _kept(leaf: Any) -> Any:
    return leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf


def _by_layer(names: list[str], blocks: Tensor) -> dict[str, Tensor]:
    """Return the sums of the blocks of each module's own parameters."""
    found: dict[str, Tensor] = {}
    for name, block in zip(names, blocks, strict=True):
        layer = clean_name(name).rpartition(".")[0] or clean_name(name)
        found[layer] = found.get(layer, torch.zeros_like(block)) + block
    return found


def _sum_over_ranks(tensor: Tensor, device: torch.device) -> Tensor:
    """Add up in place, wherever the ranks can reach each other."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        moved = tensor.to(device)
        dist.all_reduce(moved)
        tensor.copy_(moved)
    return tensor
