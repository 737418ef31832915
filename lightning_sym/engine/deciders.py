"""Callbacks that decide by a reading: what is new to them, and of which weights it is.

``EarlyStopping`` and ``ModelCheckpoint`` look at ``trainer.callback_metrics`` whenever their turn comes; a
reading stays there until the next one. Without help the one would count a reading several times, and the
other would store weights under the score of earlier ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

# The one place where each of the two looks at its metric, in ``lightning`` and ``pytorch_lightning`` alike.
_STOPS, _SAVES = "_run_early_stopping_check", "_save_topk_checkpoint"


class Deciders:
    """The ``EarlyStopping`` and ``ModelCheckpoint`` of a fit that watch a reading.

    While it is attached, each ``EarlyStopping`` is asked once a reading: its patience counts readings, not
    epochs. Each ``ModelCheckpoint`` is asked only if the reading was taken at the present step. Nothing is
    asked before there is a reading. A callback whose metric is nobody's reading is left as it is.

    Args:
        trainer: of the fit.
        schedules: whether a monitor reads at epochs' ends alone, by the first part of its keys.
        taken: the step at which each key was read; it is looked at, not copied.
        catch_up: has monitors read what is due at an epoch's end or a validation's, if they have not.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        schedules: Mapping[str, bool],
        taken: Mapping[str, int],
        catch_up: Callable[[str], None],
    ) -> None:
        self.trainer, self.schedules, self.taken, self.catch_up = trainer, schedules, taken, catch_up
        self._asked: dict[int, int] = {}  # the step of the last reading that a callback was asked about
        self._warned: set[int] = set()
        self._callbacks: list[tuple[Any, str]] = []

    def attach(self, callbacks: Iterable[Any]) -> None:
        """Stand between the callbacks and what they look at."""
        for callback in callbacks:
            key = getattr(callback, "monitor", None)
            if not isinstance(key, str) or self.quantity(key) is None:
                continue
            for method, asks in ((_STOPS, self._new), (_SAVES, self._present)):
                own = getattr(callback, method, None)
                if own is not None and method not in vars(callback):
                    setattr(callback, method, partial(self._ask, callback, key, own, asks))
                    self._callbacks.append((callback, method))

    def detach(self) -> None:
        """Leave the callbacks as they were; harmless if that was done."""
        while self._callbacks:
            callback, method = self._callbacks.pop()
            vars(callback).pop(method, None)

    def quantity(self, key: str) -> str | None:
        """Return the first part of a key if it is a monitor's."""
        first = key.partition("/")[0]
        return first if "/" in key and first in self.schedules else None

    def wanted(self, *, batch: int, step: int, accumulated: int) -> set[str]:
        """Return the quantities to be read at a step because a checkpoint may be stored after it.

        Args:
            batch: number of the step's first batch in the epoch.
            step: optimizer steps made when it has ended.
            accumulated: batches of a step.
        """
        return {
            str(self.quantity(callback.monitor))
            for callback, method in self._callbacks
            if method == _SAVES and self._saves_after(callback, batch, step, accumulated)
        }

    def _saves_after(self, callback: Any, batch: int, step: int, accumulated: int) -> bool:
        trainer = self.trainer
        interval = getattr(callback, "_every_n_train_steps", 0)
        if interval:
            return step % interval == 0
        after = range(batch + 1, batch - batch % accumulated + accumulated + 1)  # batches made by then
        if callback._should_save_on_train_epoch_end(trainer):
            return trainer.num_training_batches in after
        validates = trainer.val_check_batch if trainer.enable_validation else 0
        return isinstance(validates, int) and validates > 0 and any(n % validates == 0 for n in after)

    def _ask(self, callback: Any, key: str, own: Callable[..., None], asks: Any, *arguments: Any) -> None:
        self.catch_up(key)
        if key not in self.taken:
            first = f"{self.quantity(key)}/"
            if any(other.startswith(first) for other in self.taken):
                own(*arguments)  # there are readings, this is none of them: let the callback say so
            return
        if asks(callback, key):
            self._asked[id(callback)] = self.taken[key]
            own(*arguments)

    def _new(self, callback: Any, key: str) -> bool:
        return self._asked.get(id(callback)) != self.taken[key]

    def _present(self, callback: Any, key: str) -> bool:
        step = int(self.trainer.global_step)
        if self.taken[key] == step:
            return True
        if not self.schedules[str(self.quantity(key))] and id(callback) not in self._warned:
            self._warned.add(id(callback))
            if self.trainer.is_global_zero:
                warnings.warn(
                    f"{type(callback).__name__}(monitor={key!r}) stored nothing at step {step}: the reading "
                    f"is of step {self.taken[key]}. Let it save at steps at which the monitor reads",
                    stacklevel=2,
                )
        return False
