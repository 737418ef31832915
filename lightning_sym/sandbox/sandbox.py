"""Running a user's module outside of its step: on a copy that shares nothing, so that nothing of it changes.

A pass of ours on the module itself would count its calls, move its buffers and metrics, fire its hooks, reach
its logs and draw from its random state. See :class:`Sandbox`.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_sym.sandbox.copier import Copier, NotApartError, Uncopied
from lightning_sym.sandbox.muted import UNHEARD, lightning_kind, mute, without_global_hooks
from lightning_sym.sandbox.restore import (
    EAGER,
    PLAIN_ATTENTION,
    PLAIN_RECURRENCE,
    class_counters,
    random_states,
    settings_of,
)

__all__ = ["Apart", "NotApartError", "Sandbox", "training_loss"]

_HALF = (torch.float16, torch.bfloat16)


def _identity(x: Any) -> Any:
    return x


class Sandbox:
    """Runs a module apart from itself, as often as wanted.

    Inside of :meth:`open` the module is copied (:class:`~lightning_sym.sandbox.copier.Copier`), and whatever
    the copy does stays in it: parameters, gradients, buffers, train modes, attributes, lists, counters and
    metrics of the original do not change, none of its hooks and none that torch has for all modules fires,
    what it logs reaches nobody, and the random states of torch (of the CPU and the module's devices), numpy
    and Python are put back. Hooks that change what a module computes are left out, too, except torch's own
    (weight and spectral normalisation, pruning, lazy layers). Globals that the module's methods change are
    outside of all this.

    Args:
        module: the module; it is only read.
        precision: returns the context in which the fit runs passes, such as
            ``trainer.precision_plugin.forward_context``.
        convert: casts inputs to the fit's precision, such as ``trainer.precision_plugin.convert_input``.
        trainer: the running trainer, whose optimizers' settings are put back after use: a training step may
            change a learning rate.

    Example:
        >>> sandbox = Sandbox(nn.Linear(3, 2))
        >>> with sandbox.open() as apart:
        ...     apart("forward", torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
        convert: Callable[[Any], Any] = _identity,
        trainer: Any = None,
    ) -> None:
        self.module = module
        self.precision, self.convert, self.trainer = precision, convert, trainer

    @contextlib.contextmanager
    def open(
        self,
        *,
        train: bool | None = False,
        grad: bool = False,
        full_precision: bool = False,
        seed: int | None = None,
        twice_differentiable: bool = False,
    ) -> Iterator[Apart]:
        """Copy the module as it is now and let the copy run; eagerly, where it is compiled.

        Args:
            train: put the copy into training or evaluation mode; ``None``: each submodule as it is.
            grad: record graphs; else passes run under ``no_grad``.
            full_precision: make half parameters and buffers float32, and switch autocast off.
            seed: of what is drawn inside; ``None``: as the fit would draw now.
            twice_differentiable: use operations that have second derivatives (attention as plain products);
                records graphs.

        Yields:
            What runs the copy, until the context is left.

        Raises:
            NotApartError: if the module is sharded over ranks, can't be copied, or runs the original.
        """
        _refuse_sharded(self.module)
        grad = grad or twice_differentiable
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(grad))
            stack.enter_context(random_states(self.module, seed))
            stack.enter_context(settings_of(self.trainer))
            copier = Copier(self.module)
            copy = copy_with(copier, self.module, self.trainer)
            stack.callback(_let_go, copier)
            without_global_hooks(copier.memo[id(original)] for original in copier.modules)
            stack.enter_context(class_counters(copier.modules))
            if full_precision:
                _widen(copy)
            if train is not None:
                copy.train(train)
            if "torch._dynamo" in sys.modules:  # else nothing has been compiled
                stack.enter_context(EAGER.on())
            if twice_differentiable:
                stack.enter_context(PLAIN_ATTENTION.on())
            apart = Apart(copy, copier, self.precision, self.convert, full_precision=full_precision)
            recurrent = any(isinstance(child, nn.RNNBase) for child in copy.modules())
            if grad and recurrent and apart.device.type == "cuda":
                # cuDNN's has no gradient in evaluation mode, and no second one.
                stack.enter_context(PLAIN_RECURRENCE.on())
            stack.enter_context(apart._guarded())
            yield apart


class Apart:
    """The copy of a module in an open :class:`Sandbox`.

    Attributes:
        module: the copy, with parameters of its own (leaves without gradients) under the same names.
        device: where its first parameter, or buffer, is.
    """

    def __init__(
        self,
        module: nn.Module,
        copier: Copier,
        precision: Callable[[], AbstractContextManager[Any]],
        convert: Callable[[Any], Any],
        *,
        full_precision: bool,
    ) -> None:
        self.module = module
        first = next((t for t in (*module.parameters(), *module.buffers())), None)
        self.device = torch.device("cpu") if first is None else first.device
        self._originals = list(copier.modules)
        self._precision, self._convert, self._full = precision, convert, full_precision
        self._tried: list[Any] = []
        self._fault: str | None = None

    def __call__(self, how: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the copy in the precision of the fit.

        Args:
            how: ``"forward"`` (through ``__call__``), the name of another method, or a function that gets
                the copy first.
            *args: what it takes.
            **kwargs: what it takes by name.

        Returns:
            What it returns.

        Raises:
            NotApartError: if the original was called, or its parameters or buffers used.
            TypeError: if the module has no such method.
        """
        if isinstance(how, str) and not callable(getattr(self.module, how, None)):
            raise TypeError(
                f"forward={how!r} is not a method of {type(self.module).__name__}; pass the name of one, "
                "or a function of the module and its input"
            )
        with ExitStack() as stack:
            stack.enter_context(self._precision())
            if self._full:
                if torch.get_default_dtype() in _HALF:
                    stack.callback(torch.set_default_dtype, torch.get_default_dtype())
                    torch.set_default_dtype(torch.float32)
                for kind in {self.device.type, "cpu"}:
                    stack.enter_context(torch.autocast(kind, enabled=False))
            if how not in self._tried:  # which modules run is taken to be the same each time
                stack.enter_context(_Watch(self._originals, self._note))
            if how == "forward":
                found = self.module(*args, **kwargs)
            elif isinstance(how, str):
                found = getattr(self.module, how)(*args, **kwargs)
            else:
                found = how(self.module, *args, **kwargs)
        if self._fault is not None:  # the module caught the exception
            raise NotApartError(self._fault)
        self._tried.append(how)
        return found

    def place(self, x: Any) -> Any:
        """Return a copy of some input on the module's device, in the precision of its passes, without graphs.

        Args:
            x: a tensor, or tuples, lists, mappings and dataclasses of tensors. Other objects are moved by a
                ``to(device)`` of their own, if they have one, and keep their type of numbers.

        Returns:
            The same structure. Floating point tensors are in the precision of the fit, or, with
            ``full_precision``, in float32 where that would be half.
        """
        return self._moved(Copier()(x))

    def _moved(self, x: Any) -> Any:
        """Move a structure of which nobody else has a part."""
        if isinstance(x, Uncopied):
            return x
        if isinstance(x, Tensor):
            return self._cast(x.to(self.device))
        if callable(getattr(x, "to", None)):
            return x.to(self.device)
        if isinstance(x, tuple):
            items = [self._moved(item) for item in x]
            return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
        if isinstance(x, list):
            x[:] = [self._moved(item) for item in x]
        elif isinstance(x, Mapping):
            for key in list(x):
                x[key] = self._moved(x[key])  # type: ignore[index]
        elif is_dataclass(x) and not isinstance(x, type):
            for field in fields(x):
                object.__setattr__(x, field.name, self._moved(getattr(x, field.name)))
        return x

    def _cast(self, x: Tensor) -> Tensor:
        y = self._convert(x)
        return x.float() if self._full and y.dtype in _HALF else y

    def _note(self, fault: str) -> None:
        self._fault = self._fault or fault
        raise NotApartError(fault)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Refuse, in this thread, calls of original modules."""
        thread = threading.get_ident()

        def refuse(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == thread:
                self._note(_runs_original(type(module).__name__))

        with ExitStack() as stack:
            for module in self._originals:
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                stack.callback(module.register_forward_pre_hook(refuse, prepend=True).remove)
            yield


def training_loss(
    apart: Apart, batch: Any, how: str | Callable[[nn.Module, Any], Any] = "training_step"
) -> Tensor:
    """Return the loss of a batch.

    Args:
        apart: the copy to run.
        batch: what the step takes, placed (:meth:`Apart.place`).
        how: a method of the module, or a function of the module and a batch. A step is called as Lightning
            calls it: with the batch and, whatever their names, 0 for the batch's index and for a required
            third argument.

    Returns:
        Scalar ``[]``, or whatever shape of one entry the step returns.

    Raises:
        TypeError: if the module has no such method, or what comes out is not a scalar tensor or a mapping
            with one under ``"loss"``.
    """
    more: tuple[int, ...] = ()
    if isinstance(how, str) and callable(step := getattr(apart.module, how, None)):
        more = _indices(step, is_step=how.endswith("_step"))
    found = apart(how, batch, *more)
    loss = found.get("loss") if isinstance(found, Mapping) else found
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        name = repr(how) if isinstance(how, str) else getattr(how, "__name__", type(how).__name__)
        raise TypeError(
            f"loss={name} must return a scalar tensor, or a dict with one under 'loss', got {got}; pass "
            "another method or function as loss="
        )
    return loss


def _indices(step: Callable[..., Any], *, is_step: bool) -> tuple[int, ...]:
    """Return the indices that a step takes after its batch."""
    try:
        parameters = list(inspect.signature(step).parameters.values())
    except (TypeError, ValueError):
        return (0,) if is_step else ()
    placed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    count = 0
    for place, parameter in enumerate(placed[1:3]):
        required = parameter.default is parameter.empty
        if required or parameter.name == "batch_idx" or (is_step and place == 0):
            count += 1
    anything = any(p.kind == p.VAR_POSITIONAL for p in parameters)
    return (0,) * max(count, int(is_step and anything))


def _runs_original(name: str) -> str:
    return (
        f"the module runs its original {name} instead of the copy's, through a global or a function that "
        "holds on to it; use self, and what is reached from it"
    )


class _Watch(TorchDispatchMode):
    """Refuses operations on the originals' parameters and buffers: sees what calls of modules don't show."""

    def __init__(self, originals: list[nn.Module], note: Callable[[str], None]) -> None:
        super().__init__()
        self._note, self._owners = note, {}
        for module in originals:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and (place := _storage(tensor)):
                    self._owners[place] = type(module).__name__

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Do without torch's wrapper that keeps the compiler out: it imports it, and all is eager."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, unless it uses a tensor of an original."""
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and (owner := self._owners.get(_storage(leaf))):
                self._note(_runs_original(owner))
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    """Return the address of a tensor's numbers, or 0 where it has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError, ValueError):  # sparse, on no device, without a shape yet
        return 0


def copy_with(copier: Copier, module: nn.Module, trainer: Any = None) -> nn.Module:
    """Copy a module; Lightning's ones hang on the same trainer and say nothing."""
    hung: dict[str, list[Any]] = {"_trainer": [trainer], "_fabric": []}
    for child in module.modules():
        for name, found in hung.items():
            found.append(vars(child).get(name))
    for thing in (*hung["_trainer"], *hung["_fabric"]):
        if thing is not None:
            for shared in (thing, getattr(thing, "strategy", None)):
                copier.put(shared, shared)
    copy = copier(module)
    for original in copier.modules:
        child = copier.memo[id(original)]
        for name in hung:
            if (thing := vars(original).get(name)) is not None:
                vars(child)[name] = thing  # their __getstate__ leaves it out
        if (kind := lightning_kind(child)) is not None:
            if trainer is not None and original is module:
                vars(child)["_trainer"] = trainer
            mute(child, kind, copier)
        if isinstance(child, nn.RNNBase) and any(p.is_cuda for p in child.parameters()):
            child.flatten_parameters()  # or cuDNN warns at each pass
    return copy


def _let_go(copier: Copier) -> None:
    """Cut a copy loose from the trainer, the original and itself."""
    for original in copier.modules:
        child = copier.memo[id(original)]
        for name in UNHEARD:
            vars(child).pop(name, None)
        for name in ("_trainer", "_fabric"):
            if name in vars(child):
                vars(child)[name] = None
    copier.clear()


def _widen(copy: nn.Module) -> None:
    for tensor in (*copy.parameters(), *copy.buffers()):
        if tensor.dtype in _HALF:
            tensor.data = tensor.data.float()
    for child in copy.modules():
        if vars(child).get("_dtype") in _HALF:  # what Lightning's modules say their dtype is
            vars(child)["_dtype"] = torch.float32


def _refuse_sharded(module: nn.Module) -> None:
    """Raise where a rank holds only a part of the parameters.

    Raises:
        NotApartError: if so.
    """
    distributed: Any = sys.modules.get("torch.distributed.tensor")
    sharded = None
    if distributed is not None and any(isinstance(p, distributed.DTensor) for p in module.parameters()):
        sharded = "DTensor"
    for child in module.modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(child).__mro__):
            sharded = "FullyShardedDataParallel"
    for parameter in module.parameters():
        if getattr(parameter, "_fsdp_flattened", False):
            sharded = "FullyShardedDataParallel"
        elif hasattr(parameter, "ds_tensor"):
            sharded = "DeepSpeed ZeRO-3"
    if sharded is not None:
        raise NotApartError(
            f"{type(module).__name__} can't be run apart from itself: its parameters are sharded over ranks "
            f"({sharded}), and a copy holds only this rank's"
        )
