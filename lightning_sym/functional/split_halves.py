r"""Alignment and participation ratio without the bias of few samples: from two halves of them.

A second moment of n samples is the true one plus noise. Noise makes its own norm larger and leaves its
product with an independent matrix as it is on average, so that :func:`matrix_alignment` reads too little:
two matrices of 64 dimensions that are proportional in truth correlate by .39 at n = 32, by .72 at n = 128
and by .95 at n = 1,000. Products of two *independent* halves have no such term. A correlation divided by
the root of both sides' agreement between halves is Spearman's correction for attenuation (*The proof and
measurement of association between two things*, 1904).

Halves are of samples (images, sequences), never of positions: positions of one image are not
independent. Each half subtracts its own mean.

Shape letters: D features, M matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from lightning_sym.functional._checks import as_square, check_same_shape, nan_like, promoted
from lightning_sym.functional.alignment import RELATION_PAIRS

Halves = Tensor | tuple[Tensor, Tensor]


def split_alignment(a_halves: Halves, b_halves: Halves) -> Tensor:
    r"""Alignment of two matrices, each known from two halves of the samples, free of the bias of few.

    .. math:: \hat\alpha = \frac{\tfrac12 (\langle A_1, B_2\rangle + \langle A_2, B_1\rangle)}
              {\sqrt{\langle A_1, A_2\rangle \langle B_1, B_2\rangle}}

    with every matrix less the scalar mean of its entries, as in
    :func:`~lightning_sym.functional.matrix_alignment`, which it converges to. A matrix without sampling
    noise (a weight's ``W^T W``) is given alone and stands for both of its halves.

    Numerator and squared denominator are unbiased; their ratio is so up to a relative
    :math:`O(1/n)`. Measured at D = 64 on two independent streams of one covariance (truth 1): mean 1.00
    to 1.01 at n = 64, with a standard deviation of .05 a reading, which falls as 1/n: .02 at n = 128.

    Args:
        a_halves: the matrix from the first and from the second half of the samples, ``[D, D]`` each, as a
            tuple; or one exact matrix.
        b_halves: the same of the other matrix. Where both are of the same samples, halves correspond.

    Returns:
        Scalar ``[]``. Noise carries it out of [-1, 1] at times: it is not clamped, which would bring a
        bias back. NaN where the halves of one side do not agree (:math:`\langle A_1, A_2\rangle \le 0`:
        noise alone, more samples are needed), where a matrix is constant or not finite.

    Raises:
        TypeError: if a matrix is not a real floating-point tensor, or a side neither one nor two.
        ValueError: if a matrix is not square or shapes differ.

    Example:
        >>> a, z = torch.diag(torch.tensor([2.0, 1.0, 0.0])), torch.diag(torch.tensor([4.0, 2.0, 0.0]))
        >>> round(float(split_alignment((a, a), z)), 5)
        1.0
    """
    levels, _ = _relations({"a_halves": a_halves, "b_halves": b_halves}, pairs={"": ("a_halves", "b_halves")})
    return levels[""]


def split_expected_alignment(a_halves: Halves, b_halves: Halves) -> Tensor:
    r"""Mean of :func:`split_alignment` over random rotations of the second matrix, in closed form.

    One uniform rotation :math:`Q` turns both halves of B. With
    :math:`E[Q B Q^\top] = (\operatorname{tr} B / D) I`,

    .. math:: E_Q[\hat\alpha] \approx \frac{\tfrac1{2D} \bigl(\operatorname{tr} B_2\,
        (\operatorname{tr} A_1 - D \bar A_1) + \operatorname{tr} B_1\,
        (\operatorname{tr} A_2 - D \bar A_2)\bigr)}
        {\sqrt{\langle A_1, A_2\rangle_c\,
        (\langle B_1, B_2\rangle - \operatorname{tr} B_1 \operatorname{tr} B_2 / D^2)}}

    where c marks centred entries. As in :func:`~lightning_sym.functional.expected_alignment`, which it
    equals for exact matrices, the mean of the rotated matrix's own norm is taken for the norm: a relative
    error of :math:`O(1/D)`.

    Args:
        a_halves: see :func:`split_alignment`.
        b_halves: see :func:`split_alignment`.

    Returns:
        Scalar ``[]``, not clamped; NaN where :func:`split_alignment` is.

    Raises:
        TypeError: if a matrix is not a real floating-point tensor, or a side neither one nor two.
        ValueError: if a matrix is not square or shapes differ.

    Example:
        >>> round(float(split_expected_alignment((torch.eye(3), torch.eye(3)), 2 * torch.eye(3))), 5)
        1.0
    """
    _, chance = _relations({"a_halves": a_halves, "b_halves": b_halves}, pairs={"": ("a_halves", "b_halves")})
    return chance[""]


def split_side_alignments(
    matrices: Mapping[str, Halves],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The relations of one side from halves of the samples, and their null levels; each product once.

    Args:
        matrices: ``h``, ``g`` and ``z`` of :func:`~lightning_sym.functional.crh_relations`, as far as they
            are known: a tuple of two halves ``[D, D]`` each, or one exact matrix (``z``).

    Returns:
        By relation (``rga``, ``rwa``, ``gwa``; those whose two matrices are given):
        :func:`split_alignment` and :func:`split_expected_alignment`.

    Raises:
        TypeError: if a matrix is not a real floating-point tensor, or one is neither one nor two.
        ValueError: if a matrix is not square, shapes differ or a name is another one.

    Example:
        >>> levels, chance = split_side_alignments({"h": (torch.eye(2), torch.eye(2)), "z": torch.eye(2)})
        >>> {name: round(float(level), 5) for name, level in levels.items()}
        {'rwa': 1.0}
    """
    if unknown := matrices.keys() - {"h", "g", "z"}:
        raise ValueError(f"matrices must be called h, g and z, got {sorted(unknown)}")
    pairs = {name: pair for name, pair in RELATION_PAIRS.items() if set(pair) <= matrices.keys()}
    return _relations(matrices, pairs=pairs)


def split_participation_ratio(first: Tensor, second: Tensor) -> Tensor:
    r"""Participation ratio of a covariance known from two halves of the samples, free of their bias.

    .. math:: \frac{\operatorname{tr} C_1 \operatorname{tr} C_2}{\langle C_1, C_2\rangle}

    Both are unbiased, of :math:`(\operatorname{tr} C)^2` and :math:`\lVert C\rVert_F^2`. From n samples at
    once, :func:`~lightning_sym.functional.participation_ratio_from_covariance` of 64 independent features
    of equal variance reads about ``64 n / (n + 64)``: 32 at n = 64.

    Args:
        first: covariance of the first half of the samples, ``[D, D]``, any scale.
        second: that of the other half.

    Returns:
        Scalar ``[]``, in ``[1, D]`` but for noise; it is not clamped. 0 if both are zero; NaN where the
        halves do not agree (:math:`\langle C_1, C_2\rangle \le 0`) or one is not finite.

    Raises:
        TypeError: if a covariance is not a real floating-point tensor.
        ValueError: if a covariance is not square or their shapes differ.

    Example:
        >>> c = torch.diag(torch.tensor([2.0, 1.0, 1.0]))
        >>> split_participation_ratio(c, 3 * c)
        tensor(2.6667)
    """
    c_DD, d_DD = promoted(as_square(first, name="first"), as_square(second, name="second"))
    check_same_shape(c_DD, d_DD, names="first and second")
    size_c, size_d = _size(c_DD), _size(d_DD)
    if not (size_c.isfinite() and size_d.isfinite()):
        return nan_like(c_DD)
    if size_c == 0 and size_d == 0:
        return torch.zeros_like(size_c)
    if not (_safe(size_c) and _safe(size_d)):
        c_DD, d_DD = c_DD / size_c, d_DD / size_d
    shared = torch.dot(c_DD.flatten(), d_DD.flatten())
    traces = c_DD.diagonal().sum() * d_DD.diagonal().sum()
    return torch.where(shared > 0, traces / torch.where(shared > 0, shared, 1.0), torch.nan)


def _size(matrix: Tensor) -> Tensor:
    """Return the largest absolute entry; NaN where one is."""
    least, most = matrix.detach().aminmax()
    return torch.maximum(-least, most)


def _safe(size: Tensor) -> bool:
    """Return whether sums of products of such entries neither over- nor underflow."""
    limit = torch.finfo(size.dtype).max ** 0.25
    return bool((size > 1 / limit) & (size < limit))


def _relations(
    matrices: Mapping[str, Halves], *, pairs: Mapping[str, tuple[str, str]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return level and null level of each pair, from one table of inner products.

    Raises:
        TypeError: if a side is neither one matrix nor two.
    """
    rows: dict[str, tuple[int, int]] = {}
    parts: list[Tensor] = []
    for name, side in matrices.items():
        halves = (side,) if isinstance(side, Tensor) else side
        if not isinstance(halves, tuple | list) or not 1 <= len(halves) <= 2:
            raise TypeError(f"{name} must be one matrix or a tuple of two, got {type(side).__name__}")
        rows[name] = (len(parts), len(parts) + len(halves) - 1)
        parts += [as_square(half, name=name) for half in halves]
        check_same_shape(parts[0], parts[-1], names=f"{next(iter(matrices))} and {name}")
        check_same_shape(parts[0], parts[-len(halves)], names=f"{next(iter(matrices))} and {name}")
    if not pairs:
        return {}, {}
    features = len(parts[0])
    parts = list(promoted(*parts))
    features = len(parts[0])
    table, means = _centred_products(parts, list(rows.values()))
    traces = torch.stack([part.diagonal().sum() for part in parts])
    spreads = traces - features * means  # traces once centred
    firsts_R, seconds_R = _places(tuple(rows[a] for a, _ in pairs.values()))
    others_R, last_R = _places(tuple(rows[b] for _, b in pairs.values()))
    a_R, b_R = table[firsts_R, seconds_R], table[others_R, last_R]
    across_R = (table[firsts_R, last_R] + table[seconds_R, others_R]) / 2
    levels_R = _ratio(across_R, a_R, b_R)
    # <B1, B2> with its mean, less what a rotated B has of a mean.
    turned_R = (
        b_R + features**2 * means[others_R] * means[last_R] - traces[others_R] * traces[last_R] / features**2
    )
    chance_R = (traces[last_R] * spreads[firsts_R] + traces[others_R] * spreads[seconds_R]) / (2 * features)
    chance_R = torch.where(levels_R.isfinite(), _ratio(chance_R, a_R, turned_R), torch.nan)
    return dict(zip(pairs, levels_R, strict=True)), dict(zip(pairs, chance_R, strict=True))


@lru_cache(maxsize=16)
def _places(of: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
    """Return the places of first and of second halves as indices."""
    first_R, second_R = torch.tensor(of).T
    return first_R, second_R


@lru_cache(maxsize=16)
def _pair_numbers(count: int) -> Tensor:
    """Return the number of each pair among those of ``combinations_with_replacement``, ``[M, M]``."""
    numbers = torch.zeros(count, count, dtype=torch.long)
    for number, (one, other) in enumerate(combinations_with_replacement(range(count), 2)):
        numbers[one, other] = numbers[other, one] = number
    return numbers


def _table(parts: list[Tensor]) -> Tensor:
    """Return the inner products of all matrices, ``[M, M]``."""
    flat = [part.flatten() for part in parts]
    products = [torch.dot(one, other) for one, other in combinations_with_replacement(flat, 2)]
    return torch.stack(products)[_pair_numbers(len(parts))]


def _centred_products(parts: list[Tensor], halves: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Return inner products ``[M, M]`` of matrices less the means of their entries, and these means ``[M]``.

    NaN of what is constant, and of all where something is not finite. Matrices may be scaled in place of the
    list: both halves of a side alike, which no ratio sees.
    """
    entries = parts[0].numel()
    table = _table(parts)
    means = torch.stack([part.sum() for part in parts]) / entries
    # <A - a, B - b> = <A, B> - n a b costs no pass of its own, but loses digits where the mean is nearly all.
    squares, limit = table.detach().diagonal(), torch.finfo(table.dtype).max ** 0.5
    plain = (squares < limit) & (squares > 1 / limit) & (entries * means.detach() ** 2 < (1 - 1e-6) * squares)
    if table.dtype == torch.float64 and bool(plain.all()):
        return table - entries * torch.outer(means, means), means
    sizes = [_size(part) for part in parts]
    for first, second in halves:  # one scale for both halves: squares neither over- nor underflow
        larger = torch.maximum(sizes[first], sizes[second])
        sizes[first] = sizes[second] = torch.where(larger > 0, larger, 1.0)
    parts[:] = [part / size for part, size in zip(parts, sizes, strict=True)]
    means = torch.stack([part.mean() for part in parts])
    deviations = [part - mean for part, mean in zip(parts, means, strict=True)]
    # What the mean leaves of a constant matrix is rounding of the mean; NaN and Inf are NaN by now.
    norms = torch.stack([torch.linalg.vector_norm(part.detach()) for part in deviations])
    constant = norms <= torch.finfo(table.dtype).eps * entries**0.5 * means.detach().abs()
    known = torch.where(constant, torch.nan, 1.0)
    return _table(deviations) * torch.outer(known, known), means


def _ratio(across: Tensor, within_a: Tensor, within_b: Tensor) -> Tensor:
    known = (within_a > 0) & (within_b > 0)
    size = torch.where(known, within_a, 1.0).sqrt() * torch.where(known, within_b, 1.0).sqrt()
    return torch.where(known, across / size, torch.nan)
