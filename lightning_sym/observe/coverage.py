"""How much of a network's trained parameters can be read."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_sym._names import clean_name
from lightning_sym.observe.layer import Layer
from lightning_sym.observe.layers import watchable_layers


@dataclass(frozen=True)
class Coverage:
    """What share of the trained parameters is in layers that are read; ``str()`` says it in a sentence.

    A parameter counts as read if it is in the weight or bias of a layer; of normalisations, whose gains
    are read for gradient noise alone, it does not. One that several layers share counts once.

    Attributes:
        read: trained parameters (numbers, not tensors) in layers that are read.
        trained: all trained parameters; those of lazy layers count from their first batch on.
        layers: how many layers are read.
        total: how many layers with trained parameters can be read.
        unread: by kind of module, the numbers of trained parameters not read, by name.
        lazy: names of lazy layers that have no shape yet.
    """

    read: int
    trained: int
    layers: int
    total: int
    unread: dict[str, dict[str, int]] = field(default_factory=dict)
    lazy: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """``read / trained``, in [0, 1]; 1 if nothing is trained."""
        return self.read / self.trained if self.trained else 1.0

    def missing(self, names: int = 3) -> str:
        """Return in words what is not read, the largest kind first, with some names; ``""`` if nothing."""
        parts = []
        for kind, found in sorted(self.unread.items(), key=lambda item: -sum(item[1].values())):
            some = ", ".join(list(found)[:names]) + (", ..." if len(found) > names else "")
            parts.append(f"{kind} ({short(sum(found.values()))} in {some})")
        if self.lazy:
            parts.append(f"lazy layers before their first batch ({', '.join(self.lazy)})")
        return ", ".join(parts)

    def __str__(self) -> str:
        text = (
            f"reads {percent(self.share)} of {short(self.trained)} trained parameters in {self.layers} of "
            f"{self.total} layers"
        )
        missing = self.missing()
        return f"{text}; not read: {missing}" if missing else text


def coverage(module: nn.Module, layers: Iterable[Layer] | None = None) -> Coverage:
    """Return how much of a network's trained parameters can be read, and what can't.

    Args:
        module: the network.
        layers: which of its layers to count; by default all that can be watched
            (:func:`~lightning_sym.observe.watchable_layers`).

    Returns:
        The numbers of parameters, and what is not read by kind of module.

    Example:
        >>> found = coverage(nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)))
        >>> print(found)
        reads 82 % of 44 trained parameters in 1 of 1 layers; not read: LayerNorm (8 in 1.weight, 1.bias)
        >>> found.read, found.trained, found.unread
        (36, 44, {'LayerNorm': {'1.weight': 4, '1.bias': 4}})
    """
    every = [layer for layer in watchable_layers(module) if layer.trained]
    chosen = every if layers is None else [layer for layer in layers if layer.trained]
    mine: set[int] = set()
    for layer in chosen:
        mine.update(id(p) for p in layer.sources())
        if (bias := layer.bias_parameter()) is not None:
            mine.add(id(bias))
    read = trained = 0
    unread: dict[str, dict[str, int]] = {}
    lazy: dict[str, None] = {}
    counted: set[int] = set()
    for path, owner in module.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is None or not parameter.requires_grad or id(parameter) in counted:
                continue
            if is_lazy(parameter):
                lazy[clean_name(path)] = None
                continue
            counted.add(id(parameter))
            trained += parameter.numel()
            if id(parameter) in mine:
                read += parameter.numel()
                continue
            name = clean_name(f"{path}.{key}" if path else key)
            unread.setdefault(type(owner).__name__, {})[name] = parameter.numel()
    return Coverage(read, trained, len(chosen), len(every), unread, tuple(lazy))


def announced(module: nn.Module, names: Collection[str]) -> tuple[str, tuple[str, str] | None]:
    """Return what to say at the start of a fit of which the named layers are watched.

    Returns:
        What is read and what is not, and a warning (what it is of, and the rest of it) if nothing or
        less than half of the parameters can be read.
    """
    every, chosen = coverage(module), [layer for layer in watchable_layers(module) if layer.name in names]
    seen, missing = coverage(module, chosen), every.missing()
    some = seen.layers < every.total
    said = (
        f"lightning_sym {replace(seen, unread={}, lazy=())}"
        f"{f' (all layers: {percent(every.share)})' if some else ''}: "
        f"{', '.join(layer.name for layer in chosen) or 'none'}{f'; not read: {missing}' if missing else ''}"
        f"{'. Choose others with layers=, or more with max_layers=.' if some else ''}"
    )
    more = "lightning_sym.observe.register_layer makes more kinds of layers known."
    if not chosen and not every.lazy:
        kind, missing = type(module).__name__, missing or "it has no trained parameter"
        return said, (
            f"{kind} has no layer to watch",
            f": {missing}. The fit goes on without readings of layers; {more}",
        )
    if every.share < 0.5:
        share = f"only {percent(every.share)} of {short(every.trained)} trained parameters can be read"
        return said, (share, f"; not read: {missing}. {more}")
    return said, None


def percent(share: float) -> str:
    """Return a share in per cent; what is not all or nothing never reads so."""
    value = min(max(100 * share, 0.1 if share > 0 else 0.0), 100.0 if share == 1 else 99.9)
    return f"{value:.0f} %" if 1 <= value < 99 or share in (0, 1) else f"{value:.1f} %"


def short(count: int) -> str:
    """Return a number in thousands, millions or billions.

    Example:
        >>> short(950), short(124_439_808)
        ('950', '124.4 M')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)
