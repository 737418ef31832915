"""Samples that a monitor looks at again and again: taken from the first batches of all ranks, and kept.

Shape letters: N samples.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_sym.engine.batch import Arguments, first_samples, rows_of
from lightning_sym.engine.run import Run


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
