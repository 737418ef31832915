"""A deep linear network on Gaussian data: what the noise of SGD does to it is known.

Shape letters: B batch, I inputs, O outputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import override

from lightning_sym.papers.noise_equilibrium.closed_forms import (
    LayerSpectra,
    NoiseBalance,
    equilibrium_spectra,
    equilibrium_weights,
    layer_spectra,
    linear_hessian_top,
    linear_hessian_trace,
    noise_balance,
)


class DeepLinearNetwork(LightningModule):
    r"""A linear network of any depth that learns :math:`y = V x + \epsilon` from fresh Gaussian samples.

    The loss is :math:`\lVert W_D\cdots W_1 x - y\rVert^2`, summed over outputs and averaged over the batch,
    under SGD with one learning rate. Which of its minima SGD drifts to is known
    (:meth:`equilibrium`; Ziyin et al., 2024, arXiv 2402.07193).

    ``trainer.fit(network)`` draws batches that are never seen again, the same for one seed and resumed where
    they were left. ``trainer.fit(network, loader)`` trains on pairs ``x [B, I], y [B, O]`` of your own; with
    :meth:`exact_batch` for all of a loader that is gradient descent on the expected loss.

    Args:
        widths: of the layers from the inputs to the outputs, three or more numbers.
        target: V, ``[O, I]``; ``None``: ones on the diagonal.
        cov_x: second moment of the inputs ``[I, I]``, positive definite; ``None``: the identity.
        cov_noise: second moment of the noise ``[O, O]``, positive definite; ``None``: the identity.
        scales: weights start as Gaussian numbers of deviation ``scale / sqrt(fan_in)``: one scale, or one for
            each layer from the inputs on; positive.
        lr: learning rate, positive.
        momentum: of SGD, in [0, 1).
        batch_size: samples a batch, on each rank.
        steps_per_epoch: batches an epoch.
        seed: of weights and data; the global random state is left alone.

    Raises:
        ValueError: if an argument is out of its range, or a hidden layer is narrower than the rank of V.

    Example:
        >>> network = DeepLinearNetwork([3, 4, 2])
        >>> network(torch.zeros(5, 3)).shape, len(network.weights)
        (torch.Size([5, 2]), 2)
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        target: Tensor | None = None,
        cov_x: Tensor | None = None,
        cov_noise: Tensor | None = None,
        scales: float | Sequence[float] = 1.0,
        lr: float = 0.01,
        momentum: float = 0.0,
        batch_size: int = 10,
        steps_per_epoch: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        widths = list(widths)
        if len(widths) < 3 or min(widths) < 1:
            raise ValueError(f"widths must be three or more positive integers, got {widths}")
        depth = len(widths) - 1
        scales = [float(scales)] * depth if isinstance(scales, int | float) else [float(s) for s in scales]
        if len(scales) != depth or not all(0 < scale < math.inf for scale in scales):
            raise ValueError(f"scales must be one or {depth} positive numbers, got {scales}")
        if not 0 < lr < math.inf or not 0 <= momentum < 1:
            raise ValueError(f"lr must be positive and momentum in [0, 1), got {lr!r} and {momentum!r}")
        for name, count in (("batch_size", batch_size), ("steps_per_epoch", steps_per_epoch)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        target = torch.eye(widths[-1], widths[0]) if target is None else target
        if tuple(target.shape) != (widths[-1], widths[0]):
            raise ValueError(f"target must be [{widths[-1]}, {widths[0]}], got {tuple(target.shape)}")
        self.target = target.detach().double()
        self.cov_x, self.cov_noise = cov_x, cov_noise
        self.lr, self.momentum = lr, momentum
        self.batch_size, self.steps_per_epoch, self.seed = batch_size, steps_per_epoch, seed
        layers = [
            nn.utils.skip_init(nn.Linear, a, b, bias=False, dtype=torch.float64)
            for a, b in itertools.pairwise(widths)
        ]
        self.hidden = widths[1:-1]
        self.layers = nn.Sequential(*layers)
        self.equilibrium()  # says what does not fit
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer, scale in zip(layers, scales, strict=True):
                weight = torch.randn(*layer.weight.shape, generator=generator, dtype=torch.float64)
                layer.weight.copy_(scale / layer.in_features**0.5 * weight)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return outputs ``[B, O]`` of inputs ``[B, I]``, in float64."""
        return self.layers(x.double())

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = (self(x) - y.double()).square().sum(1).mean()
        self.log("loss", loss, batch_size=len(x))
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)

    @override
    def train_dataloader(self) -> GaussianBatches:
        """Return batches ``x [B, I], y [B, O]`` that are never seen again."""
        return GaussianBatches(self)

    def draw(self, samples: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return fresh samples ``x [B, I], y [B, O]``, float64 on the CPU."""
        x_BI, noise_BO = (
            torch.randn(samples, size, generator=generator, dtype=torch.float64)
            for size in reversed(self.target.shape)
        )
        return self._mixed(x_BI, noise_BO)

    def exact_batch(self, samples: int | None = None) -> tuple[Tensor, Tensor]:
        """Return samples whose second moments are exactly those of the distribution.

        Their loss is the expected loss, and so are its gradient and Hessian.

        Args:
            samples: at least I + O; ``None``: so many.

        Raises:
            ValueError: if there are too few samples.
        """
        outputs, inputs = self.target.shape
        samples = inputs + outputs if samples is None else samples
        if samples < inputs + outputs:
            raise ValueError(f"samples must be at least {inputs + outputs}, got {samples}")
        generator = torch.Generator().manual_seed(self.seed)
        both = torch.randn(samples, inputs + outputs, generator=generator, dtype=torch.float64)
        white = torch.linalg.qr(both)[0] * samples**0.5
        return self._mixed(white[:, :inputs], white[:, inputs:])

    def _mixed(self, x_BI: Tensor, noise_BO: Tensor) -> tuple[Tensor, Tensor]:
        if self.cov_x is not None:
            x_BI = x_BI @ torch.linalg.cholesky(self.cov_x.double()).mT
        if self.cov_noise is not None:
            noise_BO = noise_BO @ torch.linalg.cholesky(self.cov_noise.double()).mT
        return x_BI, x_BI @ self.target.mT + noise_BO

    # What theory says of it.

    @property
    def weights(self) -> list[Tensor]:
        """The weights of this moment from the inputs on, detached copies on the CPU."""
        return [p.detach().cpu().clone() for p in self.layers.parameters()]

    def equilibrium(self) -> list[Tensor]:
        """Return weights at the noise equilibrium, up to rotations of the hidden layers."""
        return equilibrium_weights(
            self.target, hidden=self.hidden, cov_x=self.cov_x, cov_noise=self.cov_noise
        )

    def predicted_spectra(self) -> LayerSpectra:
        """Return the singular values of the layers at the noise equilibrium."""
        return equilibrium_spectra(
            self.target, layers=len(self.layers), cov_x=self.cov_x, cov_noise=self.cov_noise
        )

    def spectra(self) -> list[Tensor]:
        """Return those of this moment, of each layer."""
        return layer_spectra(self.weights, cov_x=self.cov_x, cov_noise=self.cov_noise)

    def balance(self) -> list[NoiseBalance]:
        """Return both sides of the balance of each hidden layer at this moment."""
        return noise_balance(self.weights, cov_x=self.cov_x, cov_noise=self.cov_noise)

    def hessian_trace(self) -> float:
        """Return the trace of the expected loss's Hessian at this moment."""
        return linear_hessian_trace(self.weights, cov_x=self.cov_x)

    def predicted_sharpness(self) -> tuple[float, float]:
        """Return trace and largest eigenvalue of the Hessian at the noise equilibrium."""
        weights = self.equilibrium()
        return (
            linear_hessian_trace(weights, cov_x=self.cov_x),
            linear_hessian_top(weights, cov_x=self.cov_x),
        )


class GaussianBatches:
    """Batches of a deep linear network's data: the k-th of a rank's is a function of seed, rank and k.

    Args:
        network: what they are for; its trainer knows which one is next.
    """

    def __init__(self, network: DeepLinearNetwork) -> None:
        self.network = network

    def __len__(self) -> int:
        return self.network.steps_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the trainer's count of batches says which one is next."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing; that it is there tells Lightning that runs can be resumed within an epoch."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        network = self.network
        trainer = network.trainer
        start = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        stream = (network.seed * 1_000_003 + trainer.global_rank + 1) * 0x9E3779B9
        generator = torch.Generator()
        for k in range(start, start + len(self)):
            generator.manual_seed((stream + k) % 2**32)  # a torch generator keeps 32 bits of its seed
            yield network.draw(network.batch_size, generator=generator)
