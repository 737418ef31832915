"""The diagonal linear network, ready to fit: SGD's stationary distribution is known.

Shape letters: B batch, d width.
"""

from __future__ import annotations

import math

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import override

from lightning_sym.papers.law_of_balance.closed_forms import DiagonalNetwork


class DiagonalLinearNetwork(LightningModule):
    r"""A sum of products of weights times the input, on the squared error.

    :math:`f(x) = v x` with :math:`v = \sum_{i=1}^d \prod_{k=0}^D u_{ki}`, trained on
    :math:`E(f - y)^2 + \gamma\lVert\theta\rVert^2` by plain SGD (Ziyin et al., 2023, arXiv 2308.06671).
    The layers are a linear one, D - 1 depthwise convolutions and a linear one, so that every product's
    rescalings are found and every gradient is observed. At depth 0 the weights add up.

    Args:
        depth: D, at least 0.
        width: d, at least 1.
        start: v at the start; positive at depth >= 1 (zero can't be left, and signs stay).
        imbalance: logarithm of the first factor over the last at the start, with v as it is; 0: all
            factors are equal. Not at depth 0.
        lr: learning rate, positive.
        decay: gamma, at least 0; the optimizer's ``weight_decay`` is twice that.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> network = DiagonalLinearNetwork(2, width=3, start=0.5)
        >>> round(network.slope.item(), 6), network(torch.tensor([2.0]).double()).shape
        (0.5, torch.Size([1]))
    """

    def __init__(
        self,
        depth: int = 1,
        *,
        width: int = 1,
        start: float = 0.5,
        imbalance: float = 0.0,
        lr: float = 0.01,
        decay: float = 0.0,
    ) -> None:
        super().__init__()
        for name, count, least in (("depth", depth, 0), ("width", width, 1)):
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {count!r}")
        if not math.isfinite(start) or (depth and start <= 0):
            raise ValueError(f"start must be {'positive' if depth else 'finite'}, got {start!r}")
        if not math.isfinite(imbalance) or (imbalance and not depth):
            raise ValueError(f"imbalance must be finite, and 0 at depth 0, got {imbalance!r}")
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be positive, got {lr!r}")
        if not 0 <= decay < math.inf:
            raise ValueError(f"decay must be at least 0, got {decay!r}")
        self.depth, self.width, self.lr, self.decay = depth, width, lr, decay
        layers: list[nn.Module] = [nn.Linear(1, width, bias=False)]
        layers += [nn.Conv1d(width, width, 1, groups=width, bias=False) for _ in range(depth - 1)]
        layers += [nn.Linear(width, 1, bias=False)] if depth else []
        self.factors = nn.ModuleList(layers).double()
        size = abs(start / width) ** (1 / (depth + 1)) * (1 if start > 0 else -1)
        with torch.no_grad():
            for weight in self.parameters():
                weight.fill_(size)
            if depth:
                self.factors[0].weight.mul_(math.exp(imbalance / 2))  # type: ignore[operator]
                self.factors[-1].weight.mul_(math.exp(-imbalance / 2))  # type: ignore[operator]

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return f(x) ``[B]`` of inputs ``[B]`` or ``[B, 1]``."""
        h = self.factors[0](x.reshape(-1, 1).double())
        for layer in self.factors[1 : self.depth]:
            h = layer(h.unsqueeze(-1)).squeeze(-1)
        return (self.factors[-1](h) if self.depth else h.sum(1, keepdim=True)).squeeze(-1)

    @property
    def slope(self) -> Tensor:
        """The v of this moment, ``[]``."""
        return torch.stack([weight.detach().flatten() for weight in self.parameters()]).prod(0).sum()

    def solution(self, x: Tensor, *, y: Tensor) -> DiagonalNetwork:
        """Return the stationary distribution of v, whose data are drawn from these.

        Args:
            x: inputs ``[N]``.
            y: targets ``[N]``.

        Returns:
            The solved network; its temperature is ``lr`` over the batch size.

        Raises:
            ValueError: if the shapes differ, y is a function of x on these data, or there is decay at
                another depth than 1.
        """
        if self.decay and self.depth != 1:
            raise ValueError(f"decay has a closed form at depth 1, got depth={self.depth}")
        if x.shape != y.shape or x.ndim != 1:
            raise ValueError(f"x and y must be [N], got {tuple(x.shape)} and {tuple(y.shape)}")
        square_N, product_N = x.double().square(), x.double() * y.double()
        beta = float(square_N.mean()), float(product_N.mean())
        second = float((square_N * product_N).mean()) - beta[0] * beta[1]
        alpha = float(square_N.var(correction=0)), second, float(product_N.var(correction=0))
        return DiagonalNetwork(alpha, (beta[0], beta[1] - self.decay), self.depth, self.width)

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = (self(batch[0]) - batch[1].double().flatten()).square().mean()
        self.log("loss", loss, batch_size=len(batch[0]))
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=2 * self.decay)
