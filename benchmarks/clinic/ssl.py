"""Self-supervised learning on digits: three losses, perceptrons and convolutions.

Whether embeddings collapsed is measured on held-out digits: their deviation against that at the start, the
deviation of unit vectors (one over the root of the width where they are spread out), the directions they use.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_sym.losses import BarlowTwinsLoss, SimCLRLoss, VICRegLoss

from . import data, truths
from .common import Batches, Case, Measures, Task, over, under

PairLoss = Callable[[Tensor, Tensor], Tensor]


class Views:
    """Two views of each image of a batch: shifted, scaled in brightness, with pixels dropped and noise.

    Args:
        batches: of images ``[N, 1, 8, 8]`` and labels.
        strength: 1 for mild views; 4 leaves little of the image.
    """

    def __init__(self, batches: Batches, *, strength: float = 1.0) -> None:
        self.batches, self.strength, self.batch_size = batches, strength, batches.batch_size

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        for x, y in self.batches:
            yield [view(x, self.strength, self.batches.generator) for _ in range(2)], y


def view(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Return a view of images."""
    by = torch.randint(-1, 2, (2,), generator=generator).tolist()
    x = x.roll(by, dims=(2, 3))
    bright = 1 + 0.3 * (2 * torch.rand(len(x), 1, 1, 1, generator=generator) - 1)
    kept = torch.rand(x.shape, generator=generator) > min(0.1 * strength, 0.6)
    return x * bright * kept + 0.1 * strength * torch.randn(x.shape, generator=generator)


class Embedding(LightningModule):
    """An encoder, a projector, a loss of two views' embeddings.

    Args:
        loss: of the two embeddings.
        convolutional: a convolutional encoder.
        width: of the embedding.
        lr: Adam's step.
        decay: of AdamW.
    """

    def __init__(
        self, loss: PairLoss, *, convolutional: bool, width: int = 32, lr: float = 4e-3, decay: float = 1e-4
    ) -> None:
        super().__init__()
        self.loss_function = loss
        if convolutional:
            self.encoder = nn.Sequential(
                *(nn.Conv2d(1, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()),
                *(nn.Conv2d(16, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU()),
                *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 64)),
            )
        else:
            self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
        self.projector = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, width))
        self.lr, self.decay = lr, decay

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the representation and the embedding of images."""
        h = self.encoder(x)
        return h, self.projector(h)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch of views."""
        a, b = batch[0]
        return self.loss_function(self.embed(a)[1], self.embed(b)[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.decay)


def attraction(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Return one minus the mean cosine of the views: SimCLR without its negatives."""
    return 1 - nn.functional.cosine_similarity(z_a, z_b).mean()


def diagonal_twins(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Return Barlow Twins' diagonal term alone: every dimension invariant, no two told to differ."""
    a, b = ((z - z.mean(0)) / z.std(0).clamp_min(1e-4) for z in (z_a, z_b))
    return (1 - (a * b).mean(0)).square().sum()


def task(
    seed: int,
    *,
    loss: Callable[[], PairLoss],
    steps: int = 400,
    size: int = 128,
    strength: float = 1.0,
    spoil: Callable[[Embedding], None] | None = None,
    **options: Any,
) -> Task:
    """Return an encoder that is to learn digits without labels.

    Args:
        seed: of batches and views (weights: torch's).
        loss: makes the loss.
        steps: of the optimizer.
        size: of a batch.
        strength: of the views.
        spoil: changes the network before training.
        options: of :class:`Embedding`.
    """
    split = data.digits(images=True)
    module = Embedding(loss(), **options)
    if spoil is not None:
        spoil(module)

    def embedded(module: LightningModule, x: Tensor) -> tuple[Tensor, Tensor]:
        twin = copy.deepcopy(module).train()  # normalised by these images: at the start there is nothing else
        with torch.no_grad():
            return twin.embed(x)  # type: ignore[operator]

    before = float(embedded(module, split.x_held)[1].std(0).mean())

    def outcome(module: LightningModule) -> Measures:
        z = embedded(module, split.x_held)[1]
        unit = nn.functional.normalize(z, dim=1)
        return {
            "deviation": float(z.std(0).mean()) / before,
            "unit_deviation": float(unit.std(0).mean()) * z.shape[1] ** 0.5,
            "directions": truths.directions(z),
        }

    def neighbours(module: LightningModule) -> Measures:
        bank, h = embedded(module, split.x)[0], embedded(module, split.x_held)[0]
        return {"neighbours": truths.neighbour_accuracy(bank, split.y, h, split.y_held)}

    loader = Views(Batches(split.x, split.y, size=size, seed=seed), strength=strength)
    return Task(module, [loader], steps, outcome, neighbours, embeds=True)


LOSSES: dict[str, Callable[[], PairLoss]] = {
    "barlow": BarlowTwinsLoss,
    "simclr": SimCLRLoss,
    "vicreg": VICRegLoss,
}


def pair(name: str, architecture: str, *, convolutional: bool) -> list[Case]:
    """Return the cases that both encoders have."""
    make = partial(task, convolutional=convolutional)
    cases = [
        Case(
            f"ssl/{name}_{loss}",
            architecture,
            f"{loss} with mild views.",
            partial(make, loss=LOSSES[loss]),
            (over("directions", 2.5), over("neighbours", 0.85), over("unit_deviation", 0.5)),
        )
        for loss in LOSSES
    ]
    vicreg, barlow, simclr = f"ssl/{name}_vicreg", f"ssl/{name}_barlow", f"ssl/{name}_simclr"
    gone = (over("start/unit_deviation", 0.1), under("deviation", 0.1))
    return [
        *cases,
        Case(
            f"ssl/{name}_early",
            architecture,
            "VICReg, stopped after 20 steps: few dimensions are learned yet.",
            partial(make, loss=VICRegLoss, steps=20),
            (over("deviation", 0.3), over("neighbours", 0.5)),
        ),
        Case(
            f"ssl/{name}_wide",
            architecture,
            "Barlow Twins with an embedding wider than the batch: full rank is out of reach.",
            partial(make, loss=BarlowTwinsLoss, width=96, size=64),
            (over("directions", 2.5), over("neighbours", 0.8)),
        ),
        Case(
            f"ssl/{name}_no_variance",
            architecture,
            "VICReg without its variance term: the embeddings shrink to nothing.",
            partial(make, loss=partial(VICRegLoss, variance=0.0)),
            (*gone, under("deviation", 0.2, of_control=True)),
            *("embedding_collapse_complete", "objective"),
            also=("embedding_collapse_dimensional", "rank_collapse", "weights_vanish", "vanishing_gradients"),
            control=vicreg,
            leaves=under("deviation", 0.5, of_control=True),
        ),
        Case(
            f"ssl/{name}_no_negatives",
            architecture,
            "SimCLR without negatives: all embeddings point one way.",
            partial(make, loss=lambda: attraction),
            (under("unit_deviation", 0.2), under("unit_deviation", 0.3, of_control=True)),
            *("embedding_collapse_complete", "objective"),
            also=("embedding_collapse_dimensional", "rank_collapse", "vanishing_gradients"),
            control=simclr,
            leaves=under("unit_deviation", 0.5, of_control=True),
        ),
        Case(
            f"ssl/{name}_no_covariance",
            architecture,
            "VICReg without its covariance term: every dimension varies, and all as one.",
            partial(make, loss=partial(VICRegLoss, covariance=0.0)),
            (under("directions", 0.5, of_control=True), over("unit_deviation", 0.3)),
            *("embedding_collapse_dimensional", "objective"),
            also=("rank_collapse", "equal_units"),
            control=vicreg,
            leaves=under("directions", 0.5, of_control=True),
        ),
        Case(
            f"ssl/{name}_no_decorrelation",
            architecture,
            "Barlow Twins without its off-diagonal term: dimensions repeat one another.",
            partial(make, loss=lambda: diagonal_twins),
            (under("directions", 0.5, of_control=True), over("unit_deviation", 0.3)),
            *("embedding_collapse_dimensional", "objective"),
            also=("rank_collapse", "equal_units"),
            control=barlow,
            leaves=under("directions", 0.5, of_control=True),
        ),
        Case(
            f"ssl/{name}_strong_views",
            architecture,
            "SimCLR on views of which little is left: the dimensions that vary with the view are given up.",
            partial(make, loss=SimCLRLoss, strength=5.0),
            (under("directions", 0.6, of_control=True), over("unit_deviation", 0.3)),
            *("embedding_collapse_dimensional", "views"),
            also=("rank_collapse",),
            control=simclr,
            leaves=under("directions", 0.6, of_control=True),
        ),
    ]


CASES = [
    *pair("mlp", "ssl_mlp", convolutional=False),
    *pair("cnn", "ssl_cnn", convolutional=True),
]
