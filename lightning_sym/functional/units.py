"""Unit counts: how many of a layer's units are dormant, dead, zero or copies of one another?

All of them are fractions of the layer's units, piecewise constant, without a gradient. Non-finite
input gives NaN.

Shape letters: N samples, U units, I incoming weights of a unit, M outgoing weights of a unit,
C units in a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sym.functional._checks import (
    as_matrix,
    as_real,
    as_vector,
    check_number,
    check_rtol,
    nan_like,
    promoted,
)

_CHUNK_ELEMENTS = 2**21  # of one [C, U] block of similarities: 8 MiB in float32


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
    if not w_UI.isfinite().all():
        return nan_like(w_UI)
    return _is_zero(w_UI, rtol=rtol).to(w_UI.dtype).mean()


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

    Memory stays at a few blocks of 2 million similarities, however wide the layer.

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
    if not all(bool(side.isfinite().all()) for side in sides):
        return nan_like(sides[0])
    labels_U = _components([_directions(side, rtol=rtol) for side in sides], tolerance=tolerance)
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
    if not all(bool(side.isfinite().all()) for side in sides):
        raise ValueError("weight, bias and outgoing must be finite")
    return _components([_directions(side, rtol=rtol) for side in sides], tolerance=tolerance)


def _sides(
    weight: Tensor, bias: Tensor | None, outgoing: Tensor | None, *, tolerance: float, rtol: float
) -> list[Tensor]:
    """Check the arguments and return each side's vectors, a row a unit."""
    check_rtol(tolerance, name="tolerance")
    check_rtol(rtol)
    w_UI = _incoming(weight, bias)
    if outgoing is None:
        return [w_UI]
    out = as_real(outgoing.detach(), name="outgoing")
    if not out.numel() or outgoing.ndim < 2 or outgoing.shape[1] != w_UI.shape[0]:
        raise ValueError(
            f"outgoing must be the next layer's weight [M, U={w_UI.shape[0]}, ...], "
            f"got {tuple(outgoing.shape)}"
        )
    return [w_UI, out.transpose(0, 1).flatten(1)]


def _incoming(weight: Tensor, bias: Tensor | None) -> Tensor:
    w = as_real(weight.detach(), name="weight")
    if weight.ndim < 2 or weight.numel() < 1:
        raise ValueError(f"weight must be [U, ...] with two dimensions or more, got {tuple(weight.shape)}")
    w_UI = w.flatten(1)
    if bias is None:
        return w_UI
    b_U = as_real(bias.detach(), name="bias").to(w_UI.device)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [U={weight.shape[0]}], got {tuple(bias.shape)}")
    return torch.cat(promoted(w_UI, b_U[:, None]), dim=1)


def _is_zero(w_UI: Tensor, *, rtol: float) -> Tensor:
    norm_U = torch.linalg.vector_norm(w_UI, dim=1)
    return norm_U <= rtol * norm_U.max()


def _directions(w_UI: Tensor, *, rtol: float) -> Tensor:
    """Unit vectors; zero units share one more axis of their own, so they agree with each other only."""
    zero_U = _is_zero(w_UI, rtol=rtol)
    unit_UI = torch.nn.functional.normalize(w_UI / w_UI.abs().max().clamp_min(1e-30), dim=1, eps=1e-30)
    unit_UI = torch.where(zero_U[:, None], 0.0, unit_UI)
    return torch.cat([unit_UI, zero_U[:, None].to(unit_UI)], dim=1)


def _components(sides: list[Tensor], *, tolerance: float) -> Tensor:
    """Label the connected components of agreement; one pass over blocks of rows."""
    units = sides[0].shape[0]
    labels_U = torch.arange(units, device=sides[0].device)
    slack = 8 * torch.finfo(sides[0].dtype).eps  # a vector's cosine with itself is 1 up to rounding
    for rows in torch.arange(units, device=labels_U.device).split(max(1, _CHUNK_ELEMENTS // units)):
        agree_CU = torch.ones(len(rows), units, dtype=torch.bool, device=labels_U.device)
        for side in sides:
            agree_CU &= side[rows] @ side.mT >= 1 - tolerance - slack
        agree_CU[torch.arange(len(rows), device=labels_U.device), rows] = True
        if int(agree_CU.sum()) == len(rows):
            continue  # every unit of the block agrees with itself only
        while True:
            least_C = torch.where(agree_CU, labels_U, units).amin(dim=1)
            least_U = torch.where(agree_CU, least_C[:, None], units).amin(dim=0)
            # A whole component follows its member with the smallest new label.
            root_U = labels_U.clone().scatter_reduce(0, labels_U, torch.minimum(least_U, labels_U), "amin")
            merged_U = root_U[labels_U]
            if torch.equal(merged_U, labels_U):
                break
            labels_U = merged_U
    return labels_U
