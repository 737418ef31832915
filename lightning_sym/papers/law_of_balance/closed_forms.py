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
        beta: E[x^2] and E[xy]; with weight decay gamma * |theta|^2 take E[xy] - gamma (at depth 1 only).
        depth: D, at least 0; each product has D + 1 factors.
        width: d, the number of live products, at least 1.

    Raises:
        ValueError: if depth or width is out of range, a number is not finite, or alpha is no covariance (a
            positive first and third entry with a positive determinant).
    """

    alpha: tuple[float, float, float]
    beta: tuple[float, float]
    depth: int = 1
    width: int = 1

    def __post_init__(self) -> None:
        a1, a2, a3 = self.alpha
        if not (a1 > 0 and a3 > 0 and a1 * a3 > a2**2):
            raise ValueError(f"alpha must have a1, a3 > 0 and a1 a3 > a2^2, got {self.alpha}")
        if not all(math.isfinite(number) for number in (*self.alpha, *self.beta)):
            raise ValueError(f"alpha and beta must be finite, got {self.alpha} and {self.beta}")
        if self.depth < 0 or self.width < 1:
            raise ValueError(
                f"depth must be at least 0 and width at least 1, got {self.depth} and {self.width}"
            )

    @classmethod
    def noisy_line(
        cls, k: float = 1.0, *, sigma: float = 1.0, decay: float = 0.0, depth: int = 1, width: int = 1
    ) -> DiagonalNetwork:
        """Return the network for y = k x + noise of deviation ``sigma``, x standard normal.

        Raises:
            ValueError: if there is ``decay`` (gamma) at another depth than 1.
        """
        if decay and depth != 1:
            raise ValueError(f"decay has a closed form at depth 1, got depth={depth}")
        return cls((2.0, 2 * k, 2 * k**2 + sigma**2), (1.0, k - decay), depth, width)

    def noise(self, v: Tensor) -> Tensor:
        """Return g(v) = a1 v^2 - 2 a2 v + a3, the variance of the gradient over 4, ``[V]``."""
        a1, a2, a3 = self.alpha
        v_V = v.double()
        return a1 * v_V.square() - 2 * a2 * v_V + a3

    def balance_rate(self, v: Tensor, *, temperature: float, decay: float = 0.0) -> Tensor:
        r"""Return the rate at which u^2 - w^2 of a depth-1 product decays, 4 (T g(v) + gamma), ``[V]``.

        Exact for the stochastic differential equation along any path v, whatever its noise does.

        Args:
            v: values ``[V]``.
            temperature: T, positive.
            decay: gamma of a penalty gamma * |theta|^2; torch's ``weight_decay`` is twice that.

        Raises:
            ValueError: at another depth than 1, or if T is not positive.
        """
        if self.depth != 1:
            raise ValueError(f"balance_rate is that of two factors, got depth={self.depth}")
        return 4 * (_positive(temperature) * self.noise(v) + decay)

    def critical_temperature(self) -> float:
        """Return the T from which on v goes to zero: beta2 / alpha3 at depth 1, none (infinity) at others.

        At other depths the density can be normalised at every T. For beta2 <= 0 and depth >= 1, v > 0 is
        never held: 0.
        """
        if self.depth and self.beta[1] <= 0:
            return 0.0
        return self.beta[1] / self.alpha[2] if self.depth == 1 else math.inf

    def tail_exponent(self, temperature: float | None = None) -> float:
        """Return the power of v with which the density falls: -5 + 3 / (D + 1), whatever the data.

        At depth 0 data and temperature decide: -2 - beta1 / (T d alpha1).

        Raises:
            ValueError: at depth 0 without a positive temperature.
        """
        if self.depth:
            return -5 + 3 / (self.depth + 1)
        if temperature is None:
            raise ValueError("tail_exponent needs a temperature at depth 0")
        return -2 - self.beta[0] / (_positive(temperature) * self.width * self.alpha[0])

    def mode(self, temperature: float) -> float:
        """Return the most likely v (at depth >= 1 the most likely v > 0); 0 where the density diverges there.

        It diverges at zero for depth 1 from T_c / 3 on. Closed form at depth 0 and 1.
        """
        (a1, a2, a3), (b1, b2), T = self.alpha, self.beta, _positive(temperature)
        if self.depth == 0:
            rate = T * self.width
            return (b2 + 2 * rate * a2) / (b1 + 2 * rate * a1)
        if b2 <= 0 or (self.depth == 1 and 3 * a3 * T >= b2):
            return 0.0
        if self.depth == 1:
            half = b1 - 10 * a2 * T
            return (-half + math.sqrt(half**2 + 28 * a1 * T * (b2 - 3 * a3 * T))) / (14 * a1 * T)
        n, push = self.depth + 1, self.width ** (1 - 2 / (self.depth + 1)) / T

        def slope(v_V: Tensor) -> Tensor:  # of the log density, times v g n
            bend_V = v_V * (2 * a1 * v_V - 2 * a2)
            pull_V = push * (b1 * v_V - b2) * v_V.pow((1 - self.depth) / n)
            return -3 * self.depth * self.noise(v_V) - n * bend_V - pull_V

        v_V = torch.logspace(-12, 8, 20_001, dtype=torch.float64)
        falls = torch.nonzero((slope(v_V)[:-1] > 0) & (slope(v_V)[1:] <= 0)).flatten()
        best = falls[self.log_density(v_V, temperature=T)[falls].argmax()]
        low, high = v_V[best], v_V[best + 1]
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if slope(middle) > 0 else (low, middle)
        return float(low)

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
        if v_V.ndim != 1 or len(v_V) < 1:
            raise ValueError(f"v must be [V >= 1], got {tuple(v_V.shape)}")
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
        # From the largest v down: from tiny ones up, where the integrand is huge, all digits would be lost.
        falling_V = torch.cumulative_trapezoid(slope_V.flip(0), v_V.log().flip(0)).flip(0)
        integral_V = torch.cat([falling_V, v_V.new_zeros(1)])
        return -3 * self.depth / n * v_V.log() - g_V.log() - integral_V / T

    def moments(self, temperature: float) -> tuple[float, float]:
        """Return mean and standard deviation of v; (0, 0) at and above the critical temperature.

        By quadrature in log v from 1e-40 on (at depth 0 over both signs): near the critical temperature
        the density's weight lies at tiny v. At depth 0 the deviation is infinite where the tail is too long.
        """
        T = _positive(temperature)
        if self.critical_temperature() <= T:
            return 0.0, 0.0
        v_V, weight_V = self._weights(T)
        mean = float(weight_V @ v_V)
        if self.depth == 0 and self.tail_exponent(T) >= -3:
            return mean, math.inf
        return mean, math.sqrt(max(float(weight_V @ v_V.square()) - mean**2, 0.0))

    def probability(self, edges: Tensor, *, temperature: float) -> Tensor:
        """Return the stationary probability of v between neighbouring edges.

        Args:
            edges: ``[E]``, ascending; at depth >= 1 at least 0.
            temperature: T, positive.

        Returns:
            ``[E - 1]``. From the critical temperature on everything is at zero, which counts as part of
            the first interval if that begins there.

        Raises:
            ValueError: if the edges are fewer than two or not ascending, or T is not positive.
        """
        T, edges_E = _positive(temperature), edges.double()
        if edges_E.ndim != 1 or len(edges_E) < 2 or not bool((edges_E.diff() >= 0).all()):
            raise ValueError(f"edges must be two or more ascending numbers, got {edges_E.tolist()}")
        if self.critical_temperature() <= T:
            return ((edges_E[:-1] <= 0) & (edges_E[1:] > 0)).double()
        v_V, weight_V = self._weights(T)
        order_V = v_V.argsort()
        total_V = torch.cat([weight_V.new_zeros(1), weight_V[order_V].cumsum(0)])
        return total_V[torch.searchsorted(v_V[order_V].contiguous(), edges_E.contiguous())].diff()

    def _weights(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Return a grid of v and the probability of each of its points."""
        log_V = torch.linspace(math.log(1e-40), math.log(1e8), 200_001, dtype=torch.float64)
        v_V = log_V.exp()
        if self.depth:
            return v_V, torch.softmax(self.log_density(v_V, temperature=temperature) + log_V, dim=0)
        v_V, log_V = torch.cat([-v_V, v_V]), torch.cat([log_V, log_V])
        return v_V, torch.softmax(self.log_density(v_V, temperature=temperature) + log_V, dim=0)


def noise_matrices(jacobian: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return C1 and C2, which weigh the two sides of a rescaling in the law of balance.

    For a loss that depends on u and w through their product, with
    :math:`A_{ki} = \partial\ell/\partial(u_i w_k)` of each sample,
    :math:`C_1 = E[A^\top A] - E[A]^\top E[A]` and :math:`C_2 = E[A A^\top] - E[A] E[A]^\top`.

    Args:
        jacobian: A ``[N >= 1, K, I]``, of N samples, K entries of w and I of u.

    Returns:
        C1 ``[I, I]`` and C2 ``[K, K]``, float64.

    Raises:
        ValueError: if the jacobian does not have three dimensions or no sample.
    """
    if jacobian.ndim != 3 or len(jacobian) < 1:
        raise ValueError(f"jacobian must be [N >= 1, K, I], got {tuple(jacobian.shape)}")
    a_NKI = jacobian.double() - jacobian.double().mean(0)
    return (a_NKI.mT @ a_NKI).mean(0), (a_NKI @ a_NKI.mT).mean(0)


def simulate(
    network: DiagonalNetwork,
    temperature: float,
    *,
    chains: int = 2000,
    steps: int = 8000,
    burn_in: int = 3000,
    start: float = 0.5,
    seed: int = 0,
    edges: Tensor | None = None,
) -> tuple[float, float] | tuple[float, float, Tensor]:
    r"""Return time-averaged mean and deviation of v by the stochastic differential equation.

    Balanced products move together. With n = D + 1 factors and :math:`a = (v/d)^{(D-1)/n}`,

    .. math:: d\ln v = -2n\,[a(\beta_1 v - \beta_2) + T g a^2]\,dt + 2na\sqrt{Tg}\,dW.

    It is run in log v (at depth 0 in v itself), with a time step that each chain chooses (plain steps in
    the factors blow up) and averages weighted by it.

    Args:
        network: the network.
        temperature: T, positive.
        chains: independent copies.
        steps: of each.
        burn_in: of them, left out of the averages.
        start: v at the start, positive at depth >= 1.
        seed: of the noise.
        edges: also return the share of time between neighbouring edges ``[E]``, ``[E - 1]``.

    Returns:
        Mean and standard deviation, and the shares if edges were given.
    """
    rng = torch.Generator().manual_seed(seed)
    T, (b1, b2), n = _positive(temperature), network.beta, network.depth + 1
    deep = network.depth > 0
    x_C = torch.full((chains,), math.log(start) if deep else start, dtype=torch.float64)
    sums = torch.zeros(3, dtype=torch.float64)
    shares = None if edges is None else torch.zeros(len(edges) + 1, dtype=torch.float64)
    for step in range(steps):
        v_C = x_C.exp() if deep else x_C
        g_C, pull_C = network.noise(v_C), b1 * v_C - b2
        if deep:
            rate_C = n * (v_C / network.width).pow((network.depth - 1) / n)
            drift_C = -2 * rate_C * (pull_C + T * g_C * rate_C / n)
            dt_C = 0.01 / (1 + rate_C / 2 * (v_C - b2 / b1).abs() + 2 * T * g_C * rate_C.square())
        else:
            rate_C = torch.full_like(v_C, network.width)
            drift_C = -2 * rate_C * pull_C
            dt_C = 0.01 / (1 + rate_C + 2 * T * network.alpha[0] * rate_C.square())
        if step >= burn_in:
            sums += torch.stack([dt_C.sum(), dt_C @ v_C, dt_C @ v_C.square()])
            if edges is not None and shares is not None:
                shares.index_add_(0, torch.bucketize(v_C, edges.double(), right=True), dt_C)
        noise_C = torch.randn(chains, dtype=torch.float64, generator=rng)
        x_C = x_C + drift_C * dt_C + 2 * rate_C * (T * g_C * dt_C).sqrt() * noise_C
    mean = float(sums[1] / sums[0])
    deviation = math.sqrt(max(float(sums[2] / sums[0]) - mean**2, 0.0))
    if shares is None:
        return mean, deviation
    return mean, deviation, shares[1:-1] / sums[0]


def _positive(temperature: float) -> float:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature!r}")
    return float(temperature)
