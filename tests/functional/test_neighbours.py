"""Neighbour votes and linear classifiers against naive twins."""

import math

import pytest
import torch

from lightning_sym.functional.neighbours import linear_classifier, neighbour_vote


def clusters(n=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centres = 2 * torch.randn(3, 5, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(n, 5, generator=generator, dtype=torch.float64), labels


def test_the_vote_equals_the_slow_twin():
    bank, labels = clusters()
    queries, _ = clusters(n=7, seed=1)
    scores = neighbour_vote(queries, bank=bank, labels=labels, classes=3, k=5, temperature=0.1)
    for query, row in zip(queries, scores, strict=True):
        near = []
        for other, label in zip(bank, labels, strict=True):
            cosine = (query @ other / (query.norm() * other.norm())).item()
            near.append((cosine, label.item()))
        near = sorted(near, reverse=True)[:5]
        votes = [sum(math.exp(s / 0.1) for s, label in near if label == g) for g in range(3)]
        assert row.tolist() == pytest.approx([vote / sum(votes) for vote in votes])


def test_few_samples_all_vote_and_parts_are_joined():
    scores = neighbour_vote(torch.ones(2500, 2), bank=torch.eye(2), labels=torch.tensor([0, 1]), classes=4)
    assert scores.shape == (2500, 4)
    torch.testing.assert_close(scores, torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(2500, 4))


def test_the_classifier_is_at_the_minimum_of_its_loss():
    x, y = clusters()
    weight, bias = linear_classifier(x, labels=y, classes=3, l2=0.05, steps=300)
    scale = x.std(dim=0, correction=0)
    w = (weight * scale).requires_grad_()
    b = (bias + weight @ x.mean(0)).requires_grad_()
    loss = 0.05 / 2 * (w**2).sum()
    for row, label in zip((x - x.mean(0)) / scale, y, strict=True):
        logits = w @ row + b
        loss = loss - (logits[label] - logits.exp().sum().log()) / len(x)
    for gradient in torch.autograd.grad(loss, [w, b]):
        assert gradient.abs().max() < 1e-5
    assert ((x @ weight.mT + bias).argmax(1) == y).double().mean() > 0.9


def test_constant_features_and_no_grad_are_no_obstacle():
    x, y = clusters()
    x[:, 2] = 3.0
    with torch.no_grad():
        weight, _ = linear_classifier(x, labels=y, classes=3)
    assert weight.isfinite().all()
    assert not weight.requires_grad


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\), got 0 to 2"):
        neighbour_vote(torch.ones(1, 2), bank=torch.ones(3, 2), labels=torch.arange(3), classes=2)
    with pytest.raises(ValueError, match=r"k must be at least 1, got 0"):
        neighbour_vote(torch.ones(1, 2), bank=torch.ones(3, 2), labels=torch.arange(3), classes=3, k=0)
    with pytest.raises(ValueError, match=r"got \(1, 4\), \(3, 2\) and \(3,\)"):
        neighbour_vote(torch.ones(1, 4), bank=torch.ones(3, 2), labels=torch.arange(3), classes=3)
    with pytest.raises(ValueError, match=r"labels must be \(3,\), got \(2,\)"):
        linear_classifier(torch.ones(3, 2), labels=torch.arange(2), classes=3)
    with pytest.raises(TypeError, match=r"labels must be integers, got torch\.float32"):
        linear_classifier(torch.ones(3, 2), labels=torch.ones(3), classes=3)
