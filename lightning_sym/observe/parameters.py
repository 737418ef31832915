"""Whether parameters move, told without keeping them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_sym.observe.layers import Layer, watchable_layers

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Entries of a layer's weight that are kept to tell how far it is from its start.
KEPT = 256


def parameter_groups(root: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of every weight that can be watched, and of recurrent modules, by layer."""
    found = {layer.name: layer.sources() for layer in watchable_layers(root)}
    for name, module in root.named_modules():
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            found[name] = list(module.parameters(recurse=False))
    return found


def fingerprint(parameters: list[nn.Parameter]) -> int:
    """Return a sum of the bits of parameters: that it stays means, but for rare chance, that none moved."""
    total = 0
    for parameter in parameters:
        flat = _flat(_here(parameter))
        whole = flat.numel() // (each := 8 // flat.element_size()) * each
        aligned = flat.storage_offset() % each == 0
        if aligned:  # a cast while summing takes 16 times as long
            total += int(flat[:whole].view(torch.int64).sum())
        rest = flat[whole:] if aligned else flat
        total += int(rest.view(_INTEGERS[rest.element_size()]).sum(dtype=torch.int64))
    return total


def _flat(tensor: Tensor) -> Tensor:
    """Return all entries as a vector, in the order of memory where that saves a copy."""
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.flatten()


def kept_entries(layer: Layer) -> Tensor:
    """Return at most 256 spread float64 entries of a layer's parameters, on the CPU (of pieces none)."""
    if any(hasattr(p, "full_tensor") for p in layer.sources()):
        return torch.zeros(0, dtype=torch.float64)
    parts = [_here(parameter).flatten() for parameter in layer.sources()]
    flat = parts[0] if len(parts) == 1 else torch.cat(parts)
    index = torch.linspace(0, flat.numel() - 1, min(KEPT, flat.numel()), device=flat.device).round().long()
    return flat[index].double().cpu()


def gradient_norm(parameters: list[nn.Parameter]) -> float | None:
    """Return the Euclidean norm of parameters' gradients, or None where there is none."""
    if any(hasattr(p, "full_tensor") for p in parameters):
        return None  # a rank has a piece of it
    given = [_here(p.grad) for p in parameters if p.grad is not None]
    given = [g.coalesce().values() if g.is_sparse else g for g in given]
    if not given:
        return None
    return float(torch.stack([torch.linalg.vector_norm(g.float()).double() for g in given]).norm())


def _here(tensor: Tensor) -> Tensor:
    """Return a plain detached tensor; of a sharded one this rank's part."""
    local = getattr(tensor, "to_local", None)
    return tensor.detach() if local is None else local().detach()
