"""Run the matrix of ways to train, and write what came of it for the page.

Each cell is what the tests of ``tests/matrix`` found; columns whose package is not installed keep what an
earlier run found.

Run:
    python -m benchmarks.compatibility                        # everything, slow columns too
    python -m benchmarks.compatibility --only torchrun LSTM   # columns with one of these in their names
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.common import write_json
from tests.matrix.columns import can_run, columns

FILE = Path(__file__).parent.parent / "docs" / "results" / "compatibility.json"


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
    before = json.loads(args.out.read_text())["results"] if args.out.exists() else {}
    found = {}
    for group, column in columns():
        wanted = not args.only or any(part in column.name for part in args.only)
        if not wanted or not can_run(column):
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            cells = column.cells(Path(folder))
        found[column.name] = {
            "group": group,
            "reference": column.told,
            "places": column.places,
            "cells": {name: asdict(cell) for name, cell in cells.items()},
        }
        right = sum(cell.verdict == "right" for cell in cells.values())
        seconds = time.perf_counter() - began
        print(f"{column.name:60} {right:2} of {len(cells)} right {seconds:6.1f} s", flush=True)
        for name, cell in cells.items():
            if cell.verdict != "right" or cell.why:
                print(f"    {name}: {cell.verdict}: {cell.why[:150]}", flush=True)
        known = {each.name: found.get(each.name, before.get(each.name)) for _, each in columns()}
        results = {name: entry for name, entry in known.items() if entry is not None}
        write_json(args.out, config={}, results=results)


if __name__ == "__main__":
    main()
