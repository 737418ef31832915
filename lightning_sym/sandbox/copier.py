"""A deep copy of a user's module that shares nothing with it, functions that captured it included.

``copy.deepcopy`` takes a function as it is: a lambda that captured ``self`` runs the original from inside
of the copy. It also refuses tensors with a graph, and copies the user's hooks, which then fire.
"""

from __future__ import annotations

import builtins
import copyreg
import functools
import logging
import sys
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class NotApartError(RuntimeError):
    """The module cannot be run apart from itself; the message says why, in one sentence."""


#: Where a module keeps its hooks.
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
#: Whose classes hold no state of the user's.
_LIBRARIES = ("builtins", "torch", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics")
_CONSTANTS = (
    type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented), range, type,
    types.CodeType, types.ModuleType, property, staticmethod, classmethod, torch.dtype, torch.device,
    torch.Size, torch.layout, torch.memory_format, torch.jit.ScriptFunction, logging.Logger,
)  # fmt: skip
_CACHED = type(functools.lru_cache(len))
_LOCKS = {type(threading.Lock()): threading.Lock, type(threading.RLock()): threading.RLock}
_NOTHING = object()


class Copier:
    """Copies objects deeply; what is met twice is copied once.

    Unlike ``copy.deepcopy`` it

    * rebuilds functions over copies of what they captured (closures, defaults, and globals that are the
      module or parts of it), and replaces compiled functions by what was compiled;
    * follows bound methods of built-in objects (``a_list.append``), weak references and caches;
    * detaches tensors from their graphs and leaves gradients out;
    * leaves out hooks, except those of torch itself that modules need to compute
      (:func:`is_needed`);
    * puts a transparent module (:class:`Transparent`) for wrappers that compile, cast or synchronise;
    * gives copies of modules their own copies of mutable class attributes;
    * puts :class:`Uncopied` for what can't be copied, which raises only if it is used.

    Args:
        root: the module that will be copied; its parts are looked for among functions' globals.

    Attributes:
        memo: copies by ``id`` of the original.
        modules: the originals of all modules copied so far.
    """

    def __init__(self, root: nn.Module | None = None) -> None:
        self.memo: dict[int, Any] = {}
        self.modules: list[nn.Module] = []
        self._kept: list[Any] = []  # an id belongs to one object only while that lives
        self._parts: set[int] = set()
        self._begun: set[int] = set()
        if root is not None:
            self._parts = {id(x) for x in (*root.modules(), *root.parameters(), *root.buffers())}
        self.put(torch.default_generator, torch.default_generator)  # it is restored, not copied

    def put(self, original: Any, copy: Any) -> Any:
        """Have one object stand for another from now on, and return it."""
        self.memo[id(original)] = copy
        self.memo[id(copy)] = copy  # it may have entered itself in a registry of its class
        self._kept.append(original)
        return copy

    def clear(self) -> None:
        """Let go of all originals and copies."""
        self.memo, self.modules, self._kept, self._parts = {}, [], [], set()

    def __call__(self, x: Any) -> Any:
        """Return a copy of anything; constants are their own."""
        own = type(x)  # not isinstance: a weak proxy says that it is what it stands for
        if own in _CONSTANTS:
            return x
        found = self.memo.get(id(x), _NOTHING)
        if found is not _NOTHING:
            return found
        if issubclass(own, _CONSTANTS) and not _has_state(x):
            return x
        for kind, way in _WAYS:
            if issubclass(own, kind):
                return way(self, x)
        kinds: dict[type, Callable[[Any], Any]] = {
            dict: self._dict,
            list: self._list,
            tuple: self._tuple,
        }
        return kinds.get(own, self._object)(x)

    # One method for each kind of object.

    def _tensor(self, x: Any) -> Any:
        kind: Any = type(x)
        with torch.no_grad():
            if is_lazy(x):  # a buffer's own __deepcopy__ refuses
                y: Any = kind(x.requires_grad, x.data.device, x.data.dtype)
            elif isinstance(x, nn.Parameter) or (x.is_leaf and not x.is_inference()):
                y = x.__deepcopy__(self.memo)
            else:
                y = x.detach().clone()
        self.put(x, y)
        if not is_lazy(y) and y.is_leaf and y.grad is not None:
            y.grad = None
        for name, value in vars(x).items():  # Parameter's __deepcopy__ forgets attributes
            if name not in vars(y):
                vars(y)[name] = self(value)
        return y

    def _module(self, x: nn.Module) -> nn.Module:
        self.modules.append(x)
        if (inner := _wrapped(x)) is not None:
            return Transparent.over(x, inner, self)
        fresh: dict[str, OrderedDict[int, Any]] = {}
        for name in HOOKS:
            if (hooks := vars(x).get(name)) is not None:
                fresh[name] = self.put(hooks, OrderedDict())
        y = self._object(x)
        if isinstance(y, Uncopied):
            raise NotApartError(f"{type(x).__name__} can't be run apart from itself: {y.reason}")
        if isinstance(x, torch.jit.ScriptModule):  # it clones parameters as a part of the graph
            for old, new in zip(x.parameters(), y.parameters(), strict=True):
                new.detach_().requires_grad_(old.requires_grad)
        for name, hooks in fresh.items():
            hooks.update({key: self(hook) for key, hook in vars(x)[name].items() if is_needed(hook)})
            vars(y)[name] = hooks  # a __deepcopy__ of the module's own may have put the original's
        self._class_state(x, y)
        return y

    def _class_state(self, x: nn.Module, y: nn.Module) -> None:
        """Give a copy its own copies of mutable attributes of its class, such as a list of losses."""
        for kind in own_classes(x):
            for name, value in vars(kind).items():
                plain = name.startswith(("__", "_abc_")) or callable(value) or hasattr(type(value), "__get__")
                if name in vars(y) or (plain and not isinstance(value, nn.Module)):
                    continue
                if (copied := self(value)) is not value:
                    vars(y)[name] = copied

    def _dict(self, x: dict[Any, Any]) -> dict[Any, Any]:
        y = self.put(x, {})
        for key, value in list(x.items()):
            y[self(key)] = self(value)
        return y

    def _list(self, x: list[Any]) -> list[Any]:
        y = self.put(x, [])
        y.extend(self(item) for item in list(x))
        return y

    def _tuple(self, x: tuple[Any, ...]) -> tuple[Any, ...]:
        items = tuple(self(item) for item in x)
        if id(x) in self.memo:  # it holds a list that holds it
            return self.memo[id(x)]
        return self.put(x, x if all(a is b for a, b in zip(items, x, strict=True)) else items)

    def _function(self, x: types.FunctionType) -> Any:
        compiled = vars(x).get("_torchdynamo_orig_callable")
        if compiled is not None:
            return self.put(x, self(compiled))
        cells = tuple(self.memo.get(id(cell)) or types.CellType() for cell in x.__closure__ or ())
        names = self._captured_globals(x)
        space = dict(x.__globals__) if names else x.__globals__
        y = self.put(x, types.FunctionType(x.__code__, space, x.__name__, x.__defaults__, cells or None))
        changed = False
        for old, new in zip(x.__closure__ or (), cells, strict=True):
            changed |= self._cell(old, new, counts=not _is_of(x, "torch"))
        for name in names:
            space[name] = self(x.__globals__[name])
            changed |= space[name] is not x.__globals__[name]
        y.__defaults__, y.__kwdefaults__ = self(x.__defaults__), self(x.__kwdefaults__)
        changed |= y.__defaults__ is not x.__defaults__
        changed |= any(
            value is not (x.__kwdefaults__ or {})[k] for k, value in (y.__kwdefaults__ or {}).items()
        )
        if not changed:
            return self.put(x, x)
        y.__qualname__, y.__module__, y.__doc__ = x.__qualname__, x.__module__, x.__doc__
        vars(y).update({name: self(value) for name, value in vars(x).items()})
        return y

    def _cell(self, old: types.CellType, new: types.CellType, *, counts: bool) -> bool:
        """Fill the copy of a closure's cell; return whether it may come to differ from the original's."""
        self.put(old, new)
        try:
            contents = old.cell_contents
        except ValueError:  # empty still
            return False
        new.cell_contents = self(contents)
        # A number may be one that functions count with (nonlocal).
        return new.cell_contents is not contents or (counts and isinstance(contents, int | float | tuple))

    def _captured_globals(self, x: types.FunctionType) -> list[str]:
        """Return which global names of a function stand for parts of the module, or may lead to them."""
        if not self._parts or _is_of(x, *_LIBRARIES):
            return []
        found = []
        for name in _names(x.__code__):
            value = x.__globals__.get(name)
            owner = getattr(value, "__self__", None) if isinstance(value, types.MethodType) else value
            near = isinstance(value, types.FunctionType) and value.__globals__ is x.__globals__
            if id(owner) in self._parts or (near and value is not x):
                found.append(name)
        return found

    def _method(self, x: types.MethodType) -> Any:
        function, owner = self(x.__func__), self(x.__self__)
        same = function is x.__func__ and owner is x.__self__
        return self.put(x, x if same else types.MethodType(function, owner))

    def _cache(self, x: Any) -> Any:
        function = self(x.__wrapped__)
        same = function is x.__wrapped__
        return self.put(x, x if same else functools.lru_cache(**x.cache_parameters())(function))

    def _reference(self, x: Any) -> Any:
        proxy = isinstance(x, weakref.ProxyTypes)
        target = x.__repr__.__self__ if proxy else x()
        if target is None or (id(target) not in self.memo and id(target) not in self._parts):
            return x
        return self.put(x, (weakref.proxy if proxy else weakref.ref)(self(target)))

    def _object(self, x: Any) -> Any:
        if type(x) in _LOCKS:
            return self.put(x, _LOCKS[type(x)]())
        # These step by the strategy. To copy Fabric's, whose class is derived from torch's, would be torch's
        # occasion to wrap that class's step: hooks of the user's optimizer would then run twice.
        if any(kind.__name__ in ("LightningOptimizer", "_FabricOptimizer") for kind in type(x).__mro__):
            return self.put(x, self(x._optimizer))
        if _is_shared(x):
            return x
        try:
            return self._reconstructed(x)
        except NotApartError:
            raise
        except Exception as error:  # whatever a class raises that refuses to be pickled
            return self.put(x, Uncopied(type(x).__name__, error))

    def _reconstructed(self, x: Any) -> Any:
        if (own := getattr(type(x), "__deepcopy__", None)) is not None:
            if _is_of(own, "torch.nn.utils.parametrize"):  # what its own would do, with the memo filled first
                y = self.put(x, object.__new__(type(x)))
                state = {name: value for name, value in vars(x).items() if name != "_compiled_call_impl"}
                vars(y).update(self(state))
                return y
            if id(x) not in self._begun:
                self._begun.add(id(x))
                for value in list(getattr(x, "__dict__", {}).values()):
                    self(value)  # the memo has them ready for copy.deepcopy
            return self.put(x, x.__deepcopy__(self.memo))
        reduce = copyreg.dispatch_table.get(type(x))
        reduced = x.__reduce_ex__(4) if reduce is None else reduce(x)
        if isinstance(reduced, str):  # a global of that name
            return x
        make, arguments, state, items, pairs, set_state = (*reduced, None, None, None, None)[:6]
        y = self.put(x, make(*[self(argument) for argument in arguments]))
        if state is not None:
            state = self(state)
            if set_state is not None:
                set_state(y, state)
            elif hasattr(y, "__setstate__"):
                y.__setstate__(state)
            else:
                attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
                vars(y).update(attributes or {})
                for name, value in (slots or {}).items():
                    object.__setattr__(y, name, value)
        for item in items or ():
            y.append(self(item))
        for key, value in pairs or ():
            y[self(key)] = self(value)
        return y


_WAYS: tuple[tuple[Any, Callable[[Copier, Any], Any]], ...] = (
    (Tensor, Copier._tensor),
    (nn.Module, Copier._module),
    (types.FunctionType, Copier._function),
    (types.MethodType, Copier._method),
    (_CACHED, Copier._cache),
    ((weakref.ref, *weakref.ProxyTypes), Copier._reference),
)


class Uncopied:
    """Stands for an object that can't be copied: raises when used, so that the original is left alone."""

    def __init__(self, kind: str, error: Exception) -> None:
        self.reason = f"it uses a {kind}, which can't be copied ({type(error).__name__}: {error})"

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise NotApartError(f"the module can't be run apart from itself: {self.reason}")

    def __getattr__(self, name: str) -> Any:
        """Refuse every attribute but the special ones that others probe for."""
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    __call__ = __iter__ = __next__ = __getitem__ = __setitem__ = __len__ = __enter__ = _refuse

    def __exit__(self, *args: Any) -> None:
        """Belong to ``with``, which ``__enter__`` refuses."""


class Transparent(nn.Module):
    """Stands for a wrapper that compiles, casts or synchronises: calls what is wrapped."""

    @staticmethod
    def over(wrapper: nn.Module, inner: str, copier: Copier) -> Transparent:
        """Return the stand-in of a wrapper whose wrapped module is its child ``inner``."""
        y = copier.put(wrapper, Transparent())
        for name, child in wrapper._modules.items():
            y._modules[name] = copier(child)
        y.training = wrapper.training
        y.__dict__["_inner"] = inner
        return y

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped module."""
        return self._modules[self._inner](*args, **kwargs)  # type: ignore[misc, index]

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapped module that this one has not."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules[self.__dict__["_inner"]], name)


def is_needed(hook: Any) -> bool:
    """Return whether a hook is torch's own and part of what the module computes.

    Those are hooks of ``weight_norm``, ``spectral_norm`` and ``prune`` (and classes derived from them), of
    lazy modules and of quantisation. All others observe, as far as can be known.
    """
    if type(hook).__name__ == "_WrappedHook":
        hook = hook.hook
    while isinstance(hook, functools.partial):
        hook = hook.func
    owner = getattr(hook, "__self__", hook)
    if any(kind.__module__.startswith("torch.nn.utils.") for kind in type(owner).__mro__):
        return True
    function = getattr(hook, "__func__", hook)
    return isinstance(function, types.FunctionType) and _is_of(function, "torch.nn", "torch.ao")


def own_classes(x: Any) -> list[type]:
    """Return the classes of an object that its user wrote, those of the libraries left out."""
    return [kind for kind in type(x).__mro__ if not _is_of(kind, *_LIBRARIES)]


def _has_state(x: Any) -> bool:
    """Return whether an instance of a constant type (a user's subclass of ``int``) has attributes."""
    return (
        type(x).__module__ != "builtins" and bool(getattr(x, "__dict__", None)) and isinstance(x, int | str)
    )


def _is_of(x: Any, *packages: str) -> bool:
    """Return whether a class or function was defined in one of some packages."""
    module = getattr(x, "__module__", None) or ""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _names(code: types.CodeType) -> set[str]:
    """Return the global names (and attributes) that code and the functions in it use."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names - set(vars(builtins))


def _wrapped(x: nn.Module) -> str | None:
    """Return the name of the child that a compiling, synchronising or casting wrapper calls."""
    for kind in type(x).__mro__:
        if kind.__name__ == "OptimizedModule" and _is_of(kind, "torch"):
            return "_orig_mod"
        if kind.__name__ == "DistributedDataParallel" and _is_of(kind, "torch"):
            return "module"
        if kind.__name__ == "_FabricModule":
            return "_forward_module"
    return None


def _is_shared(x: Any) -> bool:
    """Return whether an object stands for a device or for other ranks and has nothing to copy."""
    kinds: Iterable[tuple[str, str]] = (
        ("torch.distributed", "ProcessGroup"),
        ("torch.distributed.device_mesh", "DeviceMesh"),
        ("torch.cuda", "Stream"),
        ("torch.cuda", "Event"),
    )
    for module, name in kinds:
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type) and isinstance(x, kind):
            return True
    return False
