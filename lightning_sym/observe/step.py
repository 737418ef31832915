"""What the statistics of a step may ask about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")
#: Where the labels are in a batch: an index, a key or a function of the batch.
Targets = int | str | Callable[[Any], Tensor] | None


@dataclass
class Step:
    """One observed optimizer step, as the micro-batch that is being run belongs to it.

    Attributes:
        samples: number of samples of the micro-batch on this rank, or ``None`` if unknown.
        before: samples of this rank in earlier micro-batches of the step.
        scale: what turns a gradient of the step's loss into gradients of per-sample losses.
        rank, ranks: this rank among those that hold different data.
        labels: returns the labels of the micro-batch at a place.
        memory: what statistics of several layers share, by a key of their own.
    """

    samples: int | None = None
    before: int = 0
    scale: float = 1.0
    rank: int = 0
    ranks: int = 1
    labels: Callable[[Targets], Tensor] = lambda targets: _no_labels(targets)
    memory: dict[Any, Any] = field(default_factory=dict)

    def shared(self, key: Any, make: Callable[[], T]) -> T:
        """Return what is kept under a key for this step, made on first asking."""
        if key not in self.memory:
            self.memory[key] = make()
        found: T = self.memory[key]
        return found


def _no_labels(targets: Targets) -> Tensor:
    raise ValueError(f"targets={targets!r} cannot be found: the step's batch is not known")
