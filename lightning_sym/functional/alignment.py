"""Alignment of representations, gradients and weights: the canonical representation hypothesis.

For a linear map ``h_b = W h_a`` and per-sample loss gradients ``g_b`` and ``g_a = W^T g_b``, the
canonical representation hypothesis (CRH) says that on either side the three matrices

* ``H = E[h h^T]`` of the representation,
* ``G = E[g g^T]`` of the gradient,
* ``Z``, the weight's ``W^T W`` on the input side a and ``W W^T`` on the output side b

become proportional (Ziyin, Chuang, Galanti & Poggio, *Formation of representations in neural
networks*, arXiv 2410.03006). That they become powers of each other is
:mod:`~lightning_sym.functional.pah`.

Everything here takes the matrices, which is what is left when samples were reduced to sums;
:func:`second_moment` makes them from samples.

Shape letters: N samples, D features.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_sym.functional._checks import (
    as_filled,
    as_matrix,
    as_square,
    check_count,
    check_same_dtype,
    check_same_shape,
    nan_like,
    promoted,
)

#: The two matrices of each relation of a side: the representation's h, the gradient's g, the weight's z.
RELATION_PAIRS: dict[str, tuple[str, str]] = {"rga": ("h", "g"), "rwa": ("h", "z"), "gwa": ("g", "z")}


class Relations(NamedTuple):
    """The three relations of one side of a layer, each a correlation in ``[-1, 1]``.

    Attributes:
        rga: representation and gradient, ``H ~ G``.
        rwa: representation and weight, ``H ~ Z``.
        gwa: gradient and weight, ``G ~ Z``.
    """

    rga: Tensor
    rwa: Tensor
    gwa: Tensor


class AlignmentNull(NamedTuple):
    """What chance gives.

    Attributes:
        mean: mean alignment over the draws.
        std: standard deviation over the draws; NaN for a single one.
    """

    mean: Tensor
    std: Tensor


def second_moment(samples: Tensor, *, moments: Literal["normalized", "raw"] = "normalized") -> Tensor:
    r"""Second moments of samples, in the two forms that alignment is measured in.

    ``"raw"`` is :math:`E[x x^\top]`, the one the theory speaks of. ``"normalized"`` is the covariance of
    :math:`x / \lVert x \rVert`, which the seed's experiments use against outliers.

    Args:
        samples: float tensor ``[N, D]``; half types are computed in float32.
        moments: which form. A zero sample has no direction and stays zero.

    Returns:
        ``[D, D]``, symmetric.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if ``samples`` is not a non-empty matrix or ``moments`` is neither of the two.

    Example:
        >>> second_moment(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), moments="raw")
        tensor([[2., 0.],
                [0., 8.]])
    """
    x_ND = as_matrix(samples, name="samples")
    if moments not in ("normalized", "raw"):
        raise ValueError(f"moments must be 'normalized' or 'raw', got {moments!r}")
    if moments == "normalized":
        norm_N = torch.linalg.vector_norm(x_ND, dim=1, keepdim=True)
        x_ND = x_ND / torch.where(norm_N == 0, torch.ones_like(norm_N), norm_N)
        x_ND = x_ND - x_ND.mean(dim=0)
    return x_ND.mT @ x_ND / x_ND.shape[0]


def matrix_alignment(a: Tensor, b: Tensor) -> Tensor:
    r"""Alignment of two matrices: Pearson's correlation over their entries.

    .. math:: \alpha(A, B) = \frac{\sum_{ij} (A_{ij} - \bar A)(B_{ij} - \bar B)}
              {\lVert A - \bar A \rVert_F \lVert B - \bar B \rVert_F}

    with the scalar means :math:`\bar A, \bar B` over all entries. The largest eigenvectors and the
    diagonal dominate it: two unrelated covariances align as well, see :func:`alignment_null`.

    Args:
        a: float tensor of any shape, usually ``[D, D]``; half types are computed in float32.
        b: float tensor of the same shape.

    Returns:
        Scalar ``[]`` in ``[-1, 1]``; NaN where a matrix is constant (there is no correlation with it) or
        not finite.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if the shapes differ or are empty.

    Example:
        >>> matrix_alignment(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.eye(2))
        tensor(1.)
    """
    a, b = promoted(as_filled(a, name="a"), as_filled(b, name="b"))
    check_same_shape(a, b, names="a and b")
    a, b = _unit_deviation(a), _unit_deviation(b)
    return (a * b).sum().clamp(-1, 1)


def crh_relations(h: Tensor, g: Tensor, z: Tensor) -> Relations:
    """The three relations of the CRH on one side of a layer.

    Args:
        h: second moment of the representation, ``[D, D]``.
        g: second moment of the gradient, ``[D, D]``.
        z: ``W^T W`` on the input side, ``W W^T`` on the output side, ``[D, D]``.

    Returns:
        :class:`Relations`, each a :func:`matrix_alignment`.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if the shapes differ.

    Example:
        >>> crh_relations(torch.eye(2), 2 * torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        Relations(rga=tensor(1.), rwa=tensor(-1.), gwa=tensor(-1.))
    """
    h, g, z = (as_filled(matrix, name=name) for name, matrix in (("h", h), ("g", g), ("z", z)))
    check_same_shape(h, g, names="h and g")
    check_same_shape(h, z, names="h and z")
    return Relations(matrix_alignment(h, g), matrix_alignment(h, z), matrix_alignment(g, z))


def alignment_null(a: Tensor, b: Tensor, *, seed: int = 0, draws: int = 8) -> AlignmentNull:
    r"""Alignment that chance gives: :func:`matrix_alignment` of ``a`` and a randomly rotated ``b``.

    With :math:`Q` uniform over the orthogonal group, :math:`Q B Q^\top` keeps the spectrum of B and
    forgets its eigenvectors. The level is above zero, since both diagonals are positive.

    Args:
        a: symmetric float tensor ``[D, D]``; half types are computed in float32.
        b: symmetric float tensor ``[D, D]``.
        seed: of the rotations; the global random state is neither used nor changed.
        draws: number of rotations. Each costs a QR decomposition of ``[D, D]``.

    Returns:
        :class:`AlignmentNull`; NaN where the alignment itself is.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if ``a`` or ``b`` is not square, their shapes differ or ``draws`` is below 1.

    Example:
        >>> alignment_null(torch.eye(3), torch.eye(3), draws=2).mean
        tensor(1.)
    """
    a_DD, b_DD = promoted(as_square(a, name="a"), as_square(b, name="b"))
    check_same_shape(a_DD, b_DD, names="a and b")
    check_count("draws", draws)
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for _ in range(draws):
        q_DD = random_rotation(a_DD.shape[0], generator=generator).to(b_DD)
        levels.append(matrix_alignment(a_DD, q_DD @ b_DD @ q_DD.mT))
    level = torch.stack(levels)
    return AlignmentNull(level.mean(), level.std() if draws > 1 else nan_like(level))


def expected_alignment(a: Tensor, b: Tensor) -> Tensor:
    r"""Mean of :func:`alignment_null` over all rotations, in closed form and at the cost of one pass.

    For :math:`Q` uniform over the orthogonal group
    :math:`E[Q B Q^\top] = (\operatorname{tr} B / D) I`, so that

    .. math:: E_Q[\alpha(A, Q B Q^\top)] \approx \frac{(\operatorname{tr} B / D)\,
        (\operatorname{tr} A - D \bar A)}{\lVert A - \bar A \rVert_F
        \sqrt{\lVert B \rVert_F^2 - (\operatorname{tr} B)^2 / D^2}}.

    The one approximation is to take the mean of the rotated matrix's own norm, which fluctuates by
    a relative :math:`O(1/D)`.

    Args:
        a: symmetric float tensor ``[D, D]``; half types are computed in float32.
        b: symmetric float tensor ``[D, D]``.

    Returns:
        Scalar ``[]`` in ``[-1, 1]``; NaN where a matrix is constant or not finite.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if ``a`` or ``b`` is not square or their shapes differ.

    Example:
        >>> round(float(expected_alignment(torch.eye(3), 2 * torch.eye(3))), 5)
        1.0
    """
    a_DD, b_DD = promoted(as_square(a, name="a"), as_square(b, name="b"))
    check_same_shape(a_DD, b_DD, names="a and b")
    return _expected(_unit_deviation(a_DD), b_DD)


def _expected(deviation_DD: Tensor, b_DD: Tensor) -> Tensor:
    """Return the mean correlation of a unit deviation with rotations of a matrix."""
    size = b_DD.detach().norm()
    trace = b_DD.diagonal().sum() / torch.where(size > 0, size, torch.ones_like(size))
    spread = 1 - (trace / len(b_DD)).square()
    level = trace / len(b_DD) * deviation_DD.diagonal().sum() / spread.clamp_min(0).sqrt()
    known = (spread > 0) & (size > 0) & size.isfinite()
    return torch.where(known, level.clamp(-1, 1), torch.nan)


def side_alignments(matrices: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The relations of one side and their null levels, each matrix being passed over once.

    Args:
        matrices: ``h``, ``g`` and ``z`` of :func:`crh_relations`, as far as they are known, ``[D, D]``.

    Returns:
        By relation (``rga``, ``rwa``, ``gwa``; those whose two matrices are given):
        :func:`matrix_alignment` and :func:`expected_alignment`.

    Raises:
        TypeError: if a matrix is not a real floating-point tensor, or they differ in precision.
        ValueError: if one is not square, shapes differ or a name is another one.

    Example:
        >>> side_alignments({"h": torch.eye(2), "z": torch.eye(2)})
        ({'rwa': tensor(1.)}, {'rwa': tensor(1.)})
    """
    if unknown := matrices.keys() - {"h", "g", "z"}:
        raise ValueError(f"matrices must be called h, g and z, got {sorted(unknown)}")
    matrices = {name: as_square(matrix, name=name) for name, matrix in matrices.items()}
    check_same_dtype(matrices)
    for name, matrix in matrices.items():
        first = next(iter(matrices))
        check_same_shape(matrices[first], matrix, names=f"{first} and {name}")
    deviation = {name: _unit_deviation(matrix) for name, matrix in matrices.items()}
    pairs = {name: pair for name, pair in RELATION_PAIRS.items() if set(pair) <= deviation.keys()}
    levels = {
        name: torch.dot(deviation[a].flatten(), deviation[b].flatten()).clamp(-1, 1)
        for name, (a, b) in pairs.items()
    }
    return levels, {name: _expected(deviation[a], matrices[b]) for name, (a, b) in pairs.items()}


def random_rotation(size: int, *, generator: torch.Generator) -> Tensor:
    """Draw from the uniform (Haar) distribution over orthogonal matrices (Mezzadri, 2007).

    Args:
        size: D.
        generator: source of randomness, on the CPU.

    Returns:
        ``[D, D]``, orthogonal, float64.

    Raises:
        ValueError: if ``size`` is not at least 1.
    """
    check_count("size", size)
    q_DD, r_DD = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    diagonal_D = r_DD.diagonal()
    return q_DD * torch.where(diagonal_D < 0, -1.0, 1.0).to(q_DD)


def _unit_deviation(a: Tensor) -> Tensor:
    """Return the entries less their mean, of unit norm; NaN if what the mean leaves is rounding."""
    size = a.detach().abs().max()
    a = a / torch.where(size > 0, size, torch.ones_like(size))  # so that no square over- or underflows
    deviation = a - a.mean()
    norm = torch.linalg.vector_norm(deviation)
    rounding = torch.finfo(a.dtype).eps * a.numel() ** 0.5
    # Infinite or NaN entries have made the deviation NaN by now.
    return torch.where(norm <= rounding, torch.nan, deviation / torch.where(norm == 0, 1.0, norm))
