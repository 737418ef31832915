"""What the histories of monitors take, in memory and in every checkpoint, by what is asked to be kept.

Run:
    python benchmarks/keeping.py --out docs/results/keeping.json
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import torch

from lightning_sym.callbacks import CollapseMonitor

sys.path.insert(0, str(Path(__file__).parent))
from common import write_json

FEW = 2000
KEYS = 90  # readings of a monitor of 12 layers at one step


def rows(count: int) -> list[dict[str, float]]:
    """Return a history, of numbers that differ."""
    names = [f"collapse/layers.{k}/effective_rank" for k in range(KEYS)]
    return [
        {"step": i + 1, "fit": 1, **{name: (i * KEYS + k) ** 0.5 for k, name in enumerate(names)}}
        for i in range(count)
    ]


def stored(state: Any) -> int:
    """Return the bytes of a state in a checkpoint."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return len(buffer.getvalue())


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--readings", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=Path("docs/results/keeping.json"))
    args = parser.parse_args()
    tracemalloc.start()
    few = rows(FEW)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    history = rows(args.readings)
    found = {"dicts": {"checkpoint_mb": stored(history) / 1e6, "memory_kb_a_reading": held / FEW / 1e3}}
    with tempfile.TemporaryDirectory() as folder:
        for name, keep in (("all", None), ("last", 1000), ("folder", folder)):
            monitor = CollapseMonitor(keep=keep)
            if isinstance(monitor.history, list):
                monitor.history = history
            else:
                for row in few:
                    monitor.history.append(row)
                size = monitor.history.path.stat().st_size
                found["file"] = {"file_kb_a_reading": size / FEW / 1e3}
            found[name] = {"checkpoint_mb": stored(monitor.state_dict()) / 1e6}
    for name, row in found.items():
        print(f"{name:8} " + ", ".join(f"{what} {value:.3f}" for what, value in row.items()))
    config = {"readings": args.readings, "keys": KEYS}
    write_json(args.out, config=config, results=found)


if __name__ == "__main__":
    main()
