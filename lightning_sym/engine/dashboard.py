"""What TensorBoard opens with: charts of the whole network first, then layers by depth."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

#: Readings of the whole network that are charted first, each chart with its keys; any loss is a pattern.
FIRST: dict[str, tuple[str, ...]] = {
    "loss": ("signal/loss",),
    "findings": ("findings/alarms", "findings/warnings"),
    "collapse score": ("collapse/score",),
    "neural collapse": ("collapse/nc1", "collapse/nc2", "collapse/nc3", "collapse/nc4"),
    "alignment": ("alignment/mean", "alignment/null"),
}
#: Readings whose last value stands beside a run's hyperparameters.
FINAL = (
    *("signal/loss", "findings/alarms", "findings/warnings"),
    *("collapse/score", "alignment/mean", "plasticity/dormant_units"),
)
_LOSS = r"^(.+-)?(train[_/])?loss(_step)?$"
Layout = dict[str, dict[str, list[Any]]]


def layout(keys: Iterable[str]) -> Layout:
    """Return a custom-scalars layout: ``{category: {chart: ["Multiline", [patterns of keys]]}}``.

    The first category, ``overview``, is of the network as a whole. Then there is one for each reading of
    layers, with a chart a layer, in the order of the keys: TensorBoard tells runs apart by colour, not the
    lines of one run.

    Args:
        keys: ``<quantity>/<layer>/<what>`` and ``<quantity>/<what>``, layers in the network's order.
    """
    split = [(key, *key.split("/", 2)) for key in keys if "/" in key]
    layers = {parts[2] for parts in split if len(parts) == 4}
    by_layer: Layout = {}
    own: dict[str, str] = {}
    for key, quantity, second, *what in split:
        if what or second in layers:
            category = by_layer.setdefault("/".join([quantity, *what]), {})
            category[second] = ["Multiline", [exactly(key)]]
        elif second != "samples":
            own[key] = f"{quantity}: {second.replace('_', ' ')}"
    first = {title: [exactly(key) for key in wanted if key in own] for title, wanted in FIRST.items()}
    first["loss"].append(_LOSS)
    told = {key for wanted in FIRST.values() for key in wanted}
    first |= {title: [exactly(key)] for key, title in own.items() if key not in told}
    overview = {title: ["Multiline", patterns] for title, patterns in first.items() if patterns}
    return {"overview": overview, **by_layer}


def exactly(key: str) -> str:
    """Return the pattern that matches a key, behind a logger's prefix or none, and no other."""
    return f"^(.+-)?{re.escape(key)}$"


def add_final_readings(logger: Any, params: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Let TensorBoard's table of hyperparameters show the last value of some scalars.

    Lightning writes what that table has before the first step, with ``hp_metric`` alone, and TensorBoard
    heeds the first writing. So it is written here, earlier, with readings besides; the run's own row stays
    Lightning's. Nothing is done where the user has said ``default_hp_metric=False``, or has no
    hyperparameters.

    Args:
        logger: Lightning's; others than TensorBoard's are left alone.
        params: the hyperparameters that Lightning is about to log.
        keys: of the scalars.
    """
    if not params or not getattr(logger, "_default_hp_metric", False):
        return
    board = logger.experiment
    if not hasattr(board, "_get_file_writer"):
        return
    from torch.utils.tensorboard.summary import hparams

    experiment, _, _ = hparams(_flat(params), dict.fromkeys(["hp_metric", *keys], 0.0))
    board._get_file_writer().add_summary(experiment, 0)


def _flat(params: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return nested parameters under the names that Lightning gives them."""
    found: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{above}{name}/")
        else:
            found[f"{above}{name}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
