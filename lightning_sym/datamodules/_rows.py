"""What a data set hands out, taken apart: rows to (image, label), labels to class numbers.

A row that cannot be taken apart is no damaged file: it ends the run with a sentence on rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sym.datamodules._pixels import UNREADABLE, is_image

UNLABELLED = -1
IMAGE_NAMES: tuple[str, ...] = (
    "image",
    "img",
    "images",
    "pixel_values",
    "picture",
    "photo",
    "x",
    "jpg",
    "jpeg",
    "png",
    "webp",
)
LABEL_NAMES = ("label", "labels", "target", "targets", "class", "cls", "fine_label", "category", "y")
Columns = tuple[str, str | None]  # names of image and label; None: there are no labels


class RowError(ValueError):
    """A row of a data set that is not understood."""


def unpack(row: Any, columns: Columns | None = None) -> tuple[Any, int]:
    """Return the image and the class number of a row.

    Args:
        row: a sequence that begins with an image and a label, whatever follows; a mapping, a named tuple
            or a dataclass with fields of usual names; or an image alone.
        columns: the names of the image and the label; None: those of a list of usual ones.

    Returns:
        The image as it is, and the label; -1, unlabelled, for None, NaN and every negative number.

    Raises:
        RowError: if there is no telling which part is which.

    Example:
        >>> image = torch.zeros(3, 2, 2)
        >>> [unpack(row)[1] for row in ((image, 4, "a.png"), {"label": 2, "img": image}, image)]
        [4, 2, -1]
    """
    if type(row) is tuple and len(row) == 2 and type(row[1]) is int and is_image(row[0]) and columns is None:
        return row[0], max(row[1], UNLABELLED)  # nearly every row there is: without further looks
    if is_image(row) or isinstance(row, str | Path):
        return row, UNLABELLED
    fields = _fields(row)
    if fields is not None:
        return _by_name(fields, columns)
    if columns is not None:
        raise RowError(f"columns={columns} names the parts of rows that have names, got {_told(row)}")
    if not isinstance(row, Sequence) or isinstance(row, bytes) or not len(row):
        raise RowError(f"a row must be (image, label), a mapping of these, or an image, got {_told(row)}")
    image, label = row[0], row[1] if len(row) > 1 else None
    if not (is_image(image) or isinstance(image, str | Path | np.ndarray | Tensor)):
        raise RowError(f"a row must be (image, label), the image first, got {_told(row)}")
    return image, class_number(label, row)


def class_number(label: Any, row: Any = None) -> int:
    """Return a label as an int, -1 for what means "not labelled": None, NaN, any negative number.

    Raises:
        RowError: if it is not a whole number.
    """
    if isinstance(label, Tensor | np.ndarray | np.generic) and math.prod(label.shape) == 1:
        label = label.item()
    if label is None or (isinstance(label, float) and math.isnan(label)):
        return UNLABELLED
    if not isinstance(label, int | float) or not math.isfinite(label) or label != int(label):
        of = "" if row is None else f" in the row {_told(row)}"
        raise RowError(
            f"a row must be (image, label) with a whole number for a label, got {_told(label)}{of}; "
            "give classes numbers, or leave the label out"
        )
    return max(int(label), UNLABELLED)


def _fields(row: Any) -> Mapping[str, Any] | None:
    """Return the named parts of a row, or None if it has no names that say which is which."""
    if isinstance(row, Mapping):
        return row
    if dataclasses.is_dataclass(row) and not isinstance(row, type):
        return {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    names = getattr(row, "_fields", None)
    if isinstance(row, tuple) and names and (set(names) & set(IMAGE_NAMES)):
        return dict(zip(names, row, strict=True))
    return None


def _by_name(fields: Mapping[str, Any], columns: Columns | None) -> tuple[Any, int]:
    if columns is None:
        columns = usual_columns(fields)
    for name in columns:
        if name is not None and name not in fields:
            raise RowError(f"columns={columns} names no part of a row, which has {sorted(map(str, fields))}")
    image, label = columns
    return fields[image], class_number(None if label is None else fields[label], dict(fields))


def usual_columns(fields: Mapping[str, Any] | Sequence[str]) -> Columns:
    """Return which of a row's named parts are the image and the label.

    Args:
        fields: the parts, or their names alone.

    Raises:
        RowError: if there is no telling.
    """
    image = next((name for name in IMAGE_NAMES if name in fields), None)
    if image is None and isinstance(fields, Mapping):
        pictures = [name for name, value in fields.items() if is_image(value)]
        image = pictures[0] if len(pictures) == 1 else None
    label = next((name for name in LABEL_NAMES if name in fields and name != image), None)
    if image is None or (label is None and len(fields) > 1):
        raise RowError(
            f"a row is a mapping (dict) of {sorted(map(str, fields))}: say which are image and label by "
            "columns=('<image>', '<label>'), or columns=('<image>', None)"
        )
    return image, label


def _told(value: Any) -> str:
    """Return what a value is, briefly."""
    if isinstance(value, np.ndarray | Tensor):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name!r}: {type(part).__name__}" for name, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(type(part).__name__ for part in value) + ")"
    return f"{value!r} ({type(value).__name__})"


def known_labels(data: Any, *, columns: Columns | None, most: int) -> Tensor | None:
    """Return the class numbers of all rows, if they can be told without reading many images.

    Args:
        data: a map-style data set, torch's subsets of one included.
        columns: see :func:`unpack`.
        most: a data set that says nothing of its labels is read through if it has at most so many rows.

    Returns:
        int64 ``[N]``, or None.
    """
    if isinstance(data, torch.utils.data.Subset):
        whole = known_labels(data.dataset, columns=columns, most=most)
        return None if whole is None else whole[torch.as_tensor(data.indices, dtype=torch.int64)]
    if type(data) is torch.utils.data.TensorDataset:  # a subclass may give other rows
        stored: Any = data.tensors[1] if len(data.tensors) > 1 else [None] * len(data)
    elif getattr(data, "target_transform", None) is not None:
        stored = None  # what is stored is not what rows say
    elif hasattr(data, "column_names"):
        label = (columns or usual_columns(data.column_names))[1]
        try:
            stored = [None] * len(data) if label is None else data[label]
        except (TypeError, KeyError, IndexError):  # rows only, no columns
            stored = None
    else:
        stored = next((v for n in ("targets", "labels") if (v := getattr(data, n, None)) is not None), None)
    try:
        if stored is not None and len(stored) == len(data):
            return torch.tensor([class_number(label) for label in stored], dtype=torch.int64)
    except (RowError, TypeError):
        pass  # an attribute of that name, but not of that meaning
    return _read_labels(data, columns) if len(data) <= most else None


def _read_labels(data: Any, columns: Columns | None) -> Tensor:
    labels = []
    for index in range(len(data)):
        try:
            row = data[index]
        except UNREADABLE:
            labels.append(UNLABELLED)
            continue
        try:
            labels.append(unpack(row, columns)[1])
        except RowError as error:
            raise RowError(f"source, sample {index}: {error}") from error
    return torch.tensor(labels, dtype=torch.int64)
