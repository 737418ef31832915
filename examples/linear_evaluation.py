r"""How good is a frozen backbone? A linear classifier on its features of a whole data set.

The features of unaugmented images are taken once, in eval mode; a logistic regression is fitted on all
training images, its weight decay chosen on a fifth of them, drawn by class. Test images are seen once.

python examples/linear_evaluation.py --checkpoint run.ckpt --method barlow_twins --data CIFAR10
python examples/linear_evaluation.py --backbone backbone.safetensors --data CIFAR10   # timm's, exported
python examples/linear_evaluation.py --smoke   # pretrains on the digits, and takes both ways
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from _data import add_data_arguments, load_images
from _report import save, table
from _trainer import quiet_trainer
from _views import two_views
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_sym.datamodules import MultiViewDataModule
from lightning_sym.modules import BarlowTwins, JointEmbedding, SimCLR, VICReg, extract_features

METHODS: dict[str, type[JointEmbedding]] = {"barlow_twins": BarlowTwins, "simclr": SimCLR, "vicreg": VICReg}
DECAYS = tuple(10.0**k for k in range(-6, 1))


def exported(path: Path) -> nn.Module:
    """Return the timm model that a module's ``export_backbone`` wrote; it takes timm alone."""
    with safe_open(path, "pt") as file:
        told = file.metadata()
    model = timm.create_model(told["timm_name"], **json.loads(told["timm_args"]))
    for name, (kind, options) in json.loads(told.get("timm_parts", "{}")).items():
        model.set_submodule(name, getattr(nn, kind)(**options))  # the stem for small images
    model.load_state_dict(load_file(path))
    return model


def fit_linear(x: Tensor, y: Tensor, *, classes: int, decay: float) -> nn.Linear:
    """Return the linear classifier of least mean cross-entropy plus ``decay / 2`` times its squared weights.

    Args:
        x: standardised features ``[N, F]``.
        y: class numbers ``[N]``.
        classes: how many.
        decay: of the weights, not of the biases.
    """
    linear = nn.Linear(x.shape[1], classes).to(x)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    solver = torch.optim.LBFGS(linear.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = nn.functional.cross_entropy(linear(x), y) + decay / 2 * linear.weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return linear


@torch.no_grad()
def accuracy(linear: nn.Linear, x: Tensor, y: Tensor) -> float:
    """Return the share of samples classified rightly."""
    return float((linear(x).argmax(1) == y).double().mean())


def evaluate(
    backbone: nn.Module, data: MultiViewDataModule, *, decays: Sequence[float], device: str, seed: int
) -> dict[str, Any]:
    """Return the test accuracy of a linear classifier on the frozen backbone, and how it was chosen."""
    train, test = (extract_features(backbone, part, device=device) for part in data.probe_dataloaders())
    mean, std = train[0].mean(0), train[0].std(0).clamp_min(1e-6)
    (x, y), (x_test, y_test) = (((h.float() - mean) / std, labels) for h, labels in (train, test))
    classes = int(y.max()) + 1
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(len(y), dtype=torch.bool)
    for label in range(classes):  # a fifth of each class
        members = order[y[order] == label]
        held[members[: len(members) // 5]] = True
    tried = {
        decay: accuracy(fit_linear(x[~held], y[~held], classes=classes, decay=decay), x[held], y[held])
        for decay in decays
    }
    best = max(tried, key=lambda decay: tried[decay])
    linear = fit_linear(x, y, classes=classes, decay=best)
    return {
        "train_images": len(y),
        "test_images": len(y_test),
        "features": x.shape[1],
        "held_out_accuracy_by_decay": {str(decay): tried[decay] for decay in tried},
        "decay": best,
        "train_accuracy": accuracy(linear, x, y),
        "test_accuracy": accuracy(linear, x_test, y_test),
    }


def pretrain(data: MultiViewDataModule, out: Path, *, seed: int) -> None:
    """Pretrain a tiny ResNet for two epochs; leave ``run.ckpt`` and ``backbone.safetensors``."""
    pl.seed_everything(seed, verbose=False)
    module = BarlowTwins("test_resnet", projector=(64, 32), optimizer="adamw", lr=2e-3, warmup_epochs=0)
    trainer = quiet_trainer(max_epochs=2, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(out / "run.ckpt")
    module.export_backbone(out / "backbone.safetensors")


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/linear_evaluation"))
    parser.add_argument("--checkpoint", type=Path, help="of a module of --method")
    parser.add_argument("--method", choices=METHODS, default="barlow_twins")
    parser.add_argument("--backbone", type=Path, help="a file of export_backbone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    images = [load_images(args.data, smoke=args.smoke, train=train) for train in (True, False)]
    data = two_views(*images, seed=args.seed, batch_size=128)
    if args.smoke:
        args.out.mkdir(parents=True, exist_ok=True)
        pretrain(data, args.out, seed=args.seed)
        args.checkpoint, args.backbone = args.out / "run.ckpt", args.out / "backbone.safetensors"
    found: dict[str, nn.Module] = {}
    if args.checkpoint:
        found["checkpoint"] = METHODS[args.method].load_from_checkpoint(args.checkpoint).backbone
    if args.backbone:
        found["backbone"] = exported(args.backbone)
    if not found:
        parser.error("give --checkpoint, --backbone or --smoke")
    how = {"decays": DECAYS[1::3] if args.smoke else DECAYS, "device": args.device, "seed": args.seed}
    results = {name: evaluate(net, data, **how) for name, net in found.items()}
    names = ("features", "decay", "train_accuracy", "test_accuracy")
    print(table([[name, *(row[n] for n in names)] for name, row in results.items()], ["from", *names]))
    config = {"method": args.method, "seeds": [args.seed], "smoke": args.smoke, "images": images[0].name}
    save(args.out, "linear_evaluation", {"config": config, "results": results})


if __name__ == "__main__":
    main()
