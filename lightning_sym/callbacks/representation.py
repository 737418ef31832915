"""What the probes of a representation share: labelled batches, features over ranks, accuracy.

Shape letters: M samples to learn from, over all ranks; N samples to be judged on, of this rank; F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_sym.callbacks.base import Monitor, at_least, named
from lightning_sym.engine.batch import Arguments, Locator, cut, find_targets, locate, rows_of
from lightning_sym.engine.history import LAST_ROWS, Keep
from lightning_sym.engine.run import Run
from lightning_sym.engine.schedule import EpochEnds
from lightning_sym.observe import Observation, Reading
from lightning_sym.sandbox import Apart


class RepresentationProbe(Monitor):
    """Evaluates the representation on labelled samples, before the fit and after epochs.

    A subclass says in :meth:`learn` how classes are told from features. Features are those of a copy of the
    module in eval mode, without gradients, in the fit's precision. Ranks share the batches of both loaders
    among them. Samples with a negative label are unlabelled and left out.

    Logs:
        ``<quantity>/accuracy``: share of validation samples whose class is found, in [0, 1], over all ranks;
            NaN if features, or their squares, are not finite.
        ``<quantity>/train_accuracy``: if :attr:`judges_training`, the same on the samples learned from.

    Args:
        train: batches to learn from; None: the first of the data module's ``probe_dataloaders()``.
        val: batches to be judged on; None: the second of them.
        every_n_epochs: how often, besides the start.
        at_start: evaluate before the first step too: what an untrained backbone gives.
        max_train: at most so many labelled samples to learn from, over all ranks; None: all.
        max_val: likewise to be judged on.
        represent: how to get features ``[B, ...]`` of samples: a method of the module, or a function of
            (module, samples).
        inputs: where the samples are in a batch: an index, a key, or a function of the batch; ``None``: what
            ``represent`` names, or the first entry.
        targets: where the labels are, likewise: one class index a sample.
        seed: of loaders that shuffle: every rank must see one order. A loader's own generator is put back.
        keep: rows of :attr:`history` that a checkpoint holds, or a folder for it
            (:class:`~lightning_sym.callbacks.base.Monitor`).
        name: first part of its keys instead of the quantity.
        strict: raise what goes wrong in here instead of warning once and going on.

    Raises:
        ValueError: if an argument is out of its range; at fit start, if there are no loaders.
        TypeError: at fit start, if ``represent`` is not a method of the module.
    """

    runs_module = True
    #: Whether the accuracy on the samples learned from is read, too.
    judges_training: bool = False

    def __init__(
        self,
        *,
        train: Iterable[Any] | None = None,
        val: Iterable[Any] | None = None,
        every_n_epochs: int = 1,
        at_start: bool = True,
        max_train: int | None = None,
        max_val: int | None = None,
        represent: str | Callable[..., Tensor] = "forward",
        inputs: Locator = None,
        targets: int | str | Callable[[Any], Tensor] = 1,
        seed: int = 0,
        keep: Keep = LAST_ROWS,
        name: str | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(
            every_n_steps=EpochEnds(every_n_epochs, at_start=at_start), keep=keep, name=name, strict=strict
        )
        at_least("max_train", max_train, 1)
        at_least("max_val", max_val, 1)
        if (train is None) != (val is None):
            raise ValueError("train and val must be given together, or both be left to the data module")
        self.train, self.val = train, val
        self.max_train, self.max_val = max_train, max_val
        self.represent, self.inputs, self.targets, self.seed = represent, inputs, targets, seed

    def learn(self, features: Tensor, labels: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
        """Return a function from features ``[N, F]`` to classes ``[N]``.

        Args:
            features: of all ranks, with finite squares, ``[M, F]``.
            labels: their classes, ``int64 [M]``.
            classes: number of classes.
        """
        raise NotImplementedError

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "represent": named(self.represent)}

    @override
    def check(self, run: Run) -> None:
        super().check(run)
        run.function(self.represent, argument="represent")
        if self.train is None and not callable(getattr(run.datamodule, "probe_dataloaders", None)):
            raise ValueError(
                f"{type(self).__name__} needs labelled samples: pass train and val loaders, or a data module "
                "with probe_dataloaders()"
            )

    @override
    def read(self, seen: Observation) -> Iterator[Reading]:
        run = seen.run
        (x_MF, train_M), (x_NF, val_N) = run.ranks.attempt(lambda: self._both(run))
        x_MF, train_M = run.ranks.gather_rows(x_MF), run.ranks.gather_rows(train_M)
        every_val = run.ranks.gather_rows(val_N)
        if not len(train_M) or not len(every_val):
            raise ValueError(
                f"no labelled samples: {len(train_M)} to learn from, {len(every_val)} to judge on"
            )
        broken = torch.tensor([float(not (_usable(x_MF) and _usable(x_NF)))], dtype=torch.float64)
        if float(run.ranks.total(broken)):
            guess_M = every_guess = None
        else:
            classes = 1 + int(max(train_M.max(), every_val.max()))
            guess_M, guess_N = run.ranks.attempt(lambda: self._guess(x_MF, train_M, x_NF, classes))
            every_guess = run.ranks.gather_rows(guess_N)
        yield Reading("", "accuracy", _share(every_guess, every_val))
        if self.judges_training:
            yield Reading("", "train_accuracy", _share(guess_M, train_M))

    def _guess(
        self, x_MF: Tensor, labels_M: Tensor, x_NF: Tensor, classes: int
    ) -> tuple[Tensor | None, Tensor]:
        """Return the classes found of the samples learned from, if asked for, and of this rank's others."""
        find = self.learn(x_MF, labels_M, classes)
        guess_N = find(x_NF) if len(x_NF) else labels_M[:0]
        return find(x_MF) if self.judges_training else None, guess_N

    def _both(self, run: Run) -> list[tuple[Tensor, Tensor]]:
        """Return features and labels of this rank's share of both loaders."""
        loaders = (self.train, self.val) if self.train is not None else run.datamodule.probe_dataloaders()
        with ExitStack() as stack:
            for loader in loaders:
                _put_back_generators(loader, stack)
            apart = stack.enter_context(run.sandbox.open(seed=self.seed))
            limits = (self.max_train, self.max_val)
            return [self._features(run, apart, *each) for each in zip(loaders, limits, strict=True)]

    def _features(self, run: Run, apart: Apart, loader: Any, most: int | None) -> tuple[Tensor, Tensor]:
        function = run.function(self.represent, argument="represent")
        features: list[Tensor] = []
        labels: list[Tensor] = []
        first: Arguments | None = None
        left = math.inf if most is None else most
        for k, batch in enumerate(loader):
            classes_B, kept = self._labels(batch, left)
            left -= len(kept)
            mine = len(kept) > 0 and k % run.ranks.size == run.ranks.rank
            if mine or first is None:
                arguments = locate(batch, self.inputs, function)
                first = first or arguments
            if mine:
                features.append(self._represent(apart, arguments, len(classes_B), kept))
                labels.append(classes_B[kept])
            if left <= 0:
                break
        if not features and first is not None:  # fewer batches than ranks: the width is still needed
            features.append(self._represent(apart, first, None, torch.arange(0)))
            labels.append(torch.zeros(0, dtype=torch.int64))
        if not features:
            raise ValueError(f"no labelled samples: {type(loader).__name__} has no batch")
        return torch.cat(features), torch.cat(labels).to(features[0].device)

    def _labels(self, batch: Any, left: float) -> tuple[Tensor, Tensor]:
        """Return a batch's labels, and which of them are used."""
        found = find_targets(batch, self.targets)
        if found is None or found.ndim != 1:
            shape = None if found is None else tuple(found.shape)
            raise ValueError(f"targets={self.targets!r} must lead to one class index a sample, got {shape}")
        labels = found.detach().cpu().long()
        kept = (labels >= 0).nonzero()[:, 0]
        return labels, kept[: min(len(kept), int(left))] if math.isfinite(left) else kept

    def _represent(self, apart: Apart, arguments: Arguments, samples: int | None, kept: Tensor) -> Tensor:
        """Return the features of some samples of a batch; only they are run, if they can be picked."""
        both: Any = (arguments.args, arguments.kwargs)
        picked = samples is not None and len(kept) < samples == rows_of(both)
        args, kwargs = apart.place(cut(both, kept) if picked else both)
        found = apart(self.represent, *args, **kwargs)
        expected = len(kept) if picked else samples
        if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim < 1:
            raise TypeError(
                f"represent={self._how} must return a floating point tensor of features, got "
                f"{found.dtype if isinstance(found, Tensor) else type(found).__name__}"
            )
        if expected is not None and len(found) != expected:
            raise ValueError(
                f"represent={self._how} must return a row of features for each of {expected} labels, got "
                f"{tuple(found.shape)}"
            )
        found = found.flatten(1) if found.ndim > 1 else found[:, None]
        return found.float() if picked or len(kept) == expected else found.float()[kept.to(found.device)]

    @property
    def _how(self) -> str:
        how = self.represent
        return repr(how) if isinstance(how, str) else getattr(how, "__name__", type(how).__name__)


def _usable(features: Tensor) -> bool:
    """Return whether features and their squares are finite; else an argmax would make classes of NaN."""
    return bool(features.square().sum().isfinite())


def _share(guess: Tensor | None, labels: Tensor) -> float:
    """Return the share of labels that were found, or NaN where nothing could be said."""
    return math.nan if guess is None else float((guess == labels).double().mean())


def _put_back_generators(loader: Any, stack: ExitStack) -> None:
    """Put back, on leaving, the random state of a loader that has its own; the fit may draw from it too."""
    sampler, batches = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    for owner in (loader, sampler, getattr(batches, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            stack.callback(generator.set_state, generator.get_state())
