"""Features of a frozen backbone, for whoever trains something small on them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def extract_features(
    backbone: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: str | torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Run a frozen backbone over labelled images, in eval mode and without gradients.

    Afterwards the backbone is as it was: weights, buffers, train modes of each part.

    Args:
        backbone: maps images ``[B, C, H, W]`` to ``[B, F]``; a timm model, or a module's ``backbone``.
        batches: of (images, labels), ``MultiViewDataModule.probe_dataloaders()`` say. Images are cast to
            the type of the backbone's weights.
        device: where it runs; None: where its weights are.

    Returns:
        Features ``[N, F]`` and labels ``[N]``, on CPU, in the order of the batches.

    Raises:
        ValueError: if there are no batches, or features are not ``[B, F]``.

    Example:
        >>> net = nn.Flatten()
        >>> x, y = extract_features(net, [(torch.ones(2, 1, 2, 2), torch.tensor([0, 1]))])
        >>> x.shape, y.tolist()
        (torch.Size([2, 4]), [0, 1])
    """
    weight = next((p for p in backbone.parameters() if p.is_floating_point()), None)
    home = torch.device("cpu") if weight is None else weight.device
    modes = {part: part.training for part in backbone.modules()}
    features: list[Tensor] = []
    labels: list[Tensor] = []
    try:
        backbone.eval().to(device or home)
        for x, y in batches:
            x = x.to(device or home, None if weight is None else weight.dtype)
            h = backbone(x)
            if h.ndim != 2 or len(h) != len(x):
                raise ValueError(f"backbone must give [B, F] = [{len(x)}, F], got {list(h.shape)}")
            features.append(h.cpu())
            labels.append(y.cpu())
    finally:
        backbone.to(home)
        for part, training in modes.items():
            part.training = training
    if not features:
        raise ValueError("batches must hold one batch at least, got none")
    return torch.cat(features), torch.cat(labels)
