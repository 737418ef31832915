"""Watch a timm ResNet-18 learn CIFAR-10 (``--smoke``: digits at 32 x 32, seconds, no download)."""

from __future__ import annotations

import timm
import torch
from _data import Images, add_data_arguments, load_images
from _monitoring import Classifier, finish, parser, tell_where
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_sym.callbacks import monitors


class FlippedImages(Dataset[tuple[Tensor, int]]):
    """Normalised images, mirrored at random in training."""

    def __init__(self, images: Images, *, flip: bool) -> None:
        self.x, self.y, self.flip = torch.from_numpy(images.x), images.y, flip

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = self.x[index].permute(2, 0, 1).float() / 127.5 - 1
        return (x.flip(-1) if self.flip and torch.rand(()) < 0.5 else x), int(self.y[index])


def network(classes: int) -> nn.Module:
    """Return a ResNet-18 whose stem suits 32 x 32 images."""
    net = timm.create_model("resnet18", num_classes=classes)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


def main() -> None:
    """Train, and say what was seen."""
    arguments = parser("monitor_cifar10", __doc__ or "")
    add_data_arguments(arguments)
    arguments.add_argument("--preset", default="standard", choices=["light", "standard", "full"])
    arguments.add_argument("--every-n-steps", type=int, default=None)
    arguments.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps")
    options = arguments.parse_args()
    seed_everything(options.seed)
    train = load_images(options.data, smoke=options.smoke)
    test = load_images(options.data, smoke=options.smoke, train=False)
    if options.smoke:
        train, test = train.take(160, seed=0), test.take(64, seed=0)
    classes = int(train.y.max()) + 1
    batch = 32 if options.smoke else 128
    every = options.every_n_steps or (2 if options.smoke else None)
    watch = monitors(options.preset, every_n_steps=every, targets=1)
    trainer = Trainer(
        max_epochs=options.epochs or (1 if options.smoke else 10),
        max_steps=options.max_steps,
        accelerator=options.accelerator,
        callbacks=[*watch],  # a copy: the Trainer adds its own to the list
        logger=TensorBoardLogger(options.out, name=None),
        log_every_n_steps=2 if options.smoke else 20,
        enable_checkpointing=False,
    )
    trainer.fit(
        Classifier(network(classes), classes=classes, lr=1e-3, weight_decay=0.05),
        DataLoader(FlippedImages(train, flip=True), batch_size=batch, shuffle=True),
        DataLoader(FlippedImages(test, flip=False), batch_size=batch),
    )
    finish(watch, out=options.out, name="monitor_cifar10", metrics=trainer.callback_metrics)
    tell_where(options.out)


if __name__ == "__main__":
    main()
