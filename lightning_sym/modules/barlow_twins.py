"""Barlow Twins, ready to fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_sym.losses import BarlowTwinsLoss
from lightning_sym.modules.joint_embedding import JointEmbedding


class BarlowTwins(JointEmbedding):
    """Barlow Twins (Zbontar et al., 2021, arXiv:2103.03230) on any timm backbone.

    Defaults are the paper's: three projector layers of 8192, LARS at a learning rate of 0.2 for
    256 samples, weight decay 1.5e-6, ten epochs of warm-up and a cosine down to a thousandth; views
    are forwarded one after the other. (The paper trains biases and normalisation layers at a rate
    of 0.0048; here they have the weights' rate.)

    Args:
        backbone: name of a timm model, or a module that maps images to ``[B, F]``.
        off_diagonal: the loss's weight of off-diagonal correlations, the paper's lambda.
        eps: added to the embeddings' variances; lower it for a small ``init_scale``.
        projector: widths of the projector's layers, the embedding's last.
        weight_decay: of weights; biases and normalisation layers have none.
        final_lr_share: share of the peak learning rate the cosine ends at.
        options: see :class:`JointEmbedding`.

    Example:
        >>> module = BarlowTwins("test_resnet", projector=(64, 32))
        >>> tuple(part.shape[1] for part in module.embed(torch.zeros(2, 3, 32, 32)))
        (96, 32)
    """

    base_lr = 0.2

    def __init__(
        self,
        backbone: str | torch.nn.Module = "resnet18",
        *,
        off_diagonal: float = 5e-3,
        eps: float = 1e-5,
        projector: Sequence[int] = (8192, 8192, 8192),
        weight_decay: float = 1.5e-6,
        final_lr_share: float = 1e-3,
        **options: Any,
    ) -> None:
        super().__init__(
            BarlowTwinsLoss(off_diagonal=off_diagonal, eps=eps),
            backbone,
            projector=projector,
            weight_decay=weight_decay,
            final_lr_share=final_lr_share,
            **options,
        )
