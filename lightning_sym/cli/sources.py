"""What ``diagnose`` looks at: a network or a mapping of tensors, from a file or timm."""

from __future__ import annotations

import importlib
import inspect
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sym._extras import need
from lightning_sym.cli import Refused
from lightning_sym.cli.files import Weights, common_prefix, fitted, read_weights
from lightning_sym.symmetry.symmetry import named_tensors


@dataclass
class Source:
    """What is looked at.

    Args:
        said: what it is, in words.
        module: the network, if there is one.
        tensors: its weights by name.
        notes: what the user should know of how it was read.
    """

    said: str
    module: nn.Module | None
    tensors: Mapping[str, Tensor] = field(repr=False)
    notes: list[str] = field(default_factory=list)


def open_source(
    name: str, *, class_path: str | None, init: str | None, max_gb: float, tell: Any = None
) -> Source:
    """Return what a name means.

    Args:
        name: path of a file, or ``timm:NAME`` for an untrained model.
        class_path: ``pkg.Class`` or ``timm:NAME``, the network that a file's weights belong to.
        init: JSON object of the class's keyword arguments.
        max_gb: largest file in gigabytes.
        tell: called with a sentence before code is imported.

    Raises:
        Refused: if it can't be opened.
    """
    options = _options(init)
    if name.startswith("timm:"):
        module = timm_model(name, options)
        return Source(f"{name}, untrained (seed 0)", module, named_tensors(module))
    weights = read_weights(Path(name), max_gb=max_gb)
    if class_path is None:
        return _of_tensors(name, weights)
    module = _built(class_path, weights, options, tell=tell)
    source = Source(f"{name}, a {weights.kind}, in {class_path}", module, {})
    source.notes += _filled(module, weights, class_path)
    source.tensors = named_tensors(module)
    return source


def timm_model(name: str, options: Mapping[str, Any]) -> nn.Module:
    """Return an untrained timm model, the same one each time; the global random state is left alone.

    Args:
        name: ``timm:NAME``.
        options: keywords of ``timm.create_model``.

    Raises:
        MissingExtraError: if timm is not installed.
        Refused: if it has no such model.
    """
    need("timm", what=name)
    timm = importlib.import_module("timm")
    plain = name.removeprefix("timm:")
    if plain.partition(".")[0] not in timm.list_models():
        raise Refused(f"timm has no model {plain!r}; timm.list_models('*{plain[:4]}*') shows what is near")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(plain, pretrained=False, **options)


def _of_tensors(name: str, weights: Weights) -> Source:
    tensors, notes = weights.tensors, []
    prefix = common_prefix(list(tensors))
    if prefix and (weights.kind == "Lightning checkpoint" or prefix == "module."):
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
        notes.append(f"the prefix {prefix!r} was taken off all names")
    where = f" (under {weights.where!r})" if weights.where else ""
    return Source(f"{name}, a {weights.kind}{where}", None, tensors, notes)


def _options(init: str | None) -> dict[str, Any]:
    try:
        options = json.loads(init) if init else {}
    except json.JSONDecodeError as error:
        raise Refused(f"--init must be a JSON object, got {init!r}: {error}") from error
    if not isinstance(options, dict):
        raise Refused(f"--init must be a JSON object of keyword arguments, got {init!r}")
    return options


def _built(class_path: str, weights: Weights, options: dict[str, Any], *, tell: Any) -> nn.Module:
    if class_path.startswith("timm:"):
        return timm_model(class_path, options)
    package, _, name = class_path.rpartition(".")
    if not package:
        raise Refused(f"--class must be a class path such as pkg.Class, got {class_path!r}")
    if tell is not None:
        tell(f"--class imports {package}: its code is run")
    try:
        kind = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError) as error:
        raise Refused(f"--class {class_path} can't be imported: {error}") from error
    arguments = {**_accepted(kind, weights.hyper_parameters), **options}
    try:
        made = kind(**arguments)
    except TypeError as error:
        raise Refused(
            f"{class_path} can't be made with {sorted(arguments) or 'no'} arguments ({error}); give "
            "the others by --init '{\"name\": value}'"
        ) from error
    if not isinstance(made, nn.Module):
        raise Refused(f"--class must name a torch.nn.Module, and {class_path} makes a {type(made).__name__}")
    return made


def _accepted(kind: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those hyper-parameters of a checkpoint that a class takes."""
    try:
        parameters = inspect.signature(kind).parameters.values()
    except (TypeError, ValueError):
        return {}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return {str(name): value for name, value in given.items() if not str(name).startswith("_")}
    return {str(name): value for name, value in given.items() if name in {p.name for p in parameters}}


def _filled(module: nn.Module, weights: Weights, class_path: str) -> list[str]:
    """Put a file's weights into a module; return what did not fit, in words.

    Raises:
        Refused: if nothing fits, or a shape differs.
    """
    own = module.state_dict()
    match, prefix = fitted(weights.tensors, own)
    if not match:
        some = ", ".join(list(weights.tensors)[:3])
        raise Refused(f"no tensor of the file ({some}, ...) is one of {class_path}")
    for name, theirs in match.items():
        tensor = weights.tensors[theirs]
        if tensor.shape != own[name].shape:
            raise Refused(
                f"{theirs} is {list(tensor.shape)} in the file and {list(own[name].shape)} in {class_path}; "
                "--init gives the class other arguments"
            )
        with torch.no_grad(), warnings.catch_warnings():
            own[name].copy_(tensor)
    notes = []
    if prefix:
        notes.append(f"the prefix {prefix.lstrip('+')!r} was {'added' if prefix[0] == '+' else 'taken off'}")
    missing, extra = len(own) - len(match), len(weights.tensors) - len(match)
    if missing:
        first = next(name for name in own if name not in match)
        notes.append(
            f"{missing} tensors of {class_path} are not in the file and stay untrained ({first} first)"
        )
    if extra:
        notes.append(f"{extra} tensors of the file are not in {class_path}")
    return notes
