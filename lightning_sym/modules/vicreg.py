"""VICReg, ready to fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_sym.losses import VICRegLoss
from lightning_sym.modules.joint_embedding import JointEmbedding


class VICReg(JointEmbedding):
    """VICReg (Bardes et al., 2022, arXiv:2105.04906) on any timm backbone.

    Defaults are the paper's: three projector layers of 8192, LARS at a learning rate of 0.2 for
    256 samples, weight decay 1e-6, ten epochs of warm-up and a cosine down to 0.002 (absolute, hence
    a hundredth of the base rate here); views are forwarded one after the other.

    Args:
        backbone: name of a timm model, or a module that maps images to ``[B, F]``.
        invariance: the loss's weight of the views' squared difference.
        variance: the loss's weight of the hinge on the standard deviations.
        covariance: the loss's weight of the squared covariances.
        projector: widths of the projector's layers, the embedding's last.
        final_lr_share: share of the peak learning rate the cosine ends at.
        options: see :class:`JointEmbedding`.

    Example:
        >>> module = VICReg("test_resnet", projector=(64, 32))
        >>> tuple(part.shape[1] for part in module.embed(torch.zeros(2, 3, 32, 32)))
        (96, 32)
    """

    base_lr = 0.2

    def __init__(
        self,
        backbone: str | torch.nn.Module = "resnet18",
        *,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        projector: Sequence[int] = (8192, 8192, 8192),
        final_lr_share: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(
            VICRegLoss(invariance=invariance, variance=variance, covariance=covariance),
            backbone,
            projector=projector,
            final_lr_share=final_lr_share,
            **options,
        )
