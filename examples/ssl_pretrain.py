r"""A short self-supervised run on CIFAR-10, judged by neighbours and a linear classifier.

python examples/ssl_pretrain.py --data CIFAR10            # minutes on a CPU
python examples/ssl_pretrain.py --data CIFAR10 --backbone resnet18 --small-images \
        --images 50000 --epochs 200 --projector 2048 2048 2048   # a GPU
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from _data import add_data_arguments, load_images
from _report import save, spread, table
from _trainer import quiet_trainer
from _views import fixed_pair, two_views
from matplotlib.figure import Figure

from lightning_sym.callbacks import EigenmodeMonitor, KNNProbe, LinearProbe
from lightning_sym.modules import BarlowTwins, JointEmbedding, SimCLR, VICReg

METHODS = {"barlow_twins": BarlowTwins, "simclr": SimCLR, "vicreg": VICReg}


def run(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Pretrain once; return what the probes read before and after every so many epochs."""
    pl.seed_everything(seed, verbose=False)
    train = load_images(args.data, smoke=args.smoke).take(args.images, seed=seed)
    test = load_images(args.data, smoke=args.smoke, train=False).take(args.test_images, seed=seed)
    data = two_views(train, test, seed=seed, batch_size=args.batch_size, recipe=args.recipe)
    module: JointEmbedding = METHODS[args.method](
        args.backbone,
        small_images=args.small_images,
        projector=tuple(args.projector),
        optimizer=args.optimizer,
        lr=args.lr,
        weight_decay=args.weight_decay,
        warmup_epochs=args.warmup_epochs,
    )
    every = max(1, args.epochs // 5)
    knn = KNNProbe(every_n_epochs=every, strict=True)
    linear = LinearProbe(every_n_epochs=every, strict=True)
    modes = EigenmodeMonitor(data=fixed_pair(data, args.batch_size), picture=False, strict=True)
    trainer = quiet_trainer(
        accelerator="auto",
        max_epochs=args.epochs,
        logger=pl.loggers.TensorBoardLogger(args.out) if args.log else False,
        callbacks=[knn, linear, modes],
        limit_val_batches=0,
    )
    began = time.perf_counter()
    trainer.fit(module, datamodule=data)
    last = modes.history[-1]
    return {
        "seed": seed,
        "images": train.name,
        "steps": trainer.global_step,
        "seconds": time.perf_counter() - began,
        "loss": float(trainer.callback_metrics["train_loss"]),
        "at_step": [row["step"] for row in knn.history],
        "knn": [row["knn/accuracy"] for row in knn.history],
        "linear": [row["linear/accuracy"] for row in linear.history],
        "rank": {layer: last[f"eigenmodes/{layer}/rank"] for layer in ("representation", "embedding")},
        "collapse": {
            layer: last[f"eigenmodes/{layer}/collapse"] for layer in ("representation", "embedding")
        },
    }


def draw(runs: list[dict[str, Any]], method: str) -> Figure:
    """Return accuracies over steps, a line a seed."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for k, each in enumerate(runs):
        for name, colour in (("knn", "C0"), ("linear", "C1")):
            label = {"knn": "20 neighbours", "linear": "linear classifier"}[name] if k == 0 else None
            axes.plot(each["at_step"], each[name], "o-", color=colour, linewidth=1, markersize=3, label=label)
    axes.set_xlabel("optimizer steps (0: untrained)")
    axes.set_ylabel("test accuracy")
    axes.set_title(f"{method}, {runs[0]['images']}: a line a seed", fontsize=9)
    axes.legend(frameon=False)
    return figure


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/ssl_pretrain"))
    parser.add_argument("--method", choices=METHODS, default="barlow_twins")
    parser.add_argument(
        "--backbone", default="test_resnet", help="any timm model; the default is a tiny ResNet"
    )
    parser.add_argument("--small-images", action="store_true", help="a ResNet's stem for small images")
    parser.add_argument("--projector", type=int, nargs="+", default=[512, 512, 256])
    parser.add_argument("--recipe", default="simclr", help="of the views")
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--warmup-epochs", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--log", action="store_true", help="TensorBoard logs under --out")
    args = parser.parse_args()
    if args.smoke:
        args.images, args.epochs, args.batch_size, args.seeds = 1024, 2, 128, args.seeds[:1]
        args.projector, args.test_images = [64, 64, 32], 200
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    runs = [run(args, seed) for seed in args.seeds]
    rows = []
    summary = {}
    for name in ("knn", "linear"):
        before, after = (spread([each[name][k] for each in runs]) for k in (0, -1))
        summary[name] = {"untrained": before, "trained": after}
        rows.append([name, *(f"{s['mean']:.3f} +- {s['std']:.3f}" for s in (before, after))])
    print(table(rows, ["accuracy", "untrained", "trained"]))
    config = {k: v for k, v in vars(args).items() if k not in ("data", "out", "log")}
    save(
        args.out,
        "ssl_pretrain",
        {"config": config, "summary": summary, "runs": runs},
        draw(runs, args.method),
    )


if __name__ == "__main__":
    main()
