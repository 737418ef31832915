"""Run the matrix, and write what came of it for the page.

Run:
    python -m tests.matrix.record                        # everything, slow columns too
    python -m tests.matrix.record --only torchrun LSTM   # columns whose names have one of these in them
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tests.matrix import lives, models, several, ways
from tests.matrix.rows import Cell, Column

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "results" / "compatibility.json"
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


def described(group: str, column: Column, cells: dict[str, Cell]) -> dict[str, Any]:
    """Return a column as it is written."""
    return {
        "group": group,
        "reference": column.told,
        "places": column.places,
        "cells": {name: asdict(cell) for name, cell in cells.items()},
    }


def main() -> None:
    """Run columns, print what is not right, and write all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--only", nargs="*", help="parts of names of columns")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from common import write_json

    before = json.loads(args.out.read_text())["results"] if args.out.exists() else {}
    found = {}
    for group, column in columns():
        wanted = not args.only or any(part in column.name for part in args.only)
        if not wanted or not can_run(column):
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            cells = column.cells(Path(folder))
        found[column.name] = described(group, column, cells)
        right = sum(cell.verdict == "right" for cell in cells.values())
        print(
            f"{column.name:60} {right:2} of {len(cells)} right {time.perf_counter() - began:6.1f} s",
            flush=True,
        )
        for name, cell in cells.items():
            if cell.verdict != "right" or cell.why:
                print(f"    {name}: {cell.verdict}: {cell.why[:150]}", flush=True)
        known = {each.name: found.get(each.name, before.get(each.name)) for _, each in columns()}
        results = {name: column for name, column in known.items() if column is not None}
        write_json(args.out, config={"tests": "tests/matrix"}, results=results)


if __name__ == "__main__":
    main()
