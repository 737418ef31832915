"""Generative adversarial networks on mixtures of Gaussians in the plane.

Whether a generator covers its modes is counted: modes that get at least a fifth of their share of 1000
samples. A small spread alone is no collapse: it is right where the data are narrow.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from . import data, truths
from .common import Batches, Case, Measures, Task, over, under


class Residual(nn.Module):
    """A perceptron added to its input.

    Args:
        width: of both.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        return x + self.net(x)


def generator(width: int, *, residual: bool, latent: int) -> nn.Sequential:
    """Return a network from the latent code to the plane."""
    if residual:
        return nn.Sequential(nn.Linear(latent, width), Residual(width), Residual(width), nn.Linear(width, 2))
    return nn.Sequential(
        *(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
    )


class GAN(LightningModule):
    """Two networks in turn, non-saturating losses, noise added to what the discriminator sees.

    Args:
        residual: a residual generator.
        latent: width of the code.
        width: of the networks.
        lr: Adam's step of the generator.
        discriminator_lr: that of the discriminator.
        noise: deviation of the instance noise.
        generator_steps: steps of the generator a batch.
        packed: the discriminator sees two samples at a time, which tells it how diverse they are.
    """

    def __init__(
        self,
        *,
        residual: bool = False,
        latent: int = 4,
        width: int = 64,
        lr: float = 1e-3,
        discriminator_lr: float = 1e-3,
        noise: float = 0.15,
        generator_steps: int = 1,
        packed: bool = True,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = generator(width, residual=residual, latent=latent)
        self.pack = 2 if packed else 1
        self.discriminator = nn.Sequential(
            *(nn.Linear(2 * self.pack, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2)),
            nn.Linear(width, 1),
        )
        self.latent, self.noise, self.generator_steps = latent, noise, generator_steps
        self.rates = (lr, discriminator_lr)

    def sample(self, count: int) -> Tensor:
        """Return points of the generator."""
        return self.generator(torch.randn(count, self.latent, device=self.device))

    def score(self, x: Tensor) -> Tensor:
        """Return the discriminator's logits of points with noise added."""
        x = x + self.noise * torch.randn_like(x)
        return self.discriminator(x.reshape(-1, 2 * self.pack))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Make a step of the discriminator and one or more of the generator."""
        real = batch[0]
        of_generator, of_discriminator = self.optimizers()  # type: ignore[misc]
        fake = self.sample(len(real)).detach()
        loss = F.softplus(-self.score(real)).mean() + F.softplus(self.score(fake)).mean()
        of_discriminator.zero_grad()
        self.manual_backward(loss)
        of_discriminator.step()
        for _ in range(self.generator_steps):
            fooling = F.softplus(-self.score(self.sample(len(real)))).mean()
            of_generator.zero_grad()
            self.manual_backward(fooling)
            of_generator.step()
        return loss.detach()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return Adam for each network."""
        pairs = zip((self.generator, self.discriminator), self.rates, strict=True)
        return [torch.optim.Adam(net.parameters(), lr=lr, betas=(0.5, 0.99)) for net, lr in pairs]


def task(
    seed: int,
    *,
    points: Callable[..., Tensor] = data.ring,
    centres: Callable[[], Tensor] = data.ring_centres,
    steps: int = 1200,
    spoil: Callable[[GAN], None] | None = None,
    **options: Any,
) -> Task:
    """Return a GAN that is to learn a mixture.

    Args:
        seed: of points and batches (weights: torch's).
        points: makes the data.
        centres: of its modes.
        steps: batches.
        spoil: changes the networks before training.
        options: of the GAN.
    """
    module = GAN(**options)
    if spoil is not None:
        spoil(module)
    real = points(4096, seed=seed)
    modes, total = centres(), float(real.std(0).mean())

    def outcome(module: LightningModule) -> Measures:
        with truths.calm(module):
            torch.manual_seed(5)
            made = module.sample(1000)  # type: ignore[operator]
        found = truths.coverage(made, modes)
        return {**found, "relative_spread": found["spread"] / total}

    loader = Batches(real, size=128, seed=seed)
    return Task(module, [loader], steps * (1 + module.generator_steps), outcome)


def one_point(count: int, *, seed: int = 0) -> Tensor:
    """Return points of one narrow Gaussian."""
    return data.ring(count, modes=1, spread=0.1, seed=seed)


GRID: dict[str, Any] = {
    "points": partial(data.grid, side=2),
    "centres": partial(data.grid_centres, 2),
    "residual": True,
    "latent": 8,
}


def pair(name: str, architecture: str, what: str, **options: Any) -> list[Case]:
    """Return the cases that both generators have."""
    plain = f"gan/{name}"
    return [
        Case(
            plain,
            architecture,
            f"{what}, all modes covered.",
            partial(task, **options),
            (over("modes", 0.85),),
        ),
        Case(
            f"{plain}_early",
            architecture,
            "Stopped after 40 batches: no mode is hit yet, the samples are spread.",
            partial(task, steps=40, **options),
            (over("spread", 0.1), under("modes", 0.9)),
        ),
        Case(
            f"{plain}_collapse_by_rate",
            architecture,
            "The generator's rate is ten times higher, the discriminator's three times lower: samples "
            "move together from mode to mode.",
            partial(task, **{**options, "lr": 1e-2, "discriminator_lr": 3e-4, "packed": False, "noise": 0.0}),
            (under("modes", 0.4),),
            *("mode_collapse", "balance"),
            also=("rank_collapse", "dead_units", "divergence"),
            layers=("*generator*",),
            control=plain,
            leaves=under("modes", 0.5, of_control=True),
        ),
        Case(
            f"{plain}_collapse_by_steps",
            architecture,
            "Five steps of the generator to one of the discriminator: it settles on the best mode.",
            partial(
                task,
                **{**options, "generator_steps": 5, "packed": False, "noise": 0.0, "steps": 500, "lr": 2e-3},
            ),
            (under("modes", 0.4),),
            *("mode_collapse", "balance"),
            also=("rank_collapse", "dead_units", "divergence"),
            layers=("*generator*",),
            control=plain,
        ),
    ]


CASES = [
    *pair("ring", "gan_mlp", "Eight Gaussians on a ring"),
    *pair("grid", "gan_residual", "Four Gaussians on a square", **GRID),
    Case(
        "gan/narrow",
        "gan_mlp",
        "One narrow Gaussian: the samples' spread is small, as the data's is.",
        partial(task, points=one_point, centres=partial(data.ring_centres, 1), steps=600),
        (over("modes", 0.99), over("relative_spread", 0.3)),
    ),
]
