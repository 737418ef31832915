"""Neural collapse: do a classifier's features shrink to one point a class, in a regular simplex?

The four measures of Papyan, Han & Donoho, *Prevalence of neural collapse during the terminal phase
of deep learning training* (2020). Classes without a sample are left out of all of them.

Shape letters: N samples, D features, K classes, C classes that have samples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sym.functional._checks import (
    as_counts,
    as_labels,
    as_matrix,
    as_square,
    as_vector,
    check_count,
    nan_like,
)
from lightning_sym.functional.nearest_mean import nearest_mean_disagreements


class NeuralCollapse(NamedTuple):
    r"""The measures of neural collapse; each is 0 at full collapse.

    With the class means :math:`\mu_c`, their mean :math:`\mu_G` and the centred means
    :math:`m_c = \mu_c - \mu_G`:

    Attributes:
        nc1: within-class variability
            :math:`\operatorname{tr}(\Sigma_W \Sigma_B^\dagger) / C`, at least 0; infinite when all
            class means coincide; NaN when no class has two samples, since nothing can vary then.
            :math:`\Sigma_W` averages over samples, :math:`\Sigma_B` over classes.
        nc2: distance from the largest possible angles, the mean over pairs of
            :math:`|\cos(m_c, m_{c'}) + 1/(C - 1)|`, in ``[0, 1 + 1/(C-1)]``.
        nc2_angles: standard deviation of those cosines (equal angles).
        nc2_norms: standard deviation over mean of :math:`\lVert m_c \rVert` (equal norms).
        nc3: self-duality, :math:`\lVert W/\lVert W\rVert_F - M/\lVert M\rVert_F \rVert_F^2` with the
            :math:`m_c` as rows of M, in ``[0, 4]``; ``None`` without a weight.
        nc4: share of samples on which the classifier disagrees with the nearest class mean, in
            ``[0, 1]``; ``None`` without a weight, and from sums, where single samples are gone.
    """

    nc1: Tensor
    nc2: Tensor
    nc2_angles: Tensor
    nc2_norms: Tensor
    nc3: Tensor | None
    nc4: Tensor | None


def neural_collapse(
    features: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    num_classes: int | None = None,
) -> NeuralCollapse:
    """Neural collapse of penultimate features.

    The paper's data are balanced. Otherwise its global mean would lean towards large classes; the
    mean of class means used here equals it for balanced data and treats classes alike.

    A class of few samples looks collapsed: with n samples a class NC1 is too small by about 1/n.

    Args:
        features: float tensor ``[N, D]``, the classifier's input; half types are computed in float32.
        labels: integer tensor ``[N]`` with values in ``[0, K)``.
        weight: classifier weight ``[K, D]``, for NC3 and NC4.
        bias: classifier bias ``[K]``, for NC4.
        num_classes: K; the weight's, or the largest label plus one if ``None``.

    Returns:
        :class:`NeuralCollapse`; NaN for fewer than two classes with samples or non-finite features.

    Raises:
        ValueError: if shapes do not fit or a label is out of range.
        TypeError: if the labels are not integers, or another tensor not real and floating-point.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
        >>> neural_collapse(x, torch.tensor([0, 0, 1, 1]), torch.tensor([[2.0, 0.0], [-2.0, 0.0]])).nc3
        tensor(0.)
    """
    x_ND = as_matrix(features, name="features")
    labels_N = as_labels(labels)
    if labels_N.shape != x_ND.shape[:1]:
        raise ValueError(f"labels must be [N={x_ND.shape[0]}], got {tuple(labels.shape)}")
    if num_classes is None:
        num_classes = int(labels_N.max()) + 1
        num_classes = num_classes if weight is None else as_matrix(weight, name="weight").shape[0]
    check_count("num_classes", num_classes)
    as_labels(labels_N, classes=num_classes)
    weight_KD, bias_K = _classifier(weight, bias, classes=num_classes, width=x_ND.shape[1])
    count_K = torch.zeros(num_classes, dtype=x_ND.dtype, device=x_ND.device)
    count_K = count_K.index_add(0, labels_N, torch.ones_like(x_ND[:, 0]))
    sum_KD = x_ND.new_zeros(num_classes, x_ND.shape[1]).index_add(0, labels_N, x_ND)
    mean_KD = sum_KD / count_K.clamp_min(1)[:, None]
    within_ND = x_ND - mean_KD[labels_N]
    within_DD = within_ND.mT @ within_ND / len(x_ND)
    present_K = count_K > 0
    result = _measures(mean_KD[present_K], within_DD, _rows(weight_KD, present_K), largest=count_K.max())
    if weight_KD is None:
        return result
    if int(present_K.sum()) < 2:
        return result._replace(nc4=nan_like(x_ND))
    wrong = nearest_mean_disagreements(x_ND, count_K, sum_KD, weight_KD, bias_K)
    return result._replace(nc4=wrong / len(x_ND))


def neural_collapse_from_sums(
    class_counts: Tensor,
    class_sums: Tensor,
    second_sum: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> NeuralCollapse:
    """Neural collapse from sums over samples, which add up over batches and ranks.

    Args:
        class_counts: samples of each class, ``[K]``.
        class_sums: sum of the features of each class, ``[K, D]``.
        second_sum: sum of ``x x^T`` over the samples of all classes, ``[D, D]``; float64 unless means
            are small against spreads, since the class means are subtracted from it.
        weight: classifier weight ``[K, D]``, for NC3.
        bias: accepted so that a layer's parameters can be passed on; no measure here depends on it.

    Returns:
        :class:`NeuralCollapse`, with ``nc4`` always ``None``; NaN for fewer than two classes with
        samples or non-finite sums or counts.

    Raises:
        TypeError: if an argument is not a tensor of real numbers.
        ValueError: if shapes do not fit or a count is negative.

    Example:
        >>> sums = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
        >>> second = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
        >>> neural_collapse_from_sums(torch.tensor([2.0, 2.0]), sums, second).nc1
        tensor(0.)
    """
    sum_KD = as_matrix(class_sums, name="class_sums")
    second_DD = as_square(second_sum, name="second_sum")
    count_K = as_counts(class_counts, name="class_counts")
    if count_K.shape != sum_KD.shape[:1]:
        raise ValueError(f"class_counts must be [K={sum_KD.shape[0]}], got {tuple(class_counts.shape)}")
    if (count_K < 0).any():
        raise ValueError(f"class_counts must be at least 0, got {float(count_K.min())}")
    if second_DD.shape[0] != sum_KD.shape[1]:
        raise ValueError(f"second_sum must be [D={sum_KD.shape[1]}, D], got {tuple(second_DD.shape)}")
    weight_KD, _ = _classifier(weight, bias, classes=sum_KD.shape[0], width=sum_KD.shape[1])
    count_K = count_K.to(sum_KD)
    # A class without a sample is left out; one whose count or sum is not known must not be.
    known_K = count_K.isfinite() & sum_KD.isfinite().all(dim=1)
    sum_KD = torch.where(known_K[:, None], sum_KD, torch.nan)
    present_K = (count_K > 0) | ~known_K
    mean_CD = sum_KD[present_K] / count_K[present_K, None]
    between_DD = mean_CD.mT @ (mean_CD * count_K[present_K, None])
    within_DD = (second_DD - between_DD.to(second_DD)) / count_K.sum().clamp_min(1).to(second_DD)
    rows_CD = _rows(weight_KD, present_K)
    return _measures(mean_CD, within_DD.to(mean_CD), rows_CD, largest=count_K.max())


def _classifier(
    weight: Tensor | None, bias: Tensor | None, *, classes: int, width: int
) -> tuple[Tensor | None, Tensor | None]:
    weight_KD = None if weight is None else as_matrix(weight, name="weight")
    bias_K = None if bias is None else as_vector(bias, name="bias")
    if weight_KD is not None and weight_KD.shape != (classes, width):
        raise ValueError(f"weight must be [K={classes}, D={width}], got {tuple(weight_KD.shape)}")
    if bias_K is not None and bias_K.shape != (classes,):
        raise ValueError(f"bias must be [K={classes}], got {tuple(bias_K.shape)}")
    return weight_KD, bias_K


def _rows(weight_KD: Tensor | None, present_K: Tensor) -> Tensor | None:
    return None if weight_KD is None else weight_KD[present_K]


def _measures(
    mean_CD: Tensor, within_DD: Tensor, weight_CD: Tensor | None, *, largest: Tensor
) -> NeuralCollapse:
    classes = mean_CD.shape[0]
    if classes < 2 or not (mean_CD.isfinite().all() and within_DD.isfinite().all()):
        nan = nan_like(within_DD)
        return NeuralCollapse(nan, nan, nan, nan, None if weight_CD is None else nan, None)
    m_CD = mean_CD - mean_CD.mean(dim=0)
    # Below this, what is left of the centred means is rounding.
    floor = mean_CD.detach().abs().max() * torch.finfo(m_CD.dtype).eps * m_CD.numel() ** 0.5
    nc1 = _variability(m_CD, within_DD, floor) if largest > 1 else nan_like(m_CD)
    return NeuralCollapse(nc1, *_simplex(m_CD, floor), _duality(m_CD, weight_CD, floor), None)


def _variability(m_CD: Tensor, within_DD: Tensor, floor: Tensor) -> Tensor:
    """Return NC1; the pseudo-inverse acts on at most C - 1 directions, those of the centred means."""
    classes = m_CD.shape[0]
    _, sigma_R, v_RD = torch.linalg.svd(m_CD, full_matrices=False)
    cut = torch.maximum(floor, sigma_R[0].detach() * torch.finfo(m_CD.dtype).eps * max(m_CD.shape))
    kept = int((sigma_R > cut)[: classes - 1].sum())
    if not kept:
        return within_DD.new_full((), torch.inf)
    v_RD, sigma_R = v_RD[:kept], sigma_R[:kept]
    inside_R = ((v_RD @ within_DD) * v_RD).sum(dim=1)
    return (inside_R / sigma_R.square()).sum().clamp_min(0)  # C Sigma_W / (C sigma^2): C cancels


def _simplex(m_CD: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return NC2: angles from the largest, spread of angles, spread of norms."""
    norm_C = torch.linalg.vector_norm(m_CD, dim=1)
    classes = m_CD.shape[0]
    if not norm_C.max() > floor:
        nan = nan_like(m_CD)
        return nan, nan, nan
    unit_CD = m_CD / torch.where(norm_C > 0, norm_C, 1.0)[:, None]
    one, other = torch.triu_indices(classes, classes, 1, device=m_CD.device)
    cosine_P = (unit_CD @ unit_CD.mT)[one, other]
    return (
        (cosine_P + 1 / (classes - 1)).abs().mean(),
        cosine_P.std(correction=0),
        norm_C.std(correction=0) / norm_C.mean(),
    )


def _duality(m_CD: Tensor, weight_CD: Tensor | None, floor: Tensor) -> Tensor | None:
    if weight_CD is None:
        return None
    weight_CD = weight_CD.to(m_CD)
    w_size, m_size = weight_CD.norm(), m_CD.norm()
    if not (w_size > 0 and m_size > floor):
        return nan_like(m_CD)
    return (weight_CD / w_size - m_CD / m_size).square().sum()
