"""Variational autoencoders of the digits, and an autoencoder with a narrow code.

A code unit is used when its posterior differs from the prior. Some unused units among many are how a VAE
chooses its dimension; none used is posterior collapse.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from . import data, truths
from .common import Batches, Case, Measures, Net, Task, adam, mean_square, over, under


class VAE(LightningModule):
    """A Gaussian code, pixels as independent Bernoulli shares.

    Args:
        codes: units of the code.
        convolutional: with a convolutional encoder and one layer for mean and log-variance together;
            otherwise perceptrons and two layers.
        beta: weight of the KL divergence.
        warm_up: steps over which beta grows from zero.
        peeking: the decoder sees each pixel's left neighbour as well, and needs no code.
        lr: Adam's step.
    """

    def __init__(
        self,
        *,
        codes: int = 8,
        convolutional: bool = False,
        beta: float = 1.0,
        warm_up: int = 0,
        peeking: bool = False,
        lr: float = 3e-3,
    ) -> None:
        super().__init__()
        self.convolutional = convolutional
        if convolutional:
            self.encoder: nn.Module = nn.Sequential(
                *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU()),
                *(nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten()),
            )
            self.to_code = nn.Linear(128, 2 * codes)
        else:
            self.encoder = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU())
            self.mean, self.log_variance = nn.Linear(64, codes), nn.Linear(64, codes)
        width = codes + 64 * peeking
        self.decoder = nn.Sequential(nn.Linear(width, 96), nn.ReLU(), nn.Linear(96, 64))
        self.beta, self.warm_up, self.peeking, self.lr = beta, warm_up, peeking, lr

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior's mean and log-variance."""
        h = self.encoder(x)
        if self.convolutional:
            mean, log_variance = self.to_code(h).chunk(2, dim=1)
            return mean, log_variance
        return self.mean(h), self.log_variance(h)

    def decode(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the pixels' logits."""
        if self.peeking:
            left = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
            z = torch.cat([z, 4 * left], dim=1)
        return self.decoder(z)

    def divergences(self, x: Tensor) -> Tensor:
        """Return the KL divergence from the prior by code unit, ``[N, codes]``."""
        mean, log_variance = self.encode(x)
        return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the negative lower bound of a batch."""
        x = batch[0]
        mean, log_variance = self.encode(x)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        bits = nn.functional.binary_cross_entropy_with_logits(self.decode(z, x), x, reduction="sum")
        kl = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum()
        beta = self.beta * (min(1.0, self.global_step / self.warm_up) if self.warm_up else 1.0)
        return (bits + beta * kl) / len(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def task(seed: int, *, steps: int = 500, **options: Any) -> Task:
    """Return a VAE; options are its own."""
    split = data.digits()
    module = VAE(**options)
    held = split.x_held
    total = float((held - held.mean(0)).square().mean())

    def outcome(module: LightningModule) -> Measures:
        with truths.calm(module):
            mean, _ = module.encode(held)  # type: ignore[operator]
            pixels = module.decode(mean, held).sigmoid()  # type: ignore[operator]
            kl = module.divergences(held).mean(0)  # type: ignore[operator]
        used = kl > 0.05
        return {
            "error": float((pixels - held).square().mean()) / total,
            "used": float(used.double().mean()),
            "used_count": float(used.sum()),
            "kl": float(kl.sum()),
        }

    return Task(module, [Batches(split.x, split.y, size=64, seed=seed)], steps, outcome)


class Auto(nn.Module):
    """An autoencoder.

    Args:
        code: width of its bottleneck.
    """

    def __init__(self, code: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, code))
        self.decoder = nn.Sequential(nn.Linear(code, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction."""
        return self.decoder(self.encoder(x))


def autoencoder(seed: int, *, code: int) -> Task:
    """Return an autoencoder with a code of so many units."""
    split = data.digits()
    module = Net(Auto(code), mean_square, adam(3e-3))
    loader = Batches(split.x, split.x, size=64, seed=seed)
    return Task(module, [loader], 400, truths.regressor(split.x_held, split.x_held))


def pair(name: str, architecture: str, make: Callable[..., Task], about: str) -> list[Case]:
    """Return the cases that both architectures have."""
    plain = f"{name}_plain"
    return [
        Case(
            plain,
            architecture,
            f"{about}, a code of eight units.",
            make,
            (over("used", 0.35), under("error", 0.6)),
        ),
        Case(
            f"{name}_spare_codes",
            architecture,
            "A code of 40 units of which most stay unused, as a VAE chooses; the picture is as good.",
            partial(make, codes=40),
            (under("used", 0.6), over("used_count", 3), under("error", 1.3, of_control=True)),
            control=plain,
        ),
        Case(
            f"{name}_warm_up",
            architecture,
            "The KL divergence comes in slowly.",
            partial(make, warm_up=250),
            (over("used", 0.35), under("error", 1.1, of_control=True)),
            control=plain,
        ),
        Case(
            f"{name}_collapse_by_beta",
            architecture,
            "The KL divergence weighs thirtyfold: the code is given up and every picture is the mean.",
            partial(make, beta=30.0),
            (under("used", 0.01), over("error", 0.9)),
            *("posterior_collapse", "objective"),
            also=("rank_collapse", "weights_vanish"),
            control=plain,
            leaves=over("error", 1.25, of_control=True),
        ),
        Case(
            f"{name}_collapse_by_peeking",
            architecture,
            "The decoder sees each pixel's left neighbour, the KL weighs threefold: the code is not needed.",
            partial(make, peeking=True, beta=3.0),
            (under("used", 0.3), under("kl", 0.2, of_control=True)),
            *("posterior_collapse", "wiring"),
            control=plain,
        ),
    ]


CASES = [
    *pair("vae/mlp", "vae_mlp", task, "Perceptrons"),
    *pair("vae/cnn", "vae_cnn", partial(task, convolutional=True), "A convolutional encoder"),
    Case(
        "vae/bottleneck",
        "vae_mlp",
        "An autoencoder with a code of two units: what follows has rank two, as it was built.",
        partial(autoencoder, code=2),
        (under("error", 0.8),),
    ),
    Case(
        "vae/early",
        "vae_mlp",
        "Stopped after 60 steps: the code is hardly used yet.",
        partial(task, steps=60),
        (under("used", 0.9), under("error", 1.3)),
    ),
]
