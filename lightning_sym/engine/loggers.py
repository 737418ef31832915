"""Where readings go: text, histograms and figures through each logger's own methods, by one table.

``WRITERS`` is the table: who takes which medium, and how. What a logger takes in no way is named once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_sym.engine.dashboard import layout

#: Bins of a histogram where the logger does not choose them.
BINS = 64


@dataclass(frozen=True)
class Writer:
    """How loggers of one kind take one medium.

    Args:
        logger: their name.
        medium: ``"text"`` (a string), ``"histogram"`` (a vector of finite values, not empty, float64 on the
            CPU) or ``"figure"`` (matplotlib's).
        takes: whether a sink is such a logger.
        write: called with the sink, the key, the value and the step.
    """

    logger: str
    medium: str
    takes: Callable[[Any], bool]
    write: Callable[[Any, str, Any, int], Any]


def _board(sink: Any) -> Any:
    """Return the ``SummaryWriter``, or another experiment, that a sink has or is."""
    return sink if hasattr(sink, "add_scalar") else getattr(sink, "experiment", None)


def _is_board(method: str) -> Callable[[Any], bool]:
    return lambda sink: hasattr(_board(sink), method)


def _is_wandb(sink: Any) -> bool:
    return hasattr(sink, "log_image") and hasattr(sink, "log_table")


def _is_mlflow(sink: Any) -> bool:
    return hasattr(sink, "run_id") and hasattr(_board(sink), "log_artifact")


def _wandb_histogram(sink: Any, key: str, values: Tensor, step: int) -> None:
    import wandb

    sink.log_metrics(metrics={key: wandb.Histogram(values.tolist(), num_bins=BINS)}, step=step)


def _mlflow_histogram(sink: Any, key: str, values: Tensor, step: int) -> None:
    low, high = float(values.min()), float(values.max())
    counts = torch.histc(values, bins=BINS, min=low, max=high)
    table = {"low": low, "high": high, "counts": [int(count) for count in counts]}
    sink.experiment.log_dict(sink.run_id, table, _artifact(key, step, "json"))


def _artifact(key: str, step: int, kind: str) -> str:
    return f"{key}/step_{step:08d}.{kind}"


def _tag(key: str) -> str:
    """Return TensorBoard's tag of a figure: its groups go by name, ``_`` before letters, overviews first."""
    return f"_{key}" if key.endswith("/overview") else key


WRITERS = (
    Writer(
        *("TensorBoard", "text", _is_board("add_text")),
        lambda sink, key, text, step: _board(sink).add_text(key, text, step),
    ),
    Writer(
        *("TensorBoard", "histogram", _is_board("add_histogram")),
        lambda sink, key, values, step: _board(sink).add_histogram(key, values, step),
    ),
    Writer(
        *("TensorBoard", "figure", _is_board("add_figure")),
        lambda sink, key, figure, step: _board(sink).add_figure(_tag(key), figure, step, close=True),
    ),
    Writer(
        *("Weights & Biases", "text", _is_wandb),
        lambda sink, key, text, step: sink.log_table(key, ["step", "text"], [[step, text]], step=step),
    ),
    Writer(
        *("Weights & Biases", "histogram"),
        lambda sink: _is_wandb(sink) and importlib.util.find_spec("wandb") is not None,
        _wandb_histogram,
    ),
    Writer(
        *("Weights & Biases", "figure", _is_wandb),
        lambda sink, key, figure, step: sink.log_image(key, [figure], step=step),
    ),
    Writer(
        *("MLflow", "text", _is_mlflow),
        lambda sink, key, text, step: _board(sink).log_text(sink.run_id, text, _artifact(key, step, "txt")),
    ),
    Writer("MLflow", "histogram", _is_mlflow, _mlflow_histogram),
    Writer(
        *("MLflow", "figure", _is_mlflow),
        lambda sink, key, figure, step: _board(sink).log_figure(
            sink.run_id, figure, _artifact(key, step, "png")
        ),
    ),
)


class Loggers:
    """The loggers of one fit: Lightning's, ``SummaryWriter`` objects, or functions of readings and a step.

    Args:
        sinks: who takes readings.
        tell: says something worth knowing, once.
    """

    def __init__(self, sinks: Iterable[Any], tell: Callable[[str], None]) -> None:
        self.sinks, self._tell = list(sinks), tell
        self._keys: dict[str, None] = {}
        self._dropped: set[int] = set()

    def send(
        self, values: Mapping[str, float], media: Mapping[str, Any], step: int, *, lead: bool = True
    ) -> list[str]:
        """Send what was read; return what went wrong there, in words.

        Args:
            values: scalars by key.
            media: strings, tensors (histograms) and functions that draw a figure, by key.
            step: under which they are logged.
            lead: whether this is rank 0. Others send scalars alone, as Lightning does: whether a logger takes
                them is its own decision.
        """
        wrong = []
        new = [key for key in values if key not in self._keys]
        self._keys.update(dict.fromkeys(new))
        for sink in self.sinks:
            try:
                if values:
                    _send_scalars(sink, values, step)
                if not lead:
                    continue
                if new and hasattr(_board(sink), "add_custom_scalars"):
                    _board(sink).add_custom_scalars(layout(self._keys))
                for key, value in media.items():
                    self._send_one(sink, key, value, step)
            except Exception as error:
                wrong.append(f"{type(sink).__name__}: {type(error).__name__}: {error}")
        return wrong

    def _send_one(self, sink: Any, key: str, value: Any, step: int) -> None:
        medium = "text" if isinstance(value, str) else "histogram" if isinstance(value, Tensor) else "figure"
        writer = next((w for w in WRITERS if w.medium == medium and w.takes(sink)), None)
        if writer is None:
            self._say_dropped(sink, key)
            return
        if isinstance(value, Tensor):
            flat = value.detach().flatten().cpu().double()
            value = flat[flat.isfinite()]
            if not value.numel():
                return
        elif medium == "figure":
            value = value()
        writer.write(sink, key, value, step)

    def _say_dropped(self, sink: Any, key: str) -> None:
        """Say once of a logger what it drops."""
        if id(sink) in self._dropped:
            return
        self._dropped.add(id(sink))
        media = dict.fromkeys(writer.medium for writer in WRITERS)
        taken = {writer.medium for writer in WRITERS if writer.takes(sink)}
        lost = " and ".join(f"no {medium}" for medium in media if medium not in taken)
        self._tell(f"lightning_sym: {type(sink).__name__} takes {lost}; {key} and the like are dropped")


def _send_scalars(sink: Any, values: Mapping[str, float], step: int) -> None:
    if hasattr(sink, "log_metrics"):
        sink.log_metrics(metrics=dict(values), step=step)  # by keyword, as Lightning and Fabric do
    elif hasattr(sink, "add_scalar"):
        for key, value in values.items():
            sink.add_scalar(key, value, step)
    else:
        sink(dict(values), step)
