"""How many images a second get their two SimCLR views: whole batches against one image at a time.

Both read the same bytes from memory and draw from the same recipe (colour strength 1, blur 0.5 at every
size). ``torchvision`` is what people write: a v2 pipeline a PIL image in two workers that stay alive;
``torchvision, tensors`` is the same on uint8 tensors. ``lightly`` is its ``SimCLRTransform`` on PIL images in
two such workers, compared where lightly is installed. ``batched`` is :class:`MultiViewDataModule` without
workers. Memory is what one pass adds in a fresh process, workers included and shared pages counted once.

With ``--one-core`` nobody has workers or a second thread, and processor seconds are compared instead of the
clock's: a machine that does other things meanwhile can still tell these.

    python benchmarks/views.py [--data cifar10.npz] [--pairs 5] [--one-core] [--out views.json]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common import paired, spread, table, write_json
from lightning_sym.datamodules import MultiViewDataModule
from lightning_sym.datamodules.augment import ViewRecipe

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Memory(Dataset[Any]):
    """Images in memory, uint8 ``[C, H, W]``."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], 0


class TwoViews(Dataset[Any]):
    """Two passes of one pipeline."""

    def __init__(self, data: Memory, pipeline: Any, *, pil: bool) -> None:
        self.data, self.pipeline, self.pil = data, pipeline, pil

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.data[index][0]
        if self.pil:
            image = to_pil_image(image)
        return self.pipeline(image), self.pipeline(image)


def images(path: Path | None, *, side: int, count: int) -> Tensor:
    """Return images ``uint8 [N, 3, side, side]``: CIFAR-10's, or scikit-learn's digits, resized."""
    from torchvision.transforms.v2 import functional as tv

    if path is None:
        from sklearn.datasets import load_digits

        stored = (load_digits().images * (255 / 16)).astype(np.uint8)
        x = torch.from_numpy(stored)[:, None].expand(-1, 3, -1, -1)
    else:
        with np.load(path, allow_pickle=False) as arrays:
            key = next(k for k in arrays.files if arrays[k].ndim == 4)
            x = torch.from_numpy(arrays[key][:count])
        x = x.permute(0, 3, 1, 2) if x.shape[-1] == 3 else x
    x = x.repeat(-(-count // len(x)), 1, 1, 1)[:count]
    return x.contiguous() if x.shape[-1] == side else tv.resize(x, [side, side], antialias=True)


def torchvision_pipeline(size: int, recipe: ViewRecipe) -> Any:
    """Return the pipeline as torchvision's users write it."""
    from torchvision.transforms import v2

    jitter = v2.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, recipe.crop_scale, recipe.crop_ratio, antialias=True),
            v2.RandomHorizontalFlip(recipe.flip),
            v2.RandomApply([jitter], p=recipe.jitter),
            v2.RandomGrayscale(recipe.grayscale),
            v2.RandomApply([v2.GaussianBlur(recipe.blur_kernel, recipe.blur_sigma)], p=recipe.blur),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def lightly_pipeline(size: int, recipe: ViewRecipe) -> Any:
    """Return one of the two equal views of lightly's ``SimCLRTransform`` (a PIL blur has no taps)."""
    from lightly.transforms import SimCLRTransform

    return SimCLRTransform(
        input_size=size,
        cj_prob=recipe.jitter,
        cj_bright=recipe.brightness,
        cj_contrast=recipe.contrast,
        cj_sat=recipe.saturation,
        cj_hue=recipe.hue,
        min_scale=recipe.crop_scale[0],
        random_gray_scale=recipe.grayscale,
        gaussian_blur=recipe.blur,
        sigmas=recipe.blur_sigma,
        hf_prob=recipe.flip,
        normalize={"mean": list(MEAN), "std": list(STD)},
    ).transforms[0]


def processor_seconds(run: Callable[[], None]) -> Callable[[], float]:
    """Return a run that returns what its process computed for, by the processor's clock."""

    def counted() -> float:
        began = time.process_time()
        run()
        return time.process_time() - began

    return counted


def runs(x: Tensor, *, size: int, batch: int, workers: int) -> dict[str, Callable[[], None]]:
    """Return what is compared: passes over the images."""
    data = Memory(x)
    module = MultiViewDataModule(
        data,
        val_source=Memory(x[:2]),
        image_size=size,
        batch_size=batch,
        recipe_options={"strength": 1.0, "blur": 0.5},
        mean=MEAN,
        std=STD,
    )
    module.setup()
    recipe = module.drawing.recipes[0]
    loader = module.train_dataloader()

    def batched() -> None:
        for raw in loader:
            module.on_after_batch_transfer(raw, 0)

    def one_by_one(pipeline: Any, *, pil: bool) -> Callable[[], None]:
        made = DataLoader(
            TwoViews(data, pipeline, pil=pil),
            batch,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

        def run() -> None:
            for _ in made:
                pass

        return run

    theirs = torchvision_pipeline(size, recipe)
    todo = {
        "torchvision": one_by_one(theirs, pil=True),
        "torchvision, tensors": one_by_one(theirs, pil=False),
    }
    if importlib.util.find_spec("lightly") is not None:
        todo["lightly"] = one_by_one(lightly_pipeline(size, recipe), pil=True)
    return {**todo, "batched": batched}


def main() -> None:
    """Compare at both sizes, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=None, help="CIFAR-10 as an .npz; else the digits")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--one-core", action="store_true", help="processor seconds of one thread, no workers")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 224])
    parser.add_argument("--count", type=int, nargs="+", default=[2048, 128], help="images a pass, by size")
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 64], help="batch size, by size")
    parser.add_argument("--out", type=Path, default=Path("runs/views/views.json"))
    parser.add_argument("--memory-of", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_core:
        torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for size, count, batch in zip(options.sizes, options.count, options.batch, strict=True):
        x = images(options.data, side=32 if size == 32 else size * 8 // 7, count=count)
        todo = runs(x, size=size, batch=batch, workers=0 if options.one_core else 2)
        if options.memory_of:
            print(json.dumps(added_memory(todo[options.memory_of])))
            return
        compared = {name: processor_seconds(run) if options.one_core else run for name, run in todo.items()}
        report = paired(compared, baseline="torchvision", pairs=options.pairs)
        costs = {name: row["costs"] for name, row in report.items()}
        rate = {name: count // batch * batch / row["cost"]["median"] for name, row in report.items()}
        faster = {
            name: spread([b / a for a, b in zip(costs["batched"], costs[name], strict=True)])
            for name in todo
            if name != "batched"
        }
        results[str(size)] = {
            "images_per_second": rate,
            "batched_is_times_as_fast_as": faster,
            "batch_of_views_mb": 2 * batch * 3 * size * size * 4 / 2**20,
            "report": report,
        }
        if not options.one_core:
            added = {name: memory(name, options, size, count, batch) for name in todo}
            results[str(size)]["added_mb"] = added
        print(f"{size} pixels, {count} images a pass\n{table(report)}")
        for what in ("images_per_second", "batched_is_times_as_fast_as", "added_mb"):
            print(what, results[str(size)].get(what))
    config = {
        "load_average": os.getloadavg()[0],  # own runs included; two cores are full at 2
        "sizes": options.sizes,
        "counts": options.count,
        "batches": options.batch,
        "pairs": options.pairs,
        "clock": "processor, one core" if options.one_core else "wall",
        "images": "digits" if options.data is None else "CIFAR-10, resized to 8/7 of 224 pixels for 224",
        "lightly": version("lightly"),
    }
    write_json(options.out, config=config, results=results)


def version(package: str) -> str:
    """Return the version of a package, or that it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def memory(name: str, options: argparse.Namespace, size: int, count: int, batch: int) -> float | None:
    """Return the MB that one pass adds in a fresh process, or None where the system does not tell."""
    one = ["--memory-of", name, "--sizes", size, "--count", count, "--batch", batch]
    one += [] if options.data is None else ["--data", options.data]
    done = subprocess.run(
        [sys.executable, __file__, *map(str, one)], check=True, capture_output=True, text=True
    )
    told: float | None = json.loads(done.stdout.strip().splitlines()[-1])
    return told


def added_memory(run: Callable[[], None]) -> float | None:
    """Return the most MB that this process and its children hold during a run, above what it held before."""
    before = resident()
    if before is None:
        return None
    most, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            most.append(resident() or 0.0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return max(most) - before


def resident() -> float | None:
    """Return the MB this process and its children hold, pages they share counted once (Linux only)."""
    total = 0.0
    try:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        for process in ("self", *children):
            rows = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            total += next(float(row.split()[1]) for row in rows if row.startswith("Pss:")) / 1024
    except (OSError, StopIteration):  # another system, or a child that has just gone
        return None
    return total


if __name__ == "__main__":
    main()
