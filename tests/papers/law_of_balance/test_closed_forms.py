"""The stationary distribution against the differential equation, quadrature and its own limits."""

import math

import pytest
import torch

from lightning_sym.papers.law_of_balance import DiagonalNetwork, noise_matrices, simulate

LINE = DiagonalNetwork.noisy_line()


@pytest.mark.parametrize(("temperature", "mean", "std"), [(0.05, 0.938, 0.346), (0.1, 0.845, 0.499)])
def test_moments_are_those_of_the_simulation(temperature, mean, std):
    assert LINE.moments(temperature) == pytest.approx((mean, std), abs=3e-3)
    seen = simulate(LINE, temperature, chains=1000, steps=3000, burn_in=1500)
    assert seen == pytest.approx((mean, std), abs=0.03)


def test_everything_collapses_above_the_critical_temperature():
    assert LINE.critical_temperature() == pytest.approx(1 / 3)
    assert LINE.moments(0.5) == (0.0, 0.0)
    assert simulate(LINE, 0.8, chains=300, steps=14_000, burn_in=13_000)[0] < 0.05


@pytest.mark.parametrize(
    ("depth", "width", "temperature"),
    [(0, 1, 0.05), (0, 3, 0.05), (1, 4, 0.1), (2, 1, 0.1), (2, 3, 0.2), (3, 2, 0.2)],
)
def test_any_depth_and_width_is_distributed_as_simulated(depth, width, temperature):
    network = DiagonalNetwork.noisy_line(depth=depth, width=width)
    edges = torch.linspace(0, 2.5, 6, dtype=torch.float64)
    mean, std, shares = simulate(network, temperature, chains=600, steps=2500, burn_in=1000, edges=edges)
    assert network.moments(temperature) == pytest.approx((mean, std), abs=0.02)
    torch.testing.assert_close(
        network.probability(edges, temperature=temperature), shares, atol=0.025, rtol=0
    )
    # Against a sum of the density over the same interval.
    v = torch.logspace(-20, 6, 100_001, dtype=torch.float64)
    if depth:
        weight = (network.log_density(v, temperature=temperature) + v.log()).softmax(0)
        whole = float(weight[(v > 0.5) & (v <= 1.0)].sum())
        assert float(network.probability(edges, temperature=temperature)[1]) == pytest.approx(whole, abs=1e-3)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("temperature", [0.02, 0.08])
def test_mode_is_the_largest_density(depth, temperature):
    network = DiagonalNetwork.noisy_line(0.9, sigma=0.8, depth=depth, width=2)
    v = torch.linspace(0.01, 3, 100_001, dtype=torch.float64)
    at = v[network.log_density(v, temperature=temperature).argmax()]
    assert network.mode(temperature) == pytest.approx(float(at), abs=1e-4)


def test_where_there_is_no_critical_temperature_and_no_mode():
    assert LINE.mode(0.2) == 0.0
    assert DiagonalNetwork.noisy_line(depth=2).critical_temperature() == float("inf")
    assert DiagonalNetwork.noisy_line(decay=0.4).critical_temperature() == pytest.approx(0.6 / 3)
    decayed = DiagonalNetwork.noisy_line(decay=1.5)
    assert decayed.critical_temperature() == 0.0
    assert (decayed.mode(0.1), decayed.moments(0.1)) == (0.0, (0.0, 0.0))
    assert LINE.probability(torch.tensor([0.0, 1, 2]), temperature=0.5).tolist() == [1, 0]
    wide = DiagonalNetwork.noisy_line(depth=0, width=9)
    assert wide.moments(0.1) == (pytest.approx(1, abs=1e-3), float("inf"))


def test_two_factors_lose_their_imbalance_at_the_rate():
    generator = torch.Generator().manual_seed(0)
    u, w = torch.full((500,), 1.4).double(), torch.full((500,), 0.6).double()
    T, gamma, dt = 0.03, 0.01, 5e-4
    start = expected = (u**2 - w**2).log()
    for _ in range(3000):
        v = u * w
        expected = expected - LINE.balance_rate(v, temperature=T, decay=gamma) * dt
        noise = torch.randn(500, dtype=torch.float64, generator=generator)
        pull = 2 * (v - 1) * dt - 2 * (T * LINE.noise(v) * dt).sqrt() * noise
        u, w = u - w * pull - 2 * gamma * u * dt, w - u * pull - 2 * gamma * w * dt
    assert float((start - expected).mean()) > 0.2
    off = (u**2 - w**2).log() - expected
    assert float(off.abs().max()) < 0.05  # on each path, whatever its noise
    assert float(off.mean()) == pytest.approx(0, abs=2e-3)


def test_the_law_is_the_mean_step_of_sgd():
    """One step from one point over many batches: u and w of a two-layer linear network."""
    generator = torch.Generator().manual_seed(0)
    u, w = (torch.randn(n, dtype=torch.float64, generator=generator) for n in (3, 2))
    x = torch.randn(400, 2, dtype=torch.float64, generator=generator)
    y = torch.randn(400, 3, dtype=torch.float64, generator=generator)
    slope = 2 * (torch.outer(u, w) @ x.T - y.T)  # of |u w.x - y|^2
    jacobian = torch.einsum("in,nk->nki", slope, x)
    c1, c2 = noise_matrices(jacobian)
    size = 4
    noise = (u @ c1 @ u - w @ c2 @ w) / size  # with the rest, what a step adds to |u|^2 - |w|^2
    g_w = torch.einsum("nki,i->nk", jacobian, u)
    g_u = torch.einsum("nki,k->ni", jacobian, w)
    # Each matrix weighs what the single samples' gradients vary by.
    torch.testing.assert_close(w @ c2 @ w, g_u.var(0, correction=0).sum())
    torch.testing.assert_close(u @ c1 @ u, g_w.var(0, correction=0).sum())
    batches = torch.randint(0, 400, (20_000, size), generator=generator)
    step_u, step_w = g_u[batches].mean(1), g_w[batches].mean(1)
    mean = float((step_u.square().sum(1) - step_w.square().sum(1)).mean())
    drift = float(g_u.mean(0).square().sum() - g_w.mean(0).square().sum())
    assert mean == pytest.approx(drift - float(noise), rel=0.03)


@pytest.mark.parametrize("depth", [0, 1])
def test_closed_forms_are_the_integral(depth):
    network = DiagonalNetwork.noisy_line(0.8, sigma=0.6, depth=depth)
    v = torch.linspace(0.2, 2, 50_001, dtype=torch.float64)
    (b1, b2), n, g = network.beta, depth + 1, network.noise(v)
    slope = (b1 * v - b2) / (n * v ** (2 * depth / n) * g) / 0.1
    integral = torch.cat([torch.zeros(1).double(), torch.cumulative_trapezoid(slope, v)])
    slow = -3 * depth / n * v.log() - g.log() - integral
    fast = network.log_density(v, temperature=0.1)
    torch.testing.assert_close(fast - fast[0], slow - slow[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_tail_falls_with_its_power(depth):
    network = DiagonalNetwork.noisy_line(depth=depth)
    v = torch.logspace(3, 6, 4001, dtype=torch.float64)
    log_p = network.log_density(v, temperature=0.3)
    slope = (log_p[-1] - log_p[-200]) / (v[-1].log() - v[-200].log())
    assert float(slope) == pytest.approx(network.tail_exponent(), abs=1e-3)


def test_the_tail_at_depth_zero_depends_on_the_temperature():
    network = DiagonalNetwork.noisy_line(depth=0, width=2)
    v = torch.logspace(3, 6, 4001, dtype=torch.float64)
    log_p = network.log_density(v, temperature=0.3)
    slope = (log_p[-1] - log_p[-200]) / (v[-1].log() - v[-200].log())
    assert float(slope) == pytest.approx(network.tail_exponent(0.3), abs=1e-3)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        LINE.mode(0)
    with pytest.raises(ValueError, match="v must be positive"):
        LINE.log_density(torch.tensor([-1.0, 1.0]), temperature=0.1)
    with pytest.raises(ValueError, match="needs a temperature at depth 0"):
        DiagonalNetwork.noisy_line(depth=0).tail_exponent()
    with pytest.raises(ValueError, match="closed form at depth 1, got depth=2"):
        DiagonalNetwork.noisy_line(decay=0.1, depth=2)
    with pytest.raises(ValueError, match="two factors, got depth=2"):
        DiagonalNetwork.noisy_line(depth=2).balance_rate(torch.ones(1), temperature=0.1)
    for shape in ((3,), (0, 2, 2)):
        with pytest.raises(ValueError, match=r"jacobian must be \[N >= 1, K, I\]"):
            noise_matrices(torch.ones(shape))
    with pytest.raises(ValueError, match="alpha must have"):
        DiagonalNetwork((1.0, 2.0, 1.0), (1.0, 1.0))
    with pytest.raises(ValueError, match=r"must be finite, got .* and \(1.0, nan\)"):
        DiagonalNetwork((2.0, 2.0, 3.0), (1.0, math.nan))
    with pytest.raises(ValueError, match=r"edges must be two or more ascending numbers, got \[0.0, nan\]"):
        LINE.probability(torch.tensor([0.0, math.nan]), temperature=0.1)
    with pytest.raises(ValueError, match=r"v must be \[V >= 1\], got \(0,\)"):
        LINE.log_density(torch.ones(0), temperature=0.1)
