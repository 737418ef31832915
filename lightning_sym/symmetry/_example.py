"""The example that a network is run on: copies of what its forward takes, in double precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_sym.symmetry._precision import doubled


class Example:
    """Arguments of a forward pass.

    Args:
        args: positional arguments: tensors, containers of them, objects with tensors in attributes.
        kwargs: keyword arguments.
        hidden: tensors that are in none of their attributes.
        missed: what could not be followed, in words.

    Attributes:
        tensors: every tensor in it.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        hidden: tuple[Tensor, ...] = (),
        missed: tuple[str, ...] = (),
    ) -> None:
        self.args, self.kwargs, self.missed = args, kwargs, missed
        self.tensors = [*tensors_of((args, kwargs)), *hidden]

    @classmethod
    def in_double(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Example:
        """Return copies on the CPU in double precision; the given objects stay as they are."""
        example = cls._copied(args, kwargs, lambda tensor: doubled(tensor.detach().cpu()).clone())
        if any(_is_array(leaf) for leaf in _leaves((args, dict(kwargs)))):
            example.missed += ("NumPy arrays among the inputs are taken for constants",)
        return example

    def fresh(self) -> Example:
        """Return copies, for a forward pass that may write into them."""
        return self._copied(self.args, self.kwargs, lambda tensor: tensor.detach().clone())

    @classmethod
    def _copied(
        cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Callable[[Tensor], Tensor]
    ) -> Example:
        copies = _Copies(change)
        made = tuple(map(copies.of, args)), {name: copies.of(value) for name, value in kwargs.items()}
        return cls(*made, hidden=tuple(copies.hidden), missed=tuple(copies.missed))


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors in containers and in the attributes of objects, each once, in order."""
    return [leaf for leaf in _leaves(tree) if isinstance(leaf, Tensor)]


def _leaves(tree: Any, seen: dict[int, Any] | None = None) -> Iterator[Any]:
    """Yield what containers and objects with attributes are made of, each once."""
    seen = {} if seen is None else seen  # keeps what it has seen, so that no number is used again
    for leaf in tree_leaves(tree):
        if id(leaf) in seen:
            continue
        seen[id(leaf)] = leaf
        yield leaf
        inside = list(_attributes(leaf).values())
        inside += leaf.values() if isinstance(leaf, Mapping) else []
        if inside:
            yield from _leaves(inside, seen)


def _attributes(value: Any) -> dict[str, Any]:
    """Return an object's own attributes, by ``__dict__`` and slots; none of tensors, modules and types."""
    if isinstance(value, Tensor | nn.Module | type | ModuleType):
        return {}
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found


def _is_array(leaf: Any) -> bool:
    return type(leaf).__module__ == "numpy" and getattr(leaf, "ndim", 0) > 0


class _Changing(TorchFunctionMode):
    """Changes each tensor that a deep copy comes upon."""

    def __init__(self, change: Callable[[Tensor], Tensor], found: list[Tensor]) -> None:
        super().__init__()
        self.change, self.found = change, found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        self.found.append(self.change(args[0]))
        args[1][id(args[0])] = self.found[-1]
        return self.found[-1]


class _Copies:
    """Copies of values whose tensors are changed on the way."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.change = change
        self.made: dict[int, Any] = {}  # by the number of the original
        self.hidden: list[Tensor] = []
        self.missed: dict[str, None] = {}

    def of(self, value: Any) -> Any:
        """Return a deep copy; where an object refuses it, a shallow one with its tensors replaced."""
        for tensor in tensors_of(value):
            self.made.setdefault(id(tensor), self.change(tensor))
        try:
            with _Changing(self.change, self.hidden):
                copied = copy.deepcopy(value, dict(self.made))
        except Exception:  # whatever an object of the user's raises when it is copied
            return self._rebuilt(value)
        if any(id(tensor) in self.made for tensor in tensors_of(copied)):
            return self._rebuilt(value)  # some object gave itself for its copy
        return copied

    def _rebuilt(self, value: Any) -> Any:
        if id(value) in self.made:
            return self.made[id(value)]
        if not tensors_of(value):
            return value
        if not (len(leaves := tree_leaves(value)) == 1 and leaves[0] is value):
            return tree_map(self._rebuilt, value)
        try:
            made = self.made[id(value)] = copy.copy(value)
            if made is value:
                raise TypeError
            for name, inner in _attributes(value).items():
                if tensors_of(inner):
                    object.__setattr__(made, name, self._rebuilt(inner))
            if isinstance(made, MutableMapping):
                made.update({key: self._rebuilt(inner) for key, inner in value.items()})
        except Exception:  # the user's object again
            made = self.made[id(value)] = value
            kind = type(value).__name__
            line = f"{kind} among the inputs can't be copied and is passed as it is, in its own precision"
            self.missed[line] = None
        return made
