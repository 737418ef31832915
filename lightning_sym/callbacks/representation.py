"""What the probes of a representation share: labelled loaders, features over ranks, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_sym.callbacks._quiet import gather_rows, method, quietly
from lightning_sym.callbacks.base import ScheduledCallback, logger_step, undisturbed
from lightning_sym.observe.reading import Reading


class RepresentationProbe(ScheduledCallback):
    """Evaluates the representation on labelled images, before the fit and after epochs.

    Features are taken in eval mode, without gradients; random state, modes and buffers are as before.
    Ranks share the batches of both loaders among them.

    Args:
        train: batches of ``(images, labels)`` to learn from; None: the first of the data module's
            ``probe_dataloaders()``.
        val: batches to be judged on; None: the second of them.
        every_n_epochs: how often, besides the start.
        at_start: evaluate before the first step too: what an untrained backbone gives.
        max_train, max_val: at most so many samples, over all ranks; None: all.
        represent: how to get features ``[B, F]`` from images: a method of the module, or a function of
            (module, images).
        seed: of the loaders, if they shuffle: every rank must see one order.
        strict: raise what goes wrong in here instead of warning once and going on.
    """

    def __init__(
        self,
        *,
        train: Iterable[Any] | None = None,
        val: Iterable[Any] | None = None,
        every_n_epochs: int = 1,
        at_start: bool = True,
        max_train: int | None = None,
        max_val: int | None = None,
        represent: str | Callable[[LightningModule, Tensor], Tensor] = "forward",
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        super().__init__(strict=strict)
        if isinstance(every_n_epochs, bool) or not isinstance(every_n_epochs, int) or every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be a positive integer, got {every_n_epochs!r}")
        for name, most in (("max_train", max_train), ("max_val", max_val)):
            if most is not None and most < 1:
                raise ValueError(f"{name} must be at least 1, got {most}")
        if (train is None) != (val is None):
            raise ValueError("train and val must be given together, or both be left to the data module")
        self.train, self.val = train, val
        self.every_n_epochs, self.at_start = every_n_epochs, at_start
        self.max_train, self.max_val = max_train, max_val
        self.represent, self.seed = represent, seed
        self.settings: dict[str, Any] = {}

    def evaluate(
        self, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], classes: int
    ) -> dict[str, float]:
        """Return scores of this rank's share of val by name; the training features are all ranks'.

        Args:
            train: features ``[M, F]`` and labels ``[M]``.
            val: features ``[N, F]`` and labels ``[N]``.
            classes: number of classes.
        """
        raise NotImplementedError

    @property
    @override
    def state_key(self) -> str:
        how = self.represent if isinstance(self.represent, str) else self.represent.__qualname__
        return self._generate_state_key(
            quantity=self.quantity, every_n_epochs=self.every_n_epochs, represent=how, **self.settings
        )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        method(pl_module, self.represent, argument="represent")
        datamodule = getattr(trainer, "datamodule", None)
        if self.train is None and not callable(getattr(datamodule, "probe_dataloaders", None)):
            raise ValueError(
                f"{type(self).__name__} needs labelled images: pass train and val loaders, or a data module "
                "with probe_dataloaders()"
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.at_start and trainer.global_step == 0:
            self._run(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._run(trainer, pl_module)

    def _run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with self.guard(trainer, "evaluate"), undisturbed(pl_module):
            torch.manual_seed(self.seed)  # undisturbed puts the random state back
            train_loader, val_loader = self.train, self.val
            if train_loader is None:
                train_loader, val_loader = trainer.datamodule.probe_dataloaders()  # type: ignore[attr-defined]
            features, labels = self._features(trainer, pl_module, train_loader, self.max_train)
            train = gather_rows(features), gather_rows(labels)
            val = self._features(trainer, pl_module, val_loader, self.max_val)
            labels = gather_rows(val[1])
            if not len(train[1]) or not len(labels):
                raise ValueError(
                    f"no labelled images: {len(train[1])} to learn from, {len(labels)} to judge on"
                )
            classes = int(max(train[1].max(), labels.max())) + 1
            scores = self.evaluate(train, val, classes)
            readings = [Reading(f"{self.quantity}/{name}", float(score)) for name, score in scores.items()]
            self.publish(trainer, readings, step=logger_step(trainer))

    def _features(
        self, trainer: Trainer, pl_module: LightningModule, loader: Any, most: int | None
    ) -> tuple[Tensor, Tensor]:
        """Return features and labels of this rank's share of the batches."""
        represent = method(pl_module, self.represent, argument="represent")
        features: list[Tensor] = []
        labels: list[Tensor] = []
        with quietly(trainer, pl_module, batch_statistics=False):
            for k, (x, y) in enumerate(_limited(loader, most)):
                if k % trainer.world_size != trainer.global_rank:
                    continue
                h: Any = represent(x.to(pl_module.device))
                features.append(h.flatten(1).float())
                labels.append(y.to(pl_module.device))
            if not features:  # fewer batches than ranks: the width is still needed to gather
                x, y = next(iter(loader))
                h = represent(x.to(pl_module.device))
                return h.flatten(1).float()[:0], y.to(pl_module.device)[:0]
        return torch.cat(features), torch.cat(labels)


def _limited(loader: Any, most: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    seen = 0
    for x, y in loader:
        if most is not None and seen + len(x) >= most:
            yield x[: most - seen], y[: most - seen]
            return
        seen += len(x)
        yield x, y


def accuracy(predictions: Tensor, labels: Tensor, classes: int) -> float:
    """Return the share of correct predictions, by torchmetrics; of all ranks' samples, gathered."""
    from torchmetrics.classification import MulticlassAccuracy

    # Every rank has all predictions (one without a batch of its own too): nothing is left to sync.
    metric = MulticlassAccuracy(max(classes, 2), average="micro", sync_on_compute=False)
    metric = metric.to(predictions.device)
    metric.update(predictions, labels)
    return float(metric.compute())
