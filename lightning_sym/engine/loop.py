"""The engine driven by a plain training loop, also Fabric's: the same monitors, the same numbers."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import nn
from typing_extensions import override

from lightning_sym.engine.engine import Engine
from lightning_sym.engine.loggers import Loggers
from lightning_sym.engine.run import Run
from lightning_sym.engine.seats import is_monitor
from lightning_sym.sandbox import Sandbox

#: What takes readings: a TensorBoard ``SummaryWriter``, a logger of Lightning's or Fabric's, or a function of
#: ``{key: value}`` and the step.
Sink = Any


def watch(
    module: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    monitors: Any,
    *,
    to: Sink | Sequence[Sink] = (),
    accumulate: int = 1,
    scaler: Any = None,
    precision: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Watching:
    """Let monitors watch a training loop of one's own.

    A step is observed from the end of the one before it to the end of its ``optimizer.step()``; with several
    optimizers, until each has stepped. Tell it the batch at the head of a step where labels, the batch's
    size or the module's input are wanted, and with a ``scaler``, which may skip a step::

        with watch(model, optimizer, monitors(), to=SummaryWriter()) as watching:
            for x, y in loader:
                watching.batch((x, y))
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    Passes between two steps are taken for the step if they record gradients; run validation under
    ``torch.no_grad()``. Readings are in ``monitor.history``, under the module's own names.

    Args:
        module: what is trained; wrappers of DDP and Fabric are looked through.
        optimizer: the optimizer, or all of them.
        monitors: a monitor, or several (:func:`~lightning_sym.callbacks.monitors`), also lists in a list.
        to: who takes readings besides the histories: a TensorBoard ``SummaryWriter``, a logger of Lightning's
            or Fabric's, a function of ``({key: value}, step)``, or several.
        accumulate: backward passes a step, each of a loss that is divided by this number.
        scaler: the ``torch.amp.GradScaler``, if there is one.
        precision: makes the context that forward passes run in, such as
            ``lambda: torch.autocast("cuda", torch.bfloat16)``; for what monitors run themselves.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if an argument is out of its range, a glob matches no layer, or parameters are kept in
            pieces in a way that a monitor can't deal with.
    """
    return Watching(
        module, optimizer, monitors, to=to, accumulate=accumulate, scaler=scaler, precision=precision
    )


class LoopRun(Run):
    """A plain loop's fit."""

    reports_steps = True

    def __init__(
        self,
        module: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        *,
        sinks: list[Sink],
        accumulate: int,
        scaler: Any,
        precision: Callable[[], AbstractContextManager[Any]] | None,
    ) -> None:
        super().__init__(module)
        self.accumulated, self._scaler = accumulate, scaler
        self._loggers = Loggers(sinks, self.tell)
        self._optimizers = optimizers
        self.steps = 0
        self.stopped = False
        self.sandbox = Sandbox(module, precision=precision or contextlib.nullcontext)

    @property
    @override
    def step(self) -> int:
        return self.steps

    @property
    @override
    def logger_step(self) -> int:
        """The steps made when the one that is observed has ended."""
        return self.steps + 1

    @property
    @override
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return self._optimizers

    @property
    def loss_scale(self) -> float:  # type: ignore[override]
        """What the gradient scaler multiplies the loss by."""
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    @override
    def stop(self) -> None:
        self.stopped = True

    @override
    def send(
        self, values: Mapping[str, float], media: Mapping[str, Any], step: int, *, taken: int
    ) -> list[str]:
        return self._loggers.send(values, media, step) if self.ranks.rank == 0 else []


class Watching:
    """Watches a loop inside of its ``with`` block; made by :func:`watch`.

    Attributes:
        monitors: the monitors.
        engine: what they read from.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        monitors: Any,
        *,
        to: Sink | Sequence[Sink],
        accumulate: int,
        scaler: Any,
        precision: Callable[[], AbstractContextManager[Any]] | None,
    ) -> None:
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"accumulate must be a positive integer, got {accumulate!r}")
        _check(module, to=to, scaler=scaler, precision=precision)
        several = isinstance(optimizer, Sequence) and not isinstance(optimizer, str)
        optimizers = [_torch_optimizer(each) for each in (optimizer if several else [optimizer])]  # type: ignore[union-attr, list-item]
        if not optimizers:
            raise ValueError("optimizer must be an optimizer or several, got none")
        self.monitors = list(_flat(monitors))
        if not self.monitors:
            raise ValueError("monitors must be a monitor or several, got none")
        for each in self.monitors:
            if isinstance(each, type) or not is_monitor(each):
                raise TypeError(f"monitors must be a monitor or several of them, got {type(each).__name__}")
        sinks = list(to) if isinstance(to, Sequence) else [to]
        self._run = LoopRun(
            _unwrapped(module),
            optimizers,
            sinks=sinks,
            accumulate=accumulate,
            scaler=scaler,
            precision=precision,
        )
        self.engine = Engine(self._run, self.monitors)
        self._handles: list[Any] = []
        self._window = contextlib.ExitStack()
        self._told = 0  # batches since the last step
        self._stepped: set[int] = set()
        self._scaled = scaler is not None
        self._wants_batch = self._scaled or any(map(_needs_batch, self.monitors))
        self._reminded = False

    def __enter__(self) -> Self:
        self.engine.start()
        self.engine.begin()
        self._handles = [o.register_step_post_hook(self._after_step) for o in self._run.optimizers]
        self._window.enter_context(self.engine.in_step())
        self._begin_step()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._window.close()
        self.engine.close(ended=kind is None)

    @property
    def stop(self) -> bool:
        """Whether a monitor asks for the loop to end (:class:`~lightning_sym.callbacks.Diagnosis`)."""
        return self._run.stopped

    def batch(self, batch: Any) -> None:
        """Say which batch is run next, at the head of a step (of each of its batches, if several)."""
        self.engine.check_batch(batch)
        first = self._told == 0
        if self.engine.armed and self._told >= self._run.accumulated:
            self.engine.drop_step()  # a gradient scaler has skipped the step
            first, self._told = True, 0
        self._told += 1
        if self.engine.armed and first:
            self.engine.set_batch(batch)
        elif self.engine.armed or first:
            self.engine.batch_start(batch)

    def loss(self, loss: Any) -> None:
        """Tell the loss of the batch, for monitors that show it."""
        self._run.saw_loss(loss)

    def epoch_end(self) -> None:
        """Say that an epoch has ended, for monitors that read then."""
        self.engine.epoch_end()
        self._run.epoch += 1

    def flush(self) -> None:
        """Publish readings of monitors with ``deferred=True`` that are still computed; all ranks call it."""
        self.engine.flush()

    def _remind(self) -> None:
        """Say once what is not read, since no batch was told; the other monitors read from the next step on.

        Raises:
            ValueError: if a monitor that is not read is strict.
        """
        if self._reminded:
            return
        self._reminded = True
        lost = [monitor for monitor in self.monitors if self._scaled or _needs_batch(monitor)]
        names = ", ".join(dict.fromkeys(type(monitor).__name__ for monitor in lost))
        who = "a gradient scaler, which may skip a step," if self._scaled else names
        what = "nothing is read" if self._scaled else "these read nothing"
        said = f"{who} needs watching.batch(batch) at the head of each step; without it {what}"
        if any(monitor.strict for monitor in lost):
            raise ValueError(said)
        warnings.warn(said, stacklevel=3)
        if not self._scaled:
            self.engine.leave_out(lost)
            self._wants_batch = False

    def _begin_step(self) -> None:
        self._told, self._stepped = 0, set()
        if not self._wants_batch:
            self.engine.batch_start(None)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if threading.get_ident() != self.engine.thread:
            return  # another thread trains with the same optimizer
        if not any(optimizer is each for each in self._run.optimizers):
            return  # a wrapper's, around the step that was counted
        self._run.steps += 1
        if self._wants_batch and not self._told:
            self._remind()
        self._stepped.add(id(optimizer))
        if self.engine.armed:
            self.engine.stepped(optimizer)
        if len(self._stepped) == len(self._run.optimizers):
            self.engine.batch_end()
            self._begin_step()


def _flat(monitors: Any) -> Iterator[Any]:
    """Yield one by one what may stand in lists, such as the monitors of a preset."""
    if isinstance(monitors, Iterable) and not isinstance(monitors, str) and not is_monitor(monitors):
        for each in monitors:
            yield from _flat(each)
    else:
        yield monitors


def _needs_batch(monitor: Any) -> bool:
    """Return whether a monitor runs the module on the batch of a due step."""
    return bool(monitor.runs_module and not monitor.reads_epochs)


def _check(module: Any, *, to: Any, scaler: Any, precision: Any) -> None:
    """Refuse arguments of the wrong type.

    Raises:
        TypeError: naming the argument.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    for sink in to if isinstance(to, Sequence) and not isinstance(to, str) else [to]:
        if not (callable(sink) or hasattr(sink, "add_scalar") or hasattr(sink, "log_metrics")):
            raise TypeError(
                "to must be a SummaryWriter, a logger, a function of the readings and the step, or several, "
                f"got {type(sink).__name__}"
            )
    if scaler is not None and not hasattr(scaler, "get_scale"):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
    if precision is not None and not callable(precision):
        raise TypeError(f"precision must be a function that makes a context, got {type(precision).__name__}")


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside of a wrapper of Fabric's or another one's.

    Raises:
        TypeError: if there is none.
    """
    inner = optimizer
    # Fabric's is of a class that is made for the one inside, which it inherits from as well.
    while not isinstance(inner, torch.optim.Optimizer) or "_FabricOptimizer" in {
        kind.__name__ for kind in type(inner).__mro__
    }:
        if not hasattr(inner, "optimizer"):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        inner = inner.optimizer
    return inner


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the user's module inside of DDP's and Fabric's wrappers."""
    while type(module).__name__ in ("DistributedDataParallel", "_FabricModule"):
        module = module.module  # type: ignore[assignment]
    return module
