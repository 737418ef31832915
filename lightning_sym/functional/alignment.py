r"""Do representations, weights and gradients share one shape? The CRH and the PAH.

For a linear map :math:`h_b = W h_a` with per-sample gradients :math:`g_b = \partial\ell/\partial h_b`,
:math:`g_a = W^\top g_b`, the canonical representation hypothesis says that on each side
:math:`c \in \{a, b\}` the matrices :math:`H_c = E[h_c h_c^\top]`, :math:`G_c = E[g_c g_c^\top]` and
:math:`Z_c` (:math:`Z_a = W^\top W`, :math:`Z_b = W W^\top`) are proportional: RGA (H and G), RWA (H and
Z), GWA (G and Z). The polynomial alignment hypothesis weakens that to powers of one another.
Source: Ziyin, Chuang, Galanti, Poggio (2024), arXiv 2410.03006.

Shape letters: N samples, D features.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sym.functional._checks import as_matrix, as_square, nan_like
from lightning_sym.functional.power_law import PowerLaw, power_law

#: Exponents (H_a, H_b, G_b, G_a) in powers of z, the squared singular values of W, by which relation
#: holds on the (output, input) side.
PHASES: dict[str, tuple[float, float, float, float]] = {
    "out:rga in:rwa": (1, 2, 2, 3),
    "out:rga in:gwa": (-1, 0, 0, 1),
    "out:rwa in:rga": (0, 1, -1, 0),
    "out:rwa in:gwa": (0, 1, 0, 1),
    "out:gwa in:rga": (2, 3, 1, 2),
    "out:gwa in:rwa": (1, 2, 1, 2),
    "canonical": (1, 1, 1, 1),
}


def second_moment(samples: Tensor) -> Tensor:
    """Raw second moment ``E[x x^T]``.

    Args:
        samples: ``[N, D]``.

    Returns:
        ``[D, D]``, positive semidefinite.

    Example:
        >>> second_moment(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        tensor([[1., 1.],
                [1., 2.]])
    """
    x_ND = as_matrix(samples, name="samples")
    return x_ND.mT @ x_ND / x_ND.shape[0]


def normalized_covariance(samples: Tensor) -> Tensor:
    """Covariance of samples divided by their norms: the form of the paper's experiments.

    Args:
        samples: ``[N, D]``. A zero sample has no direction and stays zero.

    Returns:
        ``[D, D]``, positive semidefinite, with a trace of at most 1.
    """
    x_ND = as_matrix(samples, name="samples")
    norm_N1 = torch.linalg.vector_norm(x_ND, dim=1, keepdim=True)
    u_ND = x_ND / torch.where(norm_N1 > 0, norm_N1, torch.ones_like(norm_N1))
    u_ND = u_ND - u_ND.mean(dim=0)
    return u_ND.mT @ u_ND / u_ND.shape[0]


def matrix_alignment(a: Tensor, b: Tensor) -> Tensor:
    r"""Pearson correlation of two matrices over their entries.

    .. math:: \alpha(A, B) = \frac{\sum_{ij} (A_{ij} - \bar A)(B_{ij} - \bar B)}
        {\|A - \bar A\|_F\,\|B - \bar B\|_F}

    with scalar means :math:`\bar A, \bar B` over all entries. Large eigenvectors and the diagonal
    dominate it: read it beside :func:`alignment_null`.

    Args:
        a: ``[D, D]`` (any two matrices of equal shape will do).
        b: the same shape.

    Returns:
        Scalar ``[]`` in [-1, 1]; NaN where a matrix is constant or not finite.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> matrix_alignment(torch.eye(2), 3 * torch.eye(2) + 1)
        tensor(1.)
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(
            f"a and b must be matrices of equal shape, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    a_DD, b_DD = as_matrix(a, name="a"), as_matrix(b, name="b")
    da_DD, db_DD = a_DD - a_DD.mean(), b_DD - b_DD.mean()
    # A constant matrix leaves rounding behind: below this it counts as constant.
    eps = 16 * torch.finfo(a_DD.dtype).eps
    size_a, size_b = da_DD.norm(), db_DD.norm()
    if not (size_a > eps * a_DD.norm() and size_b > eps * b_DD.norm()):
        return nan_like(a_DD)
    return ((da_DD / size_a) * (db_DD / size_b)).sum().clamp(-1.0, 1.0)


def alignment_null(a: Tensor, b: Tensor, *, draws: int = 1, seed: int = 0) -> Tensor:
    r"""Mean alignment after turning ``a`` by random rotations: what chance gives at these spectra.

    .. math:: E_Q\,[\alpha(Q A Q^\top, B)], \qquad Q \text{ Haar-distributed.}

    Args:
        a: ``[D, D]``.
        b: ``[D, D]``.
        draws: rotations averaged over.
        seed: of the rotations; the global random state is not used.

    Returns:
        Scalar ``[]`` in [-1, 1]; NaN where :func:`matrix_alignment` is.

    Raises:
        ValueError: if ``a`` and ``b`` are not square of one size, or ``draws`` is below 1.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    a_DD = as_square(a, name="a")
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for _ in range(draws):
        q_DD = random_rotation(a_DD.shape[0], generator=generator).to(a_DD)
        levels.append(matrix_alignment(q_DD @ a_DD @ q_DD.mT, b))
    return torch.stack(levels).mean()


def random_rotation(size: int, *, generator: torch.Generator) -> Tensor:
    """Return a Haar-distributed orthogonal matrix, ``[D, D]`` in float64."""
    normal_DD = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q_DD, r_DD = torch.linalg.qr(normal_DD)
    return q_DD * r_DD.diagonal().sign()  # without the signs, QR is not Haar


class PowerAlignment(NamedTuple):
    """How a matrix's eigenvalues go as powers of the weight's, in the weight's eigenbasis.

    Attributes:
        fit: the power law of ``v_i^T A v_i`` over ``z_i``.
        off_diagonal: ``||offdiag(V^T A V)|| / ||V^T A V||`` over the directions used, in [0, 1]; the
            exponent means little where this is large.
    """

    fit: PowerLaw
    off_diagonal: float


def power_alignment(
    a: Tensor, gram: Tensor, *, rtol: float = 1e-3, resamples: int = 200, seed: int = 0
) -> PowerAlignment:
    r"""Exponent :math:`p` of :math:`A \sim Z^p` (polynomial alignment).

    With :math:`Z = V \operatorname{diag}(z) V^\top`, regress :math:`\log v_i^\top A v_i` on
    :math:`\log z_i` over directions with :math:`z_i >` ``rtol`` :math:`\cdot z_\max`. Raw second
    moments belong here: normalising samples breaks :math:`H_b = W H_a W^\top`.

    Args:
        a: ``[D, D]``, :math:`H_c` or :math:`G_c`.
        gram: ``[D, D]``, :math:`Z_c` of the same side.
        rtol: directions of smaller relative ``z`` are left out.
        resamples: bootstrap resamples of the directions for the interval.
        seed: of the resampling.

    Returns:
        The fit and the off-diagonal share; NaN where ``gram`` is zero or an entry is not finite.

    Raises:
        ValueError: if shapes differ or ``rtol`` is not in [0, 1).

    Example:
        >>> z = torch.tensor([1.0, 2.0, 4.0, 8.0])
        >>> found = power_alignment(torch.diag(z**3), torch.diag(z))
        >>> round(found.fit.exponent, 4), found.off_diagonal
        (3.0, 0.0)
    """
    if not 0 <= rtol < 1:
        raise ValueError(f"rtol must be in [0, 1), got {rtol}")
    a_DD, gram_DD = as_square(a, name="a").double(), as_square(gram, name="gram").double()
    if a_DD.shape != gram_DD.shape:
        raise ValueError(
            f"a and gram must have one shape, got {tuple(a_DD.shape)} and {tuple(gram_DD.shape)}"
        )
    nan = float("nan")
    if not (a_DD.isfinite().all() and gram_DD.isfinite().all() and gram_DD.norm() > 0):
        return PowerAlignment(PowerLaw(nan, nan, nan, nan, nan, 0), nan)
    z_D, v_DD = torch.linalg.eigh(gram_DD)
    used_D = z_D > rtol * z_D[-1]
    v_DD, z_D = v_DD[:, used_D], z_D[used_D]
    turned = v_DD.mT @ a_DD @ v_DD
    diagonal_D = turned.diagonal()
    size = turned.norm()
    rest = turned - torch.diag(diagonal_D)
    off = float(rest.norm() / size) if size > 0 else nan
    return PowerAlignment(power_law(z_D, diagonal_D, resamples=resamples, seed=seed), off)


def nearest_phase(h_a: float, h_b: float, g_b: float, g_a: float) -> tuple[str, float]:
    """Return the phase of the PAH table whose exponents are nearest.

    Args:
        h_a: exponent of ``H_a`` in powers of z; likewise the other three.
        h_b: exponent of ``H_b``.
        g_b: exponent of ``G_b``.
        g_a: exponent of ``G_a``.

    Returns:
        The phase's name (which relation holds on which side; ``canonical`` when all do) and the
        largest deviation of an exponent from it; ``("unknown", nan)`` if one is NaN.

    Example:
        >>> nearest_phase(1.1, 2.0, 1.9, 3.0)
        ('out:rga in:rwa', 0.1...)
    """
    found = (h_a, h_b, g_b, g_a)
    if any(math.isnan(value) for value in found):
        return "unknown", float("nan")
    distances = {
        name: max(abs(x - y) for x, y in zip(found, phase, strict=True)) for name, phase in PHASES.items()
    }
    name = min(distances, key=distances.__getitem__)
    return name, distances[name]
