"""Where a monitor's readings are kept: in memory, in checkpoints, in a file.

Shape letters: R rows, V values of all of them.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch

#: Rows that a checkpoint holds, a folder that takes all of them, or ``None``: a checkpoint holds all.
Keep = int | str | Path | None
#: Rows that a checkpoint holds if nothing else is asked for.
LAST_ROWS = 1000
Row = dict[str, float]


def packed(rows: Sequence[Row], most: int | None) -> dict[str, Any]:
    """Return the last rows as columns, for a checkpoint: 8 bytes a number, and 8 a row.

    Args:
        rows: the rows.
        most: how many of them at most; ``None``: all.
    """
    last = rows[-most:] if most else rows[:0] if most == 0 else rows
    forms: dict[tuple[str, ...], int] = {}
    form_R = [forms.setdefault(tuple(row), len(forms)) for row in last]
    value_V = array("d", (value for row in last for value in row.values()))
    return {
        "rows": len(rows),
        "keys": [list(keys) for keys in forms],
        "forms": torch.tensor(form_R, dtype=torch.int64),
        "values": torch.tensor(value_V, dtype=torch.float64),
    }


def unpacked(state: Mapping[str, Any]) -> list[Row]:
    """Return the rows of what :func:`packed` has made."""
    rows, values = [], iter(state["values"].tolist())
    for form in state["forms"].tolist():
        row = {key: next(values) for key in state["keys"][form]}
        rows.append(row | {key: int(row[key]) for key in ("step", "fit") if key in row})
    return rows


class FileHistory(Sequence[Row]):
    """Rows in a file, one JSON object a line, each written when it comes.

    It is ``<folder>/<name>.jsonl`` on rank 0, and ``<folder>/<name>.rank<n>.jsonl`` on the others. Memory
    holds 8 bytes a row. A line that was not written to its end is no row.

    Args:
        folder: where; made with the first row.
        name: of the file.
    """

    def __init__(self, folder: str | Path, name: str) -> None:
        self.folder, self.name = Path(folder), name
        self._path: Path | None = None
        self._ends = array("Q")  # where rows end

    @property
    def path(self) -> Path:
        """The file of this rank."""
        there = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if there else 0
        return self.folder / (f"{self.name}.rank{rank}.jsonl" if rank else f"{self.name}.jsonl")

    def append(self, row: Mapping[str, float]) -> None:
        """Add a row at the end.

        Raises:
            OSError: if it can't be written.
        """
        end = self._seen()
        line = json.dumps(dict(row)).encode() + b"\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.truncate(end)  # of a line that was broken off
            file.seek(end)
            file.write(line)
        self._ends.append(end + len(line))

    def cut(self, rows: int) -> None:
        """Keep the first rows alone."""
        self._seen()
        if rows < len(self._ends):
            with self.path.open("r+b") as file:
                file.truncate(self._ends[rows - 1] if rows else 0)
            del self._ends[rows:]

    def _seen(self) -> int:
        """Look at what there is in the file; return where its last row ends."""
        path = self.path
        size = path.stat().st_size if path.exists() else 0
        if path != self._path or (self._ends and size < self._ends[-1]):
            self._path, self._ends = path, array("Q")
        end = self._ends[-1] if self._ends else 0
        if size > end:
            with path.open("rb") as file:
                file.seek(end)
                for line in file:
                    if line.endswith(b"\n"):
                        end += len(line)
                        self._ends.append(end)
        return end

    def __len__(self) -> int:
        self._seen()
        return len(self._ends)

    def __iter__(self) -> Iterator[Row]:
        return iter(self[:])

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        count = len(self)
        if isinstance(index, int):
            if not -count <= index < count:
                raise IndexError(f"index must be in [{-count}, {count}), got {index}")
            return self._read(index % count, index % count + 1)[0]
        first, stop, stride = index.indices(count)
        if stride == 1:
            return self._read(first, stop)
        return self._read(0, count)[index]

    def _read(self, first: int, stop: int) -> list[Row]:
        if first >= stop:
            return []
        start = self._ends[first - 1] if first else 0
        with self.path.open("rb") as file:
            file.seek(start)
            return [json.loads(line) for line in file.read(self._ends[stop - 1] - start).splitlines()]

    def __add__(self, others: Sequence[Row]) -> list[Row]:
        return [*self, *others]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list | FileHistory) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"FileHistory({str(self.path)!r}, {len(self)} rows)"
