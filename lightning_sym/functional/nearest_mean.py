"""Does a classifier choose the class whose mean is nearest? (NC4, for samples seen piece by piece.)

Shape letters: N samples, D features, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_mean_disagreements(
    features: Tensor,
    class_counts: Tensor,
    class_sums: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Count samples whose nearest class mean is not the classifier's choice.

    Args:
        features: ``[N, D]``.
        class_counts: samples of each class behind the class means, ``[K]``. The nearest mean is
            looked for among classes that have any; the classifier chooses among all.
        class_sums: their features' sums, ``[K, D]``.
        weight: the classifier's weight, ``[K, D]``.
        bias: its bias, ``[K]``.

    Returns:
        Scalar ``[]``, a count in [0, N].

    Example:
        >>> x = torch.tensor([[1.0], [-1.0]])
        >>> nearest_mean_disagreements(x, torch.ones(2), x, -x)
        tensor(2.)
    """
    seen_K = class_counts > 0
    h_ND = features.to(class_sums)
    means_KD = class_sums / class_counts.clamp_min(1)[:, None]
    logits_NK = h_ND @ weight.detach().to(h_ND).mT
    if bias is not None:
        logits_NK = logits_NK + bias.detach().to(h_ND)
    distance_NK = torch.cdist(h_ND, means_KD, compute_mode="donot_use_mm_for_euclid_dist")
    nearest_N = torch.where(seen_K, distance_NK, torch.inf).argmin(dim=1)
    return (nearest_N != logits_NK.argmax(dim=1)).sum().to(h_ND.dtype)
