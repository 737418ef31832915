"""Tangent kernels: closed forms, a loop over single derivatives, sketches on average."""

import pytest
import torch
from torch import nn

from lightning_sym.functional.tangent import (
    CountSketch,
    kernel_move,
    layer_alignment,
    readouts,
    tangent_kernel,
)
from tests.models import mlp


def exact(net, x, rates=None):
    """Single outputs of single samples, one parameter tensor at a time."""
    parameters = list(net.parameters())
    rates = rates or [1.0] * len(parameters)
    kernel = torch.zeros(len(x), len(x)).double()
    for rate, parameter in zip(rates, parameters, strict=True):
        for output in range(net(x).shape[1]):
            rows = [torch.autograd.grad(net(x[n])[output], parameter)[0].flatten() for n in range(len(x))]
            for n, a in enumerate(rows):
                for m, b in enumerate(rows):
                    kernel[n, m] += rate * float((a * b).sum()) / net(x).shape[1]
    return kernel


def network():
    torch.manual_seed(0)
    return mlp(4, 7, 5, 3).double(), torch.randn(5, 4).double()


def test_kernel_is_that_of_single_derivatives():
    net, x = network()
    parameters = list(net.parameters())
    torch.testing.assert_close(tangent_kernel(net, parameters, x), exact(net, x))
    rates = [0.5, 0.0, 2.0, 1.0, 3.0, 0.1]
    torch.testing.assert_close(tangent_kernel(net, parameters, x, rates=rates), exact(net, x, rates))
    assert all(p.grad is None for p in parameters)


def test_parameters_that_play_no_part_count_nothing():
    net, x = network()
    spare = nn.Parameter(torch.ones(3).double())
    torch.testing.assert_close(tangent_kernel(net, [*net.parameters(), spare], x), exact(net, x))
    assert torch.equal(tangent_kernel(lambda x: x * 2, [spare], x), torch.zeros(5, 5).double())


def test_sketches_and_readouts_are_right_on_average():
    net, x = network()
    wanted, parameters = exact(net, x), list(net.parameters())
    for options in ({"sketch": 30}, {"most_outputs": 2}, {"sketch": 30, "most_outputs": 1}):
        draws = torch.stack([tangent_kernel(net, parameters, x, seed=s, **options) for s in range(300)])
        error = draws.std(0) / 300**0.5
        assert (draws[0] - wanted).abs().max() > 1e-6  # it is a sketch
        assert ((draws.mean(0) - wanted).abs() < 5 * error + 1e-12).all(), options


def test_a_sketch_is_linear_and_has_the_stated_spread():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, 1000, generator=generator).double()
    errors = []
    for seed in range(200):
        sketch = CountSketch(1000, size=100, seed=seed)
        torch.testing.assert_close(sketch(a + 2 * b), sketch(a) + 2 * sketch(b))
        errors.append(float((sketch(a) * sketch(b)).sum() - (a * b).sum()))
    bound = (2 / 100) ** 0.5 * float(a.norm() * b.norm())
    assert 0.4 * bound < torch.tensor(errors).std() < bound
    assert torch.equal(CountSketch(1000, size=1000)(a), a)


def test_readouts_average_to_the_identity():
    assert torch.equal(readouts(3, most=None), torch.eye(3))
    v = readouts(6, most=4)
    assert v.shape == (4, 6)
    torch.testing.assert_close(v.square().sum(1), torch.ones(4))
    mean = torch.stack([readouts(6, most=4, seed=s) for s in range(500)]).flatten(0, 1)
    torch.testing.assert_close(mean.mT @ mean / len(mean), torch.eye(6) / 6, atol=0.03, rtol=0)


def test_kernel_move_degenerate():
    zero = torch.zeros(2, 2)
    assert all(value.isnan() for value in kernel_move(zero, torch.eye(2)))
    move = kernel_move(torch.eye(2), zero)
    assert move.change == 1
    assert move.cosine.isnan()
    assert move.growth == 0
    generator = torch.Generator().manual_seed(0)
    k, other = (a @ a.mT for a in torch.randn(2, 4, 4, generator=generator).double())
    move = kernel_move(k, other)
    torch.testing.assert_close(kernel_move(3 * k, 3 * other), move)
    assert move.cosine == pytest.approx(
        float((k * other).sum() / (k.square().sum() * other.square().sum()) ** 0.5)
    )


def test_layer_alignment_values():
    generator = torch.Generator().manual_seed(0)
    h, w = torch.randn(50, 400, generator=generator), torch.randn(30, 400, generator=generator)
    total = sum(float((w @ row).square().sum()) for row in h) ** 0.5
    assert layer_alignment(h, w).item() == pytest.approx(total / float(h.norm() * w.norm()), rel=1e-5)
    assert layer_alignment(h, w).item() == pytest.approx(400**-0.5, rel=0.1)
    assert layer_alignment(h[:1], 2 * h[:1]) == pytest.approx(1.0)
    assert layer_alignment(h, 0 * w).isnan()


def test_bad_input_is_named():
    net, x = network()
    parameters = list(net.parameters())
    for call, error, message in (
        (lambda: tangent_kernel(net, parameters, x[:0]), ValueError, "must not be empty, got 0 and 6"),
        (lambda: tangent_kernel(net, parameters, x, rates=[1.0]), ValueError, "rates must be 6 numbers"),
        (lambda: tangent_kernel(lambda x: [x], parameters, x), TypeError, "floating-point tensor, got list"),
        (lambda: CountSketch(3, size=0), ValueError, "size must be at least 1, got 0"),
        (lambda: CountSketch(3, size=2)(x), ValueError, r"vectors must be \[V, 3\], got \(5, 4\)"),
        (lambda: kernel_move(x[:2, :2], x[:3, :3]), ValueError, "must be of one shape"),
        (lambda: layer_alignment(x, x[:, :2]), ValueError, r"weight \[O, D\]"),
    ):
        with pytest.raises(error, match=message):
            call()
