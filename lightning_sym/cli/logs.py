"""Scalars of finished runs: from TensorBoard or CSV logs, or from saved histories."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_sym._extras import need
from lightning_sym.cli import Refused

#: Most runs of one page.
RUNS = 12
#: Readings by layer that a page shows first, and whether their decimal logarithm is shown.
STRIPS = {
    "plasticity/dead_units": False,
    "collapse/effective_rank": False,
    "signal/gradient": True,
    "plasticity/relative_update": True,
}


@dataclass
class Run:
    """One run's curves.

    Args:
        name: its folder, below the one that was given.
        curves: by key, ``(step, value)`` with steps ascending; the last value of a step counts. A step is the
            number of optimizer steps made, as in a monitor's history.
        from_zero: whether the first step is written as 0: a Trainer does so, and logs an epoch as well.
    """

    name: str
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    from_zero: bool = False

    def add(self, key: str, step: int, value: float) -> None:
        """Add one value.

        Args:
            key: of the curve.
            step: of the optimizer.
            value: NaN and infinite ones are kept: they are findings.
        """
        self.curves.setdefault(key, {})[step] = value

    def rows(self) -> list[dict[str, float]]:
        """Return the curves as a history: a row a step, with ``step`` in each."""
        steps: dict[int, dict[str, float]] = {}
        for key, curve in self.curves.items():
            for step, value in curve.items():
                steps.setdefault(step, {"step": step})[key] = value
        return [steps[step] for step in sorted(steps)]


def read_runs(paths: list[Path]) -> list[Run]:
    """Return the runs in folders and files.

    Args:
        paths: log folders (all runs below them), ``metrics.csv`` files, or histories saved as JSON: a list of
            rows with a ``step`` in each, or ``{"history": [...]}``.

    Raises:
        Refused: if there is none, or more than a page holds, or a file is damaged.
    """
    runs: list[Run] = []
    for path in paths:
        if not path.exists():
            raise Refused(f"LOGDIR must be a folder or file, and {path} is none")
        for folder, files in sorted(_sources(path)):
            run = Run(str(folder))
            logged = Run(run.name)
            for file in files:
                _read(run if file.suffix == ".json" else logged, file)
            more = int(logged.from_zero or any(0 in curve for curve in logged.curves.values()))
            for key, curve in logged.curves.items():
                for step, value in curve.items():
                    run.add(key, step + more, value)
            if run.curves:
                run.curves = {key: dict(sorted(curve.items())) for key, curve in run.curves.items()}
                runs.append(run)
    if not runs:
        raise Refused(
            f"no scalars in {', '.join(map(str, paths))}: wanted are TensorBoard events, metrics.csv, or "
            "histories as JSON"
        )
    if len(runs) > RUNS:
        raise Refused(f"a page holds at most {RUNS} runs, and there are {len(runs)}; name fewer folders")
    return runs


def _sources(path: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield folders with the files of a run in each."""
    if path.is_file():
        yield path, [path]
        return
    found: dict[Path, list[Path]] = {}
    for pattern in ("events.out.tfevents.*", "metrics.csv", "history*.json"):
        for file in sorted(path.rglob(pattern)):
            found.setdefault(file.parent, []).append(file)
    yield from found.items()


def _read(run: Run, file: Path) -> None:
    try:
        if file.suffix == ".csv":
            _read_csv(run, file)
        elif file.suffix == ".json":
            _read_history(run, json.loads(file.read_text(encoding="utf-8")))
        else:
            _read_events(run, file)
    except (ValueError, UnicodeDecodeError, csv.Error) as error:
        raise Refused(f"{file} can't be read: {error}") from error


def _read_csv(run: Run, file: Path) -> None:
    with file.open(newline="", encoding="utf-8") as lines:
        rows = csv.DictReader(lines)
        run.from_zero = run.from_zero or "epoch" in (rows.fieldnames or ())
        for row in rows:
            step = int(float(row.get("step") or 0))
            for key, text in row.items():
                if key not in ("step", "epoch", None) and isinstance(text, str) and text:
                    run.add(key, step, float(text))


def _read_history(run: Run, history: Any) -> None:
    rows = history.get("history") if isinstance(history, Mapping) else history
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError("it holds no list of rows")
    for row in rows:
        for key, value in row.items():
            if (
                key not in ("step", "epoch")
                and isinstance(value, int | float)
                and not isinstance(value, bool)
            ):
                run.add(str(key), int(row.get("step", 0)), float(value))


def _read_events(run: Run, file: Path) -> None:
    need("tensorboard", what=f"reading {file.name}")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
    for key in events.Tags()["scalars"]:
        if key == "epoch":
            run.from_zero = True
            continue
        for event in events.Scalars(key):
            run.add(key, int(event.step), float(event.value))


def loss_of(run: Run) -> str | None:
    """Return the key of a run's training loss, if it has one.

    Args:
        run: any.
    """
    losses = [key for key in run.curves if "loss" in key.lower()]
    order = sorted(losses, key=lambda key: ("train" not in key.lower(), "epoch" in key, len(key)))
    return order[0] if order else None


def strips_of(run: Run, most: int = 4) -> dict[str, dict[str, dict[int, float]]]:
    """Return the curves that come by layer: ``<quantity>/<layer>[/<what>]``, three layers or more.

    Args:
        run: any.
        most: families of curves: those of ``STRIPS`` first, then those of the most layers that change.

    Returns:
        By family (``quantity/what``) and layer, in the order of the log.
    """
    families: dict[str, dict[str, dict[int, float]]] = {}
    for key, curve in run.curves.items():
        parts = key.split("/")
        if len(parts) < 2 or not any(math.isfinite(value) for value in curve.values()):
            continue
        family = "/".join([parts[0], *parts[2:]])
        families.setdefault(family, {})[parts[1]] = curve
    known = {layer for family, layers in families.items() if "/" in family for layer in layers}
    wide = {
        name: layers
        for name, layers in families.items()
        if name in STRIPS
        or (
            len(layers) >= 3
            and len({value for curve in layers.values() for value in curve.values()}) > 1
            and ("/" in name or all(layer in known or "." in layer for layer in layers))
        )
    }
    others = sorted((name for name in wide if name not in STRIPS), key=lambda name: -len(wide[name]))
    order = [*(name for name in STRIPS if name in wide), *others][:most]
    return {name: {layer: wide[name][layer] for layer in _in_depth(list(wide[name]))} for name in order}


def _in_depth(layers: list[str]) -> list[str]:
    """Return layers in the log's order; if that is the alphabet's, numbers in them count as numbers."""
    if layers != sorted(layers):
        return layers

    def depth(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]

    return sorted(layers, key=depth)
