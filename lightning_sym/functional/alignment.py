"""Alignment of representations, gradients and weights: the canonical representation hypothesis.

For a linear map ``h_b = W h_a`` and per-sample loss gradients ``g_b`` and ``g_a = W^T g_b``, the
canonical representation hypothesis (CRH) says that on either side the three matrices

* ``H = E[h h^T]`` of the representation,
* ``G = E[g g^T]`` of the gradient,
* ``Z``, the weight's ``W^T W`` on the input side a and ``W W^T`` on the output side b

become proportional. The polynomial alignment hypothesis (PAH) says that they become powers of each
other. Both are from Ziyin, Chuang, Galanti & Poggio, *Formation of representations in neural
networks* (arXiv 2410.03006).

Everything here takes the matrices, which is what is left when samples were reduced to sums;
:func:`second_moment` makes them from samples.

Shape letters: N samples, D features, K directions used.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_sym.functional._checks import (
    as_filled,
    as_matrix,
    as_square,
    check_count,
    check_number,
    check_rtol,
    check_same_dtype,
    check_same_shape,
    nan_like,
    promoted,
)
from lightning_sym.functional.power_law import power_law

#: Exponents (H_a, H_b, G_b, G_a) of the eigenvalues of Z, by the relation that holds on the output
#: side b and the one on the input side a. ``H_b = W H_a W^T`` and ``G_a = W^T G_b W`` hold in each.
PAH_PHASES: dict[str, tuple[int, int, int, int]] = {
    "rga+rwa": (1, 2, 2, 3),
    "rga+gwa": (-1, 0, 0, 1),
    "rwa+rga": (0, 1, -1, 0),
    "rwa+gwa": (0, 1, 0, 1),
    "gwa+rga": (2, 3, 1, 2),
    "gwa+rwa": (1, 2, 1, 2),
}

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


class PAHExponent(NamedTuple):
    """One matrix as a power of another.

    Attributes:
        exponent: slope of the matrix's log values over the reference's log eigenvalues.
        low, high: its confidence interval, see :class:`~lightning_sym.functional.PowerLaw`.
        r2: of the straight line, in ``[0, 1]``; low by construction for an exponent close to 0.
        residual: root mean square distance from the line, in natural logarithms.
        count: directions used.
        off_diagonal: how much of the matrix, on those directions, the reference's eigenvectors do
            not diagonalise, in ``[0, 1]``; NaN where it is zero there. The exponent means nothing if
            this is large.
        decades: ``log10`` of the ratio of the largest and smallest reference eigenvalue used. An
            exponent means nothing where the reference has a flat spectrum.
    """

    exponent: Tensor
    low: Tensor
    high: Tensor
    r2: Tensor
    residual: Tensor
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks a fit for
    off_diagonal: Tensor
    decades: Tensor


class PAHPhase(NamedTuple):
    """A cell of the PAH table.

    Attributes:
        name: ``<relation on b>+<relation on a>``, ``"canonical"`` or ``"none"``.
        distance: root mean square difference of the exponents from the table's.
    """

    name: str
    distance: float


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


def pah_exponent(
    matrix: Tensor, reference: Tensor, *, rtol: float = 1e-3, confidence: float = 0.95
) -> PAHExponent:
    r"""Exponent of one matrix as a power of another: the slope of PAH.

    With the eigenvalues and eigenvectors :math:`(z_i, v_i)` of the reference, a line is fitted
    through :math:`(\log z_i, \log v_i^\top A v_i)` for the directions with
    :math:`z_i > \mathrm{rtol} \cdot z_{\max}`.

    The off-diagonal fraction is that of :math:`v_i^\top A v_j` with i over the directions used and j
    over all. Within an eigenspace of several dimensions the eigenvectors are arbitrary, and
    the fraction with them.

    Args:
        matrix: symmetric positive semi-definite float tensor ``[D, D]``, A; raw second moments, since
            normalised ones do not obey ``H_b = W H_a W^T``.
        reference: symmetric positive semi-definite float tensor ``[D, D]``, often ``Z``.
        rtol: directions of smaller reference eigenvalues, relative to the largest, are left out;
            in ``[0, 1)``.
        confidence: coverage of the interval, in ``(0, 1)``.

    Returns:
        :class:`PAHExponent`; all NaN with ``count`` 0 for non-finite input, NaN exponents for fewer
        than two directions.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if a matrix is not square, shapes differ or a number is out of range.

    Example:
        >>> z = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
        >>> fit = pah_exponent(z @ z @ z, z)
        >>> fit.exponent, fit.off_diagonal, fit.count
        (tensor(3.), tensor(0.), 3)
    """
    a_DD, z_DD = promoted(as_square(matrix, name="matrix"), as_square(reference, name="reference"))
    check_same_shape(a_DD, z_DD, names="matrix and reference")
    check_rtol(rtol)
    if not (a_DD.isfinite().all() and z_DD.isfinite().all()):
        power_law(a_DD.new_empty(0), a_DD.new_empty(0), confidence=confidence)  # checks its argument
        nan = nan_like(a_DD)
        return PAHExponent(nan, nan, nan, nan, nan, 0, nan, nan)
    z_D, v_DD = torch.linalg.eigh(z_DD)
    v_DD = v_DD.to(a_DD)
    used_D = z_D > z_D[-1] * max(rtol, torch.finfo(z_D.dtype).eps * len(z_D))
    used_D &= z_D[-1] > 0
    z_K, v_DK = z_D[used_D], v_DD[:, used_D]
    turned_DK = a_DD @ v_DK
    a_K = (v_DK * turned_DK).sum(dim=0)
    # Of a value that is rounding of larger ones only the size is known, not the logarithm.
    floor = a_DD.norm() * torch.finfo(a_DD.dtype).eps * len(z_D)
    fit = power_law(z_K, torch.where(a_K > floor, a_K, 0.0), confidence=confidence)
    whole = turned_DK.norm()
    off = (turned_DK - v_DK * a_K).norm() / torch.where(whole > 0, whole, 1.0)
    off = torch.where(whole > floor, off, nan_like(off))
    decades = (z_K[-1] / z_K[0]).log10() if len(z_K) else nan_like(z_D)
    return PAHExponent(fit.exponent, fit.low, fit.high, fit.r2, fit.residual, fit.count, off, decades.to(off))


def pah_exponents(
    h: Tensor, g: Tensor, z: Tensor, *, rtol: float = 1e-3, confidence: float = 0.95
) -> dict[str, PAHExponent]:
    """The three PAH exponents of one side of a layer.

    Args:
        h: raw second moment of the representation, ``[D, D]``.
        g: raw second moment of the gradient, ``[D, D]``.
        z: ``W^T W`` on the input side, ``W W^T`` on the output side, ``[D, D]``.
        rtol: see :func:`pah_exponent`.
        confidence: coverage of the intervals, in ``(0, 1)``.

    Returns:
        Under ``"rwa"`` H as a power of Z, under ``"gwa"`` G as a power of Z and under ``"rga"`` H as a
        power of G.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if a matrix is not square, shapes differ or a number is out of range.

    Example:
        >>> z = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
        >>> {key: round(float(fit.exponent), 3) for key, fit in pah_exponents(z @ z, z, z).items()}
        {'rga': 2.0, 'rwa': 2.0, 'gwa': 1.0}
    """
    h, g, z = (as_square(matrix, name=name) for name, matrix in (("h", h), ("g", g), ("z", z)))
    check_same_shape(h, g, names="h and g")
    check_same_shape(h, z, names="h and z")
    return {
        "rga": pah_exponent(h, g, rtol=rtol, confidence=confidence),
        "rwa": pah_exponent(h, z, rtol=rtol, confidence=confidence),
        "gwa": pah_exponent(g, z, rtol=rtol, confidence=confidence),
    }


def pah_phase(
    *, h_a: float, h_b: float, g_b: float, g_a: float, decades: float | None = None, flat: float = 0.3
) -> PAHPhase:
    """The cell of the PAH table that a layer's four exponents of Z are nearest to.

    Args:
        h_a: exponent of the representation on the input side.
        h_b: exponent of the representation on the output side.
        g_b: exponent of the gradient on the output side.
        g_a: exponent of the gradient on the input side.
        decades: spread of the eigenvalues of Z, see :class:`PAHExponent`. Where one relation holds on
            both sides, Z is a projection (the CRH itself); exponents have no meaning then.
        flat: spectra of at most so many decades are the canonical phase.

    Returns:
        :class:`PAHPhase`; ``"canonical"`` with distance 0 for a flat spectrum; ``"none"`` with a NaN
        distance where an exponent, or ``decades``, is not finite.

    Raises:
        TypeError: if an exponent is not a real number.
        ValueError: if ``flat`` is negative or not finite.

    Example:
        >>> pah_phase(h_a=0.1, h_b=1.1, g_b=0.1, g_a=1.1)
        PAHPhase(name='rwa+gwa', distance=0.1...)
    """
    check_number("flat", flat, least=0)
    exponents = {"h_a": h_a, "h_b": h_b, "g_b": g_b, "g_a": g_a, "decades": decades or 0.0}
    for name, value in exponents.items():
        if isinstance(value, complex) or (isinstance(value, Tensor) and value.is_complex()):
            raise TypeError(f"{name} must be a real number, got {value}")
    if decades is not None and -math.inf < float(decades) <= flat:
        return PAHPhase("canonical", 0.0)
    found = torch.tensor([float(h_a), float(h_b), float(g_b), float(g_a)], dtype=torch.float64)
    if not found.isfinite().all() or not math.isfinite(exponents["decades"]):
        return PAHPhase("none", float("nan"))
    distances = {
        name: float((found - torch.tensor(row, dtype=torch.float64)).square().mean().sqrt())
        for name, row in PAH_PHASES.items()
    }
    name = min(distances, key=distances.__getitem__)
    return PAHPhase(name, distances[name])


def _unit_deviation(a: Tensor) -> Tensor:
    """Return the entries less their mean, of unit norm; NaN if what the mean leaves is rounding."""
    size = a.detach().abs().max()
    a = a / torch.where(size > 0, size, torch.ones_like(size))  # so that no square over- or underflows
    deviation = a - a.mean()
    norm = torch.linalg.vector_norm(deviation)
    rounding = torch.finfo(a.dtype).eps * a.numel() ** 0.5
    # Infinite or NaN entries have made the deviation NaN by now.
    return torch.where(norm <= rounding, torch.nan, deviation / torch.where(norm == 0, 1.0, norm))
