"""How good are features? A nearest-neighbour vote and a linear classifier, without tuning.

Shape letters: M samples of the bank, N queries, F features, K neighbours, G classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_sym.functional._checks import (
    as_labels,
    as_matrix,
    check_count,
    check_number,
    check_same_dtype,
)


def neighbour_vote(
    queries: Tensor, *, bank: Tensor, labels: Tensor, classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    r"""Class scores of a weighted vote of the nearest neighbours (Wu et al., 2018, arXiv:1805.01978).

    Features are scaled to length one; a neighbour at cosine similarity s votes for its class with
    weight :math:`e^{s / \tau}`.

    Args:
        queries: ``[N, F]``; half types are computed in float32.
        bank: features of labelled samples, ``[M, F]``.
        labels: their classes, ``int64 [M]``.
        classes: number of classes G.
        k: neighbours that vote; all M if there are fewer.
        temperature: the paper's :math:`\tau`.

    Returns:
        ``[N, G]``, rows sum to one; the prediction is the argmax. NaN for queries that are not finite,
        and everywhere if the bank is not.

    Raises:
        TypeError: if features are not real floating-point tensors of one precision or labels not
            integers.
        ValueError: if shapes do not fit, a label is not in ``[0, classes)``, or ``k`` or the
            temperature is not positive.

    Example:
        >>> bank, labels = torch.eye(3), torch.tensor([0, 1, 1])
        >>> neighbour_vote(torch.tensor([[1.0, 0.1, 0.0]]), bank=bank, labels=labels, classes=2, k=1)
        tensor([[1., 0.]])
    """
    q_NF, b_MF = as_matrix(queries, name="queries"), as_matrix(bank, name="bank")
    check_same_dtype({"queries": q_NF, "bank": b_MF})
    check_count("classes", classes)
    labels = as_labels(labels, classes=classes)
    if q_NF.shape[1] != b_MF.shape[1] or labels.shape != b_MF.shape[:1]:
        raise ValueError(
            f"queries, bank and labels must be [N, F], [M, F] and [M], got {tuple(queries.shape)}, "
            f"{tuple(bank.shape)} and {tuple(labels.shape)}"
        )
    check_count("k", k)
    check_number("temperature", temperature, above=0)
    if not b_MF.isfinite().all():
        return b_MF.new_full((len(q_NF), classes), torch.nan)
    bank_FM = F.normalize(b_MF, dim=1).mT
    scores = []
    for part_NF in F.normalize(q_NF, dim=1).split(1024):  # keeps the similarities to 1024 x M at a time
        top_NK, index_NK = (part_NF @ bank_FM).topk(min(k, len(b_MF)), dim=1)
        votes_NK = torch.softmax(top_NK / temperature, dim=1)
        part = votes_NK.new_zeros(len(part_NF), classes)
        scores.append(part.scatter_add_(1, labels[index_NK], votes_NK))
    return torch.cat(scores)


def linear_classifier(
    features: Tensor, *, labels: Tensor, classes: int, l2: float = 1e-3, steps: int = 100
) -> tuple[Tensor, Tensor]:
    r"""Multinomial logistic regression on standardised features, to convergence by L-BFGS.

    .. math:: \min_{W, b} \frac1M \sum_m -\log \operatorname{softmax}(W x_m + b)_{y_m}
              + \frac{\lambda}{2} \lVert W \rVert_F^2

    a convex problem: no seed, learning rate or schedule to choose. The standardisation is folded
    into what is returned.

    Args:
        features: ``[M, F]``; half types are computed in float32.
        labels: ``int64 [M]``.
        classes: number of classes G.
        l2: :math:`\lambda`, for features of variance one.
        steps: L-BFGS iterations at most.

    Returns:
        Weight ``[G, F]`` and bias ``[G]`` for features as they come; NaN if these are not finite.

    Raises:
        TypeError: if features are not a real floating-point tensor or labels not integers.
        ValueError: if shapes do not fit, a label is not in ``[0, classes)`` or ``l2`` is negative.
    """
    x_MF = as_matrix(features, name="features")
    check_count("classes", classes)
    check_count("steps", steps)
    labels = as_labels(labels, classes=classes)
    if labels.shape != x_MF.shape[:1]:
        raise ValueError(f"labels must be {tuple(x_MF.shape[:1])}, got {tuple(labels.shape)}")
    check_number("l2", l2, least=0)
    if not x_MF.isfinite().all():
        return x_MF.new_full((classes, x_MF.shape[1]), torch.nan), x_MF.new_full((classes,), torch.nan)
    mean_F = x_MF.mean(dim=0)
    scale_F = x_MF.std(dim=0, correction=0)
    scale_F = scale_F.where(scale_F > 0, 1.0)
    x_MF = ((x_MF - mean_F) / scale_F).detach()
    weight = torch.zeros(classes, x_MF.shape[1], dtype=x_MF.dtype, device=x_MF.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=x_MF.dtype, device=x_MF.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(x_MF, weight, bias), labels) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad(), torch.autocast(x_MF.device.type, enabled=False):
        solver.step(closure)  # type: ignore[arg-type]
    folded = weight.detach() / scale_F
    return folded, bias.detach() - folded @ mean_F
