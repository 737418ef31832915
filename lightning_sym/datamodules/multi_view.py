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

from lightning_sym.datamodules._classes import Rows, draw_by_class, with_numbers_of
from lightning_sym.datamodules._folders import VAL_NAMES
from lightning_sym.datamodules._rows import Columns
from lightning_sym.datamodules._view_batches import (
    Drawing,
    EpochSampler,
    RawBatch,
    RawImages,
    Reading,
    ResumableLoader,
    check_corrupt,
)
from lightning_sym.datamodules.augment.recipes import ViewRecipe, local_recipe, make_recipe, unknown
from lightning_sym.datamodules.augment.resample import crop_resize
from lightning_sym.datamodules.augment.views import make_views
from lightning_sym.datamodules.sources import Splits, check_source, download, open_source


class MultiViewDataModule(LightningDataModule):
    """Batches ``(views, labels)`` for joint-embedding training, ``views`` a list of ``[B, C, S, S]``.

    With ``local_views`` the first ``views`` of them are large crops and the others small ones in fewer
    pixels (multi-crop; Caron et al., 2020, arXiv:2006.09882): size tells which are which.
    Views come in the precision of the fit. Labels are class numbers, -1 for images without a label:
    None, NaN and every negative number mean that. Splits share one list of classes, matched by name.

    Workers only read bytes; views are made in ``on_after_batch_transfer``, on the batch's device, every
    sample with its own parameters. These depend on (seed, epoch, sample, view) alone: not on workers,
    ranks or batches, and an epoch looks the same in a resumed run. No random state is touched.
    Validation batches are views as well, the same ones each time, so that a loss can be validated;
    probes get unaugmented images from :meth:`probe_dataloaders`.

    Args:
        source: ``"digits"`` (scikit-learn's, needs no download), ``"cifar10"``, ``"cifar100"`` or
            ``"stl10"`` (views of its unlabelled split, label -1); a folder of images, of class folders, or
            of ``train/`` and ``val/`` with either; a Hugging Face data set, ``"hub:<name>"`` or
            ``"<owner>/<name>"``; a map-style data set; or a mapping of such with a split ``"train"``. Rows
            are (image, label, ...), mappings, named tuples or dataclasses with these, or images alone.
        recipe: ``"simclr"``, ``"barlow_twins"``, ``"vicreg"``, ``"weak"``, a
            :class:`~lightning_sym.datamodules.augment.ViewRecipe`, or several that views take in turn.
        views: (global) views of a sample, at least 2.
        local_views: further views of a sample, small crops.
        local_size: pixels a side of these, below ``image_size``; None: 3/7 of it, SwAV's 96 of 224.
        local_scale: area of these crops as a share of the image's; SwAV's. (Its large crops have
            ``recipe_options={"crop_scale": (0.14, 1.0)}``.) Blur shrinks with the view, all else is as in
            the recipe.
        image_size: ``S``; None: 32 for digits and CIFAR, 96 for STL-10, 224 for folders and the hub, the
            first image's longer side for a data set.
        batch_size: samples a batch on each rank, at least 2.
        recipe_options: keywords of the recipe, ``{"blur": 0.5}`` say.
        backend: ``"batched"``, or ``"torchvision"``: the same views, made by torchvision in the workers,
            one by one and in whole bytes.
        root: folder of the named data sets.
        val_source: held-out images, any source's training split; None: the source's own.
        val_share: share held out where there is no split for it, drawn by class.
        subset: use only so many training images, a number or a share below 1, drawn by class: each class
            gives its share, to within one image. Where labels cannot be told without reading more than
            2,000 images, draws are from all classes alike.
        columns: names of image and label in rows with names, ``("photo", "species")`` say, or
            ``("photo", None)``; None: usual names.
        channels: 3, or 1 for grey images.
        upright: turn images as their EXIF orientation asks; False: as they are stored.
        max_side: larger images are shrunk to this many pixels on reading; None: never.
        max_corrupt: unreadable images, of each process, that are put up with. Each is warned of by name
            and counted in :attr:`skipped`; in views the next image takes its place. A row that is not
            understood is no such image: it ends the run.
        mean: of the channels, subtracted; None: the source's.
        std: of the channels, which divides; None: the source's.
        num_workers: worker processes.
        seed: of order and views.

    Attributes:
        skipped: reasons by the name of each image that could not be read.

    Raises:
        ValueError: if an argument is out of its range or a name unknown; in ``setup``, if a folder has no
            images, splits differ in their classes, rows are not understood, no image can be read or there
            are too few for one batch, which every new loader looks at again.
        TypeError: if the source is no source.
    """

    def __init__(
        self,
        source: Any = "digits",
        *,
        recipe: str | ViewRecipe | Sequence[ViewRecipe] = "simclr",
        views: int = 2,
        local_views: int = 0,
        local_size: int | None = None,
        local_scale: tuple[float, float] = (0.05, 0.14),
        image_size: int | None = None,
        batch_size: int = 256,
        recipe_options: Mapping[str, Any] | None = None,
        backend: Literal["batched", "torchvision"] = "batched",
        root: str | Path = "data",
        val_source: Any = None,
        val_share: float = 0.1,
        subset: int | float | None = None,
        columns: Columns | None = None,
        channels: Literal[1, 3] = 3,
        upright: bool = True,
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
            ("local_views", local_views, 0),
            ("local_size", 2 if local_size is None else local_size, 2),
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
        if subset is not None and not (
            0 < subset < 1 if isinstance(subset, float) else type(subset) is int and subset > 0
        ):
            raise ValueError(f"subset must be a positive number of images or a share below 1, got {subset!r}")
        if columns is not None and not (isinstance(columns, list | tuple) and len(columns) == 2):
            raise ValueError(f"columns must be the two names of image and label, got {columns!r}")
        check_source(source)
        if val_source is not None:
            check_source(val_source)
        self.n_views, self.local_views = views, local_views
        self.local_size, self.local_scale = local_size, local_scale
        self.recipe, self.recipe_options, self.seed = recipe, recipe_options, seed
        self._drawing(image_size or max(224, (local_size or 0) + 1))
        for name, moment in (("mean", mean), ("std", std)):
            if moment is not None and len(moment) != channels:
                raise ValueError(f"{name} must have one number for each of {channels} channels, got {moment}")
        if std is not None and min(std) <= 0:
            raise ValueError(f"std must be positive, got {std}")
        self.source, self.val_source, self.root = source, val_source, str(root)
        self.image_size, self.batch_size, self.backend = image_size, batch_size, backend
        self.val_share, self.subset = val_share, subset
        self.columns: Columns | None = None if columns is None else (columns[0], columns[1])
        self.channels, self.max_corrupt, self.num_workers = channels, max_corrupt, num_workers
        self.reading = Reading(channels, max_side, upright)
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
        found = open_source(self.source, root=self.root, columns=self.columns)
        train, probe, val = found.train, found.probe, found.val
        if self.val_source is not None:
            held_out = open_source(self.val_source, root=self.root, columns=self.columns).probe
            val = with_numbers_of(train, held_out)
        elif val is None:
            if isinstance(self.source, Mapping) and len(self.source) > 1:
                warnings.warn(
                    f"source: of the splits {sorted(map(str, self.source))} only 'train' is used, a share of "
                    f"it held out: none is called {VAL_NAMES[0]!r} or {VAL_NAMES[3]!r}; or give val_source",
                    stacklevel=2,
                )
            held = self._draw(train, max(1, round(self.val_share * len(train))))
            kept = torch.ones(len(train), dtype=torch.bool)
            kept[held] = False
            val, train = train.take(held.tolist()), train.take(kept.nonzero().flatten().tolist())
            probe = train
        if self.subset is not None:
            share = self.subset if isinstance(self.subset, float) else self.subset / max(1, len(train))
            fewer = train.take(self._draw(train, max(1, round(share * len(train)))).tolist())
            train, probe = fewer, fewer if probe is train else probe
        self._check_batch_size(len(train))
        first = self.reading.first(train)
        size = self.image_size or found.image_size or max(first.shape[1:])
        mean, std = found.moments
        if self.channels == 1:
            mean, std = (sum(mean) / 3,), (sum(std) / 3,)
        self.mean = torch.tensor(self._mean or mean, dtype=torch.float32)
        self.std = torch.tensor(self._std or std, dtype=torch.float32)
        self.drawing = self._drawing(size)
        self._splits = Splits(train, probe, val, size, found.moments)

    def _draw(self, rows: Rows, count: int) -> Tensor:
        return draw_by_class(rows.labels(), size=len(rows), count=count, seed=self.seed)

    def _drawing(self, size: int) -> Drawing:
        """Return how all views are drawn.

        Raises:
            ValueError: if the recipe or the local views do not fit the size.
        """
        views, more = self.n_views, self.local_views
        recipes = make_recipe(self.recipe, views=views + more, image_size=size, options=self.recipe_options)
        small = max(2, round(size * 3 / 7)) if self.local_size is None else self.local_size
        if more and small >= size:
            raise ValueError(f"local_size must be below image_size={size}, got {small}")
        local = [
            local_recipe(own, size=size, local_size=small, crop_scale=self.local_scale)
            for own in recipes[views:]
        ]
        return Drawing((*recipes[:views], *local), (size,) * views + (small,) * more, views, self.seed)

    def _check_batch_size(self, images: int | None = None) -> None:
        """Raise about a batch size that is none, or that so many training images do not fill."""
        ranks, size = self._ranks()[0], self.batch_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 2:
            raise ValueError(f"batch_size must be an integer of at least 2, got {size!r}")
        if images is not None and images // ranks < size:
            raise ValueError(
                f"batch_size={size} on {ranks} rank(s) is above the {images} training images: no step would "
                f"be made; it can be at most {images // ranks}"
            )

    @override
    def train_dataloader(self) -> DataLoader[RawBatch]:
        """Return the loader of raw batches; the trainer has this module make views of them.

        Raises:
            ValueError: if ``batch_size``, which may have changed since ``setup``, leaves no batch.
        """
        train = self._opened().train
        self._check_batch_size(len(train))
        self._training = self._loader(train, train=True)
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
        val = self._opened().val
        assert val is not None  # setup held some out
        self._check_batch_size()
        return self._loader(val, train=False)

    def probe_dataloaders(self) -> tuple[ProbeLoader, ProbeLoader]:
        """Return loaders of all labelled images, to learn from and held out, in their order.

        Batches are ``(images [B, C, S, S], labels [B])``: the middle square, resized with antialiasing
        and normalised, in the precision of the fit. Unreadable and unlabelled images are left out.

        Raises:
            ValueError: if there are no labelled images.
        """
        splits = self._opened()
        assert splits.val is not None  # setup held some out
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
        drawing = self.drawing
        if batch.views:
            made = [(v / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1) for v in batch.views]
            return [self.in_precision(view) for view in made], batch.labels
        parameters = drawing(batch.numbers, batch.sizes, batch.epoch)
        kinds = [slice(drawing.n_global), slice(drawing.n_global, None)]
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            made = [
                view
                for kind in kinds if parameters[kind]
                for view in make_views(
                    batch.images,
                    parameters[kind],
                    size=drawing.sizes[kind][0],
                    blur_kernels=[recipe.blur_kernel for recipe in drawing.recipes[kind]],
                    mean=mean,
                    std=std,
                )
            ]  # fmt: skip
        return [self.in_precision(view) for view in made], batch.labels

    def in_precision(self, x: Tensor) -> Tensor:
        """Return a tensor in the floating point type in which the trainer passes batches to its module."""
        # The trainer converts batches before their views are made.
        return x if self.trainer is None else self.trainer.precision_plugin.convert_input(x)

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

    def _images(self, data: Rows, *, views: bool) -> RawImages:
        return RawImages(
            data,
            reading=self.reading,
            max_corrupt=self.max_corrupt,
            replace=views,
            drawing=self.drawing if views and self.backend == "torchvision" else None,
        )

    def _loader(self, data: Rows, *, train: bool) -> ResumableLoader:
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

    def __init__(self, module: MultiViewDataModule, data: Rows) -> None:
        self.module = module
        labels = data.labels()
        numbers = range(len(data)) if labels is None else (labels >= 0).nonzero().flatten().tolist()
        if not len(numbers):
            raise ValueError(
                f"source: none of the {len(data)} images is labelled (labels below 0 mean that); probes need "
                "labelled images"
            )
        sampler = [(-1, index) for index in numbers]
        self._raw = module._read(module._images(data, views=False), sampler, drop_last=False)

    def __len__(self) -> int:
        return len(self._raw)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        module = self.module
        for batch in self._raw:
            module.report(batch)
            labelled = batch.labels >= 0
            if not labelled.any():
                continue
            side_B = batch.sizes.amin(dim=1)
            top, left = ((batch.sizes[:, k] - side_B) // 2 for k in range(2))
            boxes = torch.stack([top, left, side_B, side_B], dim=1)
            x = crop_resize(batch.images[labelled], boxes[labelled], size=module.drawing.size)
            x = (x - module.mean.view(-1, 1, 1)) / module.std.view(-1, 1, 1)
            yield module.in_precision(x), batch.labels[labelled]


def _whole(batch: RawBatch) -> RawBatch:
    return batch
