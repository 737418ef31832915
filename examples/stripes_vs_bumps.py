"""How many training images does a decoder need to compose: bumps alone, or stripes and bumps?

Liang et al. (2025), arXiv:2501.18797, report that images which depend on one coordinate only ("stripes")
cut the data needed to compose from about N^3 to about N images, N being the side of an image. Their
threshold is not given. Here a decoder composes when its squared error on held-out bumps is below a share
(--threshold) of a blank image's. Training sets of --per-side times N images, from N / 2 up in factors of two;
"stripes" has 2N stripes in each, at most half of it, the rest are bumps outside the hold-out. Every training
set gets the same number of steps. A seed needs the smallest number from which on every larger one composes.

    python examples/stripes_vs_bumps.py
    python examples/stripes_vs_bumps.py --runs stripes_vs_bumps.json    # go on from what was trained
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _report import save, spread, table
from _trainer import quiet_trainer
from matplotlib.figure import Figure

from lightning_sym.datamodules import GaussianBumpsDataModule
from lightning_sym.functional import find_bump
from lightning_sym.papers.composition import TransposedConvDecoder

ARMS = ("bumps", "stripes")
KEY = ("arm", "size", "images", "seed")
SHARED = ("holdout", "steps", "channels", "lr")


def run(arm: str, size: int, images: int, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train one decoder on so many images and measure it on the hold-out."""
    stripes = min(2 * size, images // 2) if arm == "stripes" else 0
    data = GaussianBumpsDataModule(
        size,
        encoding="bump",
        centers="continuous",
        holdout_size=max(1, round(args.holdout * size)),
        samples=images - stripes,
        stripes=stripes,
        ood_samples=300,
        seed=seed,
    )
    module = TransposedConvDecoder(
        data.code_length, size=size, channels=args.channels, hidden_layers=4, lr=args.lr, seed=seed
    )
    module.anneal = True
    began = time.process_time()
    quiet_trainer(
        max_steps=args.steps,
        limit_val_batches=0,
    ).fit(module, datamodule=data)
    row: dict[str, Any] = {"arm": arm, "size": size, "images": images, "seed": seed}
    module.eval()
    for name, centers in (("id", data.id_centers), ("ood", data.ood_centers)):
        with torch.no_grad():
            drawn, wanted = module(data.encode(centers)), data.render(centers)
        row[name] = ((drawn - wanted).square().mean() / (wanted - 1).square().mean()).item()
        found = find_bump(drawn, centers[:, 0], background=1.0, amplitude=-1.0).found
        row[f"{name}_found"] = found.float().mean().item()
    row["cpu_seconds"] = time.process_time() - began
    return row


def needed(rows: list[dict[str, Any]], threshold: float) -> float:
    """Return the smallest number of images from which on every error is below the threshold, inf if none."""
    found = math.inf
    for row in sorted(rows, key=lambda row: -row["images"]):
        if not row["ood"] < threshold:
            break
        found = row["images"]
    return found


def exponent(sizes: list[int], counts: list[float]) -> float | None:
    """Return the slope of log count over log size, where every count is finite."""
    if len(sizes) < 2 or not all(map(math.isfinite, counts)):
        return None
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (sizes, counts))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def draw(runs: list[dict[str, Any]], counts: dict[str, dict[int, list[float]]], threshold: float) -> Figure:
    """Return error over images for each size, beside the number of images needed over size."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = sorted({row["size"] for row in runs})
    marks = dict(zip(ARMS, ("o--", "s-"), strict=True))
    for k, size in enumerate(sizes):
        for arm in ARMS:
            here = [row for row in runs if row["size"] == size and row["arm"] == arm]
            at = sorted({row["images"] for row in here})
            mean = [spread([r["ood"] for r in here if r["images"] == n])["mean"] for n in at]
            left.plot(at, mean, marks[arm], color=f"C{k}", markersize=4, label=f"N = {size}, {arm}")
    left.axhline(threshold, color="0.5", linestyle=":")
    left.set(xscale="log", yscale="log", xlabel="training images", ylabel="error on hold-out / blank image")
    left.legend(fontsize=7)
    most = max(row["images"] / row["size"] for row in runs)
    for arm, colour in zip(ARMS, ("tab:red", "tab:blue"), strict=True):
        for size, values in counts[arm].items():
            for k, value in enumerate(values):
                reached = math.isfinite(value)
                right.plot(
                    size + 0.25 * (k - (len(values) - 1) / 2),
                    value if reached else most * size * 1.25,
                    "o" if reached else "^",
                    color=colour,
                    markerfacecolor=colour if reached else "none",
                )
        right.plot([], [], "o", color=colour, label=arm)
    right.plot([], [], "^", color="0.3", markerfacecolor="none", label="more than were tried")
    right.set(yscale="log", xlabel="image side N", ylabel="training images needed")
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axis in (left.xaxis, right.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")  # minor labels of short logarithmic axes run into each other
    return figure


def slopes(counts: dict[str, dict[int, list[float]]]) -> dict[str, dict[str, Any]]:
    """Return for each arm the power of N with which the images needed grow: of medians, and seed by seed.

    ``None`` where a size has no number: more were needed than were tried.
    """
    found: dict[str, dict[str, Any]] = {}
    for arm, by_size in counts.items():
        sizes = list(by_size)
        each = [exponent(sizes, list(values)) for values in zip(*by_size.values(), strict=True)]
        known = [slope for slope in each if slope is not None]
        found[arm] = {
            "of_medians": exponent(sizes, [median(values) for values in by_size.values()]),
            "by_seed": each,
            "spread": spread(known) if known else None,
        }
    return found


def report(
    runs: list[dict[str, Any]], counts: dict[str, dict[int, list[float]]], args: argparse.Namespace
) -> None:
    """Write the JSON file and the picture of what there is."""
    summary = {
        "needed": {
            arm: {str(n): [c if math.isfinite(c) else None for c in v] for n, v in by_size.items()}
            for arm, by_size in counts.items()
        },
        "median": {
            arm: {str(n): m if math.isfinite(m := median(v)) else None for n, v in by_size.items()}
            for arm, by_size in counts.items()
        },
        "exponent": slopes(counts),
        "paper": {"bumps": "about N^3", "stripes": "about N"},
    }
    config = {name: value for name, value in vars(args).items() if name not in ("out", "runs")}
    figure = draw(runs, counts, args.threshold)
    result = {"config": config, "summary": summary, "runs": runs}
    save(args.out, "stripes_vs_bumps", result, figure, trained=args.stored)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="seconds: one size, one seed")
    parser.add_argument("--out", type=Path, default=Path("runs/stripes_vs_bumps"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[12, 16, 20])
    parser.add_argument(
        "--per-side",
        type=float,
        nargs="+",
        default=[2.0**k for k in range(-1, 8)],
        help="training images over N",
    )
    parser.add_argument("--runs", type=Path, help="a JSON of this script's, whose runs are not made again")
    parser.add_argument("--holdout", type=float, default=0.4, help="side of the hold-out over N")
    parser.add_argument("--threshold", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    if args.smoke:
        args.sizes, args.per_side, args.steps, args.seeds = [10], [2.0, 4.0], 250, args.seeds[:1]
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    args.stored = json.loads(args.runs.read_text()) if args.runs else None
    before = {tuple(row[key] for key in KEY): row for row in args.stored["runs"]} if args.stored else {}
    if args.stored and any(args.stored["config"][k] != getattr(args, k) for k in SHARED):
        parser.error(f"--runs {args.runs} was made with another one of {SHARED}")
    runs: list[dict[str, Any]] = []
    counts: dict[str, dict[int, list[float]]] = {arm: {} for arm in ARMS}
    rows = []
    for size in args.sizes:
        for arm in ARMS:
            mine: list[dict[str, Any]] = []
            for seed in args.seeds:
                streak = 0
                failed = [
                    row["images"]
                    for row in before.values()
                    if (row["arm"], row["size"], row["seed"]) == (arm, size, seed)
                    and not row["ood"] < args.threshold
                ]
                for ratio in sorted(args.per_side):
                    images = round(size * ratio)
                    key = (arm, size, images, seed)
                    # Fewer than failed do not count, nor do more than two composing in a row.
                    if (
                        not args.smoke
                        and key not in before
                        and (streak >= 2 or images < max(failed, default=0))
                    ):
                        continue
                    mine.append(before.get(key) or run(arm, size, images, args, seed))
                    streak = streak + 1 if mine[-1]["ood"] < args.threshold else 0
                    print(*key, f"{mine[-1]['ood']:.3f}", flush=True)
            counts[arm][size] = [
                needed([row for row in mine if row["seed"] == seed], args.threshold) for seed in args.seeds
            ]
            runs += mine
            most = max(row["images"] for row in mine)
            last = [row for row in mine if row["images"] == most]
            says = ", ".join(f"{n:g}" if math.isfinite(n) else f"> {most}" for n in counts[arm][size])
            mean = {key: spread([row[key] for row in last])["mean"] for key in ("id", "ood", "ood_found")}
            rows.append([size, arm, says, last[0]["images"], mean["id"], mean["ood"], mean["ood_found"]])
            print(*map(str, rows[-1]), flush=True)
        report(runs, counts, args)  # after each size: a long run may be cut short
    header = ["N", "trained on", "images needed, by seed", "most tried", "id error", "ood error", "found"]
    print(table(rows, header))
    for arm, slope in slopes(counts).items():
        print(f"{arm}: images needed grow as a power of N: {slope}")


if __name__ == "__main__":
    main()
