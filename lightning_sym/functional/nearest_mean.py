"""Does a classifier choose the class whose mean is nearest? (NC4, for samples seen piece by piece.)

Shape letters: N samples, D features, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sym.functional._checks import as_counts, as_matrix, as_vector, nan_like


def nearest_mean_disagreements(
    features: Tensor,
    class_counts: Tensor,
    class_sums: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Count samples whose nearest class mean is not the classifier's choice.

    Args:
        features: ``[N, D]``; no sample, no disagreement.
        class_counts: samples of each class behind the class means, ``[K]``. The nearest mean is
            looked for among classes that have any; the classifier chooses among all.
        class_sums: their features' sums, ``[K, D]``.
        weight: the classifier's weight, ``[K, D]``.
        bias: its bias, ``[K]``.

    Returns:
        Scalar ``[]``, a count in [0, N]; NaN where features, sums, counts, weight or bias are not finite.

    Raises:
        TypeError: if an argument is not a tensor of real numbers.
        ValueError: if the shapes do not fit.

    Example:
        >>> x = torch.tensor([[1.0], [-1.0]])
        >>> nearest_mean_disagreements(x, torch.ones(2), x, -x)
        tensor(2.)
    """
    sums_KD = as_matrix(class_sums, name="class_sums")
    h_ND = as_matrix(features, name="features", min_rows=0).to(sums_KD)
    weight_KD = as_matrix(weight.detach(), name="weight").to(h_ND)
    counts_K = as_counts(class_counts, name="class_counts").to(h_ND)
    bias_K = None if bias is None else as_vector(bias.detach(), name="bias").to(h_ND)
    classes, width = sums_KD.shape
    if h_ND.shape[1] != width:
        raise ValueError(f"features must be [N, D={width}] as class_sums, got {tuple(h_ND.shape)}")
    if weight_KD.shape != sums_KD.shape:
        raise ValueError(f"weight must be [K={classes}, D={width}], got {tuple(weight_KD.shape)}")
    for name, vector in (("class_counts", counts_K), ("bias", bias_K)):
        if vector is not None and vector.shape != (classes,):
            raise ValueError(f"{name} must be [K={classes}], got {tuple(vector.shape)}")
    known = (h_ND, sums_KD, weight_KD, counts_K, bias_K)
    if not all(bool(tensor.isfinite().all()) for tensor in known if tensor is not None):
        return nan_like(h_ND)
    seen_K = counts_K > 0
    means_KD = sums_KD / counts_K.clamp_min(1)[:, None]
    logits_NK = h_ND @ weight_KD.mT
    if bias_K is not None:
        logits_NK = logits_NK + bias_K
    distance_NK = torch.cdist(h_ND, means_KD, compute_mode="donot_use_mm_for_euclid_dist")
    nearest_N = torch.where(seen_K, distance_NK, torch.inf).argmin(dim=1)
    return (nearest_N != logits_NK.argmax(dim=1)).sum().to(h_ND.dtype)
