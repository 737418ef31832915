"""Two augmented views of images in memory, made on the batch: enough augmentation for the examples."""

from __future__ import annotations

from typing import Any

import torch
from _data import Images
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

GREY = torch.tensor([0.299, 0.587, 0.114])


class TwoViews(LightningDataModule):
    """Batches ``(views, labels)`` of random crops, flips, colour changes and greyscale.

    Args:
        train: images to learn from.
        test: images the probes judge on.
        batch_size: samples in a batch.
        seed: of the order and of the augmentation.
        least_area: least share of the image a crop shows.
        strength: of brightness, contrast and saturation.
    """

    def __init__(
        self,
        train: Images,
        test: Images,
        *,
        batch_size: int = 256,
        seed: int = 0,
        least_area: float = 0.2,
        strength: float = 0.4,
    ) -> None:
        super().__init__()
        self.batch_size, self.least_area, self.strength = batch_size, least_area, strength
        x = torch.from_numpy(train.x).permute(0, 3, 1, 2).contiguous()
        numbers = x.float().div(255)
        self.mean = numbers.mean(dim=(0, 2, 3))[:, None, None]
        self.deviation = numbers.std(dim=(0, 2, 3))[:, None, None]
        self.train_set = TensorDataset(x, torch.from_numpy(train.y))
        test_x = torch.from_numpy(test.x).permute(0, 3, 1, 2).contiguous()
        self.test_set = TensorDataset(test_x, torch.from_numpy(test.y))
        self.order = torch.Generator().manual_seed(seed)
        self.random = torch.Generator().manual_seed(seed + 1)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled batches of whole images; the views are made by the hook below."""
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True, generator=self.order)

    def probe_dataloaders(self) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Return labelled, normalised training and test images without augmentation."""
        loaders = (DataLoader(data, 500, collate_fn=self._plain) for data in (self.train_set, self.test_set))
        train, test = loaders
        return train, test

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn images into two views."""
        x, y = batch
        x = x.float() / 255
        return [self.view(x), self.view(x)], y

    def pair(self, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
        """Return two fixed views of the first training images."""
        before, self.random = self.random, torch.Generator().manual_seed(seed)
        x = self.train_set.tensors[0][:count].float() / 255
        views = self.view(x), self.view(x)
        self.random = before
        return views

    def view(self, x: Tensor) -> Tensor:
        """Return one augmented, normalised view of images in [0, 1]."""
        n = len(x)
        x = self._crop(x)
        factor = 1 + self.strength * (2 * self._draw(3, n, 1, 1, 1).to(x.device) - 1)
        x = (x * factor[0]).clamp(0, 1)
        grey = (x * GREY.to(x.device)[:, None, None]).sum(dim=1, keepdim=True)
        mean = grey.mean(dim=(2, 3), keepdim=True)
        x = (mean + (x - mean) * factor[1]).clamp(0, 1)
        x = (grey + (x - grey) * factor[2]).clamp(0, 1)
        x = torch.where(self._draw(n, 1, 1, 1).to(x.device) < 0.2, grey.expand_as(x), x)
        return self._normalised(x)

    def _crop(self, x: Tensor) -> Tensor:
        """Return a random part of every image at full size, half of them mirrored."""
        n = len(x)
        area = self.least_area + (1 - self.least_area) * self._draw(n)
        ratio = torch.exp((2 * self._draw(n) - 1) * 0.2877)  # between 3 : 4 and 4 : 3
        size = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1).clamp_max(1)
        shift = (1 - size) * (2 * self._draw(n, 2) - 1)
        mirror = torch.where(self._draw(n) < 0.5, -1.0, 1.0)
        theta = torch.zeros(n, 2, 3)
        theta[:, 0, 0], theta[:, 1, 1] = size[:, 0] * mirror, size[:, 1]
        theta[:, :, 2] = shift
        grid = F.affine_grid(theta.to(x.device), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)

    def _draw(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.random)

    def _normalised(self, x: Tensor) -> Tensor:
        return (x - self.mean.to(x.device)) / self.deviation.to(x.device)

    def _plain(self, samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        x = torch.stack([x for x, _ in samples]).float() / 255
        return self._normalised(x), torch.stack([y for _, y in samples])
