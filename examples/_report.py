"""What every example leaves behind: one JSON file, one picture, one table on the screen."""

from __future__ import annotations

import json
import math
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]


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


def command(argv: Sequence[str] | None = None) -> str:
    """Return the command line this process was started by, as a reader would type it.

    ``--out`` is left out, and of absolute paths only the last part is kept: where data lie on one machine
    says nothing on another.

    Args:
        argv: script and arguments; ``None``: of this process.
    """
    script, *given = sys.argv if argv is None else argv
    kept, skip = [], False
    for word in given:
        if skip or word == "--out" or word.startswith("--out="):
            skip = word == "--out"
            continue
        kept.append(Path(word).name if Path(word).is_absolute() else word)
    return shlex.join(["python", f"examples/{Path(script).name}", *kept])


def commit() -> str | None:
    """Return the commit that is checked out, ``+`` behind it if package or examples differ from it.

    ``None`` outside of a git checkout.
    """
    git = ["git", "-C", str(REPOSITORY)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        paths = ["lightning_sym", "examples"]
        status = [*git, "status", "--porcelain", "--untracked-files=no", "--", *paths]
        changed = subprocess.run(status, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return mean, standard deviation (0 for one value), median, extremes and the number of values.

    Values that are not finite (runs that diverged) are left out and counted as ``not_finite``; where there
    are no others, everything else is NaN.
    """
    given = [float(value) for value in values]
    finite = [value for value in given if math.isfinite(value)]
    found = {
        "mean": statistics.fmean(finite) if finite else math.nan,
        "std": statistics.stdev(finite) if len(finite) > 1 else 0.0 if finite else math.nan,
        "median": statistics.median(finite) if finite else math.nan,
        "low": min(finite, default=math.nan),
        "high": max(finite, default=math.nan),
        "n": len(finite),
    }
    return found | ({"not_finite": len(given) - len(finite)} if len(finite) < len(given) else {})


def save(
    out: Path, name: str, result: dict[str, Any], figure: Any = None, *, trained: dict[str, Any] | None = None
) -> None:
    """Write ``<out>/<name>.json`` and, given a figure, ``<out>/<name>.png``.

    The JSON begins with what is needed to make it again: command, commit, seeds, versions and device.

    Args:
        out: folder, made if need be.
        name: of both files.
        result: numbers; ``result["config"]["seeds"]`` is how many there are or which.
        figure: matplotlib's.
        trained: of an analysis of stored runs: the header of the JSON they come from.

    Raises:
        ValueError: if the result does not say its configuration and seeds, or has a key of the header's.
    """
    seeds = result.get("config", {}).get("seeds")
    if seeds is None:
        raise ValueError(f"result must have config and in it seeds, got {list(result)}")
    header = {
        "command": command(),
        "commit": commit(),
        "seeds": list(range(seeds)) if isinstance(seeds, int) else list(seeds),
        "environment": environment(),
    }
    if taken := sorted(header.keys() & result.keys()):
        raise ValueError(f"result must leave {list(header)} to the header, got {taken}")
    if trained is not None:
        header["trained"] = {key: trained.get(key) for key in header}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(
        json.dumps(rounded({**header, **result}), indent=1, allow_nan=False) + "\n"
    )
    if figure is not None:
        figure.savefig(out / f"{name}.png", dpi=110)


def rounded(value: Any) -> Any:
    """Return the result with floats cut to six digits, which is what they are good for; not finite: None."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None  # JSON has no word for it
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
