r"""Where SGD ends up on a diagonal linear network: its stationary distribution, at any depth and width.

For :math:`\ell = (v x - y)^2` with v a sum of d products of D + 1 factors, the noise of SGD balances
the factors, and v is left with one stochastic differential equation (Ziyin et al., 2023, arXiv
2308.06671). The temperature T is the learning rate over the batch size.

Shape letters: V values of v.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DiagonalNetwork:
    """A diagonal linear network on one-dimensional data.

    Args:
        alpha: Var[x^2], E[x^3 y] - E[x^2] E[xy] and Var[xy].
        beta: E[x^2] and E[xy]; with weight decay gamma * |theta|^2 take E[xy] - gamma.
        depth: D, at least 0; each product has D + 1 factors.
        width: d, the number of live products, at least 1.

    Raises:
        ValueError: if depth or width is out of range, or alpha is no covariance (a positive first and
            third entry with a positive determinant).
    """

    alpha: tuple[float, float, float]
    beta: tuple[float, float]
    depth: int = 1
    width: int = 1

    def __post_init__(self) -> None:
        a1, a2, a3 = self.alpha
        if not (a1 > 0 and a3 > 0 and a1 * a3 > a2**2):
            raise ValueError(f"alpha must have a1, a3 > 0 and a1 a3 > a2^2, got {self.alpha}")
        if self.depth < 0 or self.width < 1:
            raise ValueError(
                f"depth must be at least 0 and width at least 1, got {self.depth} and {self.width}"
            )

    @classmethod
    def noisy_line(
        cls, k: float = 1.0, *, sigma: float = 1.0, decay: float = 0.0, depth: int = 1, width: int = 1
    ) -> DiagonalNetwork:
        """Return the network for y = k x + noise of deviation ``sigma``, x standard normal."""
        return cls((2.0, 2 * k, 2 * k**2 + sigma**2), (1.0, k - decay), depth, width)

    def noise(self, v: Tensor) -> Tensor:
        """Return g(v) = a1 v^2 - 2 a2 v + a3, the variance of the gradient over 4, ``[V]``."""
        a1, a2, a3 = self.alpha
        v_V = v.double()
        return a1 * v_V.square() - 2 * a2 * v_V + a3

    def critical_temperature(self) -> float:
        """Return T_c = beta2 / alpha3 of the network of depth 1; above it v goes to zero."""
        if self.depth != 1:
            raise ValueError(f"critical_temperature is known for depth 1, got depth={self.depth}")
        return self.beta[1] / self.alpha[2]

    def tail_exponent(self) -> float:
        """Return the power of v with which the density falls: -5 + 3 / (D + 1), less what data adds at D = 0.

        Raises:
            ValueError: at depth 0, where the exponent depends on the temperature.
        """
        if self.depth == 0:
            raise ValueError("tail_exponent needs depth >= 1: at depth 0 it depends on the temperature")
        return -5 + 3 / (self.depth + 1)

    def mode(self, temperature: float) -> float:
        """Return the most likely v > 0 of depth 1; 0 where the density diverges (T >= T_c / 3)."""
        if self.depth != 1:
            raise ValueError(f"mode is known for depth 1, got depth={self.depth}")
        (a1, a2, a3), (b1, b2), T = self.alpha, self.beta, _positive(temperature)
        if 3 * a3 * T >= b2:
            return 0.0
        half = b1 - 10 * a2 * T
        return (-half + math.sqrt(half**2 + 28 * a1 * T * (b2 - 3 * a3 * T))) / (14 * a1 * T)

    def log_density(self, v: Tensor, *, temperature: float) -> Tensor:
        r"""Return the logarithm of the stationary density of v > 0, not normalised.

        .. math:: p(v) \propto v^{-3D/(D+1)} g^{-1} \exp\Bigl\{-\frac1T \int
            \frac{d^{1-2/(D+1)} (\beta_1 v - \beta_2)}{(D+1) v^{2D/(D+1)} g}\, dv\Bigr\}

        In closed form at depth 0 and 1; the integral is taken numerically on the grid for others.

        Args:
            v: values ``[V]``, positive (depth 0: any), ascending.
            temperature: T, positive.

        Returns:
            ``[V]`` float64.

        Raises:
            ValueError: if v is not positive at depth 1 or more, or T is not positive.
        """
        T = _positive(temperature)
        v_V, g_V = v.double(), self.noise(v)
        if self.depth and not bool((v_V > 0).all()):
            raise ValueError(f"v must be positive at depth {self.depth}, got a least of {float(v_V.min()):g}")
        (a1, a2, a3), (b1, b2) = self.alpha, self.beta
        root = math.sqrt(a1 * a3 - a2**2)
        angle_V = torch.arctan((a1 * v_V - a2) / root)
        if self.depth == 0:
            rate = T * self.width
            return (-1 - b1 / (2 * rate * a1)) * g_V.log() - (a2 * b1 - a1 * b2) / (
                a1 * root * rate
            ) * angle_V
        if self.depth == 1:
            power = b2 / (2 * a3 * T) - 1.5
            return (
                power * v_V.log()
                - (1 + b2 / (4 * T * a3)) * g_V.log()
                - (a3 * b1 - a2 * b2) / (2 * T * a3 * root) * angle_V
            )
        n = self.depth + 1
        slope_V = self.width ** (1 - 2 / n) * (b1 * v_V - b2) / (n * v_V.pow(2 * self.depth / n - 1) * g_V)
        integral_V = torch.cat([v_V.new_zeros(1), torch.cumulative_trapezoid(slope_V, v_V.log())])
        return -3 * self.depth / n * v_V.log() - g_V.log() - integral_V / T

    def moments(self, temperature: float) -> tuple[float, float]:
        """Return mean and standard deviation of v of depth 1; (0, 0) at and above the critical temperature.

        By quadrature in log v from 1e-40 on: near the critical temperature the density's weight lies
        at tiny v.
        """
        if self.depth != 1:
            raise ValueError(f"moments are known for depth 1, got depth={self.depth}")
        if temperature >= self.critical_temperature():
            return 0.0, 0.0
        log_V = torch.linspace(math.log(1e-40), math.log(1e8), 200_001, dtype=torch.float64)
        v_V = log_V.exp()
        weight_V = torch.softmax(self.log_density(v_V, temperature=temperature) + log_V, dim=0)
        mean = float(weight_V @ v_V)
        return mean, math.sqrt(max(float(weight_V @ v_V.square()) - mean**2, 0.0))


def simulate(
    network: DiagonalNetwork,
    temperature: float,
    *,
    chains: int = 2000,
    steps: int = 8000,
    burn_in: int = 3000,
    start: float = 0.5,
    seed: int = 0,
) -> tuple[float, float]:
    """Return time-averaged mean and deviation of v by the SDE of a balanced depth-1 network.

    In log v, with a time step that each chain chooses (plain steps in u and w blow up) and moments
    weighted by it.
    """
    rng = torch.Generator().manual_seed(seed)
    T, (b1, b2) = _positive(temperature), network.beta
    log_C = torch.full((chains,), math.log(start), dtype=torch.float64)
    sums = torch.zeros(3, dtype=torch.float64)
    for step in range(steps):
        v_C = log_C.exp()
        g_C = network.noise(v_C)
        dt_C = 0.01 / (1 + (v_C - b2 / b1).abs() + 8 * T * g_C)
        if step >= burn_in:
            sums += torch.stack([dt_C.sum(), dt_C @ v_C, dt_C @ v_C.square()])
        noise_C = torch.randn(chains, dtype=torch.float64, generator=rng)
        log_C = log_C + (-4 * (b1 * v_C - b2) - 4 * T * g_C) * dt_C + 4 * (T * g_C * dt_C).sqrt() * noise_C
    mean = float(sums[1] / sums[0])
    return mean, math.sqrt(max(float(sums[2] / sums[0]) - mean**2, 0.0))


def _positive(temperature: float) -> float:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature!r}")
    return float(temperature)
