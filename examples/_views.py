"""The examples' augmented views: the package's data module on images in memory."""

from __future__ import annotations

from typing import Any

import torch
from _data import Images
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_sym.datamodules import MultiViewDataModule


def two_views(train: Images, test: Images, *, seed: int, **options: Any) -> MultiViewDataModule:
    """Return SimCLR's two views of images in memory, normalised by their own moments.

    Args:
        train: images to learn from.
        test: images the probes judge on.
        seed: of the order and of the augmentation.
        options: further arguments of :class:`MultiViewDataModule`.
    """
    shares = train.x.reshape(-1, 3) / 255
    data = MultiViewDataModule(
        _dataset(train),
        val_source=_dataset(test),
        mean=shares.mean(axis=0).tolist(),
        std=shares.std(axis=0).tolist(),
        seed=seed,
        **options,
    )
    data.setup()
    return data


def fixed_pair(data: MultiViewDataModule, count: int) -> tuple[Tensor, Tensor]:
    """Return two views of the first training images, as no epoch of the training shows them."""
    raw = data.train_dataloader().dataset.__getitems__(list(range(count)))  # type: ignore[attr-defined]
    first, second = data.on_after_batch_transfer(raw, 0)[0]
    return first, second


def _dataset(images: Images) -> TensorDataset:
    return TensorDataset(torch.from_numpy(images.x), torch.from_numpy(images.y))
