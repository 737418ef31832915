"""A stand-in for the user's module: runs its training step on the side, and nothing of it gets out."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_sym.callbacks.base import undisturbed
from lightning_sym.callbacks.trainability import detached_copy

_HALF = (torch.float16, torch.bfloat16)


def stand_in(module: LightningModule, trainer: Trainer) -> LightningModule:
    """Return a copy in evaluation mode and full precision, on the same trainer, that logs nothing.

    What it does to its buffers, metrics, lists and counters stays in it.

    Args:
        module: the module being trained.
        trainer: the running trainer.
    """
    copy = cast(LightningModule, detached_copy(module))
    copy.trainer = trainer
    muted = {
        "log": _nothing,
        "log_dict": _nothing,
        "print": _nothing,
        "logger": property(lambda self: DummyLogger() if trainer.loggers else None),
        "loggers": property(lambda self: [DummyLogger() for _ in trainer.loggers]),
    }
    for child in copy.modules():
        if isinstance(child, LightningModule):
            kind = type(child)
            child.__class__ = type(kind.__name__, (kind,), {**muted, "__module__": kind.__module__})
    for tensor in [*copy.parameters(), *copy.buffers()]:
        tensor.data = whole(tensor.data)
    return copy.eval()


def _nothing(self: LightningModule, *args: Any, **kwargs: Any) -> None:
    """Stand for a method that tells somebody something."""


def whole(value: Any) -> Any:
    """Return a tensor of half precision in single precision, and all else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value


@contextlib.contextmanager
def second_derivatives(trainer: Trainer, module: LightningModule, *, seed: int) -> Iterator[None]:
    """Run a loss that can be differentiated twice: eagerly, in full precision, with its own random numbers.

    All random states and the optimizers' settings (a training step may set its learning rate) are put back.

    Args:
        trainer: the running trainer.
        module: the stand-in.
        seed: of what the loss draws: the same each time, so that it is a function of parameters alone.
    """
    settings = [(group, dict(group)) for optimizer in trainer.optimizers for group in optimizer.param_groups]
    precision = trainer.precision_plugin
    with contextlib.ExitStack() as stack:
        stack.enter_context(undisturbed(module))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.inference_mode(False))
        if not isinstance(precision, HalfPrecision):  # that would make new tensors half
            stack.enter_context(precision.forward_context())
        stack.enter_context(torch.autocast(module.device.type, enabled=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused ones have one derivative only
        for group, kept in settings:
            stack.callback(_put_back, group, kept)
        yield


def _put_back(group: dict[str, Any], kept: dict[str, Any]) -> None:
    group.clear()
    group.update(kept)


def loss_of(
    module: LightningModule, batch: Any, *, how: str | Callable[[LightningModule, Any], Any]
) -> Tensor:
    """Return the loss of a batch, by a step or method of the module or a function of (module, batch).

    Raises:
        TypeError: if what comes out is not a scalar tensor, or a dict with one under "loss".
    """
    if isinstance(how, str):
        step = getattr(module, how)
        takes = inspect.signature(step).parameters
        given = {name: 0 for name in ("batch_idx", "dataloader_idx") if name in takes}
        found = step(batch, **given)
    else:
        found = how(module, batch)
    loss = found.get("loss") if isinstance(found, dict) else found
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"loss must return a scalar tensor, or a dict with one under 'loss', got {got}")
    return loss
