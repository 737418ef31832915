"""How fast are bumps made? Against a loop over images and against the memory's bandwidth.

    python benchmarks/bumps.py --threads 2

Each way makes the same images; the first line of the table checks that they agree. The bandwidth is
that of filling the same buffer with zeros. Medians of several rounds, in which the ways take turns, and
their range: the machine may be shared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import paired, spread, timed, write_json

from lightning_sym.datamodules import GaussianBumpsDataModule, gaussian_bumps


def loop(centers: torch.Tensor, size: int) -> torch.Tensor:
    """Make one image after the other, as a data set's ``__getitem__`` would."""
    pixels = torch.arange(size, dtype=torch.float32)
    images = []
    for x, y in centers.tolist():
        squares = (pixels[:, None] - y) ** 2 + (pixels[None] - x) ** 2
        images.append(1 - torch.exp(-squares / 2))
    return torch.stack(images)[:, None]


def main() -> None:
    """Time all ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--images", type=int, default=4096, help="in a batch")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None, help="a JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    centers = (torch.rand(args.images, 2, generator=generator) * (args.size - 1)).to(device)
    buffer = torch.empty(args.images, 1, args.size, args.size, device=device)
    dark = {"size": args.size, "background": 1.0, "amplitude": -1.0}
    difference = (gaussian_bumps(centers, **dark).cpu() - loop(centers.cpu(), args.size)).abs().max().item()
    if difference > 1e-5:
        raise RuntimeError(f"the batched images differ from the loop's by {difference}")
    print(f"largest difference from the loop's images: {difference:.1e}")

    data = GaussianBumpsDataModule(
        args.size, centers="continuous", encoding="bump", samples=args.images, batch_size=256, device=device
    )
    ways: dict[str, Callable[[], object]] = {
        "loop over images": lambda: loop(centers.cpu(), args.size),
        "batched, new memory": lambda: gaussian_bumps(centers, **dark),
        "batched, into a buffer": lambda: gaussian_bumps(centers, **dark, out=buffer),
        "batched, bright, into a buffer": lambda: gaussian_bumps(centers, size=args.size, out=buffer),
        "data loader, batches of 256, with codes": lambda: [image for _, image in data.train_dataloader()],
        "filling the buffer with zeros": buffer.zero_,
    }
    runs: dict[str, Callable[[], float]] = {name: partial(timed, make) for name, make in ways.items()}
    report = paired(runs, baseline="loop over images", pairs=args.rounds)  # type: ignore[arg-type]
    rates = {name: spread([args.images / cost for cost in row["costs"]]) for name, row in report.items()}
    limit = rates["filling the buffer with zeros"]["median"]
    gigabytes = 4 * args.size**2 / 1e9
    print(f"{'':42s}{'images/s':>12s}{'x loop':>9s}{'of limit':>10s}{'GB/s':>8s}   range of images/s")
    for name, row in rates.items():
        rate, times = row["median"], 1 / report[name].get("median", 1.0)
        made = f"{name:42s}{rate:12,.0f}{times:9.1f}{rate / limit:10.2f}{rate * gigabytes:8.2f}"
        print(f"{made}   {row['low']:,.0f} to {row['high']:,.0f}")
    if args.out:
        config = {key: value for key, value in vars(args).items() if key != "out"}
        write_json(args.out, config=config, results={"images_per_second": rates})


if __name__ == "__main__":
    main()
