r"""Neural collapse of a classifier's penultimate features (Papyan, Han, Donoho, 2020, arXiv 2008.08186).

Shape letters: N samples, D features, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sym.functional._checks import as_matrix


class NeuralCollapse(NamedTuple):
    r"""The four measures; each is 0 at complete neural collapse.

    Attributes:
        nc1: :math:`\operatorname{tr}(\Sigma_W \Sigma_B^+) / K`, variability within classes over that
            between them, in [0, inf); NaN with fewer than two classes or equal class means.
        nc2: :math:`\| M M^\top / \|M M^\top\|_F - (I - 11^\top / K)/\sqrt{K - 1} \|_F` of the centred
            class means :math:`M`, in [0, 2]: distance from a simplex equiangular tight frame.
        nc3: :math:`\| W / \|W\|_F - M / \|M\|_F \|_F` for the classifier's weight, in [0, 2]; NaN
            without a weight.
        nc4: share of samples whose nearest class mean is not the classifier's choice, in [0, 1]; NaN
            without a weight.
    """

    nc1: Tensor
    nc2: Tensor
    nc3: Tensor
    nc4: Tensor


def neural_collapse(
    features: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    num_classes: int | None = None,
) -> NeuralCollapse:
    """Measure neural collapse on a batch.

    Args:
        features: ``[N, D]``, the inputs of the classifier layer.
        labels: ``[N]``, integers in [0, K). Classes that do not occur are left out.
        weight: ``[K, D]`` of the classifier layer.
        bias: ``[K]`` of the classifier layer.
        num_classes: K; by default ``weight``'s rows, or the largest label and one.

    Returns:
        The four measures as scalars ``[]``.

    Raises:
        ValueError: if shapes do not fit or a label is out of range.

    Example:
        >>> neural_collapse(torch.eye(3), torch.arange(3), torch.eye(3) - 1 / 3).nc3
        tensor(0.)
    """
    h_ND = as_matrix(features, name="features")
    if labels.shape != h_ND.shape[:1]:
        raise ValueError(f"labels must be [N={h_ND.shape[0]}], got {tuple(labels.shape)}")
    if num_classes is None:
        num_classes = weight.shape[0] if weight is not None else int(labels.max()) + 1
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels must be in [0, {num_classes}), got {int(labels.min())} to {int(labels.max())}"
        )
    counts_K = torch.zeros(num_classes, dtype=h_ND.dtype, device=h_ND.device)
    counts_K = counts_K.index_add(0, labels, torch.ones_like(h_ND[:, 0]))
    sums_KD = torch.zeros(num_classes, h_ND.shape[1], dtype=h_ND.dtype, device=h_ND.device)
    sums_KD = sums_KD.index_add(0, labels, h_ND)
    nc4 = torch.full_like(counts_K.sum(), float("nan"))
    if weight is not None:
        wrong = class_disagreements(h_ND, counts_K, sums_KD, weight, bias)
        nc4 = wrong / h_ND.shape[0]
    found = neural_collapse_from_sums(counts_K, sums_KD, h_ND.mT @ h_ND, weight)
    return found._replace(nc4=nc4)


def neural_collapse_from_sums(
    counts: Tensor, sums: Tensor, second: Tensor, weight: Tensor | None = None
) -> NeuralCollapse:
    """Measure neural collapse from sums over samples, which add up over batches and ranks.

    Args:
        counts: ``[K]``, samples of each class.
        sums: ``[K, D]``, sum of the features of each class.
        second: ``[D, D]``, sum of ``h h^T`` over all samples.
        weight: ``[K, D]`` of the classifier layer.

    Returns:
        The measures; ``nc4`` needs the samples themselves and is NaN, see :func:`class_disagreements`.
    """
    seen_K = counts > 0
    counts_K, sums_KD = counts[seen_K], sums[seen_K]
    k = len(counts_K)
    nan = torch.full_like(second[0, 0], float("nan"))
    if k < 2:
        return NeuralCollapse(nan, nan, nan, nan)
    means_KD = sums_KD / counts_K[:, None]
    centered_KD = means_KD - means_KD.mean(dim=0)
    if not centered_KD.norm() > 16 * torch.finfo(second.dtype).eps * means_KD.norm():
        return NeuralCollapse(nan, nan, nan, nan)
    n = counts_K.sum()
    within_DD = (second - (means_KD * counts_K[:, None]).mT @ means_KD) / n
    # tr(S_W S_B^+) over the at most K - 1 directions of S_B = M^T M / K.
    _, s_K, v_KD = torch.linalg.svd(centered_KD / k**0.5, full_matrices=False)
    used_K = s_K > s_K[0] * 1e-6
    v_KD, s_K = v_KD[used_K], s_K[used_K]
    nc1 = (((v_KD @ within_DD) * v_KD).sum(dim=1).clamp_min(0.0) / s_K.square()).sum() / k
    gram_KK = centered_KD @ centered_KD.mT
    simplex_KK = (torch.eye(k, dtype=gram_KK.dtype, device=gram_KK.device) - 1 / k) / (k - 1) ** 0.5
    nc2 = (gram_KK / gram_KK.norm() - simplex_KK).norm()
    nc3 = nan
    if weight is not None:
        w_KD = weight.detach().to(centered_KD)[seen_K]
        if w_KD.norm() > 0:
            nc3 = (w_KD / w_KD.norm() - centered_KD / centered_KD.norm()).norm()
    return NeuralCollapse(nc1, nc2, nc3, nan)


def class_disagreements(
    features: Tensor, counts: Tensor, sums: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Count samples whose nearest class mean is not what the classifier says.

    Args:
        features: ``[N, D]``.
        counts: ``[K]``, samples of each class behind the class means.
        sums: ``[K, D]``, their features' sums.
        weight: ``[K, D]`` of the classifier layer.
        bias: ``[K]`` of the classifier layer.

    Returns:
        Scalar ``[]``: a count in [0, N]. Among classes with no sample neither side may choose.
    """
    seen_K = counts > 0
    means_KD = sums[seen_K] / counts[seen_K][:, None]
    h_ND = features.to(means_KD)
    logits_NK = h_ND @ weight.detach().to(h_ND)[seen_K].mT
    if bias is not None:
        logits_NK = logits_NK + bias.detach().to(h_ND)[seen_K]
    nearest_N = torch.cdist(h_ND, means_KD, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)
    return (nearest_N != logits_NK.argmax(dim=1)).sum().to(h_ND.dtype)
