"""What a module leaves behind: arguments in a checkpoint, a backbone that timm alone can rebuild."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_sym._extras import need
from lightning_sym.modules import _parts

FOREIGN = "object:"  # what stands in a checkpoint for an argument that is no plain value
FROM_ELSEWHERE = ("pretrained", "checkpoint_path", "cache_dir")  # timm's: weights come from the file


def arguments(module: nn.Module, frame: FrameType) -> dict[str, Any]:
    """Return what a module's own class was constructed with, as plain values.

    Args:
        module: under construction.
        frame: of a running ``__init__`` of it, maybe of a base class.
    """
    back = frame.f_back
    while back is not None and back.f_code.co_name == "__init__" and _first(back) is module:
        frame, back = back, back.f_back
    names, _, keywords, values = inspect.getargvalues(frame)
    given = {name: values[name] for name in names[1:]}
    given |= values[keywords] if keywords else {}
    return {name: plain(value) for name, value in given.items()}


def _first(frame: FrameType) -> Any:
    names = frame.f_code.co_varnames
    return frame.f_locals.get(names[0]) if names else None


def plain(value: Any) -> Any:
    """Return numbers, strings and containers of them as they are, anything else as its type's name.

    An optimizer class of torch's becomes its name, which means the same.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else [*map(plain, value)]
    kind: type = value if isinstance(value, type) else type(value)
    if kind is value and getattr(torch.optim, kind.__name__, None) is kind:
        return kind.__name__
    return f"{FOREIGN}{kind.__module__}.{kind.__qualname__}"


def refuse_foreign(**given: Any) -> None:
    """Raise if an argument is what :func:`plain` left of an object.

    Raises:
        ValueError: which names the argument, and how to give it.
    """
    for name, value in given.items():
        found = [value, *value.values()] if isinstance(value, Mapping) else [value]
        for item in found:
            if isinstance(item, str) and item.startswith(FOREIGN):
                raise ValueError(
                    f"{name} was an object, {item.removeprefix(FOREIGN)}, which a checkpoint does not hold; "
                    f"give it: load_from_checkpoint(path, {name}=...)"
                )


def export(
    backbone: nn.Module, path: str | Path, *, name: str, options: Mapping[str, Any], small_images: bool
) -> None:
    """Write a timm model's weights, and in the file's metadata how timm makes the model.

    Args:
        backbone: made by ``timm.create_model(name, num_classes=0, **options)``, trained since.
        path: of the safetensors file.
        name: what timm calls it.
        options: of ``create_model``.
        small_images: whether it was given the stem for small images.

    Raises:
        ValueError: if the options cannot be written as JSON, or no longer make such a model.
    """
    need("timm", what="Saving a backbone for timm")
    import timm
    from safetensors.torch import save_file

    kept = {key: value for key, value in options.items() if key not in FROM_ELSEWHERE}
    kept = {"num_classes": 0, **kept}
    try:
        told = json.dumps(kept)
    except TypeError as error:
        raise ValueError(
            f"backbone_options must be plain values for timm to rebuild the backbone from them, got {kept} "
            f"({error}); name layers by strings, {{'act_layer': 'gelu'}} say"
        ) from error
    weights = {key: value.detach().cpu().clone() for key, value in backbone.state_dict().items()}
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        again = timm.create_model(name, **json.loads(told))
        parts = _parts.small_stem(again, name) if small_images else {}
        for part, (kind, made_with) in parts.items():
            again.set_submodule(part, getattr(nn, kind)(**made_with))
    expected = {key: value.shape for key, value in again.state_dict().items()}
    if expected != {key: value.shape for key, value in weights.items()}:
        raise ValueError(
            f"backbone was changed after timm made it as {name!r} with {kept}: timm cannot rebuild it; "
            "save its state_dict() instead"
        )
    metadata = {"format": "pt", "timm_name": name, "timm_args": told}
    if parts:
        metadata["timm_parts"] = json.dumps(parts)
    save_file(weights, str(path), metadata=metadata)
