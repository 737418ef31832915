"""How well could this network still learn something new?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from lightning_sym.engine.batch import Arguments
from lightning_sym.sandbox import Apart, Sandbox


def trainability(
    sandbox: Sandbox,
    arguments: Arguments,
    *,
    forward: str | Callable[..., Any] = "forward",
    steps: int = 50,
    lr: float = 1e-3,
    seed: int = 0,
) -> float:
    r"""Return how far a copy gets on random targets, over how far a fresh twin gets.

    Both are fitted to the same standard normal targets of the output's shape, on one batch, in
    evaluation mode and full precision, by Adam. With the share of the loss that is taken away,
    :math:`p = 1 - L_k / L_0`, the reading is :math:`p / p_\text{fresh}` (Lyle et al., 2023, arXiv
    2303.01486, ask the same of new tasks). Outputs of a trained network are large, and its
    :math:`L_0` with them: targets are therefore those normal numbers *added* to the network's own
    first output, so that :math:`L_0 = 1` on both sides and what is measured is moving away from it.

    The fresh twin is a copy whose submodules' parameters are drawn anew by their ``reset_parameters``;
    those that belong to no submodule with one keep their values.

    Args:
        sandbox: of the module, which is left as it is, random states included.
        arguments: what ``forward`` takes.
        forward: the method to train, or a function of the module and its input.
        steps: optimizer steps, at least 1.
        lr: learning rate of Adam.
        seed: of the targets, of the twin's initial values and of what the module draws.

    Returns:
        At least 0 where training helps at all; 1: as good as new; NaN if the twin can't learn it.

    Raises:
        TypeError: if the output is not a floating point tensor.
        ValueError: if ``steps`` is less than 1, or nothing is trained.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    progress = []
    for fresh in (False, True):
        with sandbox.open(grad=True, full_precision=True, seed=seed) as apart:
            if fresh:
                _draw_anew(apart.module)
            progress.append(_progress(apart, arguments, forward, steps=steps, lr=lr, seed=seed))
    reached, of_fresh = progress
    return reached / of_fresh if of_fresh > 0 else float("nan")


def _draw_anew(module: nn.Module) -> None:
    for child in module.modules():
        for name in ("reset_parameters", "_reset_parameters"):
            # Not of a wrapper that hands on what the module inside of it has: that one comes by itself.
            if callable(getattr(type(child), name, None)):
                getattr(child, name)()
                break


def _progress(
    apart: Apart,
    arguments: Arguments,
    forward: str | Callable[..., Any],
    *,
    steps: int,
    lr: float,
    seed: int,
) -> float:
    """Return the share of the loss that training takes away."""
    parameters = [p for p in apart.module.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("trainability needs a module with parameters that are trained, found none")
    for child in apart.module.modules():
        if isinstance(child, nn.Embedding | nn.EmbeddingBag):
            child.sparse = False  # the same gradient, which Adam takes
    update = _adam(parameters, lr)
    args, kwargs = apart.place((arguments.args, arguments.kwargs))
    target: Tensor | None = None
    first = loss = torch.tensor(float("nan"))
    for step in range(steps + 1):
        output = apart(forward, *args, **kwargs)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise TypeError(
                "trainability needs a forward that returns a floating point tensor, got "
                f"{type(output).__name__}; set trainability_steps=0"
            )
        if target is None:
            noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
            target = output.detach() + noise.to(output)
        loss = (output - target).square().mean()
        if step == 0:
            first = loss.detach()
        if step < steps:
            torch.autograd.backward(loss)  # not grad(), which re-entrant checkpoints refuse
            update([p.grad for p in parameters])
            apart.module.zero_grad()
    return float(1 - loss.detach() / first)


def _adam(parameters: list[nn.Parameter], lr: float) -> Callable[[Sequence[Tensor | None]], None]:
    """Return Adam's update of parameters by gradients, in place.

    No optimizer object: torch's hooks for all optimizers, and whatever else counts steps and backward
    passes of a fit, would see it.
    """
    means, squares = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    counts = [torch.tensor(0.0) for _ in parameters]

    def update(gradients: Sequence[Tensor | None]) -> None:
        known = {i: gradient for i, gradient in enumerate(gradients) if gradient is not None}
        with torch.no_grad():
            adam(
                [parameters[i] for i in known],
                list(known.values()),
                [means[i] for i in known],
                [squares[i] for i in known],
                [],
                [counts[i] for i in known],
                has_complex=any(p.is_complex() for p in parameters),
                amsgrad=False,
                maximize=False,
                lr=lr,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
                weight_decay=0.0,
            )

    return update
