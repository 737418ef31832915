"""Which of a network's layers are watched by default: trained ones, of each role, spread over depth."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from lightning_sym._names import clean_name

if TYPE_CHECKING:
    from lightning_sym.observe.layer import Layer


def evenly(count: int, most: int) -> list[int]:
    """Return at most ``most`` of ``count`` numbers: the first, the last and an even spread between.

    Example:
        >>> evenly(7, 3), evenly(2, 3), evenly(5, 1)
        ([0, 3, 6], [0, 1], [4])
    """
    if count <= most:
        return list(range(count))
    if most == 1:
        return [count - 1]
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def role(name: str) -> str:
    """Return what is common to the names of layers that do the same in every block.

    Numbers between dots go, and so do those within a part that is not the last.

    Example:
        >>> role("layers.3.self_attn.q_proj"), role("layer4.1.conv2"), role("net.0")
        ('layers.self_attn.q_proj', 'layer.conv2', 'net')
    """
    parts = [part for part in name.split(".") if not part.isdigit()]
    return ".".join([*(re.sub(r"\d+", "", part) for part in parts[:-1]), *parts[-1:]])


def spread(names: Sequence[str], most: int) -> list[str]:
    """Choose at most ``most`` names, such that each role is there at some depth.

    Where there are fewer roles than that, the more layers a role has the more of them are chosen; each
    role's are at other depths than those of the one before: numbers that are evenly spaced would
    meet the same few roles in each block. Where there are more roles, these are evenly spread.

    Example:
        >>> spread([f"{i}.{part}" for i in range(4) for part in ("q", "k", "v")], 6)
        ['0.q', '1.k', '1.v', '2.q', '2.k', '3.v']
    """
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(role(name), []).append(name)
    roles = list(members)
    if len(names) <= most:
        return list(names)
    roles = [roles[i] for i in evenly(len(roles), most)]
    counts = dict.fromkeys(roles, 1)
    for _ in range(most - len(roles)):
        free = [r for r in roles if counts[r] < len(members[r])]
        fewest = max(free, key=lambda r: len(members[r]) / (counts[r] + 1)) if free else None
        if fewest is not None:
            counts[fewest] += 1
    # Slots of the roles with several layers, in turns; slot k is at depth k / (slots - 1).
    turns = [r for k in range(most) for r in roles if counts[r] > k and len(members[r]) > 1]
    chosen = {members[r][0] for r in roles if len(members[r]) == 1}
    for k, r in enumerate(turns):
        depth = (len(members[r]) - 1) * (k / (len(turns) - 1) if len(turns) > 1 else 1.0)
        left = [i for i in range(len(members[r])) if members[r][i] not in chosen]
        chosen.add(members[r][min(left, key=lambda i: (abs(i - round(depth)), i))])
    return [name for name in names if name in chosen]


def choose_names(names: Sequence[str], layers: str | Sequence[str] | None, *, max_layers: int) -> set[str]:
    """Choose among names of layers, as ``layers`` and ``max_layers`` of every monitor say.

    Args:
        names: all there are, in the network's order.
        layers: a glob or globs on them, or ``None`` for all. One that matches a part of a module that
            holds several maps (``*.qkv``) stands for all of them.
        max_layers: the most that ``None`` chooses, of each role and spread over depth (:func:`spread`).

    Raises:
        ValueError: if a glob matches nothing (the nearest names are told).
    """
    if layers is None:
        return set(spread(names, max_layers))
    return _matched(names, {}, layers)


def _matched(names: Sequence[str], modules: dict[str, str], layers: str | Sequence[str]) -> set[str]:
    globs = [layers] if isinstance(layers, str) else list(layers)
    found: set[str] = set()
    for glob in globs:
        matched = {
            name
            for name in names
            if fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(modules.get(name, name), glob)
        }
        if not matched:
            nearest = difflib.get_close_matches(glob, names, n=3, cutoff=0.0)
            raise ValueError(f"layers={glob!r} matches no layer; the nearest names are {nearest}")
        found |= matched
    return found


def choose_layers(
    module: nn.Module, layers: str | Sequence[str] | None, *, max_layers: int, frozen: bool = False
) -> tuple[list[Layer], int]:
    """Choose the layers to watch.

    Args:
        module: the network.
        layers: a glob or globs on the names of layers or of their modules; or ``None``: those of which a
            parameter is trained (all, if none is).
        max_layers: the most that ``None`` chooses: of each role, spread over depth (:func:`spread`).
        frozen: whether ``None`` chooses frozen layers as well.

    Returns:
        The chosen layers in the network's order, and how many there were to choose from; no layers if
        none can be watched and ``layers`` is None.

    Raises:
        ValueError: if a glob matches nothing (the nearest names are told).
    """
    from lightning_sym.observe.layers import watchable_layers

    every = watchable_layers(module)
    if layers is None:
        trained = [layer for layer in every if frozen or layer.trained] or every
        names = set(spread([layer.name for layer in trained], max_layers))
        return [layer for layer in trained if layer.name in names], len(trained)
    if not every:
        raise ValueError(
            f"layers={layers!r} matches no layer: {type(module).__name__} has no layer that can be watched; "
            "register_layer of lightning_sym.observe makes more kinds known"
        )
    modules = {child: clean_name(name) for name, child in module.named_modules()}
    owners = {layer.name: modules.get(layer.module, layer.name) for layer in every}
    chosen = _matched([layer.name for layer in every], owners, layers)
    return [layer for layer in every if layer.name in chosen], len(every)
