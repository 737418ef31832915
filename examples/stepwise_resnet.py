r"""Does a ResNet-18 learn its embedding one dimension at a time too?

Simon et al. (2023) find the staircase of the linear model in ResNets under Barlow Twins, SimCLR and
VICReg from a small initialisation. Here: the eigenvalues of the views' cross-covariance on a fixed set
of images over training, each mode dated by half of its own final size (the losses fix different
scales), and how much the modes come one at a time. Barlow Twins weighs off-diagonal entries by one, as
the theory does: the paper's 0.005 belongs to 8192 dimensions.

    python examples/stepwise_resnet.py --data CIFAR10            # minutes on a CPU
    python examples/stepwise_resnet.py --data CIFAR10 --small-images --images 50000 --batch-size 512 \
        --dimensions 64 --steps 20000 --samples 2048             # a GPU
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from _data import add_data_arguments, load_images
from _report import save, spread, table
from _views import TwoViews
from matplotlib.figure import Figure

from lightning_sym.callbacks import EigenmodeMonitor
from lightning_sym.functional.eigenmodes import step_likeness
from lightning_sym.losses import BarlowTwinsLoss, SimCLRLoss, VICRegLoss
from lightning_sym.modules import JointEmbedding
from lightning_sym.observe import LogSpaced

LOSSES: dict[str, Any] = {
    "barlow_twins": lambda: BarlowTwinsLoss(off_diagonal=1.0, eps=1e-12),
    "vicreg": VICRegLoss,
    "simclr": SimCLRLoss,
}


def run(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Train one network; return its staircase."""
    pl.seed_everything(seed, verbose=False)
    images = load_images(args.data, smoke=args.smoke).take(args.images, seed=seed)
    data = TwoViews(images, images.take(10, seed=0), batch_size=args.batch_size, seed=seed)
    module = JointEmbedding(
        LOSSES[name](),
        args.backbone,
        small_images=args.small_images,
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
        data=data.pair(args.samples, seed=7),
        modes=args.dimensions,
        picture=False,
        strict=True,
    )
    trainer = pl.Trainer(
        max_steps=args.steps,
        max_epochs=-1,
        logger=False,
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    began = time.perf_counter()
    trainer.fit(module, datamodule=data)
    spectra = monitor.eigenvalues
    # A mode counts as learned if it has grown tenfold since the start and is not negligible at the end.
    final, first = spectra[-1], spectra[0].clamp_min(0)
    learned = int(((final >= 10 * first) & (final >= 0.05 * final[0])).sum())
    followed = max(1, learned)
    return {
        "loss": name,
        "seed": seed,
        "images": images.name,
        "lr": args.lr[list(LOSSES).index(name)],
        "seconds": time.perf_counter() - began,
        "final_loss": float(trainer.callback_metrics["train_loss"]),
        "learned": learned,
        "grown": [
            j + 1 for j in range(len(final)) if final[j] >= 10 * first[j] and final[j] >= 0.05 * final[0]
        ],
        "past_half_of_the_largest": int((final >= final[0] / 2).sum()),
        "dates": [float(d) for d in monitor.dates(own=True)],
        "step_likeness": float(step_likeness(spectra[:, :followed], final=final[:followed])),
        "step_likeness_if_together": 1 / followed,
        "rank": {x: monitor.history[-1][f"eigenmodes/{x}/rank"] for x in ("representation", "embedding")},
        "first": spectra[0].tolist(),
        "last": final.tolist(),
        "curves": {"steps": monitor.steps.tolist(), "eigenvalues": spectra.tolist()},
    }


def draw(runs: list[dict[str, Any]]) -> Figure:
    """Return one column a loss: eigenvalues over steps, as they are and as shares of their last."""
    figure = Figure(figsize=(3.6 * len(runs), 5.6), layout="constrained")
    panels = figure.subplots(2, len(runs), sharex=True, squeeze=False)
    for column, each in enumerate(runs):
        steps, values = (np.array(each["curves"][key]) for key in ("steps", "eigenvalues"))
        above, below = panels[0][column], panels[1][column]
        for j in range(values.shape[1]):
            above.plot(
                steps, np.where(values[:, j] > 0, values[:, j], np.nan), color=f"C{j % 10}", linewidth=1.2
            )
            if j + 1 in each["grown"]:
                below.plot(steps, values[:, j] / values[-1, j], color=f"C{j % 10}", linewidth=1.2)
                below.axvline(each["dates"][j], color=f"C{j % 10}", linewidth=0.7, linestyle=":")
        above.set_title(each["loss"], fontsize=9)
        above.set_yscale("log")
        above.set_xscale("log")
        below.set_xlabel("optimizer steps")
        below.set_ylim(-0.05, 1.6)
    panels[0][0].set_ylabel("eigenvalues")
    panels[1][0].set_ylabel("share of the last (grown modes)")
    return figure


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/stepwise_resnet"))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--small-images", action="store_true", help="a ResNet's stem for small images")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--samples", type=int, default=128, help="images the spectrum is taken on")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dimensions", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--init-scale", type=float, default=0.5)
    parser.add_argument(
        "--lr", type=float, nargs=3, default=[3e-3, 3e-3, 3e-2], help=f"of {', '.join(LOSSES)}"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    if args.smoke:
        args.backbone, args.images, args.samples, args.steps = "test_resnet", 256, 64, 20
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    runs = [run(args, name, seed) for name in args.losses for seed in args.seeds]
    rows, summary = [], {}
    for name in args.losses:
        own = [each for each in runs if each["loss"] == name]
        summary[name] = {key: spread([each[key] for each in own]) for key in ("learned", "step_likeness")}
        dates = ", ".join(f"{own[0]['dates'][j - 1]:.0f}" for j in own[0]["grown"])
        rows.append([name, *(summary[name][key]["mean"] for key in summary[name]), dates or "none"])
    print(table(rows, ["loss", "modes learned", "step-likeness", "dated steps (first seed)"]))
    figure = draw([next(each for each in runs if each["loss"] == name) for name in args.losses])
    for each in runs:
        del each["curves"]
    config = {k: v for k, v in vars(args).items() if k not in ("data", "out")}
    save(args.out, "stepwise_resnet", {"config": config, "summary": summary, "runs": runs}, figure)


if __name__ == "__main__":
    main()
