"""Weights from files: safetensors, or pickles of which only tensors are read. No code of a file is run."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sym._names import clean_name
from lightning_sym.cli import Refused

#: Under which keys the usual trainers keep the weights.
_KEYS = ("state_dict", "model_state_dict", "model", "module", "state_dict_ema", "net", "weights")
#: Largest pickled structure of a torch file (its tensors lie beside it).
LARGEST_PICKLE = 256 * 2**20
#: Most directories of nested mappings that weights are looked for in.
_DEPTH = 3


@dataclass(frozen=True)
class Weights:
    """Weights of a file.

    Args:
        tensors: by name, as written in the file; a safetensors file's are read when asked for.
        kind: ``"safetensors file"``, ``"Lightning checkpoint"`` or ``"torch file"``.
        hyper_parameters: what a Lightning checkpoint says of its module's arguments.
        where: under which keys of the file they were.
    """

    tensors: Mapping[str, Tensor] = field(repr=False)
    kind: str
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


class SafeTensors(Mapping[str, Tensor]):
    """Tensors of a safetensors file, each read from disk when it is asked for and not kept.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._error = SafetensorError
        self._path, self._open = path, safe_open
        try:
            with safe_open(path, framework="pt") as file:
                self._names = {clean_name(name): name for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise Refused(f"{path} is not a readable safetensors file: {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        with self._open(self._path, framework="pt") as file:  # closed again: its pages may be dropped
            return file.get_tensor(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


def read_weights(path: Path, *, max_gb: float) -> Weights:
    """Return a file's weights.

    Args:
        path: of a safetensors file, or of one that ``torch.save`` wrote.
        max_gb: largest size in gigabytes, also of what a zipped file holds.

    Raises:
        Refused: if there is no such file, it is too large or damaged, holds more than plain values and
            tensors, or no weights.
    """
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no file"
        raise Refused(f"CHECKPOINT must be a file or timm:NAME, and {path} is {kind}")
    size = path.stat().st_size
    if size > max_gb * 1e9:
        raise Refused(f"{path} has {size / 1e9:.1f} GB, more than --max-gb {max_gb:g}")
    if _is_safetensors(path):
        return Weights(SafeTensors(path), "safetensors file")
    loaded = _load(path, max_gb=max_gb)
    found, where = _state_dict(loaded)
    if not found:
        raise Refused(f"{path} holds no mapping from names to tensors")
    lightning = isinstance(loaded, Mapping) and "pytorch-lightning_version" in loaded
    more = loaded.get("hyper_parameters") if lightning else None
    return Weights(
        {clean_name(name): tensor for name, tensor in found.items()},
        "Lightning checkpoint" if lightning else "torch file",
        more if isinstance(more, Mapping) else {},
        where,
    )


def _is_safetensors(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:  # eight bytes of length, then JSON
        return file.read(9)[8:] == b"{"


def _load(path: Path, *, max_gb: float) -> Any:
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_zip(path, max_gb=max_gb)
    elif path.stat().st_size > LARGEST_PICKLE * 8:
        raise Refused(f"{path} is in torch's old format, which can't be read piece by piece, and too large")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols of old files
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")
        told = next((line.strip() for line in reason if "GLOBAL" in line or "Unsupported" in line), reason[0])
        raise Refused(
            f"refused {path}: it holds more than tensors and plain values, and reading that could run code. "
            f"Nothing of it was run. ({told[:200]}) Save the state dict alone, best as safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, AttributeError, TypeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise Refused(f"{path} can't be read as a torch file: {why}") from error


def _check_zip(path: Path, *, max_gb: float) -> None:
    """Refuse what grows on reading.

    Raises:
        Refused: if the contents are larger than allowed.
    """
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except zipfile.BadZipFile as error:
        raise Refused(f"{path} is a damaged zip file: {error}") from error
    total = sum(entry.file_size for entry in entries)
    if total > max_gb * 1e9:
        raise Refused(f"{path} holds {total / 1e9:.1f} GB, more than --max-gb {max_gb:g}")
    for entry in entries:
        if entry.filename.endswith("data.pkl") and entry.file_size > LARGEST_PICKLE:
            raise Refused(
                f"{path} has a pickled structure of {entry.file_size / 1e6:.0f} MB, which no model needs"
            )


def _state_dict(loaded: Any, depth: int = 0) -> tuple[dict[str, Tensor], str]:
    """Return the weights in a loaded value, and under which keys they were."""
    if not isinstance(loaded, Mapping) or depth > _DEPTH:
        return {}, ""
    own = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    if own:
        return own, ""
    named = [key for key in _KEYS if key in loaded]
    for key in [*named, *(key for key in loaded if key not in named)]:
        found, where = _state_dict(loaded[key], depth + 1)
        if found:
            return found, f"{key}.{where}" if where else str(key)
    return {}, ""


def fitted(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[dict[str, str], str]:
    """Return which of a file's tensors is which of a module's, and the prefix that was taken off or added.

    A Lightning checkpoint names its network's weights ``model.conv.weight`` where the network itself says
    ``conv.weight``. The prefix under which most names fit is taken.

    Args:
        tensors: the file's, by name.
        wanted: the module's.

    Returns:
        The module's names to the file's, and the prefix (with a ``+`` in front if it was added).
    """
    prefixes = {""}
    for name in list(tensors):
        parts = name.split(".")
        prefixes |= {".".join(parts[:i]) + "." for i in range(1, min(len(parts), 5))}
    best: tuple[dict[str, str], str] = {}, ""
    for prefix in sorted(prefixes, key=len):
        match = {name: prefix + name for name in wanted if prefix + name in tensors}
        if len(match) > len(best[0]):
            best = match, prefix
    if best[0]:
        return best
    for inner in sorted({name.split(".")[0] + "." for name in wanted}):  # the network inside a wrapper
        match = {name: name.removeprefix(inner) for name in wanted if name.removeprefix(inner) in tensors}
        if len(match) > len(best[0]):
            best = match, f"+{inner}"
    return best


def common_prefix(names: list[str]) -> str:
    """Return the first part that all names share, with its dot; "" if there is none.

    Args:
        names: of tensors.

    Example:
        >>> common_prefix(["model.fc.weight", "model.fc.bias"])
        'model.'
    """
    first = {name.partition(".")[0] for name in names if "." in name}
    same = len(first) == 1 and all("." in name for name in names) and len(names) > 1
    rest = {name.partition(".")[2] for name in names}
    return f"{first.pop()}." if same and any("." in name for name in rest) else ""
