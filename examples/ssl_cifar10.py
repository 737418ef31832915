r"""Three self-supervised losses on all of CIFAR-10, judged by nearest neighbours on the whole test set.

The network is a ResNet-18 of a quarter of the width with the stem for small images: three 3 x 3
convolutions of stride one, no pooling. All of it is said in timm's arguments (``QUARTER``). Views have 24
pixels a side: a crop of a fifth of the area or more, as they are drawn here, has 25 on average, so that
things are as large in training as in the test images of 32, at little more than half of the work. Every
run is written when it ends, and its checkpoint with it, for ``linear_evaluation.py``; one that was stopped
goes on from its last epoch when the same command is given again. The curve is read from a part of the
images; what is reported (``knn_whole``) is of all of them, once, after the last step.

python examples/ssl_cifar10.py --data CIFAR10              # 30 epochs of each loss: hours on 2 cores
python examples/ssl_cifar10.py --data CIFAR10 --precision bf16-mixed   # where a CPU multiplies in bfloat16
python examples/ssl_cifar10.py --data CIFAR10 --minutes 60 --methods simclr   # what an hour gives
python examples/ssl_cifar10.py --data CIFAR10 --full --seeds 0 1 2   # full width, 200 epochs: a GPU
python examples/ssl_cifar10.py --smoke      # seconds, on the digits
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _data import add_data_arguments, load_images
from _report import save, spread, table
from _trainer import quiet_trainer
from _views import two_views
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib.figure import Figure

from lightning_sym.callbacks import KNNProbe
from lightning_sym.functional.neighbours import neighbour_vote
from lightning_sym.modules import BarlowTwins, JointEmbedding, SimCLR, VICReg, extract_features

QUARTER = {"channels": (16, 32, 64, 128), "stem_type": "deep", "stem_width": 8}
METHODS: dict[str, type[JointEmbedding]] = {"barlow_twins": BarlowTwins, "simclr": SimCLR, "vicreg": VICReg}
# Projectors are narrow, as the network is.
PROJECTORS = {"barlow_twins": (512, 512, 512), "simclr": (512, 128), "vicreg": (512, 512, 512)}
FULL_PROJECTORS = {"barlow_twins": (2048,) * 3, "simclr": (2048, 128), "vicreg": (2048,) * 3}


def build(args: argparse.Namespace, method: str) -> JointEmbedding:
    """Return the module of one loss."""
    special: dict[str, Any] = {"temperature": args.temperature} if method == "simclr" else {}
    if args.full:  # the papers' optimizer, rate and decay
        return METHODS[method](
            "resnet18",
            small_images=True,
            projector=FULL_PROJECTORS[method],
            rank_check="off",
            **special,
        )
    projector = tuple(min(width, args.widest) for width in PROJECTORS[method])
    module = METHODS[method](
        "resnet18",
        small_images=True,
        backbone_options=QUARTER,
        projector=projector,
        optimizer="adamw",
        lr=args.lr,
        weight_decay=args.weight_decay,
        warmup_epochs=1,
        rank_check="off",
        **special,
    )
    module.backbone.to(memory_format=torch.channels_last)  # a quarter faster on CPU
    return module


def fingerprint(args: argparse.Namespace) -> str:
    """Return what tells this configuration from others, in which a stopped run must not go on."""
    told = {key: value for key, value in vars(args).items() if key not in ("data", "out", "methods", "seeds")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


def run(args: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """Pretrain once; return what the neighbours said on the way."""
    pl.seed_everything(seed, verbose=False)
    train = load_images(args.data, smoke=args.smoke).take(args.images, seed=seed)
    test = load_images(args.data, smoke=args.smoke, train=False).take(args.test_images, seed=seed)
    options = {"batch_size": args.batch_size, "num_workers": args.workers}
    crops = {"crop_scale": (args.smallest_crop, 1.0)}
    size = args.view_pixels
    data = two_views(
        train, test, seed=seed, recipe=args.recipe, recipe_options=crops, image_size=size, **options
    )
    whole, judged = two_views(train, test, seed=seed).probe_dataloaders()
    knn = KNNProbe(
        train=whole, val=judged, max_train=args.curve_images, max_val=max(1, args.curve_images // 5),
        k=args.neighbours, every_n_epochs=args.every, strict=True,
    )  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    unfinished = args.out / f"{method}-{seed}-{fingerprint(args)}-unfinished.ckpt"
    keep = ModelCheckpoint(
        args.out, filename=unfinished.stem, save_on_train_epoch_end=True, enable_version_counter=False
    )
    trainer = quiet_trainer(
        accelerator="auto",
        devices=1,
        precision=args.precision,
        max_epochs=args.epochs,
        max_time=None if args.minutes is None else timedelta(minutes=args.minutes),
        callbacks=[knn, keep],
        enable_checkpointing=True,
        limit_val_batches=0,
    )
    module = build(args, method)
    resumed = torch.load(unfinished, weights_only=True)["epoch"] + 1 if unfinished.exists() else 0
    began, cpu_began = time.perf_counter(), time.process_time()
    trainer.fit(module, datamodule=data, ckpt_path=unfinished if resumed else None)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    trainer.save_checkpoint(args.out / f"{method}-{seed}.ckpt", weights_only=True)
    unfinished.unlink(missing_ok=True)
    per_epoch = trainer.num_training_batches
    epochs = trainer.global_step / per_epoch
    here = epochs - resumed
    return {
        "method": method,
        "seed": seed,
        "images": [len(train.y), len(test.y)],
        "steps": trainer.global_step,
        "epochs": epochs,
        "parameters": sum(p.numel() for p in module.backbone.parameters()),
        "resumed_at_epoch": resumed,
        "seconds_an_epoch": seconds / here,
        "cpu_seconds_an_epoch": cpu_seconds / here,
        "loss": float(trainer.callback_metrics["train_loss"]),
        "epoch": [row["step"] / per_epoch for row in knn.history],
        "knn": [row["knn/accuracy"] for row in knn.history],
        "knn_whole": neighbours_accuracy(args, module, whole, judged),
    }


def neighbours_accuracy(args: argparse.Namespace, module: JointEmbedding, whole: Any, judged: Any) -> float:
    """Return the share of all test images whose class wins the vote of all training images."""
    bank, labels = extract_features(module.backbone, whole)
    queries, truth = extract_features(module.backbone, judged)
    votes = neighbour_vote(queries, bank=bank, labels=labels, classes=10, k=args.neighbours)
    return float((votes.argmax(dim=1) == truth).double().mean())


def draw(runs: list[dict[str, Any]]) -> Figure:
    """Return neighbours' accuracies over epochs, a line a seed, a colour a loss; a star: of all images."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    named: set[str] = set()
    for each in runs:
        method = each["method"]
        label = None if method in named else method
        named.add(method)
        colour = f"C{list(METHODS).index(method)}"
        axes.plot(each["epoch"], each["knn"], "o-", color=colour, linewidth=1, markersize=3, label=label)
        axes.plot(each["epochs"], each["knn_whole"], "*", color=colour, markersize=10)
    axes.set_xlabel("epochs (0: untrained)")
    axes.set_ylabel("accuracy of nearest neighbours")
    axes.legend(frameon=False)
    return figure


def report(args: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    """Write what there is so far, and print it."""
    rows, summary = [], {}
    for method in dict.fromkeys(each["method"] for each in runs):
        mine = [each for each in runs if each["method"] == method]
        ends = {"untrained": spread([each["knn"][0] for each in mine])}
        for name in ("knn_whole", "epochs"):
            ends[name] = spread([each[name] for each in mine])
        for seconds in ("seconds_an_epoch", "cpu_seconds_an_epoch"):
            ends[seconds] = spread([each[seconds] for each in mine])
        summary[method] = ends
        told = [f"{end['mean']:.3f} +- {end['std']:.3f}" for end in (ends["untrained"], ends["knn_whole"])]
        rows.append(
            [method, len(mine), ends["epochs"]["mean"], *told, summary[method]["seconds_an_epoch"]["mean"]]
        )
    print(table(rows, ["loss", "seeds", "epochs", "knn untrained", "knn trained", "s/epoch"]), flush=True)
    config = {key: value for key, value in vars(args).items() if key not in ("data", "out")}
    save(args.out, "ssl_cifar10", {"config": config, "summary": summary, "runs": runs}, draw(runs))


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/ssl_cifar10"))
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--full", action="store_true", help="full width, 200 epochs, the papers' optimizer")
    parser.add_argument("--recipe", default="simclr", help="of the views")
    parser.add_argument("--view-pixels", type=int, default=None, help="24, or 32 with --full")
    parser.add_argument(
        "--smallest-crop", type=float, default=None, help="share of the area: .2, or .08 with --full"
    )
    parser.add_argument("--temperature", type=float, default=0.2, help="of SimCLR")
    parser.add_argument("--epochs", type=int, default=None, help="30, or 200 with --full")
    parser.add_argument("--minutes", type=float, default=None, help="of each run at most")
    parser.add_argument("--batch-size", type=int, default=None, help="128, or 512 with --full")
    parser.add_argument("--precision", default=None, help="32-true, or bf16-mixed with --full")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--widest", type=int, default=512, help="most units of a projector's layer")
    parser.add_argument("--neighbours", type=int, default=20)
    parser.add_argument("--every", type=int, default=1, help="epochs between two readings of the curve")
    parser.add_argument("--curve-images", type=int, default=10000, help="a fifth are judged")
    parser.add_argument("--images", type=int, default=50000)
    parser.add_argument("--test-images", type=int, default=10000)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    args.epochs = args.epochs or (200 if args.full else 30)
    args.batch_size = args.batch_size or (512 if args.full else 128)
    args.view_pixels = args.view_pixels or (32 if args.full else 24)
    args.smallest_crop = args.smallest_crop or (0.08 if args.full else 0.2)
    args.precision = args.precision or ("bf16-mixed" if args.full else "32-true")
    if args.smoke:
        args.images, args.test_images, args.epochs, args.every = 256, 180, 2, 1
        args.batch_size, args.widest, args.seeds = 128, 64, args.seeds[:1]
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    runs: list[dict[str, Any]] = []
    for seed in args.seeds:
        for method in args.methods:
            runs.append(run(args, method, seed))
            report(args, runs)


if __name__ == "__main__":
    main()
