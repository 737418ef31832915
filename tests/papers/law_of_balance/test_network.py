"""The diagonal network computes its product, and SGD spreads it as its solution says."""

import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.papers.law_of_balance import DiagonalLinearNetwork
from tests.models import trainer


@pytest.mark.parametrize(("depth", "width"), [(0, 3), (1, 1), (1, 4), (3, 2)])
def test_the_output_is_the_sum_of_products(depth, width):
    network = DiagonalLinearNetwork(depth, width=width, start=0.7, imbalance=0.4 if depth else 0.0)
    assert network.slope.item() == pytest.approx(0.7)
    weights = [w.detach().flatten() for w in network.parameters()]
    assert len(weights) == depth + 1
    if depth:
        assert float((weights[0] / weights[-1]).log().mean()) == pytest.approx(0.4)
    with torch.no_grad():
        for w in network.parameters():
            w.add_(torch.randn(w.shape, generator=torch.Generator().manual_seed(w.numel())))
    v = sum(math.prod(float(w[i]) for w in weights) for i in range(width))
    x = torch.tensor([1.0, -2.0, 0.5])
    assert network(x).tolist() == pytest.approx([v * float(a) for a in x])
    assert network.slope.item() == pytest.approx(v)


def test_sgd_spreads_as_the_solution_says():
    """Many copies at once by hand, small steps: mean and deviation of v over time."""
    network = DiagonalLinearNetwork(1, start=0.9, lr=0.01)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, generator=generator)
    y = x + 0.5 * torch.randn(4000, generator=generator)
    u, w = (torch.full((3000,), float(p.detach())).double() for p in network.parameters())
    sums = torch.zeros(3)
    for step in range(1200):
        pick = torch.randint(0, 4000, (3000,), generator=generator)
        slope = 2 * (u * w * x[pick] - y[pick]) * x[pick]
        u, w = u - network.lr * slope * w, w - network.lr * slope * u
        if step >= 400:
            v = u * w
            sums += torch.tensor([1.0, float(v.mean()), float(v.square().mean())])
    mean = float(sums[1] / sums[0])
    deviation = math.sqrt(float(sums[2] / sums[0]) - mean**2)
    expected = network.solution(x, y=y).moments(network.lr)
    assert (mean, deviation) == pytest.approx(expected, rel=0.03)


def test_it_is_trained_by_the_steps_that_are_meant():
    x, y = torch.tensor([1.0, -0.5]), torch.tensor([0.3, 0.2])
    network = DiagonalLinearNetwork(2, width=1, start=0.5, imbalance=0.3, lr=0.1, decay=0.05)
    before = [w.item() for w in network.parameters()]
    trainer(max_epochs=1).fit(network, DataLoader(TensorDataset(x, y), batch_size=2))
    slope = sum(2 * (0.5 * a - b) * a for a, b in zip(x.tolist(), y.tolist(), strict=True)) / 2
    for old, new in zip(before, network.parameters(), strict=True):
        assert new.item() == pytest.approx(old - 0.1 * (slope * 0.5 / old + 2 * 0.05 * old))


def test_bad_input_is_named():
    for options, message in (
        ({"depth": -1}, "depth must be an integer of at least 0, got -1"),
        ({"width": 0}, "width must be an integer of at least 1, got 0"),
        ({"start": 0.0}, "start must be positive, got 0.0"),
        ({"depth": 0, "imbalance": 1.0}, "imbalance must be finite, and 0 at depth 0, got 1.0"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"decay": -1.0}, "decay must be at least 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            DiagonalLinearNetwork(**options)
    with pytest.raises(ValueError, match=r"x and y must be \[N\]"):
        DiagonalLinearNetwork().solution(torch.ones(2), y=torch.ones(3))
    with pytest.raises(ValueError, match="closed form at depth 1, got depth=2"):
        DiagonalLinearNetwork(2, decay=0.1).solution(torch.ones(2), y=torch.ones(2))
