"""How alike the units of two networks act: correlations of what their layers put out.

Shape letters: N samples (and places), C channels, B blocks, U and V units, M positions of a unit.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sym._names import clean_name
from lightning_sym.symmetry._align import Gains, Group, Part
from lightning_sym.symmetry._copies import Copied
from lightning_sym.symmetry._example import Example
from lightning_sym.symmetry.kinds import SignFlip

#: Of which dimension of its weight a layer's outputs are the units, and along which axis they lie.
_LAYERS: tuple[tuple[tuple[type[nn.Module], ...], int, int], ...] = (
    ((nn.Linear,), 0, -1),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), 0, 1),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), 1, 1),
    ((nn.Embedding,), 1, -1),
)
#: Of these it is the bias: outputs keep their sign where the gain and what goes in both change theirs.
_NORMS: tuple[tuple[tuple[type[nn.Module], ...], int, int], ...] = (
    ((nn.LayerNorm,), 0, -1),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm), 0, 1),
    ((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), 0, 1),
)
_GAINED = (*(kind for kinds, _, _ in _NORMS for kind in kinds), nn.RMSNorm)
_WEIGHT = re.compile(r"\.(parametrizations\.weight\.original[01]?|weight|weight_orig|weight_v)$")
_ROWS = 512  # samples and places that are compared, evenly spread


def outputs_of(copied: Copied, example: Example) -> dict[str, Tensor]:
    """Run a copy and return what its layers put out, ``[N, C]``, by name."""
    found: dict[str, list[Tensor]] = {}
    modules = {clean_name(name): module for name, module in copied.module.named_modules()}

    def keep(name: str, out: Any) -> None:
        name = clean_name(name)
        for kinds, _, axis in (*_LAYERS, *_NORMS):
            if isinstance(modules[name], kinds) and isinstance(out, Tensor) and out.ndim > 1:
                axis = min(axis, out.ndim - 1)
                found.setdefault(name, []).append(out.detach().movedim(axis, -1).flatten(0, -2))

    given = example.fresh()
    copied.watch = keep
    try:
        with torch.no_grad():
            copied.module(*given.args, **given.kwargs)
    finally:
        copied.watch = None
    return {name: _spread(torch.cat(rows)) for name, rows in found.items()}


def _spread(rows_NC: Tensor) -> Tensor:
    count = len(rows_NC)
    return rows_NC[torch.arange(min(count, _ROWS)) * count // min(count, _ROWS)] if count else rows_NC


def gains_of(group: Group, module: nn.Module, a: dict[str, Tensor], b: dict[str, Tensor]) -> Gains | None:
    """Return how alike a group's units act, or None if no layer puts them out.

    Units of one position are compared by the correlation of their outputs, units of several (heads) by that
    of their Gram matrices over samples, which neither order nor sign within a unit changes.
    """
    modules = {clean_name(name): child for name, child in module.named_modules()}
    gains: Gains = {}
    for part in group.parts:
        name = _writer(part, modules)
        if name is None or name not in a or name not in b or a[name].shape != b[name].shape:
            continue
        if int(part.action.index.max()) >= a[name].shape[1]:
            continue
        one = part.action.index.shape[2] == 1
        a_BUD, b_BVD = (_features(outputs[name], part.action.index) for outputs in (a, b))
        flips = part.flips if one else ()
        gain_BUV = a_BUD @ b_BVD.mT
        gains[flips] = gains[flips] + gain_BUV if flips in gains else gain_BUV
    return gains or None


def _writer(part: Part, modules: dict[str, nn.Module]) -> str | None:
    """Return the name of the layer whose output's units an action moves."""
    if part.action.name.endswith(".bias"):
        name, layers = part.action.name.removesuffix(".bias"), _NORMS
    else:
        name, layers = _WEIGHT.sub("", part.action.name), _LAYERS
    for kinds, dim, _ in layers:
        if isinstance(modules.get(name), kinds) and dim == part.action.dim:
            return name
    return None


def is_told(flip: SignFlip, module: nn.Module) -> bool:
    """Whether outputs tell of a unit's sign: not where a normalisation's gain makes up for it."""
    modules = {clean_name(name): child for name, child in module.named_modules()}
    return not any(
        isinstance(modules.get(action.name.rpartition(".")[0]), _GAINED)
        for action in flip.actions
        if not action.buffer and action.name.endswith(".weight")
    )


def _features(rows_NC: Tensor, index_BUM: Tensor) -> Tensor:
    """Return a vector of length 1 (or 0) for each unit, ``[B, U, D]``."""
    centred_NC = rows_NC - rows_NC.mean(0)
    units_BUMN = centred_NC.T[index_BUM]
    if index_BUM.shape[2] == 1:
        vectors_BUD = units_BUMN.flatten(2)
    else:
        vectors_BUD = (units_BUMN.mT @ units_BUMN).flatten(2)
    return nn.functional.normalize(vectors_BUD, dim=2)
