"""Stepwise learning: closed forms against simulated gradient flow and naive linear algebra."""

import math

import pytest
import torch

from lightning_sym.functional import tangent_kernel
from lightning_sym.losses import cross_covariance_loss
from lightning_sym.papers import stepwise_ssl as stepwise


def pairs(n=40, m=6, seed=0):
    """Views that share a signal of falling strength: well separated positive modes."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 0.75, 0.55, 0.35, 0.2, 0.1], dtype=torch.float64)[:m]
    signal = torch.randn(n, m, generator=generator, dtype=torch.float64) * scale
    noise = torch.randn(2, n, m, generator=generator, dtype=torch.float64) * 0.1
    return signal + noise[0], signal + noise[1]


def simulate(x, x_other, weight, lr, steps, every=1):
    """Full-batch gradient descent by autograd on the loss as users call it."""
    weight = weight.clone().requires_grad_()
    spectra = []
    for step in range(steps + 1):
        if step % every == 0:
            z, z_other = x @ weight.detach().mT, x_other @ weight.detach().mT
            c = (z.mT @ z_other + z_other.mT @ z) / (2 * len(z))
            spectra.append(torch.linalg.eigvalsh(c).flip(0))
        loss = cross_covariance_loss(x @ weight.mT, x_other @ weight.mT)
        (gradient,) = torch.autograd.grad(loss, weight)
        weight = (weight.detach() - lr * gradient).requires_grad_()
    return weight.detach(), torch.stack(spectra)


def start(d=3, m=6, scale=1e-3, seed=1):
    return scale * torch.randn(d, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gamma_is_the_mean_of_outer_products():
    x, x_other = pairs()
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for a, b in zip(x, x_other, strict=True):
        for i in range(6):
            for j in range(6):
                expected[i, j] += (a[i] * b[j] + b[i] * a[j]) / (2 * len(x))
    torch.testing.assert_close(stepwise.pair_correlation(x, x_other=x_other), expected)


def test_modes_are_eigenpairs_in_falling_order():
    x, x_other = pairs()
    gamma = stepwise.pair_correlation(x, x_other=x_other)
    values, vectors = stepwise.modes(gamma, count=4)
    assert (values.diff() <= 0).all()
    torch.testing.assert_close(gamma @ vectors, vectors * values)


def test_a_linear_kernel_has_the_modes_of_gamma():
    x, x_other = pairs(n=12)
    both = torch.cat([x, x_other])
    operator = stepwise.kernel_correlation(both @ both.mT)
    torch.testing.assert_close(operator, operator.mT, rtol=0, atol=1e-12)
    expected = stepwise.modes(stepwise.pair_correlation(x, x_other=x_other))[0]
    values = stepwise.modes(operator)[0]
    torch.testing.assert_close(values[:5], expected[:5], rtol=1e-8, atol=1e-10)


def test_the_kernels_final_embedding_is_the_linear_one():
    x, x_other = pairs(n=12)
    both = torch.cat([x, x_other])
    values, vectors = stepwise.modes(stepwise.pair_correlation(x, x_other=x_other), count=3)
    linear = both @ stepwise.final_weight(values, vectors=vectors).mT
    kernel = both @ both.mT
    embedded = stepwise.final_embedding(kernel, kernel=kernel, dimensions=3)
    torch.testing.assert_close(embedded @ embedded.mT, linear @ linear.mT, rtol=1e-6, atol=1e-8)


def test_the_tangent_kernel_of_a_linear_model_has_the_modes_of_gamma():
    x, x_other = pairs(n=8)
    layer = torch.nn.Linear(6, 4, bias=False, dtype=torch.float64)
    kernel = tangent_kernel(
        layer, list(layer.parameters()), torch.cat([x, x_other]), most_outputs=None, sketch=None
    )
    values = stepwise.modes(stepwise.kernel_correlation(kernel))[0]
    expected = stepwise.modes(stepwise.pair_correlation(x, x_other=x_other))[0]
    torch.testing.assert_close(values[:5], expected[:5], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("gamma", [1.3, 0.2, 0.0, -0.4])
def test_singular_values_solve_their_differential_equation(gamma):
    s, dt, out = 0.05, 1e-4, []
    for step in range(20001):
        if step % 5000 == 0:
            out.append(s)
        half = s + dt / 2 * 4 * gamma * s * (1 - gamma * s * s)
        s += dt * 4 * gamma * half * (1 - gamma * half * half)
    t = torch.arange(5) * 0.5
    values = stepwise.singular_values(t, gamma=torch.tensor([gamma]), s0=0.05)
    torch.testing.assert_close(values[:, 0], torch.tensor(out, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_singular_values_far_out_are_the_fixed_points():
    gamma = torch.tensor([2.0, 1e-3, 0.0, -1.0])
    values = stepwise.singular_values(1e9, gamma=gamma, s0=0.1)
    torch.testing.assert_close(
        values, torch.tensor([2**-0.5, 1e-3**-0.5, 0.1, 0.0]).double(), rtol=1e-6, atol=0
    )
    assert (stepwise.singular_values(1e9, gamma=gamma, s0=0.0) == 0).all()


def test_learning_times():
    gamma = torch.tensor([1.0, 0.5, 0.0, -1.0])
    exact = stepwise.learning_times(gamma, s0=0.1, exact=True)
    half = stepwise.embedding_eigenvalues(exact[:2], gamma=gamma[:2], s0=0.1).diagonal()
    torch.testing.assert_close(half, torch.full((2,), 0.5, dtype=torch.float64))
    paper = stepwise.learning_times(gamma, s0=0.1)
    assert paper[0].item() == pytest.approx(math.log(100) / 8)
    assert exact[:2].tolist() == pytest.approx(paper[:2].tolist(), rel=0.01)
    assert paper[2:].tolist() == [math.inf, math.inf]
    assert torch.equal(stepwise.learning_times(gamma, 0.1), paper)  # as the formulas are written
    at_half = stepwise.singular_values(paper[0], gamma, 0.1)[0]
    assert at_half.item() == pytest.approx(0.5**0.5, rel=0.01)


def test_an_aligned_start_follows_the_closed_form():
    x, x_other = pairs()
    gamma, vectors = stepwise.modes(stepwise.pair_correlation(x, x_other=x_other), count=3)
    s0 = torch.tensor([0.02, 0.03, 0.05], dtype=torch.float64)
    turn = torch.linalg.qr(start(3, 3, scale=1.0)).Q
    lr = 1e-3
    _, spectra = simulate(x, x_other, turn @ torch.diag(s0) @ vectors.mT, lr, 4000, every=200)
    t = torch.arange(0, 4001, 200) * lr
    predicted = stepwise.embedding_eigenvalues(t, gamma=gamma, s0=s0).sort(descending=True).values
    torch.testing.assert_close(spectra, predicted, rtol=0, atol=5e-3)  # a first-order integrator
    torch.testing.assert_close(
        (1 - spectra).square().sum(1), stepwise.staircase_loss(t, gamma=gamma, s0=s0), rtol=0, atol=0.02
    )


def test_a_generic_small_start_meets_its_dates_and_the_final_map():
    x, x_other = pairs()
    weight, lr = start(scale=1e-6), 1e-2
    prediction = stepwise.Staircase.from_pairs(x, x_other=x_other, weight=weight, lr=lr)
    final, spectra = simulate(x, x_other, weight, lr, 5000)
    measured = (spectra < 0.5).sum(dim=0)
    assert measured.tolist() == pytest.approx(prediction.dates().tolist(), rel=0.05)
    gamma, vectors = stepwise.modes(stepwise.pair_correlation(x, x_other=x_other), count=3)
    expected = stepwise.final_weight(gamma, vectors=vectors)
    gram = expected.mT @ expected
    assert (final.mT @ final - gram).norm() / gram.norm() < 0.02
    torch.testing.assert_close(prediction.eigenvalues(5000.0), spectra[-1], rtol=0, atol=1e-3)


def test_aligned_scales_are_gram_schmidt():
    weight = start(4, 6, scale=1.0)
    vectors = torch.linalg.qr(start(6, 6, scale=1.0, seed=3)).Q
    seen, expected = [], []
    for j in range(4):
        left = weight @ vectors[:, j]
        for direction in seen:
            left = left - (left @ direction) * direction
        expected.append(left.norm().item())
        seen.append(left / left.norm())
    assert stepwise.aligned_scales(weight, vectors=vectors).tolist() == pytest.approx(expected)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"got \(4, 3\) and \(4, 2\)"):
        stepwise.pair_correlation(torch.ones(4, 3), x_other=torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"kernel must be \[2N, 2N\] over both views, got \(3, 3\)"):
        stepwise.kernel_correlation(torch.eye(3))
    with pytest.raises(ValueError, match=r"s0 must be one number or \(2,\), got \(3,\)"):
        stepwise.learning_times(torch.ones(2), s0=torch.ones(3))
    with pytest.raises(ValueError, match="s0 must be at least 0, got -1"):
        stepwise.singular_values(1.0, gamma=torch.ones(2), s0=-1.0)
    with pytest.raises(ValueError, match="gamma must be positive to be learned"):
        stepwise.final_weight(torch.tensor([1.0, -1.0]), vectors=torch.eye(2))
    with pytest.raises(ValueError, match="dimensions=6 is more than the kernel can learn"):
        stepwise.final_embedding(torch.eye(6), kernel=torch.eye(6), dimensions=6)
    with pytest.raises(ValueError, match="time_per_step must be positive, got 0"):
        stepwise.Staircase(torch.ones(2), torch.ones(2), 0.0)
    with pytest.raises(ValueError, match=r"count must be in \[1, 3\], got 4"):
        stepwise.modes(torch.eye(3), count=4)


def test_what_is_not_finite_or_empty_is_refused():
    nan, good = torch.tensor([[1.0, math.nan], [math.nan, 1.0]]), torch.eye(2)
    for call, message in (
        (lambda: stepwise.kernel_correlation(nan), "kernel must be finite"),
        (lambda: stepwise.final_embedding(good, kernel=nan, dimensions=1), "kernel must be finite"),
        (lambda: stepwise.modes(nan), "gamma must be finite"),
        (lambda: stepwise.modes(torch.ones(0, 0)), r"gamma must be a square matrix \[M >= 1, M\]"),
        (lambda: stepwise.learning_times(nan[0], s0=0.1), "gamma must be finite"),
        (lambda: stepwise.singular_values(1.0, gamma=nan[0], s0=0.1), "gamma must be finite"),
        (lambda: stepwise.singular_values(1.0, gamma=good[0], s0=math.nan), "s0 must be at least 0, got nan"),
        (lambda: stepwise.aligned_scales(good, vectors=torch.ones(2, 0)), "and not empty"),
        (lambda: stepwise.final_weight(torch.ones(0), vectors=torch.ones(2, 0)), r"\[J >= 1\]"),
        (
            lambda: stepwise.pair_correlation(torch.ones(0, 2), x_other=torch.ones(0, 2)),
            r"\[N >= 1, M >= 1\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
