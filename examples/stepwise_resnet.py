r"""Does a ResNet-18 learn its embedding one dimension at a time too?

Simon et al. (2023) find the staircase of the linear model in ResNets under Barlow Twins, SimCLR and
VICReg from a small initialisation. Here: the eigenvalues of the views' cross-covariance on a fixed set
of images over training, each mode dated by half of its own final size (the losses fix different
scales), and how much the modes come one at a time. Barlow Twins weighs off-diagonal entries by one, as
the theory does: the paper's 0.005 belongs to 8192 dimensions. There are two VICRegs: ``vicreg`` with its
paper's weights (25, 25, 1), which belong to 8192 dimensions as well, and ``vicreg_variance``, with weights
(12.5, 25, 25) and the hinge on the variance instead of the deviation (``stepwise_vicreg.py`` says why).

    python examples/stepwise_resnet.py --data CIFAR10            # minutes on a CPU: a quarter of the width
    python examples/stepwise_resnet.py --data CIFAR10 --width 1 --small-images --images 50000 \
        --batch-size 512 --dimensions 64 --steps 20000 --samples 2048    # a GPU
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from _data import add_data_arguments, load_images
from _report import save, spread, table
from _trainer import quiet_trainer
from _views import fixed_pair, two_views
from matplotlib.figure import Figure

from lightning_sym.callbacks import EigenmodeMonitor
from lightning_sym.engine.schedule import LogSpaced
from lightning_sym.functional.eigenmodes import step_likeness
from lightning_sym.losses import BarlowTwinsLoss, SimCLRLoss, VICRegLoss
from lightning_sym.modules import JointEmbedding
from lightning_sym.papers.stepwise_ssl import VarianceHingeLoss

CHANNELS = (64, 128, 256, 512)  # of a ResNet's four stages
LOSSES: dict[str, Any] = {
    "barlow_twins": lambda: BarlowTwinsLoss(off_diagonal=1.0, eps=1e-12),
    "vicreg": VICRegLoss,
    "vicreg_variance": VarianceHingeLoss,
    "simclr": SimCLRLoss,
}


def run(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Train one network; return its staircase."""
    pl.seed_everything(seed, verbose=False)
    images = load_images(args.data, smoke=args.smoke).take(args.images, seed=seed)
    data = two_views(images, images.take(10, seed=0), seed=seed, batch_size=args.batch_size)
    module = JointEmbedding(
        LOSSES[name](),
        args.backbone,
        small_images=args.small_images,
        backbone_options={} if args.width == 1 else {"channels": [int(c * args.width) for c in CHANNELS]},
        projector=(256, args.dimensions),
        optimizer="sgd",
        optimizer_options={"momentum": 0.9},
        lr=args.lr[list(LOSSES).index(name)],
        weight_decay=0.0,
        schedule="constant",
        init_scale=args.init_scale,
    )
    monitor = EigenmodeMonitor(
        every_n_steps=LogSpaced(16),
        data=fixed_pair(data, args.samples),
        modes=args.dimensions,
        picture=False,
        strict=True,
    )
    trainer = quiet_trainer(
        accelerator="auto",
        max_steps=args.steps,
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[monitor],
    )
    began = time.perf_counter()
    trainer.fit(module, datamodule=data)
    spectra = monitor.eigenvalues
    # A mode counts as learned if it has grown tenfold since the start and is not negligible at the end.
    final, first = spectra[-1], spectra[0].clamp_min(0)
    grown = ((final >= 10 * first) & (final >= 0.05 * final[0])).nonzero().flatten()
    stepped = step_likeness(spectra[:, grown], final=final[grown]) if len(grown) else torch.zeros(())
    return {
        "loss": name,
        "seed": seed,
        "images": images.name,
        "lr": args.lr[list(LOSSES).index(name)],
        "seconds": time.perf_counter() - began,
        "final_loss": float(trainer.callback_metrics["train_loss"]),
        "diverged": not bool(final.isfinite().all()),
        "learned": len(grown),
        "grown": [int(j) + 1 for j in grown],
        "past_half_of_the_largest": int((final >= final[0] / 2).sum()),
        "dates": [float(date) if date.isfinite() else None for date in monitor.dates(own=True)],
        "step_likeness": float(stepped),
        "step_likeness_if_together": 1 / max(1, len(grown)),
        "rank": {x: monitor.history[-1][f"eigenmodes/{x}/rank"] for x in ("representation", "embedding")},
        "first": spectra[0].tolist(),
        "last": final.tolist(),
        "curves": {"steps": monitor.steps.tolist(), "eigenvalues": spectra.tolist()},
    }


def draw(runs: list[dict[str, Any]]) -> Figure:
    """Return one column a loss: the first seed's eigenvalues and their shares; each seed's count of modes."""
    losses = list(dict.fromkeys(each["loss"] for each in runs))
    figure = Figure(figsize=(3.2 * len(losses), 7.2), layout="constrained")
    panels = figure.subplots(3, len(losses), sharex=True, squeeze=False)
    for (above, middle, below), name in zip(panels.T, losses, strict=True):
        own = [each for each in runs if each["loss"] == name]
        steps, values = (np.array(own[0]["curves"][key]) for key in ("steps", "eigenvalues"))
        for j, curve in enumerate(values.T):
            colour = f"C{j % 10}"
            above.plot(steps, np.where(curve > 0, curve, np.nan), color=colour, linewidth=1.2)
            if j + 1 in own[0]["grown"]:
                middle.plot(steps, curve / curve[-1], color=colour, linewidth=1.2)
                middle.axvline(own[0]["dates"][j], color=colour, linewidth=0.7, linestyle=":")
        for each in own:
            dates = sorted(each["dates"][j - 1] for j in each["grown"])
            label = f"seed {each['seed']}"
            below.step(
                [1, *dates, steps[-1]], [*range(len(dates) + 1), len(dates)], where="post", label=label
            )
        above.set_title(name, fontsize=9)
        above.set_yscale("log")
        above.set_ylim(bottom=1e-5)
        above.set_xscale("log")
        middle.set_ylim(-0.05, 1.6)
        below.set_ylim(-0.2, values.shape[1] + 0.2)
        below.set_xlabel("optimizer steps")
        below.legend(frameon=False, fontsize=7, loc="upper left")
    for row, label in enumerate(("eigenvalues", "share of the last (grown modes)", "modes half learned")):
        panels[row][0].set_ylabel(label)
    return figure


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/stepwise_resnet"))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--width", type=float, default=0.25, help="share of a ResNet's channels")
    parser.add_argument("--small-images", action="store_true", help="a ResNet's stem for small images")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--samples", type=int, default=128, help="images the spectrum is taken on")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dimensions", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--init-scale", type=float, default=0.5)
    parser.add_argument(
        "--lr", type=float, nargs=4, default=[3e-3, 3e-3, 3e-3, 3e-2], help=f"of {', '.join(LOSSES)}"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    if args.smoke:
        args.backbone, args.images, args.samples, args.steps = "test_resnet", 256, 64, 20
        args.width = 1.0
        args.seeds = args.seeds[:1]
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    runs: list[dict[str, Any]] = []
    for seed in args.seeds:
        runs += [run(args, name, seed) for name in args.losses]
        report(args, runs)  # after each seed: what is interrupted keeps what it has


def report(args: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    """Print the table; write numbers and picture."""
    runs = sorted(runs, key=lambda each: args.losses.index(each["loss"]))
    rows, summary = [], {}
    figure = draw(runs)
    for name in dict.fromkeys(each["loss"] for each in runs):
        own = [each for each in runs if each["loss"] == name]
        keys = ("learned", "step_likeness", "step_likeness_if_together")
        summary[name] = {key: spread([each[key] for each in own]) for key in keys}
        dates = ", ".join(f"{own[0]['dates'][j - 1]:.0f}" for j in own[0]["grown"])
        read = (f"{summary[name][key]['mean']:.2f} +- {summary[name][key]['std']:.2f}" for key in keys)
        rows.append([name, *read, dates or "none"])
    header = ["loss", "modes learned", "step-likeness", "if together", "dated steps (first seed)"]
    print(table(rows, header))
    runs = [{key: value for key, value in each.items() if key != "curves"} for each in runs]
    config = {k: v for k, v in vars(args).items() if k not in ("data", "out")}
    save(args.out, "stepwise_resnet", {"config": config, "summary": summary, "runs": runs}, figure)


if __name__ == "__main__":
    main()
