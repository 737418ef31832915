"""Train three generators on bumps outside a hold-out, and look whether they compose inside it.

Liang et al. (2025), arXiv:2501.18797: a decoder may well keep x and y apart and still not compose them.
Three arms, three seeds each:

* embedding, free: two matrices and three tiny layers; fits the training set and fails out of distribution;
* embedding, factorised: the same with the matrices pushed to stripes; composes;
* cnn: the paper's transposed convolutions on another hold-out, the centre.

Errors are also given relative to a blank image's, which a small bump makes small. At a constant rate the
error out of distribution swings from epoch to epoch: beside the last stands the mean of the last 20 (--last).

    python examples/compose_bumps.py            # reduced: a higher rate, annealed, in a fourth of the epochs
    python examples/compose_bumps.py --full     # the paper's settings for the embedding model
    python examples/compose_bumps.py --full --seeds 0 1 2 3 4 5 6 7 8 9 --arms "embedding, free" \
        "embedding, factorised"    # ten seeds: hours of one processor
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from _report import save, spread, table
from _trainer import quiet_trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from lightning_sym.callbacks import CompositionMonitor
from lightning_sym.datamodules import GaussianBumpsDataModule
from lightning_sym.papers.composition import EmbeddingDecoder, TransposedConvDecoder
from lightning_sym.papers.composition.decoders import BumpDecoder

PAPER = {  # mean squared errors: the released log's last epoch, its loss curve and a notebook's output
    "embedding, free": {"id": 1.3e-6, "ood": 2.8e-2},
    "embedding, factorised": {"id": 4.5e-5, "ood": 1.4e-4},
    "cnn": {"id": 5.9e-5, "ood": 3.1e-3},  # 10 layers, 256 channels, 250 epochs
}


class Curve(Callback):
    """Keeps the validation errors of every epoch that has some."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the errors just computed."""
        errors = {name: trainer.callback_metrics[f"mse/{name}"].item() for name in ("id", "ood")}
        self.rows.append({"epoch": trainer.current_epoch + 1, **errors})


class Last(Callback):
    """Measures the error out of distribution at the end of each of the last epochs: it swings."""

    def __init__(self, data: GaussianBumpsDataModule, *, count: int) -> None:
        self.data, self.count = data, count
        self.errors: list[float] = []

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw all held-out bumps."""
        if trainer.current_epoch < (trainer.max_epochs or 0) - self.count:
            return
        pl_module.eval()
        centers = self.data.ood_centers
        drawn = pl_module(self.data.encode(centers).to(pl_module.device))
        self.errors.append(float((drawn.cpu() - self.data.render(centers)).square().mean()))
        pl_module.train()


def build(arm: str, args: argparse.Namespace, seed: int) -> tuple[BumpDecoder, GaussianBumpsDataModule, int]:
    """Return the module, its data and the number of epochs of one run."""
    if arm == "cnn":
        data = GaussianBumpsDataModule(
            args.cnn_size, encoding="bump", samples=args.cnn_samples, ood_samples=500, seed=seed
        )
        module: BumpDecoder = TransposedConvDecoder(
            data.code_length, size=args.cnn_size, channels=args.channels, hidden_layers=4, seed=seed
        )
        return module, data, args.cnn_epochs
    data = GaussianBumpsDataModule(args.size, sigma=1.5, polarity="bright", holdout="corner", seed=seed)
    weights = {"entropy_weight": 0.0, "stripe_weight": 0.0} if arm == "embedding, free" else {}
    module = EmbeddingDecoder(args.size, lr=args.lr, seed=seed, **weights)
    module.anneal = not args.full
    return module, data, args.epochs


def run(arm: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train one module; return its errors, the monitor's readings and a few images."""
    module, data, epochs = build(arm, args, seed)
    steps = epochs * len(data.train_dataloader())
    monitor = CompositionMonitor(every_n_steps=steps, pictures=False, strict=True)
    curve, end = Curve(), Last(data, count=args.last)
    trainer = quiet_trainer(
        accelerator=args.accelerator,
        devices=1,
        max_epochs=epochs,
        check_val_every_n_epoch=max(1, epochs // 20),
        num_sanity_val_steps=0,
        callbacks=[monitor, curve, end],
    )
    began, began_cpu = time.perf_counter(), time.process_time()
    trainer.fit(module, datamodule=data)
    last = monitor.history[-1]
    centers = data.ood_centers[torch.linspace(0, len(data.ood_centers) - 1, 6).long()]
    with torch.no_grad():
        images = module.cpu().eval()(data.encode(centers))[:, 0]
    return {
        "seed": seed,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - began_cpu,
        "epochs": epochs,
        "id": last["composition/id_error"],
        "ood": last["composition/ood_error"],
        "ood_last": end.errors,
        "blank": data.blank_error,
        "readings": {key.removeprefix("composition/"): value for key, value in last.items()},
        "curve": curve.rows,
        "images": (images, data.render(centers)[:, 0]),
    }


def draw(arms: dict[str, list[dict[str, Any]]]) -> Figure:
    """Return errors over epochs (all seeds) beside images drawn out of distribution (first seed)."""
    figure = Figure(figsize=(11, 2.1 * len(arms)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.5])
    panels = left.subplots(len(arms), 1, squeeze=False)[:, 0]
    pictures = right.subplots(2 * len(arms), 6, squeeze=False)
    for k, (arm, runs) in enumerate(arms.items()):
        for each in runs:
            epochs = [row["epoch"] for row in each["curve"]]
            for name, colour in (("id", "tab:blue"), ("ood", "tab:red")):
                label = {"id": "in distribution", "ood": "out of distribution"}[name]
                values = [row[name] for row in each["curve"]]
                panels[k].plot(
                    epochs, values, color=colour, linewidth=1, label=label if each is runs[0] else None
                )
        panels[k].axhline(runs[0]["blank"], color="0.5", linewidth=0.8, linestyle=":", label="blank image")
        panels[k].set_yscale("log")
        panels[k].set_title(arm, fontsize=9)
        panels[k].set_ylabel("squared error", fontsize=8)
        drawn, wanted = runs[0]["images"]
        for row, images in enumerate((drawn, wanted)):
            for column in range(6):
                axis = pictures[2 * k + row, column]
                axis.set_xticks([])
                axis.set_yticks([])
                if column < len(images):
                    show(axis, images[column], wanted)
            pictures[2 * k + row, 0].set_ylabel(("drawn", "wanted")[row], fontsize=7)
    panels[0].legend(fontsize=7)
    panels[-1].set_xlabel("epoch")
    return figure


def show(axis: Any, image: Tensor, wanted: Tensor) -> None:
    """Draw one image on the grey scale of the right ones."""
    axis.imshow(
        image.numpy(), cmap="gray", origin="lower", vmin=float(wanted.min()), vmax=float(wanted.max())
    )


def summarise(arms: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return mean and spread of what was measured, and how much factorisation gains, seed by seed."""
    summary: dict[str, Any] = {}
    for arm, runs in arms.items():
        summary[arm] = {name: spread([each[name] for each in runs]) for name in ("id", "ood")}
        summary[arm]["ood_over_blank"] = spread([each["ood"] / each["blank"] for each in runs])
        for what in ("ood_found", "ood_superposition", "ood_memorised", "ood_product", "ood_rank"):
            summary[arm][what] = spread([each["readings"][what] for each in runs])
        summary[arm]["paper"] = PAPER[arm]
    if not {"embedding, free", "embedding, factorised"} <= set(arms):
        return summary
    both = ("embedding, free", "embedding, factorised")
    errors = [[each["ood"] for each in arms[arm]] for arm in both]
    gains = [free / forced for free, forced in zip(*errors, strict=True)]
    # Errors scatter by a factor of ten over seeds: a mean is mostly its largest. One statistic at any length.
    summary["gain_of_medians"] = median(errors[0]) / median(errors[1])
    summary["gain_by_seed"] = gains
    if all(each.get("ood_last") for arm in both for each in arms[arm]):
        means = [[fmean(each["ood_last"]) for each in arms[arm]] for arm in both]
        summary["last"] = {
            "ood": {arm: spread(values) for arm, values in zip(both, means, strict=True)},
            "gain_of_medians": median(means[0]) / median(means[1]),
            "gain_by_seed": [free / forced for free, forced in zip(*means, strict=True)],
        }
    return summary


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="seconds: small images, one seed")
    parser.add_argument("--full", action="store_true", help="1000 epochs at a constant 1e-3, as in the paper")
    parser.add_argument("--out", type=Path, default=Path("runs/compose_bumps"))
    parser.add_argument("--size", type=int, default=32, help="pixels a side, embedding model")
    parser.add_argument("--epochs", type=int, default=250, help="of the embedding model")
    parser.add_argument("--lr", type=float, default=3e-3, help="of the embedding model, annealed")
    parser.add_argument("--cnn-size", type=int, default=28)
    parser.add_argument("--cnn-samples", type=int, default=2000)
    parser.add_argument("--cnn-epochs", type=int, default=20)
    parser.add_argument("--channels", type=int, default=16, help="of the cnn")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--last", type=int, default=20, help="epochs whose mean error is told")
    parser.add_argument("--arms", nargs="+", choices=list(PAPER), default=list(PAPER))
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--runs", type=Path, help="a JSON of this script's: summarise its runs, train none")
    args = parser.parse_args()
    if args.full:
        args.epochs, args.lr = 1000, 1e-3
    if args.smoke:
        args.size, args.epochs, args.lr, args.seeds = 14, 120, 1e-2, args.seeds[:1]
        args.cnn_size, args.cnn_samples, args.cnn_epochs, args.channels = 14, 256, 6, 8
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    stored = json.loads(args.runs.read_text()) if args.runs else None
    if stored:
        arms = stored["runs"]
    else:
        arms = {arm: [run(arm, args, seed) for seed in args.seeds] for arm in args.arms}
    rows = []
    summary = summarise(arms)
    for arm in arms:
        s = summary[arm]
        errors = [s["id"]["mean"], PAPER[arm]["id"], s["ood"]["mean"], s["ood"]["std"], PAPER[arm]["ood"]]
        rows.append([arm, *errors, s["ood_over_blank"]["mean"], s["ood_found"]["mean"]])
    header = ["arm", "id", "id, paper", "ood", "+-", "ood, paper", "ood / blank", "bumps found"]
    print(table(rows, header))
    if gains := summary.get("gain_by_seed"):
        print(
            f"forced factorisation lowers the median error out of distribution "
            f"{summary['gain_of_medians']:.1f} times (by seed {', '.join(f'{gain:.1f}' for gain in gains)}; "
            "paper, one seed, 200)"
        )
    seconds = sum(each["cpu_seconds"] for runs in arms.values() for each in runs)
    print(f"{seconds / 60:.1f} minutes of one processor")
    figure = None if stored else draw(arms)
    for runs in arms.values():
        for each in runs:
            each.pop("images", None)
    config = {name: value for name, value in vars(args).items() if name not in ("out", "runs")}
    config = stored["config"] if stored else config
    name = "compose_bumps" + ("_full" if config["full"] else "")
    save(args.out, name, {"config": config, "summary": summary, "runs": arms}, figure, trained=stored)


if __name__ == "__main__":
    main()
