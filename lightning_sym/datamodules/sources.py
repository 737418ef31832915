"""Where images come from: data sets by name, folders, the Hugging Face hub, or anything indexable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sym.datamodules._classes import Rows, with_numbers_of
from lightning_sym.datamodules._folders import VAL_NAMES, open_folders
from lightning_sym.datamodules._rows import Columns
from lightning_sym.datamodules.augment.recipes import unknown

Moments = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET: Moments = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TORCHVISION: dict[str, tuple[str, int, Moments]] = {  # class, pixels a side, channel means and deviations
    "cifar10": ("CIFAR10", 32, ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))),
    "cifar100": ("CIFAR100", 32, ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))),
    "stl10": ("STL10", 96, ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713))),
}
DIGITS: Moments = ((0.305,) * 3, (0.376,) * 3)


@dataclass(frozen=True)
class Splits:
    """What a source offers.

    Args:
        train: images to make views of.
        probe: labelled images for probes to learn from.
        val: held-out labelled images, or None: a share of ``train`` is to be held out.
        image_size: pixels a side of a view, unless asked for otherwise.
        moments: means and standard deviations of the channels.
    """

    train: Rows
    probe: Rows
    val: Rows | None
    image_size: int
    moments: Moments


def check_source(source: Any) -> str:
    """Return the kind of a source: "digits", "torchvision", "folder", "hub", "splits" or "dataset".

    Raises:
        ValueError: if it is a name that is not known, or a folder that is not there.
        TypeError: if it is neither a name nor a map-style data set.
    """
    if isinstance(source, Path) or (isinstance(source, str) and Path(source).is_dir()):
        if not Path(source).is_dir():
            raise ValueError(f"source: there is no folder {source}")
        return "folder"
    if isinstance(source, str):
        if source == "digits":
            return "digits"
        if source in TORCHVISION:
            return "torchvision"
        if source.startswith("hub:") or (source.count("/") == 1 and source[0] not in "./~"):
            return "hub"
        named = unknown("source", source, {"digits", *TORCHVISION})
        raise ValueError(f"{named}; or an existing folder, hub:<name>, or a data set of (image, label)")
    if isinstance(source, Mapping):
        if "train" not in source:
            raise ValueError(
                f"source, a mapping, must have a split 'train', a data set, got {list(source)[:8]}"
            )
        return "splits"
    indexed = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    if not indexed or isinstance(source, torch.utils.data.IterableDataset):
        raise TypeError(f"source must be a name, a folder or a map-style data set, got {type(source)}")
    return "dataset"


def download(source: Any, *, root: str) -> None:
    """Fetch what is not on disk yet; only torchvision's and the hub's sets ever need it."""
    kind = check_source(source)
    if kind == "torchvision":
        for split in _splits_of(source):
            _torchvision(source, root, split, fetch=True)
    elif kind == "hub":
        _hub(source)


def open_source(source: Any, *, root: str, columns: Columns | None = None) -> Splits:
    """Open a source that is on disk.

    Args:
        source: see :class:`~lightning_sym.datamodules.multi_view.MultiViewDataModule`.
        root: folder of torchvision's data sets.
        columns: names of image and label in rows with names; None: found by themselves.

    Raises:
        ValueError: if a name is unknown, a folder has no images or splits differ in their classes.
    """
    kind = check_source(source)
    val: Any = None
    if kind == "digits":
        digits = Rows(_digits())
        train = digits.take([i for i in range(len(digits)) if i % 10])
        held_out = digits.take(range(0, len(digits), 10))
        return Splits(train, train, held_out, 32, DIGITS)
    if kind == "torchvision":
        opened = [Rows(_torchvision(source, root, split, fetch=False)) for split in _splits_of(source)]
        return Splits(opened[0], opened[-2], opened[-1], *TORCHVISION[source][1:])
    if kind == "folder":
        rows, val = open_folders(Path(source))
        size = 224
    elif kind in ("hub", "splits"):
        splits = _hub(source) if kind == "hub" else source
        rows, val = splits["train"], next((splits[n] for n in VAL_NAMES if n in splits), None)
        size = 224 if kind == "hub" else 0
    else:
        rows, size = source, 0
    train = Rows(rows, columns=columns)
    held = None if val is None else with_numbers_of(train, Rows(val, columns=columns))
    return Splits(train, train, held, size, IMAGENET)


def _splits_of(source: str) -> tuple[Any, ...]:
    """Return the splits for views, for probes and held out; STL-10's views are of its unlabelled split."""
    return ("unlabeled", "train", "test") if source == "stl10" else (True, False)


def _torchvision(source: str, root: str, split: Any, *, fetch: bool) -> Any:
    import torchvision

    reader = getattr(torchvision.datasets, TORCHVISION[source][0])
    return reader(root, **{"split" if source == "stl10" else "train": split}, download=fetch)


def _hub(source: str) -> Any:
    name = source.removeprefix("hub:")
    try:
        import datasets
    except ImportError as error:
        raise ModuleNotFoundError(
            f"source {source!r}: there is no such folder, and a data set of the hub needs the extra "
            "'hub': pip install lightning-sym[hub]"
        ) from error
    splits = datasets.load_dataset(name)
    if "train" not in splits:
        raise ValueError(f"source {source!r} has no split 'train', but {sorted(splits)}")
    return splits


def _digits() -> list[tuple[Tensor, int]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))
    return [(image[None], int(label)) for image, label in zip(x, digits.target, strict=True)]
