"""Watch a small network learn real digits, and a twin whose learning rate kills it: what monitors show."""

from __future__ import annotations

import numpy as np
import torch
from _monitoring import Classifier, finish, parser, tell_where
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import monitors
from lightning_sym.engine.schedule import LogSpaced


def network(*, normalised: bool = True) -> nn.Module:
    """Return a small convolutional network for 8 x 8 images."""
    norm = nn.BatchNorm2d if normalised else nn.Identity
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        norm(32),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        norm(32),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(32 * 16, 64),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(64, 10),
    )


def loaders() -> tuple[DataLoader, DataLoader]:
    """Return scikit-learn's digits, every fifth of them held out."""
    digits = load_digits()
    x = torch.from_numpy((digits.images / 16).astype(np.float32))[:, None]
    y = torch.from_numpy(digits.target).long()
    held_out = torch.arange(len(y)) % 5 == 0
    train, test = TensorDataset(x[~held_out], y[~held_out]), TensorDataset(x[held_out], y[held_out])
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=360)


def main() -> None:
    """Train both, and say what was seen."""
    arguments = parser("monitor_digits", __doc__ or "").parse_args()
    train, test = loaders()
    for word, normalised, lr in (("sick", False, 0.1), ("healthy", True, 2e-3)):
        seed_everything(arguments.seed)
        watch = monitors("standard", every_n_steps=LogSpaced(8), targets=1)
        trainer = Trainer(
            max_epochs=15 if arguments.epochs is None else arguments.epochs,
            accelerator=arguments.accelerator,
            callbacks=watch,
            logger=TensorBoardLogger(arguments.out, name=word),
            log_every_n_steps=5,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        net = network(normalised=normalised)
        trainer.fit(Classifier(net, classes=10, lr=lr, weight_decay=0.05), train, test)
        name = f"monitor_digits_{word}" if word == "sick" else "monitor_digits"
        finish(watch, out=arguments.out, name=name, metrics=trainer.callback_metrics, word=word)
    tell_where(arguments.out)


if __name__ == "__main__":
    main()
