"""Image files in folders: which are splits, which are classes, and what is neither.

Hidden files and folders (``.ipynb_checkpoints``, ``.DS_Store``, ``._0.png``), and those that systems leave
behind, are not seen at all.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_sym.datamodules._pixels import open_image
from lightning_sym.datamodules._rows import UNLABELLED

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "test", "testing")  # the first that is there is used
SYSTEMS = ("__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
SUFFIXES: tuple[str, ...] = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
SUFFIXES += (".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2")


class FolderImages:
    """Image files and their class numbers.

    Attributes:
        samples: path and class number of each file, -1 without classes.
        targets: the class numbers.
        classes: names of the classes, in their order; None without classes.
    """

    def __init__(self, samples: list[tuple[str, int]], classes: list[str] | None) -> None:
        self.samples, self.classes = samples, classes
        self.targets = [label for _, label in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return open_image(path), label


def open_folders(root: Path) -> tuple[FolderImages, FolderImages | None]:
    """Return the training images and the held-out ones, None if there is no split of them.

    A folder is one split if it holds images, or folders of images, a class each; it is several if it has a
    folder ``train`` or ``training`` (in any case) of class folders, with ``val``, ``valid``,
    ``validation``, ``test`` or ``testing`` beside it. A folder of one of these names that holds images
    itself, beside other classes, is a class.

    Raises:
        ValueError: if there are no images, or if there is no telling splits from classes.
    """
    folders = _folders_of_images(root)
    splits = [f for f in folders if f.name.lower() in TRAIN_NAMES + VAL_NAMES]
    others = [f for f in folders if f not in splits]
    nested = [f for f in splits if not _files(f)]
    if not splits or (others and not nested):
        _check_no_hidden_splits(root, others)
        for folder in splits:
            warnings.warn(
                f"the folder {folder.name!r} in {root} holds images beside the classes "
                f"{_names(others)}: it is taken for a class",
                stacklevel=2,
            )
        return _one_split(root), None
    if others:
        raise ValueError(
            f"source: {_names(nested)} in {root} may be splits (they hold class folders) or classes beside "
            f"{_names(others)}; move or rename one kind"
        )
    train = [f for f in splits if f.name.lower() in TRAIN_NAMES]
    if len(train) != 1:
        raise ValueError(
            f"source: {root} holds {_names(splits)}, {'two' if train else 'no'} folders of training images; "
            f"name one of them {' or '.join(map(repr, TRAIN_NAMES))}"
        )
    held_out = sorted(
        (f for f in splits if f not in train), key=lambda folder: VAL_NAMES.index(folder.name.lower())
    )
    opened = _one_split(train[0])
    for folder in held_out:
        val = _one_split(folder)
        if val.classes is None and opened.classes is not None:
            warnings.warn(f"{folder} has no class folders, as {train[0]} has, and is left out", stacklevel=2)
            continue
        return opened, val
    return opened, None


def _one_split(root: Path) -> FolderImages:
    """Return a folder's images, one class a folder, or without classes if all lie in it directly."""
    folders, direct = _folders_of_images(root), _files(root)
    if not folders:
        if not direct:
            raise ValueError(f"source: no images in {root} or in folders of classes below it")
        return FolderImages([(path, UNLABELLED) for path in direct], None)
    if direct:
        warnings.warn(
            f"{len(direct)} images lie in {root} itself, beside folders of classes: they are left out",
            stacklevel=2,
        )
    samples = [(path, label) for label, folder in enumerate(folders) for path in _files_below(folder)]
    return FolderImages(samples, [folder.name for folder in folders])


def _check_no_hidden_splits(root: Path, folders: list[Path]) -> None:
    """Raise if class folders look like splits of another name, or hold the splits.

    Raises:
        ValueError: which names one.
    """
    for folder in folders:
        below = _folders_of_images(folder)
        if any(f.name.lower() in TRAIN_NAMES for f in below):
            raise ValueError(f"source: {root} holds no splits itself, but {folder} does; give that folder")
        if below and not _files(folder) and re.match(r"train|val|test|.*[-_ ]train", folder.name.lower()):
            raise ValueError(
                f"source: {folder.name!r} in {root} looks like a split of class folders; name splits "
                f"{TRAIN_NAMES[0]!r} and {VAL_NAMES[0]!r}"
            )


def _visible(name: str) -> bool:
    return not name.startswith(".") and name not in SYSTEMS


def _is_image(name: str) -> bool:
    return _visible(name) and name.lower().endswith(SUFFIXES)


def _files(folder: Path) -> list[str]:
    """Return the image files directly in a folder, in order."""
    return sorted(entry.path for entry in os.scandir(folder) if _is_image(entry.name) and entry.is_file())


def _walk(folder: Path, seen: set[str]) -> Iterator[str]:
    """Yield all image files below a folder; links are followed, in circles only once."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    inner = {*seen, real}
    yield from _files(folder)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and _visible(entry.name):
            yield from _walk(Path(entry.path), inner)


def _files_below(folder: Path) -> list[str]:
    return list(_walk(folder, set()))


def _folders_of_images(root: Path) -> list[Path]:
    """Return the visible folders in a folder with an image in or below them, in order."""
    entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    folders = [Path(entry.path) for entry in entries if entry.is_dir() and _visible(entry.name)]
    return [folder for folder in folders if next(_walk(folder, set()), None) is not None]


def _names(folders: list[Path]) -> str:
    shown = [repr(folder.name) for folder in folders[:4]]
    return ", ".join(shown) + (f" and {len(folders) - 4} more" if len(folders) > 4 else "")
