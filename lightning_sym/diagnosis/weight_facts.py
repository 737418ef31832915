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
from lightning_sym.observe.weights import accumulation_dtype, kept_features

#: A direction counts as used above this share of the largest singular value. A square Gaussian matrix of
#: 512 has its smallest at about 5e-4 of the largest: a random matrix of the shape is the yardstick.
RANK_RTOL = 1e-3
#: A unit counts as zero up to this share of the layer's largest.
ZERO_RTOL = 1e-4
#: Cosine distance up to which units count as equal (8 degrees), unless chance alone would bring them there.
EQUAL_TOLERANCE = 1e-2
#: A cosine distance below this is rounding in float32: units are compared number by number instead.
LEAST_TOLERANCE = 1e-6
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
    def entries(self) -> int:
        """Number of entries of the weight."""
        return math.prod(self.shape)

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
    label_S = torch.arange(shape[0] * shape[1])
    worst: dict[str, float | int] = {}
    for g in range(0, shape[0], max(1, shape[0] // GROUPS)):
        own = slice(g * shape[1], (g + 1) * shape[1])
        if largest == 0 or zero_S[own].all() or min(shape[1:]) < 2:
            continue
        found = _rank(blocks[g])
        alive_A = torch.nonzero(~zero_S[own]).flatten()
        rows_AI = _narrowed(blocks[g], alive_A if len(alive_A) < shape[1] else None)
        rest = None if bias is None else bias[own][alive_A.to(bias.device)]
        label_S[own][alive_A] = g * shape[1] + alive_A[_equal(rows_AI, rest, rank=int(found["rank"]))]
        kept = kept_features(shape[1], _most(blocks[g])[0], torch.device("cpu"))
        index = torch.arange(shape[1]) if kept is None else kept
        distinct = label_S[own][index][~zero_S[own][index]].unique().numel()
        found["possible"] = min(distinct, int(found["random_rank"]))
        if not worst or found["rank"] * worst["possible"] < worst["rank"] * found["possible"]:
            worst = found
    made = WeightFacts(name, shape, size=size, zero=zero_S, group=label_S)
    return WeightFacts(**(vars(made) | worst))


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


def _narrowed(matrix: Tensor, rows: Tensor | None) -> Tensor:
    """Return the given rows (all of them for ``None``), a wide matrix's fixed random columns alone."""
    keep = kept_features(matrix.shape[1], ENTRIES, matrix.device)
    matrix = matrix if keep is None else matrix[:, keep]
    matrix = matrix if rows is None else matrix[rows.to(matrix.device)]
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def _equal(rows_UI: Tensor, bias_U: Tensor | None, *, rank: int) -> Tensor:
    """Return for each unit the smallest index in its group of equal units, ``[U]``.

    Incoming weights must agree by themselves and together with the bias: next to a large bias, weights would
    not be looked at.

    Units of a low-rank layer are close to one another by chance: what is left to chance is counted in as
    many dimensions as the weight uses. Where angles tell nothing (two dimensions or fewer), units are equal
    if all their numbers are, or if all units of the layer are within 1 % of their mean.
    """
    units = len(rows_UI)
    if units < 2:
        return torch.arange(units)
    if bias_U is not None and not bias_U.any():
        bias_U = None
    tolerance = chance_tolerance(rank, units * (units - 1) // 2) if rank > 1 else 0.0
    if tolerance >= LEAST_TOLERANCE:
        alone = None if bias_U is None else rows_UI.mT
        return unit_groups(rows_UI, bias_U, alone, tolerance=tolerance, rtol=0.0).cpu()
    whole = rows_UI if bias_U is None else torch.cat([rows_UI, bias_U[:, None].to(rows_UI)], dim=1)
    whole = whole.double().cpu()
    if _alike(whole) and _alike(rows_UI.double()):
        return torch.zeros(units, dtype=torch.long)
    inverse = torch.unique(whole, dim=0, return_inverse=True)[1]
    first = torch.full((int(inverse.max()) + 1,), units).scatter_reduce(
        0, inverse, torch.arange(units), reduce="amin"
    )
    return first[inverse]


def _alike(rows_UI: Tensor) -> bool:
    """Return whether all rows are within 1 % of their mean."""
    spread = torch.linalg.vector_norm(rows_UI - rows_UI.mean(0))
    return bool(spread <= EQUAL_TOLERANCE * torch.linalg.vector_norm(rows_UI))


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


def _most(matrix: Tensor) -> tuple[int, int]:
    """Return the most rows and columns of a matrix whose spectrum is taken."""
    return (SHORT_SIDE, LONG_SIDE) if matrix.shape[0] <= matrix.shape[1] else (LONG_SIDE, SHORT_SIDE)


def _rank(matrix: Tensor) -> dict[str, float | int]:
    """Return rank and effective rank beside a random matrix's; of a side too long a fixed random part."""
    most_rows, most_columns = _most(matrix)
    rows = kept_features(matrix.shape[0], most_rows, matrix.device)
    columns = kept_features(matrix.shape[1], most_columns, matrix.device)
    part = matrix if rows is None else matrix[rows]
    part = (part if columns is None else part[:, columns]).to(accumulation_dtype(part.device))
    random_rank, random_effective = random_spectrum(*part.shape)
    rank, effective = _spectrum(part) if part.any() else (0, 0.0)
    return {
        "rank": rank,
        "effective_rank": effective,
        "random_rank": random_rank,
        "random_effective_rank": random_effective,
    }


def _spectrum(matrix: Tensor) -> tuple[int, float]:
    side = matrix / matrix.abs().max()  # so that no product underflows
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
