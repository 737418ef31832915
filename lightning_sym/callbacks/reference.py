"""Reading another network's tensors from disk, without running anything that is stored there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sym._names import clean_name


def load_tensors(reference: str, module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint holds for a module, by clean names, on the CPU.

    Args:
        reference: path of a Lightning checkpoint or a state dict, or of a ``.safetensors`` file.
        module: of the architecture that was saved.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such file, or lacks a tensor of the module's or has it in another shape.
    """
    path = Path(reference)
    if not path.is_file():
        raise FileNotFoundError(f"reference={reference!r} is no file")
    stored: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            stored = load_file(path)
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an empty, damaged or other file: readers raise whatever they stumble on
        raise ValueError(
            f"reference={reference!r} is not a file of tensors; save a state dict, or safetensors"
        ) from error
    stored = stored.get("state_dict", stored) if isinstance(stored, dict) else {}
    found = {clean_name(name): tensor for name, tensor in stored.items()}
    for name, tensor in module.state_dict().items():
        other = found.get(clean_name(name))
        if not isinstance(other, Tensor):
            raise ValueError(f"reference={reference!r} holds no tensor {clean_name(name)!r}")
        if other.shape != tensor.shape:
            raise ValueError(
                f"reference={reference!r} must hold {clean_name(name)!r} of shape {tuple(tensor.shape)}, "
                f"got {tuple(other.shape)}"
            )
    return found
