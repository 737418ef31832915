"""What a step showed, as one monitor reads it; what is computed of it is computed once for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_sym.observe.statistics.statistic import Statistic

if TYPE_CHECKING:
    from lightning_sym.observe.functions import FunctionWatch
    from lightning_sym.observe.hooks import LayerWatch
    from lightning_sym.observe.layers import Layer


class LayerObservation:
    """What one layer showed in one optimizer step.

    Attributes:
        layer: the layer.
        name: its name.
        calls: its forward calls in this step, over all ranks.
        fed_by_data: whether no input of it carried a gradient (raw data, frozen layers).
        trained: whether a parameter of its weight is trained; else it counts in no summary of layers.
    """

    def __init__(self, watch: LayerWatch, *, failed: set[Statistic], fed_by_data: bool) -> None:
        self.layer: Layer = watch.layer
        self.name = watch.layer.name
        self.trained = watch.layer.trained
        self.calls = int(watch.calls)
        self.fed_by_data = fed_by_data
        self._watch, self._failed = watch, failed
        self._results: dict[Statistic, Any] = {}

    def __getitem__(self, statistic: Statistic) -> Any:
        """Return what a statistic came to.

        Raises:
            KeyError: if it has no result for this layer in this step.
        """
        found = self.get(statistic)
        if found is None:
            raise KeyError(f"{statistic} has no result for layer {self.name}")
        return found

    def get(self, statistic: Statistic) -> Any:
        """Return what a statistic came to, or None if it has no result for this layer in this step."""
        if statistic not in self._results:
            tally = self._watch.tallies.get(statistic)
            missing = tally is None or statistic in self._failed
            self._results[statistic] = None if missing or tally is None else tally.result()
        return self._results[statistic]

    def reason(self, statistic: Statistic) -> str:
        """Return why a statistic that was asked for has no result, as far as this rank knows; else ``""``."""
        tally = self._watch.tallies.get(statistic)
        return tally.reason if tally is not None else ""


@dataclass
class Observation:
    """One due step (or epoch end), as one monitor sees it.

    Attributes:
        step: optimizer steps made, this one included.
        every: what was seen of the monitor's layers, in the network's order; layers that never ran are
            not among them.
        silent: names of watched layers that never ran in this step.
        run: the live fit: module, batch, sandbox, ranks, optimizers
            (:class:`~lightning_sym.engine.run.Run`).
        state: what the monitor keeps from reading to reading: tensors, numbers, strings, lists and dicts.
            It is stored in checkpoints, and empty when a new run begins.
        watch: before a step, the layers to watch from now on instead of those chosen at the start.
        look: before a step, what is to see the calls of torch's functions during it
            (:class:`~lightning_sym.observe.functions.FunctionWatch`).
        others: the monitors beside it that read this fit, for one that reads what they have read.
        current: the layer that is being read, for error messages.
    """

    step: int
    every: list[LayerObservation] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    run: Any = field(default=None, repr=False)
    state: dict[str, Any] = field(default_factory=dict, repr=False)
    watch: list[Layer] | None = field(default=None, repr=False)
    look: FunctionWatch | None = None
    others: list[Any] = field(default_factory=list, repr=False)
    current: str = ""

    @property
    def layers(self) -> Iterator[LayerObservation]:
        """The layers one after the other; remembers which is being read."""
        for layer in self.every:
            self.current = layer.name
            yield layer
        self.current = ""
