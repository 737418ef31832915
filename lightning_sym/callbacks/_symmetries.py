"""The symmetries of the module in training: found on a copy, the same on every rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_sym.callbacks._quiet import cut, rows_of
from lightning_sym.callbacks.trainability import Locator, detached_copy, locate
from lightning_sym.symmetry import Symmetries, find_symmetries

#: Samples the search runs on: a trial costs two passes in float64, whatever the batch.
SAMPLES = 16


def symmetries_of(
    trainer: Trainer, module: LightningModule, batch: Any, *, inputs: Locator, **options: Any
) -> Symmetries:
    """Return the module's symmetries, bound to it and so read as it is by then.

    They are searched for on the first samples of the batch. Ranks see other samples; what the first
    one finds goes for all.

    Args:
        trainer: the running trainer.
        module: the module being trained.
        batch: a training batch.
        inputs: where the module's input is in it.
        options: keywords of :func:`~lightning_sym.symmetry.find_symmetries`.

    Raises:
        RuntimeError: if the search failed on the first rank alone; else its own error.
    """
    found, failure = Symmetries(), None
    try:
        found = find_symmetries(detached_copy(module), _few(locate(batch, inputs)), **options)
    except Exception as error:
        failure = error
    alike = Symmetries(
        [replace(symmetry, module=None) for symmetry in found], untraced=found.untraced, refuted=found.refuted
    )
    alike, failed = trainer.strategy.broadcast((alike, failure is not None), 0)
    if failed:
        raise failure or RuntimeError("the first rank could not find symmetries")
    return Symmetries(
        [symmetry.bind(module) for symmetry in alike], untraced=alike.untraced, refuted=alike.refuted
    )


def _few(example: Any) -> Any:
    """Return the first samples of a module's input, where each of its tensors has a row for each."""
    leaves, structure = tree_flatten(example)
    return tree_unflatten(cut(leaves, slice(SAMPLES)), structure) if rows_of(leaves) else example
