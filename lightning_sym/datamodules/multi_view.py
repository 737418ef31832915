"""Several augmented views of every image, made a batch at a time where the batch lives.

Shape letters: B batch, C channels, S pixels a side of a view.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_sym.datamodules._view_batches import (
    Drawing,
    EpochSampler,
    RawBatch,
    RawImages,
    ResumableLoader,
    check_corrupt,
)
from lightning_sym.datamodules.augment.recipes import ViewRecipe, make_recipe, unknown
from lightning_sym.datamodules.augment.resample import crop_resize
from lightning_sym.datamodules.augment.views import make_views
from lightning_sym.datamodules.sources import Part, Splits, as_bytes, check_source, download, open_source


class MultiViewDataModule(LightningDataModule):
    """Batches ``(views, labels)`` for joint-embedding training, ``views`` a list of ``[B, C, S, S]``.

    Workers only read bytes; views are made in ``on_after_batch_transfer``, on the batch's device, every
    sample with its own parameters. These depend on (seed, epoch, sample, view) alone: not on workers,
    ranks or batches, and an epoch looks the same in a resumed run. No random state is touched.
    Validation batches are views as well, the same ones each time, so that a loss can be validated;
    probes get unaugmented images from :meth:`probe_dataloaders`.

    Args:
        source: ``"digits"`` (scikit-learn's, needs no download), ``"cifar10"``, ``"cifar100"`` or
            ``"stl10"`` (views of its unlabelled split, label -1); a folder of class folders, or of
            ``train/`` and ``val/`` with such; a Hugging Face data set, ``"hub:<name>"`` or
            ``"<owner>/<name>"``; or a map-style data set of (image, label).
        recipe: ``"simclr"``, ``"barlow_twins"``, ``"vicreg"``, ``"weak"``, a
            :class:`~lightning_sym.datamodules.augment.ViewRecipe`, or several that views take in turn.
        views: views of a sample, at least 2.
        image_size: ``S``; None: 32 for digits and CIFAR, 96 for STL-10, 224 for folders and the hub, the
            first image's longer side for a data set.
        batch_size: samples a batch on each rank, at least 2.
        recipe_options: keywords of the recipe, ``{"blur": 0.5}`` say.
        backend: ``"batched"``, or ``"torchvision"``: the same views, made by torchvision in the workers,
            one by one and in whole bytes.
        root: folder of the named data sets.
        val_source: held-out images, any source's training split; None: the source's own.
        val_share: share held out at random where there is no split for it.
        channels: 3, or 1 for grey images.
        max_side: larger images are shrunk to this many pixels on reading; None: never.
        max_corrupt: unreadable images, of each process, that are put up with. Each is warned of by name
            and counted in :attr:`skipped`; in views the next image takes its place.
        mean: of the channels, subtracted; None: the source's.
        std: of the channels, which divides; None: the source's.
        num_workers: worker processes.
        seed: of order and views.

    Attributes:
        skipped: reasons by the name of each image that could not be read.

    Raises:
        ValueError: if an argument is out of its range or a name unknown; in ``setup``, if a folder has no
            images or there are too few for one batch.
        TypeError: if the source is no source.
    """

    def __init__(
        self,
        source: Any = "digits",
        *,
        recipe: str | ViewRecipe | Sequence[ViewRecipe] = "simclr",
        views: int = 2,
        image_size: int | None = None,
        batch_size: int = 256,
        recipe_options: Mapping[str, Any] | None = None,
        backend: Literal["batched", "torchvision"] = "batched",
        root: str | Path = "data",
        val_source: Any = None,
        val_share: float = 0.1,
        channels: Literal[1, 3] = 3,
        max_side: int | None = 512,
        max_corrupt: int = 100,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("views", views, 2),
            ("batch_size", batch_size, 2),
            ("image_size", 2 if image_size is None else image_size, 2),
            ("max_side", 1 if max_side is None else max_side, 1),
            ("max_corrupt", max_corrupt, 0),
            ("num_workers", num_workers, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if backend not in ("batched", "torchvision"):
            raise ValueError(unknown("backend", backend, {"batched", "torchvision"}))
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels!r}")
        if not 0 < val_share < 1:
            raise ValueError(f"val_share must be above 0 and below 1, got {val_share!r}")
        check_source(source)
        if val_source is not None:
            check_source(val_source)
        make_recipe(recipe, views=views, image_size=image_size or 224, options=recipe_options)
        for name, moment in (("mean", mean), ("std", std)):
            if moment is not None and len(moment) != channels:
                raise ValueError(f"{name} must have one number for each of {channels} channels, got {moment}")
        if std is not None and min(std) <= 0:
            raise ValueError(f"std must be positive, got {std}")
        self.source, self.val_source, self.root = source, val_source, str(root)
        self.recipe, self.recipe_options, self.n_views = recipe, recipe_options, views
        self.image_size, self.batch_size, self.backend = image_size, batch_size, backend
        self.val_share, self.channels, self.max_side, self.max_corrupt = (
            val_share,
            channels,
            max_side,
            max_corrupt,
        )
        self.num_workers, self.seed = num_workers, seed
        self._mean, self._std = mean, std
        self.skipped: dict[str, str] = {}
        self._splits: Splits | None = None
        self._training: ResumableLoader | None = None
        self._resume: dict[str, int] | None = None

    @override
    def prepare_data(self) -> None:
        for source in (self.source, self.val_source):
            if source is not None:
                download(source, root=self.root)

    @override
    def setup(self, stage: str | None = None) -> None:
        if self._splits is not None:
            return
        found = open_source(self.source, root=self.root)
        train, probe, val = found.train, found.probe, found.val
        if self.val_source is not None:
            val = open_source(self.val_source, root=self.root).probe
        elif val is None:
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed)).tolist()
            held = max(1, round(self.val_share * len(train)))
            val, train = Part(train, sorted(order[:held])), Part(train, sorted(order[held:]))
            probe = train
        ranks = self._ranks()[0]
        if len(train) < self.batch_size * ranks:
            raise ValueError(
                f"batch_size={self.batch_size} on {ranks} rank(s) is above the {len(train)} training images"
            )
        size = self.image_size or found.image_size
        if not size:
            first = as_bytes(train[0][0], channels=self.channels, max_side=self.max_side)
            size = max(first.shape[1:])
        mean, std = found.moments
        if self.channels == 1:
            mean, std = (sum(mean) / 3,), (sum(std) / 3,)
        self.mean, self.std = torch.tensor(self._mean or mean), torch.tensor(self._std or std)
        recipes = make_recipe(self.recipe, views=self.n_views, image_size=size, options=self.recipe_options)
        self.drawing = Drawing(recipes, size, self.seed)
        self._splits = Splits(train, probe, val, size, found.moments)

    @override
    def train_dataloader(self) -> DataLoader[RawBatch]:
        """Return the loader of raw batches; the trainer has this module make views of them."""
        self._training = self._loader(self._opened().train, train=True)
        if self._resume is not None:
            self._training.load_state_dict(self._resume)
        return self._training

    # The loader has a state of its own, but a trainer that was asked for its number of steps while the
    # optimizers were made has set its loaders up by then, and does not restore them.

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return how far the training loader got."""
        return {} if self._training is None else {"training": self._training.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Have the training loader, made or yet to be made, go on from there."""
        self._resume = state_dict.get("training")
        if self._training is not None and self._resume is not None:
            self._training.load_state_dict(self._resume)

    @override
    def teardown(self, stage: str | None = None) -> None:
        self._resume = None  # it was of this run

    @override
    def val_dataloader(self) -> DataLoader[RawBatch]:
        """Return the loader of held-out images; a last batch of one image is left out."""
        return self._loader(self._opened().val, train=False)

    def probe_dataloaders(self) -> tuple[ProbeLoader, ProbeLoader]:
        """Return loaders of all labelled images, to learn from and held out, in their order.

        Batches are ``(images [B, C, S, S], labels [B])``: the middle square, resized with antialiasing
        and normalised. Unreadable images are left out.
        """
        splits = self._opened()
        return ProbeLoader(self, splits.probe), ProbeLoader(self, splits.val)

    @override
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if not isinstance(batch, RawBatch):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        return batch._replace(  # what parameters are drawn from stays where they are drawn
            images=batch.images.to(device, non_blocking=True),
            views=[view.to(device, non_blocking=True) for view in batch.views],
            labels=batch.labels.to(device, non_blocking=True),
        )

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return ``(views, labels)`` for a raw batch, anything else as it is."""
        if not isinstance(batch, RawBatch):
            return batch
        self.report(batch)
        device = batch.labels.device
        mean, std = self.mean.to(device), self.std.to(device)
        if batch.views:
            scaled = [(v / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1) for v in batch.views]
            return scaled, batch.labels
        parameters = self.drawing(batch.numbers, batch.sizes, batch.epoch)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            made = make_views(
                batch.images,
                parameters,
                size=self.drawing.size,
                blur_kernels=[recipe.blur_kernel for recipe in self.drawing.recipes],
                mean=mean,
                std=std,
            )
        return made, batch.labels

    def report(self, batch: RawBatch) -> None:
        """Count and name the images a batch could not read.

        Raises:
            RuntimeError: if there have been more than ``max_corrupt``.
        """
        for name, reason in batch.failed:
            if name not in self.skipped:
                self.skipped[name] = reason
                warnings.warn(
                    f"skipped {name}, which could not be read ({reason}); {len(self.skipped)} so far",
                    stacklevel=2,
                )
        check_corrupt(self.skipped, self.max_corrupt)

    def _opened(self) -> Splits:
        if self._splits is None:
            self.setup()
        assert self._splits is not None  # setup made them
        return self._splits

    def _ranks(self) -> tuple[int, int]:
        trainer = self.trainer
        return (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)

    def _images(self, data: Any, *, views: bool) -> RawImages:
        return RawImages(
            data,
            channels=self.channels,
            max_side=self.max_side,
            max_corrupt=self.max_corrupt,
            replace=views,
            drawing=self.drawing if views and self.backend == "torchvision" else None,
        )

    def _loader(self, data: Any, *, train: bool) -> ResumableLoader:
        ranks, rank = self._ranks()
        share = len(data) // ranks if train else -(-len(data) // ranks)
        lonely = not train and share % self.batch_size == 1
        sampler = EpochSampler(
            len(data), seed=self.seed, ranks=ranks, rank=rank, shuffle=train, keep=share - lonely
        )
        return self._read(self._images(data, views=True), sampler, drop_last=train)

    def _read(self, images: RawImages, sampler: Any, *, drop_last: bool) -> ResumableLoader:
        return ResumableLoader(
            images,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            collate_fn=_whole,  # type: ignore[arg-type]  # the fetcher hands over whole batches
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0 and drop_last,
            generator=torch.Generator().manual_seed(self.seed),  # or workers' seeds move the global one
        )


class ProbeLoader:
    """Labelled images without augmentation, ``(images, labels)`` a batch."""

    def __init__(self, module: MultiViewDataModule, data: Any) -> None:
        self.module = module
        sampler = [(-1, index) for index in range(len(data))]
        self._raw = module._read(module._images(data, views=False), sampler, drop_last=False)

    def __len__(self) -> int:
        return len(self._raw)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        module = self.module
        for batch in self._raw:
            module.report(batch)
            if not len(batch.labels):
                continue
            side_B = batch.sizes.amin(dim=1)
            top, left = ((batch.sizes[:, k] - side_B) // 2 for k in range(2))
            boxes = torch.stack([top, left, side_B, side_B], dim=1)
            x = crop_resize(batch.images, boxes, size=module.drawing.size)
            yield (x - module.mean.view(-1, 1, 1)) / module.std.view(-1, 1, 1), batch.labels


def _whole(batch: RawBatch) -> RawBatch:
    return batch
