"""What one weight shows by itself: rank, equal and zero units, size, entries that are not finite.

Shape letters: G groups, U units of a group, I incoming weights of a unit, S = G * U.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_sym.functional import (
    effective_rank_from_eigenvalues,
    numerical_rank_from_eigenvalues,
    unit_groups,
)
from lightning_sym.observe.weights import kept_features

#: A direction counts as used above this share of the largest singular value. A square Gaussian matrix of
#: 512 has its smallest at about 5e-4 of the largest: a random matrix of the shape is the yardstick.
RANK_RTOL = 1e-3
#: A unit counts as zero up to this share of the layer's largest.
ZERO_RTOL = 1e-4
#: Cosine distance up to which units count as equal (8 degrees), unless chance alone would bring them there.
EQUAL_TOLERANCE = 1e-2
#: Pairs of random units that may count as equal by chance, on average.
CHANCE = 1e-2
#: Most rows and columns of which a spectrum is taken, and most entries of a unit that are compared.
SHORT_SIDE, LONG_SIDE, ENTRIES = 512, 4096, 2048
#: Most groups of a grouped convolution that are looked into; evenly spread.
GROUPS = 64


@dataclass(frozen=True)
class WeightFacts:
    """Facts of one weight.

    Args:
        name: the layer's name, or the tensor's.
        shape: ``(G, U, I)``.
        not_finite: number of entries that are NaN or infinite; if any, all else is left at its default.
        size: root mean square of its entries times ``sqrt(I)``, so that an ordinary initialisation is near
            1 (and 0.3 to 3 in use), whatever the width; 0 if it is zero all over.
        zero: which units' incoming weights are zero, ``[S]``.
        group: for each unit the smallest index in its group of equal units, ``[S]``; a zero unit is its
            own group here.
        rank: number of directions in use, of ``possible`` ones.
        possible: what a random matrix of that shape uses, less its equal and zero units.
        effective_rank: exponential of the entropy of the singular values (Roy and Vetterli, 2007).
        random_rank: directions in use of a random matrix of that shape.
        random_effective_rank: effective rank of a random matrix of that shape.
    """

    name: str
    shape: tuple[int, int, int]
    not_finite: int = 0
    size: float = math.nan
    zero: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool), repr=False)
    group: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long), repr=False)
    rank: int = 0
    possible: int = 0
    effective_rank: float = math.nan
    random_rank: int = 0
    random_effective_rank: float = math.nan

    @property
    def units(self) -> int:
        """Number of units S."""
        return self.shape[0] * self.shape[1]

    @property
    def equal(self) -> Tensor:
        """Which units equal another one, ``[S]``."""
        if not self.group.numel():
            return torch.zeros(self.units, dtype=torch.bool)
        return self.group.bincount(minlength=self.units)[self.group] > 1

    @property
    def redundant(self) -> int:
        """Number of units that could be left out: all but one of each group of equal units."""
        return int(self.group.numel() - self.group.unique().numel()) if self.group.numel() else 0


def weight_facts(name: str, blocks: Tensor, bias: Tensor | None = None) -> WeightFacts:
    """Look at one weight.

    Args:
        name: of its layer.
        blocks: ``[G, U, I]``, a unit's incoming weights along the last dimension.
        bias: ``[S]``, or ``None``; units that differ in it are not equal.

    Raises:
        ValueError: if ``blocks`` is not ``[G, U, I]`` or empty.
    """
    if blocks.ndim != 3 or not blocks.numel():
        raise ValueError(f"blocks must be a non-empty [G, U, I], got {tuple(blocks.shape)}")
    shape = (blocks.shape[0], blocks.shape[1], blocks.shape[2])
    wrong, square_S = _in_pieces(blocks)
    if bias is not None:
        wrong += int((~bias.isfinite()).sum())
    if wrong:
        return WeightFacts(name, shape, not_finite=wrong)
    largest = float(square_S.max())
    zero_S = square_S <= ZERO_RTOL**2 * largest
    size = math.sqrt(float(square_S.mean()))
    group_S = _equal(blocks, bias, zero_S)
    facts = WeightFacts(name, shape, size=size, zero=zero_S, group=group_S)
    if largest == 0 or min(shape[1:]) < 2:
        return facts
    return WeightFacts(**(vars(facts) | _rank(blocks, zero_S, group_S)))


def _in_pieces(blocks: Tensor) -> tuple[int, Tensor]:
    """Return the number of entries that are not finite, and each unit's squared norm, ``[S]`` float64."""
    rows_SI = blocks.flatten(0, 1)
    wrong, squares = 0, []
    step = max(1, 2**22 // rows_SI.shape[1])
    for piece in rows_SI.split(step):
        piece = piece.double()
        wrong += int((~piece.isfinite()).sum())
        squares.append(piece.square().sum(1))
    return wrong, torch.cat(squares).cpu()


def _equal(blocks: Tensor, bias: Tensor | None, zero_S: Tensor) -> Tensor:
    """Return for each unit the smallest index in its group of equal units, ``[S]``."""
    groups, units, width = blocks.shape
    label_S = torch.arange(groups * units)
    entries = width + (bias is not None)
    if units < 2 or entries < 2:
        return label_S
    tolerance = chance_tolerance(min(entries, ENTRIES), groups * units * (units - 1) // 2)
    keep = kept_features(width, ENTRIES, blocks.device)
    for g in range(0, groups, max(1, groups // GROUPS)):
        alive = torch.nonzero(~zero_S[g * units : (g + 1) * units]).flatten()
        if len(alive) < 2:
            continue
        rows = blocks[g] if keep is None else blocks[g][:, keep]
        rows = rows if len(alive) == units else rows[alive.to(rows.device)]
        own = None if bias is None else bias[g * units : (g + 1) * units][alive.to(bias.device)]
        found = unit_groups(rows, own, tolerance=tolerance, rtol=0.0).cpu()
        label_S[g * units + alive] = g * units + alive[found]
    return label_S


def chance_tolerance(entries: int, pairs: int) -> float:
    r"""Return the cosine distance within which random directions hardly ever meet.

    Two random directions of D entries are within an angle :math:`\theta` with a probability of about
    :math:`\theta^{D-1} / ((D-1) B)`, :math:`B = \sqrt\pi\,\Gamma(\frac{D-1}2) / \Gamma(\frac D2)`. The
    angle is chosen so that 0.01 of the pairs of a layer meet on average, and at most 8 degrees.

    Args:
        entries: D, at least 2.
        pairs: pairs of units.

    Returns:
        In ``(0, 0.01]``.

    Example:
        >>> chance_tolerance(100, 1000)
        0.01
        >>> chance_tolerance(2, 100) < 1e-6
        True
    """
    d = entries - 1
    log_b = 0.5 * math.log(math.pi) + math.lgamma(d / 2) - math.lgamma((d + 1) / 2)
    log_angle = (math.log(CHANCE / max(pairs, 1)) + math.log(d) + log_b) / d
    angle = math.exp(min(log_angle, 0.0))
    return min(EQUAL_TOLERANCE, 1 - math.cos(angle))


def _rank(blocks: Tensor, zero_S: Tensor, group_S: Tensor) -> dict[str, float | int]:
    """Return rank and effective rank beside those of a random matrix.

    Of several groups the one with the lowest rank is told; of a side too long a fixed random part.
    """
    _, units, width = blocks.shape
    most_units, most_width = (SHORT_SIDE, LONG_SIDE) if units <= width else (LONG_SIDE, SHORT_SIDE)
    rows = kept_features(units, most_units, blocks.device)
    columns = kept_features(width, most_width, blocks.device)
    worst: dict[str, float | int] = {}
    for g in range(0, blocks.shape[0], max(1, blocks.shape[0] // GROUPS)):
        part = blocks[g] if rows is None else blocks[g][rows]
        part = part if columns is None else part[:, columns]
        index = torch.arange(units) if rows is None else rows.cpu()
        index = index + g * units
        distinct = group_S[index][~zero_S[index]].unique().numel()
        if not distinct or not part.any():
            continue
        rank, effective = _spectrum(part)
        random_rank, random_effective = random_spectrum(*part.shape)
        possible = min(distinct, random_rank)
        if not worst or rank * worst["possible"] < worst["rank"] * possible:
            worst = {"rank": rank, "possible": possible, "effective_rank": effective}
            worst |= {"random_rank": random_rank, "random_effective_rank": random_effective}
    return worst


def _spectrum(matrix: Tensor) -> tuple[int, float]:
    side = matrix.double() if matrix.device.type != "mps" else matrix.float()
    side = side / side.abs().max()  # so that no product underflows
    gram = side @ side.mT if side.shape[0] <= side.shape[1] else side.mT @ side
    values = torch.linalg.eigvalsh(gram)
    rank = int(numerical_rank_from_eigenvalues(values, rtol=RANK_RTOL))
    return rank, float(effective_rank_from_eigenvalues(values))


@functools.lru_cache(maxsize=512)
def random_spectrum(rows: int, columns: int) -> tuple[int, float]:
    """Return rank and effective rank of one Gaussian matrix of that shape, always the same one.

    Args:
        rows: of the matrix.
        columns: of the matrix.
    """
    generator = torch.Generator().manual_seed(rows + columns)
    return _spectrum(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
