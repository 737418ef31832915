"""Products ``X^T X``, of which only one side of the diagonal is computed.

Shape letters: N rows, D features.
"""

from __future__ import annotations

from torch import Tensor

#: Features of a block; narrower products are formed whole.
BLOCK = 128


def add_gram(sums_DD: Tensor, x_ND: Tensor, *, scale: float = 1.0, anew: bool = False) -> None:
    """Add ``scale * X^T X`` in place; below the diagonal's blocks only once :func:`mirror` is called.

    Args:
        sums_DD: what is added to, in the precision of x or float64.
        x_ND: the rows.
        scale: factor.
        anew: whether it is the first of the sums, which replaces what stands there.
    """
    features = x_ND.shape[1]
    # Of few rows the blocks' own cost is larger than what they save.
    block = BLOCK if features > BLOCK and 2 * len(x_ND) >= features else features
    for start in range(0, features, block):
        part, columns = sums_DD[start : start + block, start:], x_ND[:, start:]
        if part.dtype == x_ND.dtype:
            part.addmm_(columns[:, :block].mT, columns, beta=float(not anew), alpha=scale)
        elif anew:
            part.copy_(columns[:, :block].mT @ columns).mul_(scale)
        else:
            part.add_(columns[:, :block].mT @ columns, alpha=scale)


def upper(sums: Tensor) -> list[Tensor]:
    """Return views of what is formed of ``[..., D, D]``: the diagonal's blocks and what is right of each."""
    return [sums[..., start : start + BLOCK, start:] for start in range(0, sums.shape[-1], BLOCK)]


def mirror(sums: Tensor) -> None:
    """Copy what is above the diagonal's blocks below it, of ``[..., D, D]``."""
    for start in range(0, sums.shape[-1] - BLOCK, BLOCK):
        end = start + BLOCK
        sums[..., end:, start:end] = sums[..., start:end, end:].mT


def gram(x_ND: Tensor) -> Tensor:
    """Return ``X^T X``, ``[D, D]``."""
    found = x_ND.new_empty(x_ND.shape[1], x_ND.shape[1])
    add_gram(found, x_ND, anew=True)
    mirror(found)
    return found
