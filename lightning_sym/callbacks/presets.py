"""Ready lists of monitors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from lightning_sym.callbacks.alignment import AlignmentMonitor
from lightning_sym.callbacks.base import Monitor
from lightning_sym.callbacks.collapse import CollapseMonitor
from lightning_sym.callbacks.plasticity import PlasticityMonitor
from lightning_sym.callbacks.trainability import Locator
from lightning_sym.observe.schedule import Schedule


def monitors(
    preset: Literal["light", "standard", "full"] = "standard",
    *,
    every_n_steps: int | Schedule | None = None,
    layers: str | list[str] | None = None,
    targets: int | str | Callable[[Any], Tensor] | None = None,
    inputs: Locator = 0,
    strict: bool = False,
) -> list[Monitor]:
    """Return a ready list of monitors.

    ======== ===================================================================== ======= ========
    preset   monitors                                                              layers  interval
    ======== ===================================================================== ======= ========
    light    collapse, plasticity                                                  4       200
    standard collapse, plasticity, alignment                                       12      200
    full     the same with spectra, PAH exponents and the trainability probe       all     200
    ======== ===================================================================== ======= ========

    Args:
        preset: ``"light"``, ``"standard"`` or ``"full"``.
        every_n_steps: an interval in optimizer steps, or a schedule, instead of the preset's.
        layers: a glob, or a list of globs, on module names, instead of the preset's choice.
        targets: where the class labels are in a batch, for neural collapse: an index, a key or a function.
        inputs: where the module's input is in a batch, for ``full``'s trainability probe, likewise.
        strict: raise what goes wrong inside instead of warning once and going on.

    Returns:
        Callbacks for ``Trainer(callbacks=...)``.

    Raises:
        ValueError: if the preset is unknown.

    Example:
        >>> [type(monitor).__name__ for monitor in monitors("light")]
        ['CollapseMonitor', 'PlasticityMonitor']
    """
    if preset not in ("light", "standard", "full"):
        raise ValueError(f"preset must be 'light', 'standard' or 'full', got {preset!r}")
    full = preset == "full"
    shared: dict[str, Any] = {
        "every_n_steps": 200 if every_n_steps is None else every_n_steps,
        "layers": layers,
        "max_layers": {"light": 4, "standard": 12, "full": 1_000_000}[preset],
        "strict": strict,
    }
    chosen: list[Monitor] = [
        CollapseMonitor(targets=targets, inputs=inputs, histograms=full, **shared),
        PlasticityMonitor(trainability_steps=50 if full else 0, inputs=inputs, **shared),
    ]
    if preset != "light":
        chosen.append(AlignmentMonitor(exponents=full, **shared))
    return chosen
