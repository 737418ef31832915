"""What a case is, and what every family needs: checks, tasks, batches, a module with a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

#: What a run can be sick of: the kinds that :mod:`lightning_sym.diagnosis` names.
KINDS = (
    *("dead_units", "equal_units", "weights_vanish", "rank_collapse", "divergence", "exploding_gradients"),
    *("vanishing_gradients", "saturation", "frozen", "dead_block", "embedding_collapse_complete"),
    *("embedding_collapse_dimensional", "posterior_collapse", "mode_collapse", "attention_collapse"),
    *("plasticity_loss", "lazy_training", "edge_of_stability"),
)
#: What made it so.
CAUSES = (
    *("initialisation", "learning rate", "decay", "depth", "wiring", "objective", "views", "balance"),
    *("stream", "scale"),
)
#: Which half an architecture's cases belong to. Rules are tuned on one, figures are reported on the other.
#: Fresh ones were written when the rules stood, and no rule was changed after they were scored.
HALVES: Mapping[str, Literal["tuning", "reported", "fresh"]] = {
    **dict.fromkeys(
        ("mlp", "cnn", "gpt", "vae_mlp", "gan_mlp", "ssl_mlp", "stream_mlp", "regression"), "tuning"
    ),
    **dict.fromkeys(("cnn_bn", "resnet", "vit", "recurrent", "vae_cnn", "gan_residual"), "reported"),
    **dict.fromkeys(("ssl_cnn", "stream_cnn", "lora"), "reported"),
    "fresh": "fresh",
}

Measures = dict[str, float]


@dataclass(frozen=True)
class Check:
    """One condition of a truth: a measure below or above a limit.

    Args:
        measure: its key in the outcome; ``start/`` before it: as training began.
        relation: ``"<"`` or ``">"``.
        limit: what it is held against; with ``of_control`` a multiple of the control's measure.
        of_control: see ``limit``.
    """

    measure: str
    relation: Literal["<", ">"]
    limit: float
    of_control: bool = False

    def bound(self, control: Mapping[str, float] | None) -> float:
        """Return the limit as a number.

        Raises:
            ValueError: if it takes a control and there is none.
        """
        if not self.of_control:
            return self.limit
        if control is None:
            raise ValueError(f"the check of {self.measure!r} needs a control's outcome, got None")
        return self.limit * control[self.measure]

    def holds(self, outcome: Mapping[str, float], control: Mapping[str, float] | None = None) -> bool:
        """Return whether the condition holds; a measure that is NaN fulfils none."""
        value, bound = outcome[self.measure], self.bound(control)
        return value < bound if self.relation == "<" else value > bound


def under(measure: str, limit: float, *, of_control: bool = False) -> Check:
    """Return the condition that a measure is below a limit."""
    return Check(measure, "<", limit, of_control)


def over(measure: str, limit: float, *, of_control: bool = False) -> Check:
    """Return the condition that a measure is above a limit."""
    return Check(measure, ">", limit, of_control)


@dataclass
class Task:
    """One run, built and ready to fit.

    Args:
        module: what is trained.
        loaders: batches, one iterable a fit; several: one fit after another, each with a new Trainer.
        steps: optimizer steps of each fit.
        outcome: what the user cares for, on held-out data; cheap, it is taken along the way too.
        examine: more about the module, taken at the start and at the end.
        targets: where the class labels are in a batch, if there are any.
        embeds: whether the module has ``embed`` and its batches hold two views.
        trainer: further arguments of the Trainer.
    """

    module: LightningModule
    loaders: Sequence[Any]
    steps: int
    outcome: Callable[[LightningModule], Measures]
    examine: Callable[[LightningModule], Measures] = field(default=lambda module: {})
    targets: int | None = None
    embeds: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A run with a known truth.

    Args:
        name: ``family/what``.
        architecture: a key of :data:`HALVES`.
        about: what it is and why it is sick, or why it is healthy though it looks otherwise.
        build: makes the task of a seed.
        checks: all must hold, or the case is not what it says.
        sick: a kind, or None for healthy.
        cause: one of :data:`CAUSES`, for the sick.
        also: further kinds that are true of the run; naming them is no error, and not asked for.
        layers: globs on the layers where it sits, as far as it sits somewhere.
        control: name of its healthy twin.
        leaves: for a sickness that comes on gradually, the condition on the outcome and the control's at
            the same step from which on the run is taken to be worse.
    """

    name: str
    architecture: str
    about: str
    build: Callable[[int], Task]
    checks: tuple[Check, ...]
    sick: str | None = None
    cause: str = ""
    also: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    control: str | None = None
    leaves: Check | None = None

    def __post_init__(self) -> None:
        for kind in (self.sick, *self.also):
            if kind is not None and kind not in KINDS:
                raise ValueError(f"{self.name}: sick and also must be of {KINDS}, got {kind!r}")
        if self.architecture not in HALVES:
            raise ValueError(
                f"{self.name}: architecture must be of {list(HALVES)}, got {self.architecture!r}"
            )
        if (self.sick is not None) != (self.cause in CAUSES):
            raise ValueError(
                f"{self.name}: a sick case, and it alone, has a cause of {CAUSES}, got {self.cause!r}"
            )
        if not self.checks:
            raise ValueError(f"{self.name}: checks must not be empty")

    @property
    def family(self) -> str:
        """The file it is in."""
        return self.name.split("/")[0]

    @property
    def half(self) -> str:
        """``"tuning"`` or ``"reported"``."""
        return HALVES[self.architecture]

    def verdict(
        self, outcome: Mapping[str, float], control: Mapping[str, float] | None
    ) -> list[dict[str, Any]]:
        """Return every check with its value, its bound and whether it holds."""
        return [
            {
                "measure": check.measure,
                "value": outcome[check.measure],
                "relation": check.relation,
                "bound": check.bound(control),
                "holds": check.holds(outcome, control),
            }
            for check in self.checks
        ]


class Batches:
    """Batches of tensors that belong together, in a new order each epoch; equal seeds, equal batches.

    Args:
        tensors: equal first dimensions.
        size: samples a batch; a ragged last one is dropped.
        seed: of the order.
    """

    def __init__(self, *tensors: Tensor, size: int, seed: int = 0) -> None:
        self.tensors, self.batch_size = tensors, min(size, len(tensors[0]))
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.tensors[0]) // self.batch_size

    def __iter__(self) -> Iterator[list[Tensor]]:
        order = torch.randperm(len(self.tensors[0]), generator=self.generator)
        for rows in order.split(self.batch_size)[: len(self)]:
            yield [tensor[rows] for tensor in self.tensors]


Loss = Callable[[nn.Module, Any], Tensor]
Optimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Net(LightningModule):
    """A network, a loss of (network, batch) and an optimizer, as a user would write them.

    Args:
        net: the network.
        loss: returns the loss of a batch.
        optimizer: makes the optimizer from the network.
        schedule: factor of the learning rate by step.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Loss,
        optimizer: Optimizer,
        *,
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.loss_function, self.make_optimizer, self.schedule = loss, optimizer, schedule

    def forward(self, x: Tensor) -> Any:
        """Return the network's output."""
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        """Return the loss of a batch."""
        return self.loss_function(self.net, batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and the schedule if there is one."""
        optimizer = self.make_optimizer(self.net)
        if self.schedule is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def cross_entropy(net: nn.Module, batch: Any) -> Tensor:
    """Return the mean cross-entropy of a batch ``(x, labels)``."""
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def mean_square(net: nn.Module, batch: Any) -> Tensor:
    """Return the mean square error of a batch ``(x, y)``."""
    return (net(batch[0]) - batch[1]).square().mean()


def sgd(lr: float, *, decay: float = 0.0, momentum: float = 0.0) -> Optimizer:
    """Return a maker of SGD on all parameters that take gradients."""
    return lambda net: torch.optim.SGD(trained(net), lr=lr, weight_decay=decay, momentum=momentum)


def adam(lr: float, *, decay: float = 0.0, without: Sequence[str] = ()) -> Optimizer:
    """Return a maker of AdamW; parameters whose names begin with one of ``without`` are left out."""

    def make(net: nn.Module) -> torch.optim.Optimizer:
        chosen = [
            parameter
            for name, parameter in net.named_parameters()
            if parameter.requires_grad and not name.startswith(tuple(without))
        ]
        return torch.optim.AdamW(chosen, lr=lr, weight_decay=decay)

    return make


def trained(net: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that take gradients."""
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def leaving_step(
    check: Check, curve: Sequence[Mapping[str, float]], control: Sequence[Mapping[str, float]]
) -> float | None:
    """Return the first step from which on the outcome is worse than the control's for good.

    Args:
        check: what "worse" is, on rows of the two curves at equal steps.
        curve: the outcomes along the run, with ``step``.
        control: the same of the control.

    Returns:
        The step, or None where the run does not end worse.
    """
    by_step = {row["step"]: row for row in control}
    left: float | None = None
    for row in curve:
        twin = by_step.get(row["step"])
        if twin is None:
            continue
        worse = check.holds(row, twin) or not math.isfinite(row[check.measure])
        left = (row["step"] if left is None else left) if worse else None
    return left
