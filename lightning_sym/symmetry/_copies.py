"""A copy of the user's module that can be run without anything of the user's noticing it."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves

from lightning_sym.symmetry._precision import doubled

#: Hooks that compute a weight: without them a module can't run.
_COMPUTING = (WeightNorm, SpectralNorm, BasePruningMethod)
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
_NOTICES = ("log", "log_dict", "print")  # methods of a LightningModule that tell its trainer something


class Copied:
    """A copy of a module in double precision, on the CPU, in evaluation mode.

    No hook of the user's fires on it, global ones included; functions that captured the module (a lambda
    kept as an attribute) run the copy; what a LightningModule logs goes nowhere.

    Args:
        module: the user's.

    Attributes:
        module: the copy.
        where: the names of the modules that are running, the innermost last.
        watch: is told the name and the output of each module that has run.
        foreign: numbers of the tensors of the user's own module, which the copy should not meet.

    Raises:
        TypeError: if the module can't be copied.
        ValueError: if a parameter has no shape yet (lazy layers).
    """

    def __init__(self, module: nn.Module) -> None:
        own = [*module.parameters(), *module.buffers()]
        if any(torch.nn.parameter.is_lazy(tensor) for tensor in own):
            raise ValueError("module must have been run once: it has lazy parameters without a shape")
        self.foreign = {id(tensor) for tensor in own}
        self.where: list[str] = []
        self.watch: Callable[[str, Any], None] | None = None
        self.module = _deep_copy(module)
        self.module._apply(lambda tensor: doubled(tensor.cpu()))
        self.module.eval()
        for name, child in self.module.named_modules():
            if "_trainer" in vars(child):
                _mute(child)
            # An attribute goes before the class's method: so neither hooks nor global hooks are looked at.
            object.__setattr__(child, "_call_impl", partial(self._call, name, child))
            child._compiled_call_impl = None

    def close(self) -> None:
        """Take the copy's own references to itself off it, so that its memory is free at once."""
        for child in self.module.modules():
            vars(child).pop("_call_impl", None)

    def _call(self, name: str, child: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.where.append(name)
        try:
            for hook in child._forward_pre_hooks.values():
                hook(child, args)
            out = child.forward(*args, **kwargs)
            if self.watch is not None:
                self.watch(name, out)
            return out
        finally:
            self.where.pop()


def _mute(child: nn.Module) -> None:
    """Let a LightningModule keep its trainer, and tell it nothing."""
    kind = type(child)
    silent = dict.fromkeys(_NOTICES, _nothing)
    child.__class__ = type(kind.__name__, (kind,), {**silent, "__module__": kind.__module__})


def _nothing(self: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Stand for a method that tells somebody something."""


def _deep_copy(module: nn.Module) -> nn.Module:
    """Copy a module without its hooks and the trainer it hangs on, and with its functions bound anew."""
    memo: dict[int, Any] = {}
    children = list(module.modules())
    for child in children:
        own = vars(child)
        memo |= {id(hung): hung for hung in (own.get("_trainer"), own.get("_fabric")) if hung is not None}
        # What it computed and kept belongs to a graph, and can't be copied with it.
        kept = [leaf for leaf in tree_leaves(own) if isinstance(leaf, Tensor) and not leaf.is_leaf]
        memo |= {id(tensor): tensor.detach().clone() for tensor in kept}
        memo |= {id(own[name]): OrderedDict() for name in _HOOKS if name in own}
    functions = _rebound(children, memo)
    try:
        copied = copy.deepcopy(module, memo)
    except Exception as error:
        raise TypeError(
            f"module must be one that copy.deepcopy can copy, and {type(module).__name__} is not: {error}"
        ) from error
    for child in children:
        hooks = {
            number: copy.deepcopy(hook, memo)
            for number, hook in child._forward_pre_hooks.items()
            if isinstance(hook, _COMPUTING)
        }
        if hooks and id(child) in memo:
            memo[id(child)]._forward_pre_hooks.update(hooks)
    for function in functions:
        _fill(*function, memo)
    return copied


def _rebound(children: list[nn.Module], memo: dict[int, Any]) -> list[tuple[FunctionType, FunctionType]]:
    """Put empty twins of the functions that modules keep into the memo: deepcopy copies no function."""
    names = {id(child) for child in children}
    found: list[tuple[FunctionType, FunctionType]] = []
    for child in children:
        if "_orig_mod" in child._modules:
            continue  # torch.compile makes its own anew
        for function in _functions([value for name, value in vars(child).items() if name not in _HOOKS]):
            reads_global = any(id(function.__globals__.get(n)) in names for n in function.__code__.co_names)
            kept = function.__closure__ or function.__defaults__ or function.__kwdefaults__
            if id(function) in memo or not (kept or reads_global):
                continue
            twin = FunctionType(
                function.__code__,
                dict(function.__globals__) if reads_global else function.__globals__,
                function.__name__,
                function.__defaults__,
                tuple(CellType() for _ in function.__closure__ or ()),
            )
            memo[id(function)] = twin
            found.append((function, twin))
    return found


def _functions(values: Any, seen: set[int] | None = None) -> Iterator[FunctionType]:
    """Yield the plain functions in containers, in partials, and in what functions captured, each once."""
    seen = set() if seen is None else seen
    for value in tree_leaves(values):
        if isinstance(value, partial):
            yield from _functions([value.func, list(value.args), value.keywords], seen)
        elif isinstance(value, FunctionType) and id(value) not in seen:  # methods are bound by deepcopy
            seen.add(id(value))
            yield value
            captured = [cell.cell_contents for cell in value.__closure__ or () if _is_full(cell)]
            yield from _functions([*captured, value.__defaults__, value.__kwdefaults__], seen)


def _is_full(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - raises where nothing is in it
    except ValueError:
        return False
    return True


def _fill(function: FunctionType, twin: FunctionType, memo: dict[int, Any]) -> None:
    """Give a function's twin copies of what the function captured."""

    def copied(value: Any) -> Any:
        trial = dict(memo)
        try:
            made = copy.deepcopy(value, trial)
        except Exception:  # an object of the user's that can't be copied stays
            return value
        memo.update(trial)
        return made

    for old, new in zip(function.__closure__ or (), twin.__closure__ or (), strict=True):
        if _is_full(old):
            new.cell_contents = copied(old.cell_contents)
    twin.__defaults__ = copied(function.__defaults__)
    twin.__kwdefaults__ = copied(function.__kwdefaults__)
    if twin.__globals__ is not function.__globals__:
        for name in function.__code__.co_names:
            if id(function.__globals__.get(name)) in memo:
                twin.__globals__[name] = memo[id(function.__globals__[name])]


@contextlib.contextmanager
def unnoticed(seed: int) -> Iterator[None]:
    """Run with random states of one's own, without compilation; the global ones are put back."""
    numpy: Any = sys.modules.get("numpy")
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.callback(random.setstate, random.getstate())
        if numpy is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(plain_attention())
        reseed(seed)
        yield


def reseed(seed: int) -> None:
    """Set all random states, so that a module that draws from them draws the same each time."""
    torch.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Switch the fused inference path of torch's transformer layers off; it hides what is inside."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
