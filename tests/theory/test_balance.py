"""The stationary distribution against the differential equation, quadrature and its own limits."""

import pytest
import torch

from lightning_sym.theory.balance import DiagonalNetwork, simulate

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


@pytest.mark.parametrize("temperature", [0.02, 0.08])
def test_mode_is_the_largest_density(temperature):
    v = torch.linspace(0.01, 3, 100_001, dtype=torch.float64)
    at = v[LINE.log_density(v, temperature=temperature).argmax()]
    assert LINE.mode(temperature) == pytest.approx(float(at), abs=1e-4)
    assert LINE.mode(0.2) == 0.0


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


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        LINE.mode(0)
    with pytest.raises(ValueError, match="v must be positive"):
        LINE.log_density(torch.tensor([-1.0, 1.0]), temperature=0.1)
    with pytest.raises(ValueError, match="alpha must have"):
        DiagonalNetwork((1.0, 2.0, 1.0), (1.0, 1.0))
