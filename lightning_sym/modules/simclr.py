"""SimCLR, ready to fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_sym.losses import SimCLRLoss
from lightning_sym.modules.joint_embedding import JointEmbedding


class SimCLR(JointEmbedding):
    """SimCLR (Chen et al., 2020, arXiv:2002.05709) on any timm backbone.

    Defaults are the paper's: a projector of one hidden layer of 2048 and an embedding of 128, LARS
    at a learning rate of 0.3 for 256 samples, weight decay 1e-6, ten epochs of warm-up and a cosine
    down to zero; all views go through one forward pass.

    Args:
        backbone: name of a timm model, or a module that maps images to ``[B, F]``.
        temperature: of the loss; the paper's 0.5 for CIFAR-10, 0.1 for ImageNet.
        projector: widths of the projector's layers, the embedding's last.
        joint_forward: one forward pass of all views.
        options: see :class:`JointEmbedding`.

    Example:
        >>> module = SimCLR("test_resnet", projector=(64, 32), small_images=True)
        >>> tuple(part.shape[1] for part in module.embed(torch.zeros(2, 3, 32, 32)))
        (96, 32)
    """

    base_lr = 0.3

    def __init__(
        self,
        backbone: str | torch.nn.Module = "resnet18",
        *,
        temperature: float = 0.5,
        projector: Sequence[int] = (2048, 128),
        joint_forward: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            SimCLRLoss(temperature=temperature),
            backbone,
            projector=projector,
            joint_forward=joint_forward,
            **options,
        )
