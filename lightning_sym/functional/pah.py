"""Powers of one another: the polynomial alignment hypothesis (PAH).

Where the canonical representation hypothesis (:mod:`~lightning_sym.functional.alignment`) says that the
matrices H, G and Z of one side of a layer become proportional, the PAH says that they become powers of each
other: Ziyin, Chuang, Galanti & Poggio, *Formation of representations in neural networks* (arXiv 2410.03006).

Shape letters: D features, R eigenvectors known, K directions used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sym.functional._checks import (
    as_square,
    check_number,
    check_rtol,
    check_same_shape,
    nan_like,
    promoted,
)
from lightning_sym.functional.eigen import low_rank_eigh
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
#: Rows from which a matrix is decomposed in float32, where ``rtol`` allows it.
_NARROW_FROM = 128
_RELATIONS = {"rga": ("h", "g"), "rwa": ("h", "z"), "gwa": ("g", "z")}


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
    return _fit(a_DD, *torch.linalg.eigh(z_DD), rtol=rtol, confidence=confidence)


def _fit(a_DD: Tensor, z_R: Tensor, v_DR: Tensor, *, rtol: float, confidence: float) -> PAHExponent:
    """Return the fit in the eigenvectors of the reference; R of them may differ from 0."""
    v_DR, rows = v_DR.to(a_DD), len(a_DD)
    used_R = z_R > z_R[-1] * max(rtol, torch.finfo(z_R.dtype).eps * rows)
    used_R &= z_R[-1] > 0
    z_K, v_DK = z_R[used_R], v_DR[:, used_R]
    turned_DK = a_DD @ v_DK
    a_K = (v_DK * turned_DK).sum(dim=0)
    # Of a value that is rounding of larger ones only the size is known, not the logarithm.
    floor = a_DD.norm() * torch.finfo(a_DD.dtype).eps * rows
    fit = power_law(z_K, torch.where(a_K > floor, a_K, 0.0), confidence=confidence)
    whole = turned_DK.norm()
    off = (turned_DK - v_DK * a_K).norm() / torch.where(whole > 0, whole, 1.0)
    off = torch.where(whole > floor, off, nan_like(off))
    decades = (z_K[-1] / z_K[0]).log10() if len(z_K) else nan_like(z_R)
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
    return side_exponents({"h": h, "g": g, "z": z}, rtol=rtol, confidence=confidence)


def side_exponents(
    matrices: Mapping[str, Tensor],
    *,
    ranks: Mapping[str, int] | None = None,
    rtol: float = 1e-3,
    confidence: float = 0.95,
) -> dict[str, PAHExponent]:
    """The PAH exponents of one side, as far as its matrices are known; each is decomposed once.

    Args:
        matrices: ``h``, ``g`` and ``z`` of :func:`pah_exponents`, or some of them.
        ranks: what the rank of a matrix is known not to exceed, by its name (its number of samples): of a low
            one the decomposition is cheaper (:func:`~lightning_sym.functional.eigen.low_rank_eigh`).
        rtol: see :func:`pah_exponent`.
        confidence: coverage of the intervals, in ``(0, 1)``.

    Returns:
        :func:`pah_exponent` under ``"rga"``, ``"rwa"`` and ``"gwa"``, where both matrices are given; from 128
        features on, and with an ``rtol`` of 1e-3 or more, to four decimals (solved in float32).

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if a matrix is not square, shapes differ, or a name or number is another one than these.

    Example:
        >>> z = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
        >>> {key: round(float(fit.exponent), 3) for key, fit in side_exponents({"h": z @ z, "z": z}).items()}
        {'rwa': 2.0}
    """
    if unknown := matrices.keys() - {"h", "g", "z"}:
        raise ValueError(f"matrices must be called h, g and z, got {sorted(unknown)}")
    check_rtol(rtol)
    squares = {name: as_square(matrix, name=name) for name, matrix in matrices.items()}
    for name, matrix in squares.items():
        check_same_shape(next(iter(squares.values())), matrix, names=f"{next(iter(squares))} and {name}")
    squares = dict(zip(squares, promoted(*squares.values()), strict=True))
    solved: dict[str, tuple[Tensor, Tensor]] = {}
    found = {}
    for relation, (a, reference) in _RELATIONS.items():
        if a not in squares or reference not in squares:
            continue
        a_DD, z_DD = squares[a], squares[reference]
        if not (a_DD.sum().isfinite() and z_DD.sum().isfinite()):
            found[relation] = pah_exponent(a_DD, z_DD, rtol=rtol, confidence=confidence)
            continue
        if reference not in solved:
            solved[reference] = _eigenpairs(z_DD, rank=(ranks or {}).get(reference), rtol=rtol)
        found[relation] = _fit(a_DD, *solved[reference], rtol=rtol, confidence=confidence)
    return found


def _eigenpairs(z_DD: Tensor, *, rank: int | None, rtol: float) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors, from float32 where that is enough.

    Of 128 to 512 directions over 2 to 5 decades, fits with ``rtol=1e-3`` agree to four decimals.
    """
    rows = len(z_DD)
    size = torch.linalg.vector_norm(z_DD)
    reduced = rank is not None and 4 * rank <= rows
    if z_DD.dtype != torch.float64 or rtol < 1e-3 or rows < _NARROW_FROM or reduced or not size > 0:
        return low_rank_eigh(z_DD, rank=rank)
    values_D, vectors_DD = torch.linalg.eigh((z_DD / size).float())
    return values_D.to(z_DD) * size, vectors_DD


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
