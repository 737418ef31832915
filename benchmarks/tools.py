"""What the rest takes: importing the package, finding symmetries, diagnosing weights, making a report page.

    OMP_NUM_THREADS=1 python benchmarks/tools.py
    OMP_NUM_THREADS=1 python benchmarks/tools.py --networks resnet18 --steps 500 --rounds 1

Work on a network is told in its own training steps (forward and backward, two samples) on one thread, by the
processor's time; an import over that of torch, in processes of their own; the page by its size and by the
time of reading its logs.
"""

from __future__ import annotations

import argparse
import csv
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from common import paired, write_json

from lightning_sym import find_symmetries
from lightning_sym.cli import main as cli
from lightning_sym.diagnosis import diagnose_weights

#: Networks of different families, each with the size of its inputs.
NETWORKS = {
    "resnet18": 64,
    "resnet50": 64,
    "vit_tiny_patch16_224": 224,
    "convnext_atto": 64,
    "mixer_s32_224": 224,
    "efficientnet_b0": 64,
}
IMPORTS = {
    "torch": "import torch",
    "lightning": "import lightning.pytorch",
    "lightning_sym": "import lightning_sym",
    "lightning_sym, monitors": "import lightning_sym; lightning_sym.monitors()",
}
#: Layers and readings of a layer in the run that is reported, and steps between readings.
LAYERS, READINGS, EVERY = 12, 20, 100


def imports(rounds: int) -> dict[str, Any]:
    """Return the processor's time of each import, in a process of its own, over torch's."""

    def seconds(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return paired(
        {name: lambda code=code: seconds(code) for name, code in IMPORTS.items()},  # type: ignore[misc]
        baseline="torch",
        pairs=rounds,
    )


def work(name: str, size: int, rounds: int) -> dict[str, Any]:
    """Return what a search for symmetries and a diagnosis of the weights take, over a training step."""
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10)
    x = torch.randn(2, 3, size, size)

    def clocked(run: Callable[[], Any], times: int = 1) -> float:
        began = time.process_time()
        for _ in range(times):
            run()
        return (time.process_time() - began) / times

    def step() -> None:
        net.zero_grad()
        net(x).sum().backward()

    found = paired(
        {
            "step": lambda: clocked(step, 3),
            "find_symmetries": lambda: clocked(lambda: find_symmetries(net, x)),
            "diagnose_weights": lambda: clocked(lambda: diagnose_weights(net)),
            "diagnose_weights, with an example": lambda: clocked(lambda: diagnose_weights(net, x)),
        },
        baseline="step",
        pairs=rounds,
        warmup=0,
    )
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    told = {key: {each: row[each] for each in ("median", "low", "high")}
            for key, row in found.items() if key != "step"}  # fmt: skip
    return {"millions": millions, "in_steps": told}


def page(steps: int) -> dict[str, Any]:
    """Return the size of the page of a run of so many steps, and the processor's time to make it."""
    keys = [f"collapse/net.{layer}/reading_{k}" for layer in range(LAYERS) for k in range(READINGS)]
    with tempfile.TemporaryDirectory() as folder:
        with Path(folder, "metrics.csv").open("w", newline="") as file:
            write = csv.writer(file)
            write.writerow(["step", "train_loss", *keys])
            for step in range(0, steps, 10):
                drawn = torch.rand(len(keys)).tolist() if step % EVERY == 0 else [""] * len(keys)
                write.writerow([step, 10 / (step + 10), *drawn])
        began = time.process_time()
        out = Path(folder, "page.html")
        if cli(["report", folder, "--out", str(out)]):
            raise RuntimeError("no page was made")
        seconds = time.process_time() - began
        size = out.stat().st_size / 1e3
    curves = len(keys) + 1
    return {"steps": steps, "curves": curves, "readings": steps // EVERY, "seconds": seconds, "kb": size}


def main() -> None:
    """Measure all of it and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results/tools.json"))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    results: dict[str, Any] = {"imports": imports(args.rounds), "page": page(args.steps), "networks": {}}
    print(results["page"], flush=True)
    for name in args.networks:
        results["networks"][name] = work(name, NETWORKS[name], args.rounds)
        print(name, results["networks"][name], flush=True)
    write_json(args.out, config={"rounds": args.rounds}, results=results)


if __name__ == "__main__":
    main()
