"""Eigenmodes of an embedding: which dimensions has self-supervised learning learned, and when?

Non-finite input gives NaN; it is never an exception.

Shape letters: N samples, D dimensions, J modes, T readings over time, S = 2N views.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sym.functional._checks import as_counts, as_matrix, as_real, nan_like


def cross_covariance_eigenvalues(z_a: Tensor, *, z_b: Tensor, center: bool = True) -> Tensor:
    r"""Eigenvalues of the symmetrised cross-covariance of two views' embeddings, largest first.

    .. math:: C = \frac{1}{2N} \sum_n (z^a_n {z^b_n}^\top + z^b_n {z^a_n}^\top)

    What both views agree on has positive eigenvalues, what they contradict each other in negative
    ones. Wide embeddings (D > 2N) are decomposed through their samples; the D - 2N eigenvalues left
    out are zero.

    Args:
        z_a: embeddings of the first view, ``[N, D]``; computed in float64 where the device has it.
        z_b: embeddings of the second view, row by row of the same samples, ``[N, D]``.
        center: subtract each view's mean first.

    Returns:
        ``[min(D, 2N)]``, descending; NaN for non-finite embeddings, or where their squares overflow.

    Raises:
        ValueError: if the two are not ``[N, D]`` of one shape, with N >= 2 if centred.

    Example:
        >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> cross_covariance_eigenvalues(z, z_b=z * torch.tensor([1.0, -1.0])).tolist()
        [1.0, -1.0]
    """
    a_ND, b_ND = (_exact(z, name, center) for z, name in ((z_a, "z_a"), (z_b, "z_b")))
    if a_ND.shape != b_ND.shape:
        raise ValueError(f"z_a and z_b must be of one shape, got {tuple(z_a.shape)} and {tuple(z_b.shape)}")
    n, d = a_ND.shape
    if not (a_ND.isfinite().all() and b_ND.isfinite().all()):
        return a_ND.new_full((min(d, 2 * n),), torch.nan)
    if d <= 2 * n:
        c_DD = a_ND.mT @ b_ND / n
        if not c_DD.isfinite().all():  # the squares of a run that diverged
            return c_DD.new_full((d,), torch.nan)
        return torch.linalg.eigvalsh((c_DD + c_DD.mT) / 2).flip(0)
    # With X = U S V^T the rows of both views and P their exchange, C = X^T P X / 2N has the
    # eigenvalues of S (U^T P U) S / 2N: a matrix over samples, not over dimensions.
    u_SK, s_K, _ = torch.linalg.svd(torch.cat([a_ND, b_ND]), full_matrices=False)
    exchanged_KK = u_SK.mT @ u_SK.roll(n, dims=0)
    return torch.linalg.eigvalsh(s_K[:, None] * exchanged_KK * s_K / (2 * n)).flip(0)


def covariance_eigenvalues(z: Tensor, *, center: bool = True) -> Tensor:
    r"""Eigenvalues of the (biased) covariance of features, largest first.

    From singular values of the features, so that small ones are not lost to rounding.

    Args:
        z: ``[N, D]``; computed in float64 where the device has it.
        center: subtract the mean first.

    Returns:
        ``[min(N, D)]``, descending, at least 0; NaN for non-finite features. Those left out are zero.

    Raises:
        ValueError: if ``z`` is not ``[N, D]``, with N >= 2 if centred.
    """
    z_ND = _exact(z, "z", center)
    if not z_ND.isfinite().all():
        return z_ND.new_full((min(z_ND.shape),), torch.nan)
    return torch.linalg.svdvals(z_ND).square() / z_ND.shape[0]


def variance_share(z: Tensor) -> Tensor:
    r"""Share of the embeddings' mean square that is variance: zero means complete collapse.

    .. math:: \frac{\sum_i \operatorname{Var}(z_i)}{\sum_i \operatorname{E}[z_i^2]}

    It does not depend on the embeddings' scale, so that a small start is no collapse.

    Args:
        z: ``[N >= 2, D]``.

    Returns:
        Scalar ``[]`` in ``[0, 1]``; 0 for embeddings that are all zero; NaN for non-finite ones.

    Raises:
        ValueError: if ``z`` is not ``[N >= 2, D]``.

    Example:
        >>> variance_share(torch.tensor([[3.0, 1.0], [3.0, -1.0]]))
        tensor(0.1000, dtype=torch.float64)
    """
    z_ND = _exact(z, "z", False)
    centred_ND = _exact(z, "z", True)
    if not z_ND.isfinite().all():
        return nan_like(z_ND)
    largest = z_ND.abs().max()
    if largest == 0:
        return torch.zeros_like(largest)
    return (centred_ND / largest).square().sum() / (z_ND / largest).square().sum()


def mode_dates(steps: Tensor, *, eigenvalues: Tensor, level: Tensor | float = 0.5) -> Tensor:
    """Step at which each mode first reaches a level, linear between readings.

    Args:
        steps: steps of the readings, increasing, ``[T]``.
        eigenvalues: ``[T, J]``, a mode a column.
        level: one level, or one a mode ``[J]``: half of ``eigenvalues[-1]`` dates modes where
            learned ones do not end at one.

    Returns:
        ``[J]`` in float64; infinite for modes that never reach it, the first step for those that
        start above it, NaN for those with a step, level or eigenvalue that is not finite.

    Raises:
        TypeError: if an argument is not a tensor of real numbers.
        ValueError: if the shapes do not fit.

    Example:
        >>> mode_dates(torch.tensor([0.0, 10.0]), eigenvalues=torch.tensor([[0.0, 0.0], [1.0, 0.2]]))
        tensor([5., inf], dtype=torch.float64)
    """
    t_T, y_TJ = _as_history(steps, eigenvalues)
    level_J = as_counts(torch.as_tensor(level), name="level")
    if level_J.ndim > 1 or level_J.numel() not in (1, y_TJ.shape[1]):
        raise ValueError(f"level must be one number or [J={y_TJ.shape[1]}], got {tuple(level_J.shape)}")
    level_J = level_J.to(y_TJ).expand(y_TJ.shape[1])
    past_TJ = y_TJ >= level_J
    k_J = past_TJ.int().argmax(dim=0)
    before_J = (k_J - 1).clamp_min(0)
    high_J, low_J = (y_TJ.gather(0, k[None])[0] for k in (k_J, before_J))
    share_J = torch.where(k_J > 0, (level_J - low_J) / (high_J - low_J), 0.0)
    dates_J = t_T[before_J] + share_J * (t_T[k_J] - t_T[before_J])
    dates_J = torch.where(past_TJ.any(dim=0), dates_J, torch.inf)
    known_J = y_TJ.isfinite().all(dim=0) & level_J.isfinite() & t_T.isfinite().all()
    return torch.where(known_J, dates_J, torch.nan)


def step_likeness(eigenvalues: Tensor, *, final: Tensor | None = None) -> Tensor:
    r"""How much learning goes one mode at a time.

    With growth :math:`g_{tj}` of mode j between two readings, as a share of the mode's final size
    and counted where it passes its maximum so far,

    .. math:: S = \frac{\sum_t \sum_j g_{tj}^2 / \sum_j g_{tj}}{\sum_t \sum_j g_{tj}}:

    the inverse number of modes that grow at the same time, averaged over all growth. Readings must be
    dense enough to tell modes apart: two steps between the same two readings count as one.

    Args:
        eigenvalues: ``[T >= 2, J]``, a mode a column.
        final: size of each learned mode ``[J]``, positive; None: one for all. Growth beyond it does
            not count.

    Returns:
        Scalar ``[]`` in ``[1 / J, 1]``: 1 if one mode grows at any time, 1 / J if all J grow alike;
        0 without growth; NaN for non-finite eigenvalues.

    Raises:
        ValueError: if ``eigenvalues`` is not ``[T >= 2, J >= 1]``, or ``final`` does not fit it.

    Example:
        >>> step_likeness(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]))
        tensor(1., dtype=torch.float64)
        >>> step_likeness(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        tensor(0.5000, dtype=torch.float64)
    """
    y_TJ = as_real(eigenvalues, name="eigenvalues").double()
    if y_TJ.ndim != 2 or y_TJ.shape[0] < 2 or y_TJ.shape[1] < 1:
        raise ValueError(f"eigenvalues must be [T >= 2, J >= 1], got {tuple(eigenvalues.shape)}")
    if final is not None:
        final_J = as_real(final, name="final").to(y_TJ)
        if final_J.shape != y_TJ.shape[1:]:
            raise ValueError(f"final must be [J={y_TJ.shape[1]}], got {tuple(final.shape)}")
        if not (final_J.isfinite() & (final_J > 0)).all():
            raise ValueError(f"final must be positive and finite sizes, got {final_J.tolist()[:8]}")
        y_TJ = y_TJ / final_J
    if not y_TJ.isfinite().all():
        return nan_like(y_TJ)
    growth_TJ = y_TJ.clamp(0, 1).cummax(dim=0).values.diff(dim=0)
    total_T = growth_TJ.sum(dim=1)
    alone_T = torch.where(total_T > 0, growth_TJ.square().sum(dim=1) / total_T.where(total_T > 0, 1.0), 0.0)
    total = total_T.sum()
    return torch.where(total > 0, alone_T.sum() / total.where(total > 0, 1.0), 0.0)


def _exact(z: Tensor, name: str, center: bool) -> Tensor:
    z_ND = as_matrix(z, name=name, min_rows=2 if center else 1)
    z_ND = z_ND if z_ND.device.type == "mps" else z_ND.double()
    return z_ND - z_ND.mean(dim=0) if center else z_ND


def _as_history(steps: Tensor, eigenvalues: Tensor) -> tuple[Tensor, Tensor]:
    t_T = as_counts(steps, name="steps")
    y_TJ = as_real(eigenvalues, name="eigenvalues").double()
    if steps.ndim != 1 or eigenvalues.ndim != 2 or len(steps) != len(eigenvalues) or not y_TJ.numel():
        raise ValueError(
            "steps and eigenvalues must be [T >= 1] and [T, J >= 1], "
            f"got {tuple(steps.shape)} and {tuple(eigenvalues.shape)}"
        )
    return t_T.to(y_TJ), y_TJ
