"""What does a reading of the sharpness cost, in training steps of the same batch?

    python benchmarks/sharpness.py --out docs/results/sharpness_benchmark.json

Each step of a fit is timed beside the reading that follows it, by the processor's time where there is no
accelerator: that of other processes is not counted.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import timm
import torch
from common import spread, synchronize, write_json
from lightning.pytorch import Callback, Trainer
from overhead import Fit
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import SharpnessMonitor


class Watch(Callback):
    """Takes the time at a step's begin and end; the monitor comes between two of them."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.ended: list[float] = []

    def now(self) -> float:
        """Return seconds."""
        synchronize()
        return time.perf_counter() if torch.cuda.is_available() else time.process_time()

    def on_train_batch_start(self, *_: Any) -> None:
        """Note the begin."""
        self.began.append(self.now())

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the end."""
        self.ended.append(self.now())


def measure(net: nn.Module, batch: tuple[Tensor, Tensor], *, steps: int, **options: int) -> dict[str, Any]:
    """Return the cost of a reading over that of the step before it, the first ones left out."""
    first, last = Watch(), Watch()
    monitor = SharpnessMonitor(every_n_steps=1, strict=True, **options)
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        max_steps=steps + 1,
        max_epochs=-1,
        callbacks=[first, monitor, last],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Fit(net), DataLoader(TensorDataset(*batch), len(batch[0])))
    step = [b - a for a, b in zip(first.began, first.ended, strict=True)][1:]
    reading = [b - a for a, b in zip(first.ended, last.ended, strict=True)][1:]
    return {
        "steps": spread([b / a for a, b in zip(step, reading, strict=True)]),
        "products": monitor.products,
        "step_seconds": spread(step),
    }


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="a part of the names of what is measured")
    parser.add_argument("--out", type=Path, default=None, help="a JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images = torch.randn(args.batch, 3, 32, 32), torch.randint(10, (args.batch,))
    results: dict[str, Any] = {}
    for name, options in {
        "default": {},
        "one product": {"vectors": 1, "lanczos_steps": 0},
        "five products": {"vectors": 5, "lanczos_steps": 0},
    }.items():
        if args.only not in name:
            continue
        net = timm.create_model("resnet18", num_classes=10)
        results[name] = measure(net, images, steps=args.steps, **options)
        row = results[name]["steps"]
        print(f"{name}: {row['median']:.1f} steps ({row['low']:.1f} to {row['high']:.1f})", flush=True)
    if args.out:
        config = {"model": "timm resnet18, 32x32", "batch": args.batch, "steps": args.steps}
        write_json(args.out, config=config, results=results)


if __name__ == "__main__":
    main()
