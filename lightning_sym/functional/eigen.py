"""Eigenproblems of many symmetric matrices at once; one that is not finite gives NaN, never an error.

Where one call for all matrices of a shape is faster than one call each depends on the device. On a CPU,
LAPACK solves them one after another in either case: a batch is twice as fast for D = 16, equal at D = 64
and slower above (it leaves the second thread idle), so that only small ones are solved together there.

Precision, measured on covariances with equally spaced log eigenvalues: float32 takes .6 of the time and
is off by 3e-7 to 3e-6 of the *largest* eigenvalue (D = 64 to 512), whatever the size of the one that is
read. That is enough for a participation ratio (relative error 1e-7), for the large eigenvalues, and for
an effective rank where the spectrum spans at most 4 decades (equal to two decimals). Where it spans 6 or
more, the effective rank reads 1 to 4 % too little, and
:func:`~lightning_sym.functional.numerical_rank_from_eigenvalues` at its ``rtol`` of 1e-3 (1e-6 of the
largest eigenvalue) up to 30 % (359 for 511 at D = 512): those need float64. With ``rtol=1e-2`` float32
counts within one of float64.

Shape letters: M matrices, D rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sym.functional._checks import as_square, check_count

_BATCHED_UP_TO = 32  # rows, on a CPU
_REDUCED_FROM = 384  # rows below which a smaller problem saves nothing


def batched_eigvalsh(matrices: Sequence[Tensor], *, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Eigenvalues of symmetric matrices of any shapes, equal shapes solved together where that is faster.

    Args:
        matrices: symmetric float tensors ``[D, D]``, D their own; the lower triangle is read.
        dtype: precision to solve in, ``torch.float32`` or ``torch.float64``; ``None``: each matrix' own.
            The module's text says what float32 loses.

    Returns:
        For each matrix its eigenvalues ``[D]``, ascending, in the precision of the solution; NaN for a
        matrix that is not finite, and for one that float32 cannot hold where it is solved in it (largest
        entry below 1e-30 or above 1e30).

    Raises:
        TypeError: if a matrix is not a real floating-point tensor or ``dtype`` another one.
        ValueError: if a matrix is not square.

    Example:
        >>> batched_eigvalsh([torch.diag(torch.tensor([2.0, 1.0])), torch.tensor([[torch.nan]])])
        [tensor([1., 2.]), tensor([nan])]
    """
    solved = _solve(matrices, dtype=dtype, vectors=False)
    return [values for values, _ in solved]


def batched_eigh(
    matrices: Sequence[Tensor], *, dtype: torch.dtype | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Eigenvalues and eigenvectors of symmetric matrices, see :func:`batched_eigvalsh`.

    Args:
        matrices: symmetric float tensors ``[D, D]``, D their own; the lower triangle is read.
        dtype: precision to solve in; ``None``: each matrix' own.

    Returns:
        For each matrix its eigenvalues ``[D]``, ascending, and the eigenvectors as columns ``[D, D]``; NaN
        for a matrix that is not finite.

    Raises:
        TypeError: if a matrix is not a real floating-point tensor or ``dtype`` another one.
        ValueError: if a matrix is not square.

    Example:
        >>> values, vectors = batched_eigh([torch.diag(torch.tensor([2.0, 1.0]))])[0]
        >>> values, vectors.abs()
        (tensor([1., 2.]), tensor([[0., 1.],
                [1., 0.]]))
    """
    return _solve(matrices, dtype=dtype, vectors=True)


def low_rank_eigvalsh(matrix: Tensor, *, rank: int) -> Tensor:
    r"""Eigenvalues of a symmetric matrix whose rank is known not to exceed a number.

    With an orthonormal basis Q of its range the eigenvalues that are not 0 are those of
    :math:`Q^\top C Q`; the basis is that of C times random vectors. A covariance of 128 samples with 512
    features takes .6 of the time so; where the rank is above a quarter of D, nothing is saved, and the matrix
    is solved as it is. In float64 both agree to 4e-15 of the largest eigenvalue.

    Args:
        matrix: symmetric float tensor ``[D, D]``; a covariance of n samples has a rank of at most n - 1.
        rank: at least the rank of the matrix; of a larger one than D the matrix is solved as it is.

    Returns:
        ``[D]``, ascending (of a matrix that is not semi-definite, with the zeros first); NaN for a matrix
        that is not finite.

    Raises:
        TypeError: if ``matrix`` is not of real floating-point numbers or ``rank`` not a whole number.
        ValueError: if ``matrix`` is not square or ``rank`` not positive.

    Example:
        >>> low_rank_eigvalsh(torch.diag(torch.tensor([3.0, 0.0, 0.0])), rank=1)
        tensor([0., 0., 3.])
    """
    c_DD = as_square(matrix, name="matrix")
    check_count("rank", rank)
    if not c_DD.sum().isfinite():
        return torch.full_like(c_DD[0], torch.nan)
    basis_DR = _range_basis(c_DD, rank)
    if basis_DR is None:
        return torch.linalg.eigvalsh(c_DD)
    values_R = torch.linalg.eigvalsh(basis_DR.mT @ (c_DD @ basis_DR))
    return torch.cat([values_R.new_zeros(len(c_DD) - len(values_R)), values_R])


def low_rank_eigh(matrix: Tensor, *, rank: int | None) -> tuple[Tensor, Tensor]:
    """Eigenvalues that may differ from 0, and their eigenvectors; see :func:`low_rank_eigvalsh`.

    Args:
        matrix: symmetric float tensor ``[D, D]``.
        rank: at least the rank of the matrix; ``None``: not known.

    Returns:
        Eigenvalues ``[R]``, ascending, and eigenvectors as columns ``[D, R]``; R is D, or ``rank`` where that
        saves time. NaN for a matrix that is not finite.

    Raises:
        TypeError: if ``matrix`` is not of real floating-point numbers or ``rank`` not a whole number.
        ValueError: if ``matrix`` is not square or ``rank`` not positive.
    """
    c_DD = as_square(matrix, name="matrix")
    check_count("rank", len(c_DD) if rank is None else rank)
    if not c_DD.sum().isfinite():
        return torch.full_like(c_DD[0], torch.nan), torch.full_like(c_DD, torch.nan)
    basis_DR = None if rank is None else _range_basis(c_DD, rank)
    if basis_DR is None:
        return tuple(torch.linalg.eigh(c_DD))
    values_R, vectors_RR = torch.linalg.eigh(basis_DR.mT @ (c_DD @ basis_DR))
    return values_R, basis_DR @ vectors_RR


def _range_basis(c_DD: Tensor, rank: int) -> Tensor | None:
    """Return an orthonormal basis ``[D, R]`` of what holds the range, or None where it saves nothing."""
    rows = len(c_DD)
    if rows < _REDUCED_FROM or 4 * rank > rows:
        return None
    # The same vectors at every reading, and of no random state of the user's.
    generator = torch.Generator().manual_seed(rows)
    random_DR = torch.randn(rows, rank, generator=generator, dtype=c_DD.dtype).to(c_DD.device)
    basis: Tensor = torch.linalg.qr(c_DD @ random_DR).Q
    return basis


def _solve(
    matrices: Sequence[Tensor], *, dtype: torch.dtype | None, vectors: bool
) -> list[tuple[Tensor, Tensor]]:
    if dtype not in (None, torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32, torch.float64 or None, got {dtype}")
    squares = [as_square(matrix, name=f"matrices[{k}]") for k, matrix in enumerate(matrices)]
    groups: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
    for k, square in enumerate(squares):
        groups.setdefault((len(square), square.dtype, square.device), []).append(k)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for (rows, _, device), members in groups.items():
        together = device.type != "cpu" or rows <= _BATCHED_UP_TO
        for part in [members] if together else [[k] for k in members]:
            for k, solution in zip(
                part, _solve_equal([squares[k] for k in part], dtype, vectors), strict=True
            ):
                found[k] = solution
    return [found[k] for k in range(len(squares))]


def _solve_equal(
    squares: list[Tensor], dtype: torch.dtype | None, vectors: bool
) -> list[tuple[Tensor, Tensor]]:
    """Return eigenvalues and eigenvectors of matrices of one shape, solved in one call."""
    x_MDD = torch.stack(squares) if len(squares) > 1 else squares[0][None]
    size_M = torch.linalg.vector_norm(x_MDD, ord=torch.inf, dim=(1, 2))
    known_M = size_M.isfinite()
    if x_MDD.dtype == torch.float64 and dtype == torch.float32:
        known_M &= (size_M == 0) | ((size_M > 1e-30) & (size_M < 1e30))
    x_MDD = x_MDD if dtype is None else x_MDD.to(dtype)
    if not known_M.all():  # LAPACK raises on these, cuSOLVER returns anything
        x_MDD = torch.where(known_M[:, None, None], x_MDD, 0.0)
    if vectors:
        values_MD, vectors_MDD = torch.linalg.eigh(x_MDD)
    else:
        values_MD = torch.linalg.eigvalsh(x_MDD)
        vectors_MDD = values_MD.new_empty(len(squares), 0, 0)
    if not known_M.all():
        values_MD = torch.where(known_M[:, None], values_MD, torch.nan)
        vectors_MDD = torch.where(known_M[:, None, None], vectors_MDD, torch.nan)
    return list(zip(values_MD, vectors_MDD, strict=True))
