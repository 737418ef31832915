"""A two-layer ReLU student of a teacher of a few ReLU units, trained by gradient descent.

Shape letters: B batch, D inputs, H hidden units, K units of the teacher.
"""

from __future__ import annotations

import math

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import override

Data = tuple[Tensor, Tensor]
TEACHER = (3.0, 0.8, -0.3)  # outgoing weights of its units
TEST = 2000


def problem(inputs: int, samples: int, *, seed: int) -> tuple[Data, Data]:
    """Return training and test data of a teacher whose units look in orthogonal directions.

    Args:
        inputs: D, at least the teacher's K = 3 units.
        samples: in the training set, at least 1.
        seed: of the teacher and the data; the global random state is left alone.

    Returns:
        ``x [B, D], y [B]`` to train on, and the same for 2,000 test samples.

    Raises:
        ValueError: if there are fewer inputs than units, or no samples.
    """
    if inputs < len(TEACHER):
        raise ValueError(f"inputs must be at least {len(TEACHER)}, one for each unit, got {inputs}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    rng = torch.Generator().manual_seed(seed)
    w_KD = torch.linalg.qr(torch.randn(inputs, len(TEACHER), generator=rng)).Q.mT
    x = torch.randn(samples + TEST, inputs, generator=rng)
    y = torch.relu(x @ w_KD.mT) @ torch.tensor(TEACHER)
    return (x[:samples], y[:samples]), (x[samples:], y[samples:])


class Student(LightningModule):
    """A two-layer ReLU network without biases, trained on half the mean squared error.

    The second half of the units repeats the first with the sign of the outgoing weight changed: the
    network starts at zero, whatever the scale of its weights. The learning rate is a constant share of
    the largest stable one at the start.

    Args:
        hidden: H, even.
        data: training data ``x [B, D], y [B]``, which set the learning rate.
        scale: of the initial weights, positive.
        weight_decay: of SGD.
        seed: of the initial weights; the global random state is left alone.

    Raises:
        ValueError: if ``hidden`` is not positive and even, or ``scale`` is not positive.
    """

    def __init__(
        self, hidden: int, data: Data, *, scale: float = 1.0, weight_decay: float = 0.0, seed: int
    ) -> None:
        super().__init__()
        if hidden < 2 or hidden % 2:
            raise ValueError(f"hidden must be positive and even, to start at zero, got {hidden}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive, got {scale!r}")
        x, y = data
        self.first = nn.utils.skip_init(nn.Linear, x.shape[1], hidden, bias=False)
        self.second = nn.utils.skip_init(nn.Linear, hidden, 1, bias=False)
        rng = torch.Generator().manual_seed(1000 + seed)
        w_HD = torch.randn(hidden // 2, x.shape[1], generator=rng) / x.shape[1] ** 0.5
        v_H = torch.randn(hidden // 2, generator=rng) / hidden**0.5
        with torch.no_grad():
            self.first.weight.copy_(scale * torch.cat([w_HD, w_HD]))
            self.second.weight.copy_(scale * torch.cat([v_H, -v_H])[None])
        pull = float((y @ x / len(x)).norm())  # what small weights grow by
        self.lr, self.weight_decay = 0.2 / (self._stiffness(x) + 2 * pull), weight_decay

    @torch.no_grad()
    def _stiffness(self, x: Tensor) -> float:
        """Return the largest eigenvalue of the tangent kernel, over the number of samples."""
        h_BH = torch.relu(self.first(x))
        gates_BH = (h_BH > 0).to(x)
        kernel_BB = h_BH @ h_BH.mT + (x @ x.mT) * ((gates_BH * self.second.weight[0] ** 2) @ gates_BH.mT)
        return float(torch.linalg.eigvalsh(kernel_BB.double() / len(x))[-1])

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return outputs ``[B]`` of inputs ``[B, D]``."""
        return self.second(torch.relu(self.first(x))).squeeze(1)

    def loss(self, data: Data) -> Tensor:
        """Return half the mean squared error."""
        return (self(data[0]) - data[1]).square().mean() / 2

    @override
    def training_step(self, batch: Data, batch_idx: int) -> Tensor:
        """Return the loss of all training data."""
        return self.loss(batch)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
