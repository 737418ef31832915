"""Batches of raw images, the sampler that says in which epoch they are seen, and torchvision's workers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from lightning_sym.datamodules._classes import Rows
from lightning_sym.datamodules._pixels import UNREADABLE, as_bytes
from lightning_sym.datamodules._rows import UNLABELLED, RowError
from lightning_sym.datamodules.augment.parameters import ViewParameters, draw
from lightning_sym.datamodules.augment.recipes import ViewRecipe
from lightning_sym.datamodules.augment.threads import side_by_side

Ticket = tuple[int, int]  # epoch, index


class RawBatch(NamedTuple):
    """What a worker hands over: bytes, and what the views' parameters depend on."""

    images: Tensor  # uint8 [B, C, H, W], padded on the right and below; empty if there are views
    views: list[Tensor]  # uint8 [B, C, S, S] each, if workers made them
    labels: Tensor  # int64 [B]
    sizes: Tensor  # int64 [B, 2]
    numbers: Tensor  # int64 [B], in the data set
    epoch: int
    failed: list[tuple[str, str]]  # name and reason of what could not be read


@dataclass(frozen=True)
class Reading:
    """How rows become bytes: everything a worker needs to know.

    Args:
        channels: of the bytes.
        max_side: larger images are shrunk to this many pixels; None: never.
        upright: turn images as their EXIF orientation asks.
    """

    channels: int
    max_side: int | None
    upright: bool

    def __call__(self, rows: Rows, index: int) -> tuple[Tensor | None, int, str]:
        """Return a row's image, class number, and why there is no image if there is none.

        Raises:
            RowError: if the row is not understood: that is no fault of a file.
        """
        try:
            row = rows.row(index)
        except UNREADABLE as error:
            return None, UNLABELLED, f"{type(error).__name__}: {error}"
        try:
            image, label = rows.unpack(row)
        except RowError as error:
            raise RowError(f"source, {rows.name_of(index)}: {error}") from error
        try:
            x = as_bytes(image, channels=self.channels, max_side=self.max_side, upright=self.upright)
        except UNREADABLE as error:
            return None, label, f"{type(error).__name__}: {error}"
        return x, label, ""

    def first(self, rows: Rows, *, tries: int = 64) -> Tensor:
        """Return the first image that can be read, of the first and some others spread over the rows.

        Raises:
            RowError: if a row is not understood.
            ValueError: if none of those tried can be read; it says why.
        """
        failed = []
        for k in range(min(tries, len(rows))):
            index = k * len(rows) // tries if len(rows) > tries else k
            image, _, reason = self(rows, index)
            if image is not None:
                return image
            failed.append((rows.name_of(index), reason))
        raise ValueError(f"source: none of the {len(failed)} images tried can be used: {listed(failed)}")


@dataclass(frozen=True)
class Drawing:
    """How views are drawn: everything a worker needs to know.

    Args:
        recipes: of each view.
        sizes: pixels a side of each view; the first views are the global ones.
        n_global: how many are global.
        seed: of all draws.
    """

    recipes: tuple[ViewRecipe, ...]
    sizes: tuple[int, ...]
    n_global: int
    seed: int

    @property
    def size(self) -> int:
        """Pixels a side of a global view."""
        return self.sizes[0]

    def __call__(self, index: Tensor, sizes: Tensor, epoch: int) -> list[ViewParameters]:
        """Return the parameters of each view."""

        def one(view: int) -> ViewParameters:
            key = (self.seed, epoch, view)
            return draw(self.recipes[view], index=index, heights=sizes[:, 0], widths=sizes[:, 1], key=key)

        return side_by_side(one, range(len(self.recipes)), threads=torch.get_num_threads())


class EpochSampler(DistributedSampler):
    """This rank's share of an epoch's order, which depends on seed and epoch; yields (epoch, index).

    ``epoch`` is fixed at -1 for data that should look the same each time. ``start`` samples are left
    out at the beginning of one pass.
    """

    def __init__(self, size: int, *, seed: int, ranks: int, rank: int, shuffle: bool, keep: int) -> None:
        super().__init__(
            range(size),  # type: ignore[arg-type]
            num_replicas=ranks,
            rank=rank,
            shuffle=shuffle,
            seed=seed,
            drop_last=shuffle and size >= ranks,
        )
        self.keep = min(keep, self.num_samples)
        self.start = 0

    def __len__(self) -> int:
        return self.keep

    def __iter__(self) -> Iterator[Any]:
        epoch = self.epoch if self.shuffle else -1
        start, self.start = self.start, 0
        for index in itertools.islice(super().__iter__(), start, self.keep):
            yield epoch, index


class ResumableLoader(DataLoader["RawBatch"]):
    """A loader whose state is how far it got in which epoch: a resumed run goes on from there.

    A pass begins with its first batch, not with ``iter``: a trainer that resumes asks for the iterator
    before it tells the sampler the epoch, and workers would read ahead in the wrong one.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._given = 0
        self._resume: dict[str, int] | None = None

    @override
    def __iter__(self) -> Iterator[RawBatch]:  # type: ignore[override]
        sampler = self.sampler
        resume, self._resume = self._resume, None
        self._given = 0
        if resume is not None and resume["epoch"] == getattr(sampler, "epoch", None):
            self._given = resume["batches"]
            sampler.start = self._given * (self.batch_size or 1)  # type: ignore[attr-defined]
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its batches have been handed out."""
        return {"epoch": getattr(self.sampler, "epoch", 0), "batches": self._given}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Have the next pass leave out what the stored one handed out, if it is of the same epoch."""
        self._resume = {name: int(state_dict[name]) for name in ("epoch", "batches")}


class RawImages(Dataset[RawBatch]):
    """Reads batches; an unreadable image is reported, and replaced by the next one or left out."""

    def __init__(
        self,
        data: Rows,
        *,
        reading: Reading,
        max_corrupt: int,
        replace: bool,
        drawing: Drawing | None = None,
    ) -> None:
        self.data, self.reading = data, reading
        self.max_corrupt, self.replace, self.drawing = max_corrupt, replace, drawing

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, ticket: Ticket | int) -> RawBatch:
        return self.__getitems__([ticket])

    def __getitems__(self, tickets: Sequence[Ticket | int]) -> RawBatch:
        """Return one batch; torch's fetcher calls this instead of collating single samples.

        A bare index (a trainer that overfits batches brings its own sampler) is seen the same each time.
        """
        told = [ticket if isinstance(ticket, tuple) else (-1, ticket) for ticket in tickets]
        images: list[Tensor] = []
        labels: list[int] = []
        kept: list[int] = []
        failed: list[tuple[str, str]] = []
        for _, wanted in told:
            for step in range(len(self.data) if self.replace else 1):
                index = (wanted + step) % len(self.data)
                image, label, reason = self.reading(self.data, index)
                if image is None:
                    failed.append((self.data.name_of(index), reason))
                    check_corrupt(dict(failed), self.max_corrupt)
                    continue
                images.append(image)
                labels.append(label)
                kept.append(index)
                break
            else:
                if self.replace:
                    raise RuntimeError(f"none of the {len(self.data)} images can be used: {listed(failed)}")
        sizes = torch.tensor([x.shape[1:] for x in images], dtype=torch.int64).view(-1, 2)
        index_B, epoch = torch.tensor(kept, dtype=torch.int64), told[0][0]
        views = self._views(images, index_B, sizes, epoch) if self.drawing is not None and images else []
        stacked = torch.empty(0, dtype=torch.uint8) if views or not images else _padded(images, sizes)
        return RawBatch(
            stacked, views, torch.tensor(labels, dtype=torch.int64), sizes, index_B, epoch, failed
        )

    def _views(self, images: list[Tensor], index: Tensor, sizes: Tensor, epoch: int) -> list[Tensor]:
        drawing = self.drawing
        assert drawing is not None  # the caller looked
        return [
            torch.stack([_torchvision_view(x, own, n, size, recipe) for n, x in enumerate(images)])
            for own, recipe, size in zip(
                drawing(index, sizes, epoch), drawing.recipes, drawing.sizes, strict=True
            )
        ]


def check_corrupt(skipped: dict[str, str], most: int) -> None:
    """Raise once more samples than allowed could not be read.

    Raises:
        RuntimeError: which names the first of them.
    """
    if len(skipped) > most:
        raise RuntimeError(
            f"{len(skipped)} images could not be read, above max_corrupt={most}; the first are "
            f"{listed(list(skipped.items()))}"
        )


def listed(failed: list[tuple[str, str]]) -> str:
    """Return the first of what could not be read, with reasons."""
    return "; ".join(f"{name} ({reason})" for name, reason in failed[:5])


def _padded(images: list[Tensor], sizes: Tensor) -> Tensor:
    if bool((sizes == sizes[0]).all()):
        return torch.from_numpy(np.stack([x.numpy() for x in images]))  # torch.stack would share it out
    height, width = sizes.max(dim=0).values.tolist()
    padded = torch.zeros(len(images), images[0].shape[0], height, width, dtype=torch.uint8)
    for n, x in enumerate(images):
        padded[n, :, : x.shape[1], : x.shape[2]] = x
    return padded


def _torchvision_view(image: Tensor, own: ViewParameters, n: int, size: int, recipe: ViewRecipe) -> Tensor:
    """Return one view of one uint8 image, made by torchvision's functions in the recipe's turn."""
    from torchvision.transforms.v2 import functional as tv

    x = tv.resized_crop(image, *own.boxes[n].tolist(), [size, size], antialias=True)
    x = tv.horizontal_flip(x) if own.flip[n] else x
    if own.jitter[n]:
        changes = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
        factors = own.factors[n].tolist()
        for which in own.order[n].tolist():
            x = changes[which](x, factors[which])
    if own.grayscale[n]:
        x = tv.rgb_to_grayscale(x, num_output_channels=x.shape[0])
    if own.blur_sigma[n] > 0:
        x = tv.gaussian_blur(x, [recipe.blur_kernel] * 2, [float(own.blur_sigma[n])])
    if own.solarize_threshold[n] <= 1:
        x = tv.solarize(x, float(own.solarize_threshold[n]) * 255)
    return x
