"""Parts of the joint-embedding modules: backbones, projectors, optimizers and their schedule."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_sym._extras import need


def backbone(name: str, *, small_images: bool = False, **options: Any) -> tuple[nn.Module, int]:
    """Return any timm model without its classifier, and the width of its representation.

    Args:
        name: a model timm knows, ``resnet18`` say.
        small_images: give a ResNet the stem for images of about 32 pixels (SimCLR, appendix B.9):
            its first convolution 3 x 3 (a deep stem keeps its kernels) with stride one, and no
            max-pooling. Other models have no such stem and are refused.
        options: passed to ``timm.create_model`` (``pretrained``, ``in_chans``, ``img_size``).

    Returns:
        The model, which maps ``[B, C, H, W]`` to ``[B, F]``, and F.

    Raises:
        ValueError: if timm does not know the name, or the model has no small-image stem.
    """
    need("timm", what=f"The backbone {name!r}")
    import timm

    if not timm.is_model(name):
        raise ValueError(
            f"backbone must be a model timm knows, got {name!r}{nearest(name, timm.list_models())}"
        )
    model = timm.create_model(name, num_classes=0, **options)
    if small_images:
        put_small_stem(model, name)
    return model, int(model.num_features)  # type: ignore[arg-type]


def small_stem(model: nn.Module, name: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return which modules of a ResNet are others with the stem for small images, as torch makes them.

    Returns:
        By the module's name: the name of a class in ``torch.nn``, and its keyword arguments.

    Raises:
        ValueError: if the model is no ResNet of timm's.
    """
    from timm.models.resnet import ResNet

    if not isinstance(model, ResNet):
        raise ValueError(
            f"small_images gives a ResNet another stem, got the backbone {name!r}; pass small_images=False"
        )
    deep = isinstance(model.conv1, nn.Sequential)
    first = model.conv1[0] if isinstance(model.conv1, nn.Sequential) else model.conv1
    convolution = {
        "in_channels": first.in_channels, "out_channels": first.out_channels, "kernel_size": 3, "stride": 1,
        "padding": 1, "bias": first.bias is not None,
    }  # fmt: skip
    return {"conv1.0" if deep else "conv1": ("Conv2d", convolution), "maxpool": ("Identity", {})}


def put_small_stem(model: nn.Module, name: str) -> None:
    """Give a ResNet the stem for small images; weights of the same shape are kept."""
    for part, (kind, options) in small_stem(model, name).items():
        made, old = getattr(nn, kind)(**options), model.get_submodule(part)
        if isinstance(made, nn.Conv2d) and isinstance(old, nn.Conv2d):
            if made.weight.shape == old.weight.shape:
                made.weight, made.bias = old.weight, old.bias
            else:
                nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
        model.set_submodule(part, made)


def projector(features: int, widths: Sequence[int], *, last_norm: bool = False) -> nn.Sequential:
    """Return an MLP of linear layers with batch normalisation and ReLU between them.

    Args:
        features: width of its input.
        widths: width of every layer, the embedding's last; empty: an identity.
        last_norm: normalise the embedding too (without affine part).

    Raises:
        ValueError: if a width is not positive.
    """
    if any(not isinstance(width, int) or width < 1 for width in widths):
        raise ValueError(f"projector must be a sequence of positive widths, got {widths!r}")
    layers: list[nn.Module] = []
    for k, width in enumerate(widths):
        layers.append(nn.Linear(features, width, bias=False))
        if k < len(widths) - 1:
            layers += [nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        elif last_norm:
            layers.append(nn.BatchNorm1d(width, affine=False))
        features = width
    return nn.Sequential(*layers)


def synchronised(module: nn.Module) -> nn.Module:
    """Return the module with batch statistics of all ranks, parameters and fused activations as before."""
    need("timm", what="Batch statistics of all ranks")
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(module)


def ignored_activations(module: nn.Module) -> list[str]:
    """Return the names of normalisations whose activation is no longer applied.

    timm fuses activations into batch normalisations; torch's conversion to ``SyncBatchNorm`` keeps
    them as children that its forward pass does not call.
    """
    return [
        name
        for name, child in module.named_modules()
        if type(child) is nn.SyncBatchNorm and any(True for _ in child.children())
    ]


def optimizer(
    kind: str | type[torch.optim.Optimizer],
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    options: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """Return an optimizer that spares biases and normalisation layers the decay.

    LARS does not adapt the learning rate of those either, as in the papers.

    Args:
        kind: a class, or the name of one in ``torch.optim`` in any case, or ``"lars"``.
        parameters: named parameters; frozen ones are left out.
        lr: learning rate.
        weight_decay: of weights of two dimensions or more.
        options: further arguments of the class.

    Raises:
        ValueError: if there is no optimizer of that name.
        TypeError: if ``kind`` is neither a name nor an optimizer class.
    """
    cls = optimizer_class(kind)
    trained = [p for _, p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if isinstance(kind, str) and kind.lower() == "lars":
        options = {"momentum": 0.9, **options}
    made: Any = cls  # its own constructor takes more than the base class's
    return made([group for group in groups if group["params"]], lr=lr, **options)


def optimizer_class(kind: str | type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Return the optimizer class of a name; see :func:`optimizer`."""
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
        return kind
    if not isinstance(kind, str):
        raise TypeError(f"optimizer must be a name or a torch.optim.Optimizer class, got {kind!r}")
    if kind.lower() == "lars":
        need("timm", what="The optimizer 'lars'")
        from timm.optim import Lars

        return Lars
    known = {
        name.lower(): cls
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type)
        and issubclass(cls, torch.optim.Optimizer)
        and cls is not torch.optim.Optimizer
    }
    if kind.lower() not in known:
        near = nearest(kind.lower(), [*known, "lars"])
        raise ValueError(f"optimizer must be in torch.optim, or 'lars', got {kind!r}{near}")
    return known[kind.lower()]


def time_share(trainer: Any) -> float | None:
    """Return which share of the trainer's ``max_time`` has passed, rank 0's on all ranks; None: no limit."""
    for callback in trainer.callbacks:
        if hasattr(callback, "time_elapsed") and hasattr(callback, "time_remaining"):
            left = callback.time_remaining()
            if left is None:
                continue
            passed = callback.time_elapsed()
            return float(trainer.strategy.broadcast(passed / max(passed + left, 1e-9)))
    return None


def warmup_cosine(step: int, *, warmup: float, total: float, final: float) -> float:
    r"""Share of the peak learning rate at a step: a line up, then half a cosine down.

    Args:
        step: steps made, from 0.
        warmup: steps of the line; it reaches one at ``step = warmup - 1``.
        total: all steps; infinity for a constant rate after the warm-up.
        final: share reached at ``step = total``.

    Returns:
        A share in ``[0, 1]``; 0 during a warm-up without end.

    Example:
        >>> [round(warmup_cosine(k, warmup=2, total=6, final=0.0), 3) for k in range(7)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    if math.isinf(total):
        return 1.0
    progress = min(1.0, (step - warmup) / max(1.0, total - warmup))
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint that lists the known names nearest to one, or nothing."""
    names = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(names)}" if names else ""
