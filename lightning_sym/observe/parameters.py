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
        here = _here(parameter)
        total += int(here.view(_INTEGERS[here.element_size()]).sum(dtype=torch.int64))
    return total


def kept_entries(layer: Layer) -> Tensor:
    """Return at most 256 spread float64 entries of a layer's parameters, on the CPU (of pieces none)."""
    if any(hasattr(p, "full_tensor") for p in layer.sources()):
        return torch.zeros(0, dtype=torch.float64)
    flat = torch.cat([_here(parameter).flatten() for parameter in layer.sources()])
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
