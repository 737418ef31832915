"""Where images come from: data sets by name, folders, the Hugging Face hub, or anything indexable."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sym._extras import need
from lightning_sym.datamodules.augment.recipes import unknown

try:
    from PIL.Image import DecompressionBombError
except ModuleNotFoundError:  # it comes with torchvision: without that no image is decoded
    PILLOW: tuple[type[Exception], ...] = ()
else:
    PILLOW = (DecompressionBombError,)

Moments = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET: Moments = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TORCHVISION: dict[str, tuple[str, int, Moments]] = {  # class, pixels a side, channel means and deviations
    "cifar10": ("CIFAR10", 32, ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))),
    "cifar100": ("CIFAR100", 32, ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))),
    "stl10": ("STL10", 96, ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713))),
}
UNREADABLE = (  # what Pillow raises on damaged files: broken headers ask for sizes beyond all bounds, too
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    *PILLOW,
)
DIGITS: Moments = ((0.305,) * 3, (0.376,) * 3)


@dataclass(frozen=True)
class Splits:
    """What a source offers.

    Args:
        train: images to make views of: ``(image, label)`` by index.
        probe: labelled images for probes to learn from.
        val: held-out labelled images, or None: a share of ``train`` is to be held out.
        image_size: pixels a side of a view, unless asked for otherwise.
        moments: means and standard deviations of the channels.
    """

    train: Any
    probe: Any
    val: Any
    image_size: int
    moments: Moments


class Part:
    """Some of a data set's samples, under their numbers there."""

    def __init__(self, data: Any, rows: list[int]) -> None:
        self.data, self.rows = data, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.data[self.rows[index]]

    def name_of(self, index: int) -> str:
        """Return what to call a sample in a message."""
        return name_of(self.data, self.rows[index])


class _HubRows:
    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.image = next((c for c in ("image", "img") if c in rows.column_names), None)
        self.label = next((c for c in ("label", "labels", "fine_label") if c in rows.column_names), None)
        if self.image is None or self.label is None:
            raise ValueError(f"source has no image and label columns, but {rows.column_names}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row = self.rows[index]
        return row[self.image], row[self.label]


def check_source(source: Any) -> str:
    """Return the kind of a source: "digits", "torchvision", "folder", "hub" or "dataset".

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
    if not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
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


def open_source(source: Any, *, root: str) -> Splits:
    """Open a source that is on disk.

    Args:
        source: see :class:`~lightning_sym.datamodules.multi_view.MultiViewDataModule`.
        root: folder of torchvision's data sets.

    Raises:
        ValueError: if a name is unknown or a folder has no images.
    """
    kind = check_source(source)
    if kind == "digits":
        data = _digits()
        test = [i for i in range(len(data)) if i % 10 == 0]
        train = Part(data, [i for i in range(len(data)) if i % 10])
        return Splits(train, train, Part(data, test), 32, DIGITS)
    if kind == "torchvision":
        opened = [_torchvision(source, root, split, fetch=False) for split in _splits_of(source)]
        return Splits(opened[0], opened[-2], opened[-1], *TORCHVISION[source][1:])
    if kind == "folder":
        folder = Path(source)
        train_at = folder / "train" if (folder / "train").is_dir() else folder
        val_at = next((folder / n for n in ("val", "test") if (folder / n).is_dir()), None)
        train = _folder(train_at)
        val = _folder(val_at) if val_at is not None and train_at != folder else None
        return Splits(train, train, val, 224, IMAGENET)
    if kind == "hub":
        rows, held_out = _hub(source)
        return Splits(rows, rows, held_out, 224, IMAGENET)
    return Splits(source, source, None, 0, IMAGENET)


def name_of(data: Any, index: int) -> str:
    """Return what to call a sample in a message: its path, if the data set tells, or its number."""
    if isinstance(data, Part):
        return data.name_of(index)
    samples = getattr(data, "samples", None)
    return str(samples[index][0]) if samples is not None else f"sample {index}"


def as_bytes(image: Any, *, channels: int, max_side: int | None) -> Tensor:
    """Return an image as uint8 ``[C, H, W]``.

    Args:
        image: PIL image; array or tensor ``[H, W]``, ``[C, H, W]`` or ``[H, W, C]``, uint8 or
            floating in [0, 1].
        channels: 1 or 3; colours are weighed to grey, grey is repeated.
        max_side: larger images are first shrunk, with antialiasing, to this many pixels.

    Raises:
        ValueError: if it is none of these.
    """
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3:
        most = max(image.shape[1:])
        if image.shape[0] == channels and (max_side is None or most <= max_side):
            return image  # as it is: nothing to convert, nothing to import
    need("torchvision", what="Reading an image")
    from torchvision.transforms.v2 import functional as tv

    if isinstance(image, np.ndarray | Tensor):
        x = torch.as_tensor(image)
        x = x[None] if x.ndim == 2 else x
        if x.ndim == 3 and x.shape[0] not in (1, 3) and x.shape[2] in (1, 3):
            x = x.permute(2, 0, 1)
        if x.ndim != 3 or x.shape[0] not in (1, 3):
            raise ValueError(f"an image must have 1 or 3 channels, got shape {tuple(image.shape)}")
        if x.is_floating_point():
            low, high = (float(v) for v in x.aminmax())
            if not (
                low >= -0.01 and high <= 1.01
            ):  # room for a resampling's overshoot, not for normalised ones
                raise ValueError(
                    f"a floating image must be in [0, 1], got values from {low:.3g} to {high:.3g}"
                )
            x = (x * 255).round().clamp(0, 255).to(torch.uint8)
        elif x.dtype != torch.uint8:
            raise ValueError(f"an image must be uint8 or floating in [0, 1], got {x.dtype}")
        if x.shape[0] != channels:
            x = x.expand(3, -1, -1) if channels == 3 else tv.rgb_to_grayscale(x)
    else:
        x = tv.pil_to_tensor(image.convert("RGB" if channels == 3 else "L"))
    longest = max(x.shape[1:])
    if max_side is not None and longest > max_side:
        shape = [max(1, round(side * max_side / longest)) for side in x.shape[1:]]
        x = tv.resize(x, shape, antialias=True)
    return x


def _splits_of(source: str) -> tuple[Any, ...]:
    """Return the splits for views, for probes and held out; STL-10's views are of its unlabelled split."""
    return ("unlabeled", "train", "test") if source == "stl10" else (True, False)


def _torchvision(source: str, root: str, split: Any, *, fetch: bool) -> Any:
    need("torchvision", what=f"source {source!r}")
    import torchvision

    reader = getattr(torchvision.datasets, TORCHVISION[source][0])
    return reader(root, **{"split" if source == "stl10" else "train": split}, download=fetch)


def _folder(root: Path) -> Any:
    need("torchvision", what="A folder of images")
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(root), allow_empty=True)
    except FileNotFoundError:
        found = None
    if found is None or not len(found):
        raise ValueError(f"source: no images in folders of classes below {root}")
    return found


def _hub(source: str) -> tuple[_HubRows, _HubRows | None]:
    name = source.removeprefix("hub:")
    need(
        "datasets", what=f"source {source!r}: there is no such folder, and a data set of the Hugging Face hub"
    )
    import datasets

    splits = datasets.load_dataset(name)
    if "train" not in splits:
        raise ValueError(f"source {source!r} has no split 'train', but {sorted(splits)}")
    held_out = next((splits[n] for n in ("validation", "val", "test") if n in splits), None)
    return _HubRows(splits["train"]), None if held_out is None else _HubRows(held_out)


def _digits() -> list[tuple[Tensor, int]]:
    need("sklearn", what="source 'digits'")
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))
    return [(image[None], int(label)) for image, label in zip(x, digits.target, strict=True)]
