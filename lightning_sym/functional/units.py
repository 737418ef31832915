"""Unit counts: how many of a layer's units are dormant, dead, zero or copies of one another?

All of them are fractions of the layer's units, piecewise constant, without a gradient. Non-finite
input gives NaN.

Shape letters: N samples, U units, I incoming weights of a unit, M outgoing weights of a unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sym.functional import _grouping
from lightning_sym.functional._checks import (
    as_matrix,
    as_real,
    as_vector,
    check_number,
    check_rtol,
    nan_like,
    promoted,
)


def dormant_scores(mean_abs: Tensor) -> Tensor:
    r"""Score of each unit: its mean absolute activation over the layer's mean of the same.

    .. math:: s_i = \frac{E_x |h_i(x)|}{\frac1U \sum_j E_x |h_j(x)|}

    from Sokar et al., *The dormant neuron phenomenon in deep reinforcement learning* (2023).

    Args:
        mean_abs: mean absolute activation of each unit, ``[U]``.

    Returns:
        ``[U]``, with mean 1; all zero when no unit is active; NaN where input is not finite.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if ``mean_abs`` is not a non-empty vector.

    Example:
        >>> dormant_scores(torch.tensor([1.0, 3.0, 0.0, 0.0]))
        tensor([1., 3., 0., 0.])
    """
    score_U = as_vector(mean_abs, name="mean_abs")
    average = score_U.mean()
    return score_U / torch.where(average == 0, torch.ones_like(average), average)


def dormant_fraction_from_scores(mean_abs: Tensor, *, threshold: float = 0.025) -> Tensor:
    """Fraction of units whose :func:`dormant_scores` is at most ``threshold``.

    Args:
        mean_abs: mean absolute activation of each unit, ``[U]`` (a sum over samples serves as well).
        threshold: a score, at least 0; 1 is the layer's average unit.

    Returns:
        Scalar ``[]`` in ``[0, 1]``; 1 when no unit is active; NaN for non-finite input.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if ``mean_abs`` is not a non-empty vector or ``threshold`` is negative.

    Example:
        >>> dormant_fraction_from_scores(torch.tensor([1.0, 3.0, 0.001, 0.0]))
        tensor(0.5000)
    """
    check_number("threshold", threshold, least=0)
    score_U = dormant_scores(mean_abs)
    if not score_U.isfinite().all():
        return nan_like(score_U)
    return (score_U <= threshold).to(score_U.dtype).mean()


def dormant_fraction(activations: Tensor, *, threshold: float = 0.025) -> Tensor:
    """Fraction of dormant units (Sokar et al., 2023), see :func:`dormant_scores`.

    Args:
        activations: ``[N, U]``; half types are computed in float32.
        threshold: a score, at least 0; 1 is the layer's average unit.

    Returns:
        Scalar ``[]`` in ``[0, 1]``; 1 when no unit is active; NaN for non-finite activations.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if ``activations`` is not ``[N >= 1, U >= 1]`` or ``threshold`` is negative.

    Example:
        >>> dormant_fraction(torch.tensor([[1.0, 0.0], [-1.0, 0.01]]))
        tensor(0.5000)
    """
    h_NU = as_matrix(activations, name="activations")
    return dormant_fraction_from_scores(h_NU.abs().mean(dim=0), threshold=threshold)


def dead_fraction(activations: Tensor, *, tolerance: float = 0.0) -> Tensor:
    """Fraction of units that are zero on every sample.

    Args:
        activations: ``[N, U]``, after the non-linearity (a ReLU that never fires is dead).
        tolerance: absolute value up to which an activation counts as zero.

    Returns:
        Scalar ``[]`` in ``[0, 1]``; NaN for non-finite activations.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if ``activations`` is not ``[N >= 1, U >= 1]`` or ``tolerance`` is negative.

    Example:
        >>> dead_fraction(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        tensor(0.5000)
    """
    check_number("tolerance", tolerance, least=0)
    h_NU = as_matrix(activations, name="activations")
    if not h_NU.isfinite().all():
        return nan_like(h_NU)
    return (h_NU.abs().amax(dim=0) <= tolerance).to(h_NU.dtype).mean()


def zero_units(weight: Tensor, bias: Tensor | None = None, *, rtol: float = 1e-3) -> Tensor:
    """Fraction of units whose incoming weights (with the bias) are zero.

    A unit is zero when the norm of its ``[incoming weights, bias]`` is at most ``rtol`` times the
    largest such norm of the layer.

    Args:
        weight: ``[U, ...]``, a unit's incoming weights along the rest (``nn.Linear``, ``nn.Conv2d``).
        bias: ``[U]``, or ``None``.
        rtol: cut relative to the largest norm, in ``[0, 1)``.

    Returns:
        Scalar ``[]`` in ``[0, 1]``; 1 for an all-zero layer; NaN for non-finite weights.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if shapes do not fit or ``rtol`` is out of range.

    Example:
        >>> zero_units(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor(0.5000)
    """
    check_rtol(rtol)
    w_UI = _incoming(weight, bias)
    return zero_units_from_norms(torch.linalg.vector_norm(_in_range(w_UI), dim=1), rtol=rtol)


def zero_units_from_norms(norms: Tensor, *, rtol: float = 1e-3) -> Tensor:
    """Fraction of units that are zero in the sense of :func:`zero_units`, from the norms of their weights.

    Args:
        norms: norm of each unit's incoming weights, ``[U]``, any scale.
        rtol: cut relative to the largest norm, in ``[0, 1)``.

    Returns:
        Scalar ``[]`` in ``[0, 1]``; 1 for an all-zero layer; NaN for norms that are not finite.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if ``norms`` is not a non-empty vector or ``rtol`` is out of range.

    Example:
        >>> zero_units_from_norms(torch.tensor([5.0, 0.0]))
        tensor(0.5000)
    """
    check_rtol(rtol)
    norm_U = as_vector(norms, name="norms")
    if not norm_U.isfinite().all():
        return nan_like(norm_U)
    return (norm_U <= rtol * norm_U.max()).to(norm_U.dtype).mean()


def distinct_units(
    weight: Tensor,
    bias: Tensor | None = None,
    outgoing: Tensor | None = None,
    *,
    tolerance: float = 1e-2,
    rtol: float = 1e-3,
) -> Tensor:
    r"""Number of distinct units over the number of units.

    Two units *agree* when the vectors [incoming weights, bias] of both have a cosine of at least
    ``1 - tolerance``, and their outgoing weights too where those are given. All units that are zero
    in the sense of :func:`zero_units` agree with one another and with no other. Units are the same
    when a chain of agreeing units joins them (single linkage: the connected components of
    the graph of agreement), so the count does not depend on the order of the units.
    Permutation symmetry makes such copies absorbing for SGD (arXiv 2309.16932).

    Memory stays at a few blocks of 2 million numbers, however wide the layer. Up to 8,192 units the count
    is exact. Of more, pairs are found by random signs (locality-sensitive hashing) and then compared: a
    group is never too large, copies are always found, but a pair just within the tolerance is missed
    with a probability of 1e-4, and more often where all units lie in a narrow cone: the fraction may then
    be too high, never too low. Tolerances above about 0.07 have all pairs compared, in quadratic time.

    Args:
        weight: ``[U, ...]``, a unit's incoming weights along the rest.
        bias: ``[U]``, or ``None``.
        outgoing: the next layer's weight, ``[M, U, ...]``; ``None`` to compare incoming only.
        tolerance: ``1 - cosine`` up to which directions agree, in ``[0, 1)``; 0.01 is 8 degrees.
        rtol: norm relative to the largest up to which a vector counts as zero, in ``[0, 1)``.

    Returns:
        Scalar ``[]`` in ``[1/U, 1]``; NaN for non-finite weights.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if shapes do not fit or a number is out of range.

    Example:
        >>> distinct_units(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        tensor(0.7500)
    """
    sides = _sides(weight, bias, outgoing, tolerance=tolerance, rtol=rtol)
    if not all(_is_finite(side) for side in sides):
        return nan_like(sides[0])
    labels_U = _grouping.components([_directions(side, rtol=rtol) for side in sides], tolerance=tolerance)
    return sides[0].new_tensor(labels_U.unique().numel() / labels_U.numel())


def unit_groups(
    weight: Tensor,
    bias: Tensor | None = None,
    outgoing: Tensor | None = None,
    *,
    tolerance: float = 1e-2,
    rtol: float = 1e-3,
) -> Tensor:
    """Group the units of a layer that are the same, in the sense of :func:`distinct_units`.

    Args:
        weight: ``[U, ...]``, a unit's incoming weights along the rest.
        bias: ``[U]``, or ``None``.
        outgoing: the next layer's weight, ``[M, U, ...]``; ``None`` to compare incoming only.
        tolerance: see :func:`distinct_units`.
        rtol: see :func:`distinct_units`.

    Returns:
        ``[U]`` integers: for each unit the smallest index in its group.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if shapes do not fit, a number is out of range or a weight is not finite.

    Example:
        >>> unit_groups(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 2.0]]))
        tensor([0, 1, 0])
    """
    sides = _sides(weight, bias, outgoing, tolerance=tolerance, rtol=rtol)
    if not all(_is_finite(side) for side in sides):
        raise ValueError("weight, bias and outgoing must be finite")
    return _grouping.components([_directions(side, rtol=rtol) for side in sides], tolerance=tolerance)


def _sides(
    weight: Tensor, bias: Tensor | None, outgoing: Tensor | None, *, tolerance: float, rtol: float
) -> list[Tensor]:
    """Return each side's vectors, a row a unit.

    Raises:
        ValueError: if ``outgoing`` is not the next layer's weight.
    """
    check_rtol(tolerance, name="tolerance")
    check_rtol(rtol)
    w_UI = _incoming(weight, bias)
    if outgoing is None:
        return [w_UI]
    out = as_real(outgoing, name="outgoing").detach()
    if not out.numel() or outgoing.ndim < 2 or outgoing.shape[1] != w_UI.shape[0]:
        raise ValueError(
            f"outgoing must be the next layer's weight [M, U={w_UI.shape[0]}, ...], "
            f"got {tuple(outgoing.shape)}"
        )
    return [w_UI, out.transpose(0, 1).flatten(1)]


def _incoming(weight: Tensor, bias: Tensor | None) -> Tensor:
    w = as_real(weight, name="weight").detach()
    if weight.ndim < 2 or weight.numel() < 1:
        raise ValueError(f"weight must be [U, ...] with two dimensions or more, got {tuple(weight.shape)}")
    w_UI = w.flatten(1)
    if bias is None:
        return w_UI
    b_U = as_real(bias, name="bias").detach().to(w_UI.device)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [U={weight.shape[0]}], got {tuple(bias.shape)}")
    return torch.cat(promoted(w_UI, b_U[:, None]), dim=1)


def _is_finite(w_UI: Tensor) -> bool:
    return bool(torch.linalg.vector_norm(w_UI, ord=torch.inf).isfinite())  # one pass, nothing allocated


def _in_range(w_UI: Tensor) -> Tensor:
    """Return the rows, divided by their largest entry where squares would over- or underflow."""
    size = torch.linalg.vector_norm(w_UI, ord=torch.inf)
    limit = torch.finfo(w_UI.dtype).max ** 0.25
    return w_UI / size if size > 0 and not 1 / limit < size < limit else w_UI


def _directions(w_UI: Tensor, *, rtol: float) -> Tensor:
    """Return unit vectors; zero units share one more axis of their own, they agree with each other only."""
    w_UI = _in_range(w_UI)
    norm_U = torch.linalg.vector_norm(w_UI, dim=1)
    zero_U = norm_U <= rtol * norm_U.max()
    unit_UI = w_UI.new_empty(len(w_UI), w_UI.shape[1] + 1)
    torch.mul(w_UI, torch.where(zero_U, 0.0, 1 / norm_U)[:, None], out=unit_UI[:, :-1])
    unit_UI[:, -1] = zero_U
    return unit_UI
