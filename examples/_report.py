"""What every example leaves behind: one JSON file, one picture, one table on the screen."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, str]:
    """Return the versions and the kind of device a result was taken with."""
    import lightning

    import lightning_sym

    cuda = torch.cuda.is_available()
    return {
        "lightning_sym": lightning_sym.__version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} thread(s)",
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean, standard deviation (0 for one value) and the number of values."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": deviation, "n": len(values)}


def save(out: Path, name: str, result: dict[str, Any], figure: Any = None) -> None:
    """Write ``<out>/<name>.json`` and, given a figure, ``<out>/<name>.png``."""
    out.mkdir(parents=True, exist_ok=True)
    result = {"environment": environment(), **result}
    (out / f"{name}.json").write_text(json.dumps(rounded(result), indent=1) + "\n")
    if figure is not None:
        figure.savefig(out / f"{name}.png", dpi=110)


def rounded(value: Any) -> Any:
    """Return the result with floats cut to six digits, which is what they are good for."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Return rows as aligned columns."""
    cells = [list(header)] + [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
