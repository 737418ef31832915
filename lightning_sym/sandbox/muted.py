"""Copies that nobody hears: no global hook fires on them, and those of LightningModules log nothing."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Iterable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sym.sandbox.copier import Copier


def lightning_kind(module: nn.Module) -> type | None:
    """Return Lightning's class that a module is derived from, of either package, without importing any."""
    for kind in type(module).__mro__:
        if kind.__name__ == "LightningModule" and kind.__module__.startswith(
            ("lightning.", "pytorch_lightning.")
        ):
            return kind
    return None


#: The methods of ``nn.Module`` that look for global hooks.
UNHEARD = ("_call_impl", "_get_backward_hooks", "_get_backward_pre_hooks")


def without_global_hooks(copies: Iterable[nn.Module]) -> None:
    """Let copied modules run without the hooks that are registered for all modules, if there are any.

    Only the copies are changed: other modules, of other threads too, keep theirs.
    """
    space = vars(torch.nn.modules.module)
    hooks = [name for name in space if name.startswith("_global_") and name.endswith("_hooks")]
    if not any(space[name] for name in hooks):
        return
    none = {name: OrderedDict[int, Any]() for name in hooks}
    copies = [copy for copy in copies if not isinstance(copy, torch.jit.ScriptModule)]  # takes no attributes
    for name in UNHEARD:
        unheard = FunctionType(vars(nn.Module)[name].__code__, {**space, **none}, name)
        for copy in copies:
            object.__setattr__(copy, name, partial(unheard, copy))  # an attribute goes before the method


class _Muted:
    """What copied LightningModules do differently: they log nothing and step copies of optimizers."""

    _apart_copier: Copier
    _apart_loggers: type

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log nothing."""

    log_dict = print = toggle_optimizer = untoggle_optimizer = log

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run backward, without the trainer's hooks."""
        loss.backward(*args, **kwargs)

    @property
    def loggers(self) -> list[Any]:
        """Loggers that drop everything, as many as the trainer has."""
        loud = getattr(vars(self).get("_fabric") or vars(self).get("_trainer"), "loggers", None) or []
        return [self._apart_loggers() for _ in loud]

    @property
    def logger(self) -> Any:
        """The first of :attr:`loggers`, or None."""
        return next(iter(self.loggers), None)

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """Return copies of the optimizers, of the copied parameters."""
        trainer = vars(self).get("_trainer")
        held = self._fabric_optimizers if trainer is None else trainer.optimizers  # type: ignore[attr-defined]
        optimizers = [self._apart_copier(each) for each in held]
        return optimizers[0] if len(optimizers) == 1 else optimizers

    def lr_schedulers(self) -> Any:
        """Return copies of the schedulers, of the copied optimizers."""
        configs = vars(self)["_trainer"].lr_scheduler_configs
        schedulers = [self._apart_copier(config.scheduler) for config in configs]
        for scheduler in schedulers:
            if getattr(scheduler, "_step_count", None) == 1:  # or it warns that its optimizer is another
                scheduler._step_count = 2
        return (schedulers[0] if len(schedulers) == 1 else schedulers) or None


def mute(module: nn.Module, kind: type, copier: Copier) -> None:
    """Change the class of a copied LightningModule to one derived from it that is silent.

    Args:
        module: the copy.
        kind: what :func:`lightning_kind` returned for it.
        copier: what it was copied by.
    """
    package = kind.__module__.partition(".core")[0]
    own = type(module)
    space: dict[str, Any] = {
        **{name: value for name, value in vars(_Muted).items() if not name.startswith("__")},
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "_apart_copier": copier,
        "_apart_loggers": importlib.import_module(f"{package}.loggers.logger").DummyLogger,
    }
    # Not simply derived: a metaclass or __init_subclass__ of the user's (a registry, say) is not told of it.
    muted = type.__new__(type(own), own.__name__, (kind,), space)
    muted.__bases__ = (own,)
    module.__class__ = muted  # type: ignore[assignment]
