"""All columns of the matrix, by group."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from tests.matrix import lives, models, several, ways
from tests.matrix.rows import Column

GROUPS = {
    "One process": ways.COLUMNS,
    "Several processes": several.COLUMNS,
    "Lives of a run": lives.COLUMNS,
    "Models": models.COLUMNS,
}


def columns() -> Iterator[tuple[str, Column]]:
    """Yield all columns with their group."""
    for group, found in GROUPS.items():
        for column in found:
            yield group, column


def can_run(column: Column) -> bool:
    """Return whether the package that a column needs is there."""
    return not column.needs or importlib.util.find_spec(column.needs) is not None
