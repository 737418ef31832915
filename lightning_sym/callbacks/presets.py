"""Ready lists of monitors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, overload

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_sym.callbacks.alignment import AlignmentMonitor
from lightning_sym.callbacks.base import Monitor, stored_states
from lightning_sym.callbacks.collapse import CollapseMonitor
from lightning_sym.callbacks.diagnosis import Diagnosis
from lightning_sym.callbacks.plasticity import PlasticityMonitor
from lightning_sym.callbacks.signal import SignalMonitor
from lightning_sym.engine.batch import Locator
from lightning_sym.engine.history import LAST_ROWS, Keep
from lightning_sym.engine.schedule import Schedule


class Monitors(Callback, Sequence[Monitor]):
    """Several monitors as one callback, and as a sequence of them.

    ``Trainer(callbacks=monitors())``, ``Trainer(callbacks=[monitors(), other])`` and
    ``Trainer(callbacks=[*monitors(), other])`` are the same, and so is ``monitors() + [other]``.

    Attributes:
        members: the monitors.
    """

    def __init__(self, members: Sequence[Monitor]) -> None:
        self.members = list(members)

    @overload
    def __getitem__(self, index: int) -> Monitor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Monitor]: ...
    def __getitem__(self, index: int | slice) -> Monitor | list[Monitor]:
        return self.members[index]

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Monitor]:
        return iter(self.members)

    def __add__(self, others: Sequence[Callback]) -> list[Callback]:
        return [*self, *others]

    def __radd__(self, others: Sequence[Callback]) -> list[Callback]:
        return [*others, *self]

    def __repr__(self) -> str:
        return f"Monitors({self.members!r})"

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(members=[each.state_key for each in self.members])

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"members": {each.state_key: each.state_dict() for each in self.members}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for each in self.members:
            each.take_up(state_dict["members"])

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up what was saved by monitors one by one, or under another schedule."""
        states = stored_states(checkpoint)
        for each in self.members:
            each.take_up(states)
            each.on_load_checkpoint(trainer, pl_module, {**checkpoint, "callbacks": states})


def _to_members(hook: str) -> Callable[..., None]:
    def call(self: Monitors, *args: Any, **kwargs: Any) -> None:
        for each in self.members:
            getattr(each, hook)(*args, **kwargs)

    call.__name__ = hook
    return call


for _hook in ("setup", "teardown", *(name for name in vars(Callback) if name.startswith("on_"))):
    if _hook not in vars(Monitors):
        setattr(Monitors, _hook, _to_members(_hook))


def monitors(
    preset: Literal["light", "standard", "full"] = "standard",
    *,
    every_n_steps: int | Schedule | None = None,
    layers: str | list[str] | None = None,
    targets: int | str | Callable[[Any], Tensor] | None = None,
    inputs: Locator = None,
    keep: Keep = LAST_ROWS,
    deferred: bool = False,
    strict: bool = False,
) -> Monitors:
    """Return ready monitors.

    ======== ===================================================================== ======= ========
    preset   monitors                                                              layers  interval
    ======== ===================================================================== ======= ========
    light    collapse, plasticity, signal, diagnosis                               4       200
    standard collapse, plasticity, alignment, signal, diagnosis                    12      200
    full     the same with spectra, PAH exponents and the trainability probe       all     200
    ======== ===================================================================== ======= ========

    Args:
        preset: ``"light"``, ``"standard"`` or ``"full"``.
        every_n_steps: an interval in optimizer steps, or a schedule, instead of the preset's.
        layers: a glob, or a list of globs, on module names, instead of the preset's choice.
        targets: where the class labels are in a batch, for neural collapse: an index, a key or a function.
        inputs: where the module's input is in a batch, for ``full``'s trainability probe, likewise;
            ``None``: what its ``forward`` names, or the first entry.
        keep: rows of each history that a checkpoint holds, or a folder for them
            (:class:`~lightning_sym.callbacks.base.Monitor`).
        deferred: compute ranks, alignments and spectra in a thread while training goes on. They are the same
            numbers under the same step, published 4 optimizer steps later or, if that comes first, before the
            next reading, validation, a checkpoint, the epoch's end and the fit's end. Leave it off where a
            callback decides by one of them in the middle of an epoch.
        strict: raise what goes wrong inside instead of warning once and going on.

    Returns:
        For ``Trainer(callbacks=...)``, alone or in a list; also a sequence of the monitors.

    Raises:
        ValueError: if the preset is unknown.

    Example:
        >>> [type(monitor).__name__ for monitor in monitors("light")]
        ['CollapseMonitor', 'PlasticityMonitor', 'SignalMonitor', 'Diagnosis']
    """
    if preset not in ("light", "standard", "full"):
        raise ValueError(f"preset must be 'light', 'standard' or 'full', got {preset!r}")
    full = preset == "full"
    shared: dict[str, Any] = {
        "every_n_steps": 200 if every_n_steps is None else every_n_steps,
        "layers": layers,
        "max_layers": {"light": 4, "standard": 12, "full": 1_000_000}[preset],
        "keep": keep,
        "strict": strict,
    }
    later = {**shared, "deferred": deferred}
    chosen: list[Monitor] = [
        CollapseMonitor(targets=targets, inputs=inputs, histograms=full, **later),
        PlasticityMonitor(trainability_steps=50 if full else 0, inputs=inputs, **later),
    ]
    if preset != "light":
        chosen.append(AlignmentMonitor(exponents=full, **later))
    chosen.append(SignalMonitor(**shared))
    chosen.append(Diagnosis(every_n_steps=shared["every_n_steps"], keep=keep, strict=strict))
    return Monitors(chosen)
