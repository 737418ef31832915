"""Streams of tasks: labels drawn anew for the same digits, task after task.

Every task is as hard as the first. What a network fresh from its initialiser reaches on the last task, with
the same batches and steps, is what one that has not lost its plasticity reaches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from . import data, truths
from .cnn import convolutional
from .common import Batches, Case, Measures, Net, Optimizer, Task, adam, cross_entropy, over, under
from .mlp import perceptron


class Stream:
    """Tasks one after another in one epoch.

    Args:
        x: inputs of all tasks.
        labels: by task.
        steps: batches a task.
        size: of a batch.
        seed: of the batches.
    """

    def __init__(self, x: Tensor, labels: list[Tensor], *, steps: int, size: int, seed: int) -> None:
        self.x, self.labels, self.steps, self.batch_size, self.seed = x, labels, steps, size, seed
        self.given = 0
        self.learned: list[float] = []

    def __len__(self) -> int:
        return self.steps * len(self.labels)

    def of_task(self, task: int) -> Iterator[list[Tensor]]:
        """Yield the batches of one task."""
        batches = Batches(self.x, self.labels[task], size=self.batch_size, seed=self.seed * 1000 + task)
        made = 0
        while made < self.steps:
            for batch in batches:
                yield batch
                made += 1
                if made == self.steps:
                    return

    def accuracy(self, module: LightningModule, task: int) -> float:
        """Return how well a module knows a task's labels."""
        with truths.calm(module):
            return float((module(self.x).argmax(1) == self.labels[task]).double().mean())

    def ask(self, module: LightningModule) -> None:
        """Note how well the task was learned that has just ended, if one has."""
        if self.given and self.given % self.steps == 0 and len(self.learned) < self.given // self.steps:
            self.learned.append(self.accuracy(module, self.given // self.steps - 1))

    def __iter__(self) -> Iterator[list[Tensor]]:
        self.given, self.learned = 0, []
        for task in range(len(self.labels)):
            for batch in self.of_task(task):
                self.given += 1
                yield batch


def task(
    seed: int,
    *,
    net: Callable[[], nn.Module],
    images: bool = False,
    tasks: int = 10,
    samples: int = 64,
    steps: int = 80,
    size: int = 32,
    optimizer: Optimizer | None = None,
    relabel: float = 1.0,
    fits: bool = False,
) -> Task:
    """Return a network on a stream of tasks.

    Args:
        seed: of labels and batches (weights: torch's).
        net: makes the network.
        images: inputs are images.
        tasks: how many.
        samples: of each task.
        steps: batches of each task, a multiple of the 20 between two outcomes.
        size: of a batch.
        optimizer: Adam with a step of 2e-3 by default.
        relabel: share of the labels that each task draws anew; the others are the digits' own.
        fits: one fit a task instead of one for all.
    """
    split = data.digits(images=images, samples=samples)
    labels = [data.noisy_labels(split.y, relabel, seed=100 * seed + i) for i in range(tasks)]
    made = net()
    start = copy.deepcopy(made)
    module = Net(made, cross_entropy, optimizer or adam(2e-3))
    stream = Stream(split.x, labels, steps=steps, size=size, seed=seed)
    loaders = [stream]
    if fits:
        loaders = [
            Stream(split.x, [each], steps=steps, size=size, seed=seed * 1000 + i)
            for i, each in enumerate(labels)
        ]

    last = range(tasks - 3, tasks)  # one task alone is decided by a few samples

    def learned() -> list[float]:
        return [each for loader in loaders for each in loader.learned]

    def outcome(module: LightningModule) -> Measures:
        for loader in loaders:
            loader.ask(module)
        return {"learned": learned()[-1] if learned() else 1.0}

    def examine(module: LightningModule) -> Measures:
        found = truths.units(lambda module: module(split.x))(module)
        if len(learned()) == tasks:
            found["last"] = sum(learned()[i] for i in last) / len(last)
            found["fresh"] = sum(fresh(i) for i in last) / len(last)
            found["of_fresh"] = found["last"] / found["fresh"]
        return found

    def fresh(task: int) -> float:
        twin = Net(copy.deepcopy(start), cross_entropy, module.make_optimizer)
        descent = twin.make_optimizer(twin.net)
        for batch in stream.of_task(task):
            descent.zero_grad()
            twin.loss(batch).backward()
            descent.step()
        return stream.accuracy(twin, task)

    if not fits:
        return Task(module, loaders, steps * tasks, outcome, examine, targets=1)
    return Task(module, loaders, steps, outcome, examine, targets=1)


def wide(*, norm: bool = False) -> nn.Module:
    """Return a perceptron, with layer normalisation or without."""
    if not norm:
        return perceptron((64, 64, 64, 64, 10), nn.ReLU)
    layers: list[nn.Module] = []
    for a, b in ((64, 64), (64, 64), (64, 64)):
        layers += [nn.Linear(a, b), nn.LayerNorm(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def images(*, norm: bool = False) -> nn.Module:
    """Return a convolutional network, with batch normalisation or without."""
    return convolutional((16, 24, 24), nn.ReLU, norm=norm, classes=10)


def pair(name: str, architecture: str, make: Callable[..., Task], hot: float) -> list[Case]:
    """Return the cases that both networks have."""
    plain = f"streams/{name}_plain"
    return [
        Case(
            plain,
            architecture,
            "A modest rate: every task is learned as a fresh network learns it.",
            partial(make, tasks=5),
            (over("of_fresh", 0.8), over("fresh", 0.45)),
        ),
        Case(
            f"streams/{name}_noise_tasks",
            architecture,
            "Half of the labels change with each task, the others are the digits' own.",
            partial(make, tasks=5, relabel=0.5),
            (over("of_fresh", 0.8),),
        ),
        Case(
            f"streams/{name}_plasticity_loss",
            architecture,
            "A high rate without decay: units die task by task, and late tasks are not learned any more.",
            partial(make, optimizer=adam(hot)),
            (under("of_fresh", 0.65), over("fresh", 0.5)),
            *("plasticity_loss", "stream"),
            also=("dead_units", "rank_collapse"),
            control=f"streams/{name}_long",
            leaves=under("learned", 0.8, of_control=True),
        ),
        Case(
            f"streams/{name}_long",
            architecture,
            "As many tasks at a modest rate.",
            make,
            (over("of_fresh", 0.8), over("fresh", 0.45)),
        ),
    ]


CNN = partial(task, net=images, images=True, tasks=6, samples=48, size=24, steps=100, optimizer=adam(3e-3))

CASES = [
    *pair("mlp", "stream_mlp", partial(task, net=wide), 1e-2),
    *pair("cnn", "stream_cnn", CNN, 2e-2),
    Case(
        "streams/mlp_normalised",
        "stream_mlp",
        "Layer normalisation at the modest rate.",
        partial(task, net=partial(wide, norm=True)),
        (over("of_fresh", 0.8),),
    ),
    Case(
        "streams/mlp_fits",
        "stream_mlp",
        "Five tasks as five fits: steps begin anew with each.",
        partial(task, net=wide, tasks=5, fits=True, relabel=0.5),
        (over("of_fresh", 0.8),),
    ),
]
