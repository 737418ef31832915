"""How well could this network still learn something new?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_sym.observe.recorder import Recorder

Locator = int | str | Callable[[Any], Any]


def locate(batch: Any, inputs: Locator) -> Any:
    """Return the module's input from a batch; a batch that is a tensor is its own input.

    Raises:
        ValueError: if the batch has no such entry.
    """
    if callable(inputs):
        return inputs(batch)
    if isinstance(batch, Tensor):
        return batch
    try:
        return batch[inputs]
    except (KeyError, IndexError, TypeError) as error:
        entries = f"keys {list(batch)}" if isinstance(batch, Mapping) else f"type {type(batch).__name__}"
        raise ValueError(f"inputs={inputs!r} is not in the batch of {entries}") from error


def fresh_twin(module: nn.Module) -> nn.Module:
    """Return a copy with every submodule's parameters drawn anew by its ``reset_parameters``.

    Uses the global random state: call it inside a fork. Parameters that belong to no submodule
    with a ``reset_parameters`` keep their values.
    """
    twin = detached_copy(module)
    for child in twin.modules():
        reset = getattr(child, "reset_parameters", None) or getattr(child, "_reset_parameters", None)
        if callable(reset):
            reset()
    return twin


def trainability(
    module: nn.Module, batch: Any, *, inputs: Locator = 0, steps: int = 50, lr: float = 1e-3, seed: int = 0
) -> float:
    r"""Return how far a copy gets on random targets, over how far a fresh twin gets.

    Both are fitted to the same standard normal targets of the output's shape, on one batch, in
    evaluation mode, by Adam. With the share of the loss that is taken away,
    :math:`p = 1 - L_k / L_0`, the reading is :math:`p / p_\text{fresh}` (Lyle et al., 2023, arXiv
    2303.01486, ask the same of new tasks). Outputs of a trained network are large, and its
    :math:`L_0` with them: targets are therefore those normal numbers *added* to the network's own
    first output, so that :math:`L_0 = 1` on both sides and what is measured is moving away from it.

    Args:
        module: left as it is; its ``forward`` is called on a copy.
        batch: a training batch.
        inputs: where the input is in the batch.
        steps: optimizer steps.
        lr: learning rate of Adam.
        seed: of the targets and of the twin's initial values. The global random state is used:
            fork it around the call.

    Returns:
        At least 0 where training helps at all; 1: as good as new; NaN if the twin can't learn it.

    Raises:
        TypeError: if the module's output is not a floating point tensor.
    """
    x = locate(batch, inputs)
    reached = _progress(detached_copy(module), x, steps=steps, lr=lr, seed=seed)
    torch.manual_seed(seed)
    of_fresh = _progress(fresh_twin(module), x, steps=steps, lr=lr, seed=seed)
    return reached / of_fresh if of_fresh > 0 else float("nan")


def detached_copy(module: nn.Module) -> nn.Module:
    """Deep-copy a module without the trainer it hangs on, and without the observation's hooks.

    Tensors that it keeps with their graphs (losses in a list) are copied without.
    """
    memo: dict[int, Any] = {}
    for child in module.modules():
        if isinstance(child, LightningModule):
            memo |= {id(hung): None for hung in (child._trainer, child._fabric) if hung is not None}
        _cut_graphs(vars(child), memo, set())
    twin = copy.deepcopy(module, memo)
    for parameter in twin.parameters():
        parameter.grad = None
    for child in twin.modules():
        for hooks in (child._forward_hooks, child._forward_pre_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(_owner(hook), Recorder)]:
                del hooks[key]
    return twin


def _cut_graphs(value: Any, memo: dict[int, Any], seen: set[int]) -> None:
    """Enter into the memo what stands for tensors with a graph, which ``deepcopy`` refuses."""
    if isinstance(value, Tensor):
        if not value.is_leaf:
            memo[id(value)] = value.detach().clone()
    elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
        seen.add(id(value))
        for item in value.values() if isinstance(value, dict) else value:
            _cut_graphs(item, memo, seen)


def _owner(hook: Any) -> Any:
    return getattr(hook, "__self__", None)


@torch.enable_grad()
def _progress(module: nn.Module, x: Any, *, steps: int, lr: float, seed: int) -> float:
    module.eval()
    parameters = [p for p in module.parameters() if p.requires_grad]
    with torch.inference_mode(False):
        optimizer = torch.optim.Adam(parameters, lr=lr)
        target: Tensor | None = None
        first = loss = torch.tensor(float("nan"))
        for step in range(steps + 1):
            output = module(x)
            if not isinstance(output, Tensor) or not output.is_floating_point():
                raise TypeError(
                    "trainability needs a module whose forward returns a floating point tensor, got "
                    f"{type(output).__name__}; set trainability_steps=0"
                )
            if target is None:
                noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
                target = output.detach() + noise.to(output)
            loss = (output - target).square().mean()
            if step == 0:
                first = loss.detach()
            if step < steps:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return float(1 - loss.detach() / first)
