"""Fit the strangers' runs with the monitors and store what they read beside what is true.

    python -m benchmarks.clinic.strangers.run --seed 0

One JSON file a run, below an output folder.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_sym.callbacks import EigenmodeMonitor, monitors

from ...common import commit, environment
from ..fitting import EVERY_N_STEPS, QUIET, quiet
from ..run import load, plain, to_table
from .base import CASES, KINDS

FAMILIES = (
    *("perceptrons", "perceptrons_healthy", "convolutions", "sequences", "sequences_healthy"),
    *("generators", "embeddings", "others"),
)
OUT = Path(tempfile.gettempdir()) / "lightning_sym_strangers"
for family in FAMILIES:
    importlib.import_module(f"{__package__}.{family}")


def fit(name: str, seed: int) -> dict[str, Any]:
    """Return a run's truth and what monitors read of it."""
    seed_everything(seed, verbose=False)
    run = CASES[name](seed)
    watch: list[Any] = list(monitors("standard", every_n_steps=EVERY_N_STEPS, targets=run.targets))
    if run.views:
        watch.append(EigenmodeMonitor(every_n_steps=EVERY_N_STEPS))
    began = time.perf_counter()
    for module, data, steps in run.fits:
        length = {"max_steps": steps, "max_epochs": -1}
        options = {**QUIET, **length, "callbacks": [*watch, *run.callbacks], **run.trainer}
        Trainer(**options).fit(module, data)
    seconds = time.perf_counter() - began
    numbers, sick = run.truth()
    return {
        "name": name,
        "seed": seed,
        "expected": list(KINDS[name]),
        "truth": {key: float(value) for key, value in numbers.items()},
        "sick": bool(sick),
        "seconds": seconds,
        "histories": {type(monitor).__name__: to_table(monitor.history) for monitor in watch},
        "commit": commit(),
        "environment": environment(),
    }


def stored(out: Path) -> list[dict[str, Any]]:
    """Return all stored runs, their histories as rows again."""
    return [load(path) for path in sorted(out.glob("*.json"))]


def main() -> None:
    """Fit what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=sorted(CASES), help="a case; may be repeated")
    parser.add_argument("--seed", type=int, action="append", help="may be repeated (0)")
    parser.add_argument("--missing", action="store_true", help="only what has not been stored yet")
    parser.add_argument("--out", type=Path, default=OUT, help="output folder (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seed or [0]:
        for name in args.only or CASES:
            path = args.out / f"{name}.{seed}.json"
            if args.missing and path.exists():
                continue
            with quiet():
                record = fit(name, seed)
            path.write_text(json.dumps(plain(record), separators=(",", ":")))
            holds = "ok   " if record["sick"] == bool(KINDS[name]) else "FAILS"
            print(f"{holds} {name}.{seed} ({record['seconds']:.1f} s): {plain(record['truth'])}", flush=True)


if __name__ == "__main__":
    main()
