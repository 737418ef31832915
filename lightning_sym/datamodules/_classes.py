"""Labelled rows with their classes: one numbering for all splits, and draws by class.

Shape letters: N rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sym.datamodules._rows import UNLABELLED, Columns, known_labels, unpack, usual_columns

READ_THROUGH = 2000  # rows of a data set that says nothing of its labels which are read to learn them


class Rows:
    """Some rows of a data set, in an order, as (image, class number).

    Args:
        data: a map-style data set.
        columns: names of image and label in rows with names; None: found by themselves.
        index: which rows; None: all.
        renumber: class numbers for those the data set gives; None: as they are.
    """

    def __init__(
        self,
        data: Any,
        *,
        columns: Columns | None = None,
        index: Sequence[int] | None = None,
        renumber: Sequence[int] | None = None,
    ) -> None:
        self.data, self.columns, self.index, self.renumber = data, columns, index, renumber
        self._labels: list[Tensor | None] = []  # once they were asked for

    def __len__(self) -> int:
        return len(self.data) if self.index is None else len(self.index)

    def row(self, number: int) -> Any:
        """Return a row as the data set has it: whatever fails in here is the data set's."""
        return self.data[number if self.index is None else self.index[number]]

    def unpack(self, row: Any) -> tuple[Any, int]:
        """Return the image and the class number of a row, -1 if it has none."""
        image, label = unpack(row, self.columns)
        return image, label if self.renumber is None or label < 0 else self.renumber[label]

    def __getitem__(self, number: int) -> tuple[Any, int]:
        return self.unpack(self.row(number))

    def name_of(self, number: int) -> str:
        """Return what to call a row in a message: its path, if the data set tells, or its number."""
        at = number if self.index is None else self.index[number]
        samples = getattr(self.data, "samples", None)
        return str(samples[at][0]) if isinstance(samples, list) else f"sample {at}"

    def labels(self) -> Tensor | None:
        """Return the class numbers int64 ``[N]``, or None if only reading all images would tell."""
        if not self._labels:
            self._labels.append(self._find_labels())
        return self._labels[0]

    def _find_labels(self) -> Tensor | None:
        labels = known_labels(self.data, columns=self.columns, most=READ_THROUGH)
        if labels is None:
            return None
        if self.renumber is not None and len(self.renumber):
            table = torch.tensor(self.renumber, dtype=torch.int64)
            labels = torch.where(labels < 0, labels, table[labels.clamp_min(0)])
        return labels if self.index is None else labels[torch.tensor(self.index, dtype=torch.int64)]

    def take(self, numbers: Sequence[int]) -> Rows:
        """Return some of these rows."""
        index = list(numbers) if self.index is None else [self.index[n] for n in numbers]
        return Rows(self.data, columns=self.columns, index=index, renumber=self.renumber)

    def class_names(self) -> list[str] | None:
        """Return the names of the classes, by number, if the data set tells."""
        data = self.data
        while isinstance(data, torch.utils.data.Subset):
            data = data.dataset
        if getattr(data, "target_transform", None) is not None:
            return None  # its numbers are no longer those of the names
        names = getattr(data, "classes", None)
        features = getattr(data, "features", None)
        if features is not None and hasattr(data, "column_names"):
            label = (self.columns or usual_columns(data.column_names))[1]
            names = None if label is None else getattr(features[label], "names", None)
        if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
            return list(names)
        return None


def with_numbers_of(train: Rows, val: Rows) -> Rows:
    """Return the held-out rows with the class numbers of the training rows, matched by name.

    Rows whose classes have no names keep their numbers.

    Raises:
        ValueError: if a held-out class is none of the training's; it names all that differ.
    """
    ours, theirs = train.class_names(), val.class_names()
    if ours is None or theirs is None:
        return val
    used, used_in_val = _used(train, ours), _used(val, theirs)
    new, absent = [n for n in used_in_val if n not in used], [n for n in used if n not in used_in_val]
    if new:
        more = f"; they lack {_listed(absent)}" if absent else ""
        raise ValueError(
            f"source: held-out images have classes that training images lack: {_listed(new)}{more}; "
            "both need the same class names"
        )
    if absent:
        warnings.warn(f"no held-out image is of the class {_listed(absent)}", stacklevel=2)
    if ours == theirs:
        return val
    renumber = [ours.index(name) if name in ours else UNLABELLED for name in theirs]
    return Rows(val.data, columns=val.columns, index=val.index, renumber=renumber)


def _used(rows: Rows, names: list[str]) -> list[str]:
    """Return the names of the classes that have an image; all, if that is not known."""
    labels = rows.labels()
    if labels is None:
        return names
    present = set(labels.tolist())
    return [name for number, name in enumerate(names) if number in present]


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def draw_by_class(labels: Tensor | None, *, size: int, count: int, seed: int) -> Tensor:
    """Draw rows at random such that every class gives the same share of its rows, to within one row.

    Args:
        labels: class numbers ``[N]``; None: not known, the draw is from all alike.
        size: N.
        count: how many rows.
        seed: of the draw.

    Returns:
        Their numbers, int64 ``[count]``, ascending.

    Example:
        >>> labels = torch.tensor([0] * 8 + [1] * 4)
        >>> labels[draw_by_class(labels, size=12, count=3, seed=0)].tolist()
        [0, 0, 1]
    """
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    if labels is not None:
        # Row k of a class of n, in random order, stands at (k + 1/2) / n: the lowest `count` places then
        # hold round(share * n) rows of each class.
        place = torch.empty(size, dtype=torch.float64)
        for label in labels.unique():
            members = order[labels[order] == label]
            place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
        order = order[place[order].argsort(stable=True)]
    return order[:count].sort().values
