"""A live fit, as the engine drives it and as monitors may look at it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sym.engine.batch import sample_count
from lightning_sym.engine.ranks import Ranks
from lightning_sym.sandbox import Sandbox

#: Where Lightning's sharding strategies, of both its packages, keep parameters in pieces.
_REFUSED = {
    "FSDPStrategy": "FSDP1 flattens parameters; use ModelParallelStrategy with fully_shard",
    "FSDP": "FSDP1 flattens parameters; use fully_shard",
    "DeepSpeedStage3": "DeepSpeed ZeRO-3 keeps parameters in pieces; use stage 1 or 2",
    "tensor parallel": "layers are tensor-parallel: a rank sees a part of each of their units",
}


class Run:
    """What the engine needs to know of a fit. One subclass for a Trainer, one for a plain loop.

    Attributes:
        module: what is being trained.
        ranks: the ranks that hold different data.
        batch: the batch that is being run, or was run last.
        sandbox: runs the module outside its step.
        datamodule: the Trainer's, if it has one.
        read_at: the step at which was read what is sent, in optimizer steps made.
    """

    #: Whether the driver calls ``Engine.stepped`` itself.
    reports_steps = False
    automatic = True
    clipped = False
    accumulated = 1
    loss_scale = 1.0
    epoch = 0
    read_at = 0
    datamodule: Any = None
    sandbox: Sandbox

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.batch: Any = None
        first = next(module.parameters(), None)
        self.device = torch.device("cpu") if first is None else first.device
        self.ranks = Ranks(self.device)
        self.losses: list[Tensor] = []  # of the micro-batches of the step that is observed
        self._returned: Tensor | None = None

    @property
    def step(self) -> int:
        """Optimizer steps made."""
        raise NotImplementedError

    @property
    def logger_step(self) -> int:
        """The step under which readings of the current batch are logged."""
        return self.step

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers of the fit."""
        raise NotImplementedError

    def samples(self, batch: Any) -> int | None:
        """Return the number of samples of a batch on this rank, or None if it can't be told."""
        return sample_count(batch)

    def tell(self, message: str) -> None:
        """Say something worth knowing, on rank 0."""
        if self.ranks.rank == 0:
            logging.getLogger("lightning_sym").info(message)

    def metric(self, key: str) -> float | None:
        """Return a metric that the user logged, or None."""
        return None

    def send(self, values: Mapping[str, float], media: Mapping[str, Any], step: int) -> list[str]:
        """Send what was read to whoever takes it; return what went wrong there."""
        raise NotImplementedError

    def saw_loss(self, returned: Any) -> None:
        """Take note of what a training step returned."""
        found = returned.get("loss") if isinstance(returned, Mapping) else returned
        if isinstance(found, Tensor) and found.numel() == 1:
            self._returned = found.detach()  # of an optimizer with several evaluations, the last

    def stop(self) -> None:
        """Ask for the fit to end after this step."""
        raise NotImplementedError

    def function(self, how: str | Callable[..., Any], *, argument: str = "forward") -> Callable[..., Any]:
        """Return what a monitor calls: a method of the module by name, or a function of (module, input).

        Args:
            how: the one or the other.
            argument: of the monitor, for the error's sake.

        Raises:
            TypeError: if the module has no such method.
        """
        if not isinstance(how, str):
            return partial(how, self.module)
        found = getattr(self.module, how, None)
        if not callable(found):
            raise TypeError(
                f"{argument}={how!r} is not a method of {type(self.module).__name__}; pass the name of one, "
                "or a function of the module and its input"
            )
        return found

    def mean(self, value: float) -> float:
        """Return the mean of a number over ranks."""
        return float(self.ranks.total(torch.tensor(value, dtype=torch.float64))) / self.ranks.size

    def end_batch(self) -> None:
        """End a micro-batch of the step."""
        if self._returned is not None:
            self.losses.append(self._returned)
            self._returned = None

    def loss(self) -> float:
        """Return the step's loss, the mean over its batches and ranks; NaN if it is not known."""
        parts = [float(value) for value in self.losses]
        total = self.ranks.total(torch.tensor([sum(parts), len(parts)], dtype=torch.float64))
        return float(total[0] / total[1]) if total[1] else math.nan

    def sharding(self) -> str:
        """Return how parameters are kept in pieces: ``""``, ``"fully_shard"``, or a reason of refusal."""
        kinds = {kind.__name__ for child in self.module.modules() for kind in type(child).__mro__}
        if "FullyShardedDataParallel" in kinds:
            return "FSDP"
        pieces = [p for p in self.module.parameters() if hasattr(p, "device_mesh")]
        if not pieces:
            return ""
        sharded = any(sum(place.is_shard() for place in p.placements) > 1 for p in pieces)  # type: ignore[attr-defined]
        return "tensor parallel" if sharded or "FSDPModule" not in kinds else "fully_shard"

    def check(self, monitors: list[Any]) -> None:
        """Refuse what can't be right.

        Raises:
            ValueError: if parameters are kept in pieces in a way that a monitor can't deal with.
        """
        how = self.sharding()
        names = ", ".join(dict.fromkeys(type(monitor).__name__ for monitor in monitors))
        if how in _REFUSED:
            raise ValueError(f"{names} cannot read this fit: {_REFUSED[how]}")
        apart = [type(monitor).__name__ for monitor in monitors if monitor.runs_module]
        if how and apart:
            raise ValueError(
                f"{', '.join(dict.fromkeys(apart))} runs the module outside of its step, which needs "
                "parameters whole on every rank (one device, or DDP); here they are sharded by fully_shard"
            )
