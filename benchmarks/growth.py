"""How does a reading grow with the network, the batch, the vocabulary and the number of ranks?

    OMP_NUM_THREADS=1 python benchmarks/growth.py            # some 20 minutes
    OMP_NUM_THREADS=1 python benchmarks/growth.py --axes vocabulary --points 2

Each point is a process of its own, so that its peak memory is its own. A reading is told in training steps of
the same fit, by the processor's time of the thread that trains (as in ``overhead.py``). Each of several ranks
has a batch of the same size; bytes are those that a rank hands to collectives for one reading.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import spread, write_json
from overhead import EVERY, Transformer, once
from torch import Tensor, nn
from torch.utils.data import TensorDataset

#: What grows, over which values; all else is as in ``USUAL``.
AXES: dict[str, tuple[int, ...]] = {
    "width": (256, 1024, 4096, 8192),
    "depth": (2, 8, 32),
    "batch": (32, 128, 512, 2048),
    "vocabulary": (1_000, 10_000, 50_000),
    "ranks": (1, 2, 4),
}
USUAL = {"width": 512, "depth": 3, "batch": 128, "vocabulary": 0, "ranks": 1}
ARMS = ("none", "standard", "full")
STEPS = 2 * EVERY


def network(point: dict[str, int]) -> tuple[nn.Module, TensorDataset]:
    """Return a network of one point, and one batch for it: an MLP, or a transformer where there are words."""
    labels = torch.randint(0, 10, (point["batch"],))
    if point["vocabulary"]:
        tokens = torch.randint(0, point["vocabulary"], (point["batch"], 64))
        return Transformer(vocabulary=point["vocabulary"]), TensorDataset(tokens, labels)
    width = point["width"]
    layers: list[nn.Module] = [nn.Linear(64, width)]
    for _ in range(point["depth"] - 2):
        layers += [nn.ReLU(), nn.Linear(width, width)]
    net = nn.Sequential(*layers, nn.ReLU(), nn.Linear(width, 10))
    return net, TensorDataset(torch.randn(point["batch"], 64), labels)


class Sent:
    """Counts the bytes that this rank hands to collectives while the module is not in its own step."""

    def __init__(self) -> None:
        self.bytes = 0
        for name in ("all_reduce", "all_gather", "broadcast"):
            setattr(dist, name, self._counted(getattr(dist, name)))

    def _counted(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensor = next(each for each in reversed(args) if isinstance(each, Tensor))
            self.bytes += tensor.numel() * tensor.element_size()
            return collective(*args, **kwargs)

        return counted


def measure(arm: str, point: dict[str, int], rank: int, address: str) -> dict[str, Any]:
    """Fit once in this process, as one rank of so many."""
    options = argparse.Namespace(batch=point["batch"], steps=STEPS, accelerator="cpu")
    options.precision, options.channels_last = "32-true", False
    sent = Sent()
    if point["ranks"] > 1:
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=point["ranks"])
    found = once(arm, lambda _: network(point), options)
    readings = 1 + STEPS // EVERY  # step 1 is always due
    return {
        "steps": found["probed"] / found["unprobed"] - 1,
        "held_mb": found["held_mb"],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "sent_mb": sent.bytes / readings / 1e6,
    }


def apart(arm: str, point: dict[str, int]) -> dict[str, Any]:
    """Return what rank 0 of a fit in processes of their own has measured."""
    with tempfile.TemporaryDirectory() as folder:
        address = Path(folder, "ranks").as_uri()
        ask = [sys.executable, __file__, "--one", json.dumps([arm, point])]
        ranks = [
            subprocess.Popen(
                [*ask, "--rank", str(rank), "--address", address],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(point["ranks"])
        ]
        told = [each.communicate()[0] for each in ranks]
    if any(each.returncode for each in ranks):
        raise RuntimeError(f"{arm} at {point} failed: run {' '.join(ask[1:])} to see why")
    return json.loads(told[0].splitlines()[-1])


def grow(axis: str, values: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """Return a row a value: the cost of a reading, and what it takes of memory."""
    rows = []
    for value in values:
        point = {**USUAL, axis: value}
        found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for turn in range(rounds):
            for arm in ARMS[:: 1 - 2 * (turn % 2)]:
                found[arm].append(apart(arm, point))
        row: dict[str, Any] = {"value": value}
        for arm in ARMS[1:]:
            mine = {key: [each[key] for each in found[arm]] for key in found[arm][0]}
            peak = statistics.median(mine["peak_mb"]) - statistics.median(e["peak_mb"] for e in found["none"])
            bare = statistics.median(each["sent_mb"] for each in found["none"])
            row[arm] = {
                "steps": spread(mine["steps"]),
                "held_mb": mine["held_mb"][0],
                "peak_mb": peak,
                "sent_mb": statistics.median(mine["sent_mb"]) - bare,
            }
        print(axis, value, {arm: f"{row[arm]['steps']['median']:.2f} steps" for arm in ARMS[1:]}, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Measure each axis and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results/growth.json"))
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--points", type=int, default=None, help="of each axis, from its first value on")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--address", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one, args.rank, args.address)))
        return
    results = {axis: grow(axis, AXES[axis][: args.points], args.rounds) for axis in args.axes}
    config = {"usual": USUAL, "every": EVERY, "rounds": args.rounds, "arms": ARMS[1:]}
    write_json(args.out, config=config, results=results)


if __name__ == "__main__":
    main()
