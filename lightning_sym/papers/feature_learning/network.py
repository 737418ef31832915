"""The one-hidden-layer linear network whose training is solved, ready to fit.

Shape letters: B batch, I inputs, D hidden units.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import override

from lightning_sym.papers.feature_learning.closed_forms import SolvableModel


class SolvableNetwork(LightningModule):
    r"""A linear network of one hidden layer, trained as its solution is written.

    :math:`f(x) = \gamma\, u^\top W x` under gradient descent on :math:`E(f - y)^2` with a learning rate
    for each layer (Xu and Ziyin, 2024, arXiv 2401.07085). On inputs along one line the course of
    gradient flow is known (:meth:`solution`). Steps follow the flow: a step of size

    .. math:: dt = \frac{\text{pace}}{2\,(\beta_1 K + 2 b\,\lvert\beta_2\rvert)}

    is as long as the tangent kernel :math:`K` of the moment allows, since in the rich regime K grows by
    orders of magnitude and no constant step serves all of a run. ``time`` adds them up.

    Args:
        width: hidden units D.
        inputs: I.
        output_scale: gamma, positive.
        var_u: variance of the outgoing weights at the start, positive.
        var_w: variance of the incoming weights along each input, positive.
        lr_u: learning rate of u, positive.
        lr_w: learning rate of W, positive.
        alignment: cosine of u and the first input's weights at the start, in [-1, 1] and up to
            :math:`1/\sqrt D` if not -1 or 1; ``None``: the second half of the units repeats the first
            with the sign of u changed, so that f is exactly zero.
        pace: share of the largest stable step, in (0, 1]; the flow's error is of its order.
        seed: of the weights; the global random state is left alone.

    Attributes:
        time: gradient-flow time made so far, a float64 buffer ``[]``.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> network = SolvableNetwork(8, output_scale=1 / 8)
        >>> network(torch.ones(2, 1).double()).tolist()
        [0.0, 0.0]
    """

    time: Tensor

    def __init__(
        self,
        width: int,
        *,
        inputs: int = 1,
        output_scale: float = 1.0,
        var_u: float = 1.0,
        var_w: float = 1.0,
        lr_u: float = 1.0,
        lr_w: float = 1.0,
        alignment: float | None = None,
        pace: float = 0.02,
        seed: int = 0,
    ) -> None:
        super().__init__()
        scales = {"output_scale": output_scale, "var_u": var_u, "var_w": var_w, "lr_u": lr_u, "lr_w": lr_w}
        for name, value in scales.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value!r}")
        for name, count in (("width", width), ("inputs", inputs)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be a positive integer, got {count!r}")
        if alignment is None and width % 2:
            raise ValueError(f"width must be even to start at f = 0 (alignment=None), got {width}")
        if alignment is not None and not -1 <= alignment <= 1:
            raise ValueError(f"alignment must be in [-1, 1] or None, got {alignment!r}")
        if not 0 < pace <= 1:
            raise ValueError(f"pace must be in (0, 1], got {pace!r}")
        self.output_scale, self.lr_u, self.lr_w, self.pace = output_scale, lr_u, lr_w, pace
        self.hidden = nn.utils.skip_init(nn.Linear, inputs, width, bias=False, dtype=torch.float64)
        self.readout = nn.utils.skip_init(nn.Linear, width, 1, bias=False, dtype=torch.float64)
        self.register_buffer("time", torch.zeros((), dtype=torch.float64))
        generator = torch.Generator().manual_seed(seed)
        w_DI = torch.randn(width, inputs, generator=generator, dtype=torch.float64)
        u_D = torch.randn(width, generator=generator, dtype=torch.float64)
        if alignment is None:
            half = width // 2
            w_DI[half:], u_D[half:] = w_DI[:half], -u_D[:half]
        else:
            u_D = alignment * w_DI[:, 0] + math.sqrt(1 - alignment**2) * u_D
        with torch.no_grad():
            self.hidden.weight.copy_(math.sqrt(var_w) * w_DI)
            self.readout.weight.copy_(math.sqrt(var_u) * u_D)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return f(x) ``[B]`` of inputs ``[B, I]``."""
        return self.output_scale * self.readout(self.hidden(x)).squeeze(-1)

    def solution(self, x: Tensor, *, y: Tensor) -> SolvableModel:
        """Return the exact course of gradient flow from the weights of this moment.

        Args:
            x: inputs ``[B, I]``, all of them multiples of one direction.
            y: targets ``[B]``.

        Returns:
            The solved model along that direction, on which x is 1.

        Raises:
            ValueError: if shapes do not fit, a number is not finite or the inputs are not on one line
                through zero.
        """
        n_I, beta1, beta2 = self._line(x, y)
        w_D = self.hidden.weight.detach() @ n_I
        options = {"output_scale": self.output_scale, "lr_u": self.lr_u, "lr_w": self.lr_w}
        u_D = self.readout.weight.detach().flatten()
        return SolvableModel(u_D.clone(), w_D, beta1=beta1, beta2=beta2, **options)

    def _line(self, x: Tensor, y: Tensor) -> tuple[Tensor, float, float]:
        if x.ndim != 2 or y.shape != x.shape[:1] or len(x) < 1:
            raise ValueError(f"x must be [B, I] and y [B], got {tuple(x.shape)} and {tuple(y.shape)}")
        if not bool(x.isfinite().all() and y.isfinite().all()):
            raise ValueError("x and y must be finite, got NaN or infinity")
        _, sigma_K, v_KI = torch.linalg.svd(x.double(), full_matrices=False)
        if not sigma_K[0] > 0 or (len(sigma_K) > 1 and sigma_K[1] > 1e-6 * sigma_K[0]):
            raise ValueError("x must be multiples of one direction that is not zero")
        n_I = v_KI[0] * torch.where(v_KI[0, v_KI[0].abs().argmax()] < 0, -1.0, 1.0)
        along_B = x.double() @ n_I
        return n_I, float(along_B.square().mean()), float((along_B * y.double()).mean())

    def step_size(self, x: Tensor, y: Tensor) -> float:
        """Return dt for the next step, from the weights of this moment.

        For inputs off one line the kernel and the correlation of all inputs stand in for those along it.
        """
        second = float(x.square().sum(1).mean())
        correlation = float((x * y[:, None]).mean(0).norm())
        w2, u2 = (float(layer.weight.detach().square().sum()) for layer in (self.hidden, self.readout))
        kernel = self.output_scale**2 * (self.lr_w * u2 + self.lr_u * w2)
        b = self.output_scale * math.sqrt(self.lr_u * self.lr_w)
        return self.pace / (2 * (second * kernel + 2 * b * correlation))

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch[0].double(), batch[1].double()
        dt = self.step_size(x, y)
        optimizer: Any = self.optimizers()
        for group, rate in zip(optimizer.param_groups, (self.lr_u, self.lr_w), strict=True):
            group["lr"] = rate * dt
        self.time += dt
        loss = (self(x) - y).square().mean()
        self.log("loss", loss, batch_size=len(x))
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [
            {"params": [self.readout.weight], "lr": self.lr_u},
            {"params": [self.hidden.weight], "lr": self.lr_w},
        ]
        return torch.optim.SGD(groups, lr=self.lr_u)
