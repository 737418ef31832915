"""Batches of which the ranks have shares of different size."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from tests.models import data


class Uneven(Dataset):
    """Three batches of eight samples, of which the first of two ranks has five and the second one three."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        """Return this rank's share."""
        there = torch.distributed.is_initialized() and torch.distributed.get_world_size() == 2
        share = [slice(0, 5), slice(5, 8)][torch.distributed.get_rank()] if there else slice(0, 8)
        return [part[8 * index : 8 * index + 8][share] for part in data()]


def uneven() -> DataLoader:
    """Return a loader of them; for a Trainer with ``use_distributed_sampler=False``."""
    return DataLoader(Uneven(), batch_size=None)


class Counting:
    """For a module with a ``net``: counts its calls, which go through a function that captured it."""

    calls = 0

    def forward(self, x: Any) -> Any:
        """Run the net."""
        self.calls += 1
        self.fired = getattr(self, "fired", [])
        if not hasattr(self, "through"):
            self.through = lambda x: self.net(x)
            self.register_forward_hook(lambda module, args, output: module.fired.append(len(output)))
        return self.through(x)
