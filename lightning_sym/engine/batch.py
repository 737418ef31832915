"""What of a batch a call takes, where its labels are, and how many samples it holds."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

#: Where something is in a batch: an index, a key or attribute, a function of the batch, or None.
Locator = int | str | Callable[[Any], Any] | None

_STATIC = (type(None), bool, int, float, complex, str, bytes)


@dataclass(frozen=True)
class Arguments:
    """What a call takes.

    Attributes:
        args: by position.
        kwargs: by name.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def locate(batch: Any, inputs: Locator, function: Callable[..., Any]) -> Arguments:
    """Return what a function takes of a batch.

    With ``inputs`` None it is guessed: of a tuple or list the first entry; of a mapping the entries that
    are named in the function's signature, or the mapping itself where its one positional parameter is
    named otherwise; else the batch itself. What is found is then handed over as the signature says:

    * a tuple goes to a function of one parameter as one argument, and to one of so many parameters as
      these; a list only where several parameters are required;
    * a mapping that ``inputs`` leads to goes by name if the signature names all of its keys, else as one
      argument;
    * a pair of a tuple and a dict with string keys, returned by ``inputs``, are the positional and the named
      arguments; :class:`Arguments` are taken as they are.

    Args:
        batch: a batch of any kind.
        inputs: an index, a key (or an attribute's name), a function of the batch, or None. A batch that is a
            tensor is its own entry 0.
        function: what will be called; a module stands for its forward.

    Returns:
        The arguments, which the signature accepts.

    Raises:
        ValueError: if ``inputs`` is none of these or not in the batch, or what is found does not fit the
            function.
    """
    signature = _signature(function)
    if inputs is None:
        found = _guess(batch, signature)
    elif callable(inputs):
        found = _given(inputs(batch), signature)
    else:
        entry = _entry(batch, inputs, "inputs")
        found = _by_name(entry, signature) if isinstance(entry, Mapping) else _spread(entry, signature)
    try:
        if signature is not None:
            signature.bind(*found.args, **found.kwargs)
    except TypeError as error:
        name = getattr(function, "__qualname__", None) or type(function).__name__
        raise ValueError(
            f"inputs={_named(inputs)} finds {_described(found)} in {_contents(batch)}, which "
            f"{name}{signature} does not take ({error}); pass inputs= as an index, a key, or a function of "
            "the batch that returns a pair of args and kwargs"
        ) from error
    return found


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):  # some built-in functions have none
        return None


def _positional(signature: inspect.Signature | None) -> tuple[int, float]:
    """Return how many positional arguments a function requires, and how many it takes."""
    if signature is None:
        return 1, 1
    kinds = [
        p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    endless = any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())
    return sum(p.default is p.empty for p in kinds), float("inf") if endless else len(kinds)


def _keywords(signature: inspect.Signature | None) -> tuple[set[str], set[str], bool]:
    """Return the names that a function takes, those it requires, and whether it takes any other."""
    if signature is None:
        return set(), set(), False
    kinds = [p for p in signature.parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = {p.name for p in kinds if p.default is p.empty}
    return (
        {p.name for p in kinds},
        required,
        any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()),
    )


def _guess(batch: Any, signature: inspect.Signature | None) -> Arguments:
    if isinstance(batch, tuple | list) and not isinstance(batch, str):
        if not batch:
            raise ValueError("inputs=None takes the first entry of a batch, and this one is empty")
        batch = batch[0]
    if not isinstance(batch, Mapping):
        return _spread(batch, signature)
    named, required, anything = _keywords(signature)
    _, most = _positional(signature)
    found = {key: value for key, value in batch.items() if key in named}
    missing = required - set(found)
    if anything and not most:
        return Arguments(kwargs={str(key): value for key, value in batch.items()})
    if (not found and most == 1) or (len(missing) == 1 and most >= 1 and not required & set(found)):
        return Arguments((batch,))
    if not missing and found:
        return Arguments(kwargs=found)
    what = f"lacks {sorted(missing)}" if missing else f"has none of {sorted(named)}"
    raise ValueError(
        f"inputs=None looks for {sorted(required or named)} by name, and the batch, {_contents(batch)}, "
        f"{what}; pass inputs= as a key, or a function of the batch"
    )


def _given(found: Any, signature: inspect.Signature | None) -> Arguments:
    """Return what a user's function returned as arguments."""
    if isinstance(found, Arguments):
        return found
    pair = found if type(found) is tuple and len(found) == 2 else (None, None)
    if isinstance(pair[0], tuple) and isinstance(pair[1], dict) and all(isinstance(k, str) for k in pair[1]):
        return Arguments(pair[0], dict(pair[1]))
    return _by_name(found, signature) if isinstance(found, Mapping) else _spread(found, signature)


def _by_name(found: Mapping[Any, Any], signature: inspect.Signature | None) -> Arguments:
    named, _, anything = _keywords(signature)
    _, most = _positional(signature)
    if found and (set(found) <= named or (anything and not most)):
        return Arguments(kwargs={str(key): value for key, value in found.items()})
    return Arguments((found,))


def _spread(found: Any, signature: inspect.Signature | None) -> Arguments:
    """Return positional arguments: an entry, or those that a tuple holds."""
    least, most = _positional(signature)
    several = isinstance(found, tuple) or (isinstance(found, list) and least > 1)
    own_kind = hasattr(found, "_fields")  # a named tuple is one thing
    if several and not own_kind and most != 1 and least <= len(found) <= most:
        return Arguments(tuple(found))
    return Arguments((found,))


def _entry(batch: Any, place: int | str, argument: str) -> Any:
    """Return an entry of a batch by index, key or attribute.

    Raises:
        ValueError: if there is none.
    """
    if not isinstance(place, int | str):
        raise ValueError(
            f"{argument} must be an index, a key, a function of the batch or None, got {place!r}"
        )
    if isinstance(batch, Tensor):
        if place == 0 and not isinstance(place, str):
            return batch
    elif isinstance(place, str) and not isinstance(batch, Mapping) and hasattr(batch, place):
        return getattr(batch, place)
    else:
        try:
            return batch[place]
        except (KeyError, IndexError, TypeError, AttributeError):
            pass
    raise ValueError(f"{argument}={place!r} is not in the batch, which is {_contents(batch)}")


def _contents(batch: Any) -> str:
    """Say in words what a batch has."""
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} of keys {list(batch)}"
    if isinstance(batch, tuple | list):
        kinds = ", ".join(type(x).__name__ for x in batch[:5])
        return f"a {type(batch).__name__} of {len(batch)} entries ({kinds})"
    names = [name for name in getattr(batch, "__dict__", {}) if not name.startswith("_")]
    return f"a {type(batch).__name__}" + (f" of attributes {names}" if names else "")


def _described(found: Arguments) -> str:
    kinds = [type(x).__name__ for x in found.args] + [
        f"{key}={type(x).__name__}" for key, x in found.kwargs.items()
    ]
    return f"({', '.join(kinds)})"


def _named(inputs: Locator) -> str:
    return getattr(inputs, "__name__", None) or repr(inputs)


def check_place(batch: Any, place: Locator, argument: str) -> None:
    """Raise if a batch has no entry of that index or key; functions of a batch are called when needed.

    Args:
        batch: a batch of any kind.
        place: an index, a key (or an attribute's name), a function of the batch, or None.
        argument: that says so: ``"targets"`` or ``"inputs"``.

    Raises:
        ValueError: if there is none, or ``targets`` leads to no tensor of class indices.
    """
    if place is None or callable(place):
        return
    if argument == "targets":
        find_targets(batch, place)
    else:
        _entry(batch, place, argument)


def find_targets(batch: Any, targets: Locator) -> Tensor | None:
    """Return the labels in a batch.

    Args:
        batch: a batch of any kind.
        targets: an index, a key (or an attribute's name), a function of the batch, or None.

    Returns:
        Class indices of any integer type, or None where ``targets`` is None.

    Raises:
        ValueError: if the batch has no such entry, or it is not a tensor of class indices.
    """
    if targets is None:
        return None
    found = targets(batch) if callable(targets) else _entry(batch, targets, "targets")
    if not isinstance(found, Tensor) or found.is_floating_point() or found.is_complex():
        got = f"a tensor of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"targets={_named(targets)} must lead to a tensor of class indices, got {got}")
    return found


def sample_count(batch: Any) -> int | None:
    """Return the number of samples in a batch.

    Objects that say it are believed (``num_graphs``, ``batch_size``). Else it is the length that most of
    the tensors have, scalars left out: class weights or an edge list beside the samples are outnumbered
    by samples and labels. Where two lengths are as frequent, it is that of the largest tensor.

    Args:
        batch: a tensor, or tuples, lists, mappings and objects that hold some.

    Returns:
        At least 0, or None where there is no tensor but scalars.
    """
    for name in ("num_graphs", "batch_size"):
        said = None if isinstance(batch, Mapping | Sequence | Tensor) else getattr(batch, name, None)
        if isinstance(said, Sequence) and said:  # a shape
            said = said[0]
        if isinstance(said, int) and not isinstance(said, bool):
            return said
    lengths: Counter[int] = Counter()
    largest: dict[int, int] = {}
    for tensor in _tensors(batch, set()):
        length = len(tensor)
        lengths[length] += 1
        largest[length] = max(largest.get(length, 0), tensor.numel())
    return max(lengths, key=lambda length: (lengths[length], largest[length]), default=None)


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors of a batch that are not scalars."""
    if isinstance(value, Tensor):
        if value.ndim:
            yield value
    elif not isinstance(value, (*_STATIC, type, nn.Module)) and id(value) not in seen and not callable(value):
        seen.add(id(value))
        if isinstance(value, Mapping):
            inner: Any = list(value.values())
        elif isinstance(value, Sequence):
            inner = value
        else:
            inner = list(getattr(value, "__dict__", {}).values())
        for item in inner:
            yield from _tensors(item, seen)


def rows_of(tree: Any) -> int:
    """Return the number of samples if every tensor has a row for each, so that :func:`cut` can be used.

    Args:
        tree: tuples, lists and dicts of tensors. Scalars, numbers, strings and None go along.

    Returns:
        The number; 0 if lengths differ, there is no tensor, or there are objects of another kind.
    """
    leaves = tree_leaves(tree)
    if not all(isinstance(leaf, (Tensor, *_STATIC)) for leaf in leaves):
        return 0
    lengths = {len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
    return lengths.pop() if len(lengths) == 1 else 0


def cut(tree: Any, rows: slice | Tensor) -> Any:
    """Return some samples, by a slice or indices, of tensors, see :func:`rows_of`; scalars stay."""
    return tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) and leaf.ndim else leaf, tree)


def first_samples(arguments: Arguments, n: int) -> Arguments:
    """Return the arguments of the first ``n`` samples, or all where they can't be cut.

    Args:
        arguments: what a call takes.
        n: how many samples, at least 1.

    Raises:
        ValueError: if ``n`` is less than 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    both = (arguments.args, arguments.kwargs)
    return Arguments(*cut(both, slice(n))) if rows_of(both) > n else arguments
