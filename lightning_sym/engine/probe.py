"""Samples that a monitor looks at again and again: taken from the first batches of all ranks, and kept.

Shape letters: N samples.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_sym.engine.batch import Arguments, first_samples, rows_of
from lightning_sym.engine.run import Run

#: Why a resumed run does not have the first one's samples.
LOST = "checkpoints hold no samples; pass data, or a folder as keep"


def gathered(run: Run, arguments: Arguments, samples: int) -> Arguments:
    """Return what a call takes, of the first samples of all ranks, on the CPU and cut loose.

    Args:
        run: the fit.
        arguments: what a call takes of this rank's batch.
        samples: at most so many, over all ranks.

    Raises:
        TypeError: if they are no tensors with a row for each sample.
    """
    both = (arguments.args, arguments.kwargs)
    if not rows_of(both):
        raise TypeError(
            "inputs must find tensors with a row for each sample, to keep some of them; pass data instead"
        )
    mine = first_samples(arguments, samples)

    def share(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim:
            return leaf
        return run.ranks.gather_rows(leaf.detach())[:samples].cpu().clone()

    return Arguments(*tree_map(share, (mine.args, mine.kwargs)))


class Held:
    """Samples of one run that a monitor looks at again and again. No checkpoint holds them.

    Args:
        file: where rank 0 stores them for a resumed run; ``None``: nowhere.

    Attributes:
        samples: tensors, numbers and strings in lists and dicts, or None.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.samples: Any = None

    def take(self, samples: Any, run: Run) -> str:
        """Keep samples, the same on all ranks; return what tells them from others.

        Raises:
            OSError: if the file can't be written.
        """
        self.samples = samples
        if self.file is not None and run.ranks.rank == 0:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.file.with_suffix(".part")
            torch.save(samples, unfinished)
            os.replace(unfinished, self.file)
        return fingerprint(samples)

    def again(self, run: Run, mark: str | None, *, taken: Any = None) -> Any:
        """Return the samples that :meth:`take` returned a mark for, or None where they are gone.

        Args:
            run: the fit; all ranks call this.
            mark: what ``take`` returned; ``None``: nothing was taken.
            taken: what would be taken now, which may be the same.
        """
        if mark is None:
            return None
        found = [each for each in (self.samples, taken) if each is not None and fingerprint(each) == mark]
        if not found and run.ranks.rank == 0 and self.file is not None and self.file.exists():
            stored = torch.load(self.file, weights_only=True)
            found = [stored] if fingerprint(stored) == mark else []
        self.samples = run.ranks.broadcast(found[0] if found else None)
        return self.samples


def fingerprint(samples: Any) -> str:
    """Return what tells samples from any others, the same in every process."""
    said = hashlib.sha256()
    for leaf in tree_leaves(samples):
        if isinstance(leaf, Tensor):
            said.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            said.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            said.update(repr(leaf).encode())
    return said.hexdigest()
