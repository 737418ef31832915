"""How sharp is the point that training is at, and is the learning rate small enough for it?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from typing_extensions import override

from lightning_sym._names import clean_name
from lightning_sym.callbacks.base import Monitor, at_least, named
from lightning_sym.engine.batch import cut, rows_of, sample_count
from lightning_sym.engine.history import LAST_ROWS, Keep
from lightning_sym.engine.probe import LOST
from lightning_sym.engine.run import Run
from lightning_sym.engine.schedule import EpochEnds, Schedule
from lightning_sym.functional.curvature import (
    Product,
    hessian_product,
    hutchinson_trace,
    lanczos_top,
    stability_line,
)
from lightning_sym.observe import Observation, Reading
from lightning_sym.sandbox import Apart, training_loss

_STORABLE = (Tensor, str, int, float, bool, type(None))  # what a checkpoint is loaded with safely


class SharpnessMonitor(Monitor):
    r"""Trace and largest eigenvalue of the Hessian of the loss, beside the line of stability.

    On a fixed probe batch, in evaluation mode and full precision, by all parameters that are trained. All is
    done on a copy of the module: parameters, gradients, buffers, metrics, optimizers and random states stay
    as they are, and what the copy logs is lost (:class:`~lightning_sym.sandbox.sandbox.Sandbox`).

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
        ``sharpness/<layer>/trace``: with ``per_layer``, of each layer's own block, at no further cost.

    An undefined value (the error of a single vector, anything of a loss that is NaN) is not logged.

    Cost: a gradient of the probe batch with its graph (1.2 plain gradients) and ``vectors + lanczos_steps``
    Hessian-vector products (2.5 each). With what the long vectors take themselves, the defaults cost a timm
    ResNet-18 on as many samples as its batch has (64, on a CPU) 58 training steps a reading, 6 % of a fit at
    every 1000 steps (``benchmarks/sharpness.py``). Memory: the graph of the gradient, a copy of the
    parameters and ``lanczos_steps`` vectors of their number.

    The loss must be the mean over samples: ranks each take their share of the probe batch, and losses and
    products are averaged over ranks, each by its number of samples. Parameters must be whole on every rank
    (one device, or DDP).

    Args:
        every_n_steps: an interval in optimizer steps, or a schedule; or
            :class:`~lightning_sym.engine.schedule.EpochEnds`.
        data: a batch as the training step gets it; ``None``: the first batch of the fit, of all ranks.
        samples: at most so many of its samples, over all ranks, if it is made of tensors with a row for each;
            ``None``: all.
        loss: how to get the loss of a batch. By default ``training_step`` is called, with 0 for the batch's
            index, and ``log`` and loggers muted. Or another method that takes a batch, or a function of
            (module, batch). The module is the copy. Must be set under manual optimization.
        vectors: random vectors for the trace; 0: no trace.
        lanczos_steps: for the eigenvalue; 0: none.
        per_layer: log the trace of each layer's block too.
        seed: of the vectors (other ones at each step), and of what the loss draws.
        keep: rows of :attr:`history` that a checkpoint holds, or a folder for it
            (:class:`~lightning_sym.callbacks.base.Monitor`).
        name: first part of its keys instead of ``sharpness``.
        strict: raise what goes wrong in here instead of warning once and going on.

    Attributes:
        products: Hessian-vector products of the last reading.
        seconds: that it took.
        gradients: the same over the time of one gradient with its graph.

    Raises:
        ValueError: if an argument is out of its range; at fit start, if ``training_step`` optimizes by
            hand, parameters are sharded, or a batch is needed before the first one.
        TypeError: at fit start, if the module has no such method.
    """

    quantity: ClassVar[str] = "sharpness"
    runs_module = True

    def __init__(
        self,
        *,
        every_n_steps: int | Schedule | EpochEnds = 1000,
        data: Any = None,
        samples: int | None = 256,
        loss: str | Callable[[nn.Module, Any], Any] = "training_step",
        vectors: int = 8,
        lanczos_steps: int = 12,
        per_layer: bool = False,
        seed: int = 0,
        keep: Keep = LAST_ROWS,
        name: str | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, keep=keep, name=name, strict=strict)
        at_least("samples", samples, 1)
        at_least("vectors", vectors, 0)
        at_least("lanczos_steps", lanczos_steps, 0)
        if vectors + lanczos_steps == 0:
            raise ValueError("vectors or lanczos_steps must be positive, got 0 and 0")
        if per_layer and not vectors:
            raise ValueError("per_layer=True needs vectors of at least 1, got 0")
        self.data, self.samples, self.loss = data, samples, loss
        self.vectors, self.lanczos_steps, self.per_layer = vectors, lanczos_steps, per_layer
        self.seed = seed
        self.products, self.seconds, self.gradients = 0, 0.0, 0.0
        self.end_run()

    @override
    def settings(self) -> dict[str, Any]:
        return {"loss": named(self.loss), "seed": self.seed}

    @override
    def end_run(self) -> None:
        self._structure: Any = None  # of a batch; its leaves are in the state

    @override
    def check(self, run: Run) -> None:
        super().check(run)
        run.function(self.loss, argument="loss")
        if self.loss == "training_step" and not run.automatic:
            raise ValueError(
                "loss='training_step' makes steps of its own under manual optimization; pass the name of a "
                "method that takes a batch and returns the loss, or a function of (module, batch)"
            )
        if self.data is None and getattr(self.schedule, "at_start", False):
            raise ValueError(
                f"every_n_steps={self.schedule!r} reads before there is a batch; pass data, or at_start=False"
            )

    @override
    def start(self, seen: Observation) -> None:
        if self.data is None:
            run = seen.run
            leaves, self._structure = tree_flatten(run.batch)
            parts = self._gathered(leaves, run)
            # A resumed run goes on with the first one's, if they are still there.
            if self.held.again(run, seen.state.get("samples"), taken=parts) is None:
                if "samples" in seen.state:
                    run.tell(f"{type(self).__name__} goes on with other samples: {LOST}.")
                seen.state["samples"] = self.held.take(parts, run)

    def _gathered(self, leaves: list[Any], run: Run) -> list[list[Any]]:
        """Return the leaves of all ranks' batches, in the order of ranks."""
        odd = sorted({type(leaf).__name__ for leaf in leaves if not isinstance(leaf, _STORABLE)})
        if odd:
            raise TypeError(
                f"a probe batch must be made of tensors, numbers and strings, got {', '.join(odd)}; pass data"
            )
        if rows_of(leaves) and self.samples is not None:
            leaves = cut(leaves, slice(max(1, self.samples // run.ranks.size)))
        return run.ranks.gather(tree_map(_kept, leaves))

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
    def read(self, seen: Observation) -> Iterator[Reading]:
        if self.data is None and self.held.samples is None:  # taking them failed, and a warning has said so
            return
        began = perf_counter()
        run = seen.run
        with run.sandbox.open(full_precision=True, seed=self.seed, twice_differentiable=True) as apart:
            named = [(name, p) for name, p in apart.module.named_parameters() if p.requires_grad]
            loss, product = self._prepare(seen, apart, [p for _, p in named])
            gradient = (perf_counter() - began) or 1.0
            values = dict(self._curvature(seen.step, named, product))
        self.seconds = perf_counter() - began
        self.gradients = self.seconds / gradient
        values["loss"] = loss
        line = line_of(run.optimizers)
        if line is not None:
            values["line"] = line
            values |= {"ratio": float(values["top"]) / line} if "top" in values else {}
        for key, value in values.items():
            layer, _, what = key.rpartition("/")
            if not math.isnan(value):
                yield Reading(layer, what, value)

    def _prepare(
        self, seen: Observation, apart: Apart, parameters: Sequence[Tensor]
    ) -> tuple[float, Product]:
        """Return the loss of the probe batch and the product with its Hessian, over all ranks."""
        ranks = seen.run.ranks
        if not parameters:
            raise ValueError("the module has no parameters that are trained")
        if self.data is not None:
            leaves, structure = tree_flatten(self.data)
            parts = self._shared(leaves, ranks.size)
        else:
            parts, structure = self.held.samples, self._structure
        sizes = [sample_count(leaves) or 1 for leaves in parts]
        own: list[tuple[float, Product]] = []
        total = torch.zeros((), dtype=torch.float64)
        # A resumed run may have another number of ranks than there are parts.
        for leaves, size in list(zip(parts, sizes, strict=True))[ranks.rank :: ranks.size]:
            share = apart.place(tree_unflatten(leaves, structure))
            loss = training_loss(apart, share, self.loss)
            weight = size / sum(sizes)
            own.append((weight, hessian_product(loss, parameters)))
            total += weight * float(loss.detach())

        def product(vector_P: Tensor) -> Tensor:
            self.products += 1
            found = torch.zeros_like(vector_P)
            for weight, multiply in own:
                found.add_(multiply(vector_P), alpha=weight)
            return ranks.total(found)

        return float(ranks.total(total)), product

    def _curvature(
        self, step: int, named: Sequence[tuple[str, Tensor]], product: Product
    ) -> Iterator[tuple[str, float]]:
        self.products = 0
        sizes = [p.numel() for _, p in named]
        first = named[0][1]
        seed = self.seed + 1_000_003 * step  # others at each step: averages over time gain
        options: dict[str, Any] = {"seed": seed, "device": first.device, "dtype": first.dtype}
        if self.vectors:
            trace = hutchinson_trace(product, sizes, vectors=self.vectors, **options)
            yield "trace", float(trace.value)
            yield "trace_error", float(trace.error)
            if self.per_layer:
                for layer, value in _by_layer([name for name, _ in named], trace.blocks).items():
                    yield f"{layer}/trace", float(value)
        if self.lanczos_steps:
            top = lanczos_top(product, sum(sizes), steps=self.lanczos_steps, **options)
            yield "top", float(top.value)
            yield "top_error", float(top.error)


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
