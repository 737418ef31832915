"""What every benchmark needs: paired runs, their ratios, command, commit and environment, JSON.

Machines are shared and drift: two things are compared by running them in turn, A B A B ..., and
looking at the ratio within each pair. What is reported is the median of those ratios and their range.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "lightning", "torchmetrics", "timm", "torchvision", "numpy")


def timed(run: Callable[[], object]) -> float:
    """Return the seconds that ``run()`` takes, work queued on an accelerator included."""
    gc.collect()
    synchronize()
    began = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    """Wait for an accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def paired(
    runs: Mapping[str, Callable[[], float | None]],
    *,
    baseline: str,
    pairs: int = 5,
    warmup: int = 1,
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Run everything in turn, ``pairs`` rounds long, and compare with the baseline of the same round.

    Every second round goes backwards, so that nothing always comes first.

    Args:
        runs: what to run, by name. A run returns its cost, or ``None`` to have its seconds taken.
        baseline: the name of the run that the others are divided by.
        pairs: rounds that count.
        warmup: rounds before them that do not.
        progress: told about every run.

    Returns:
        By name: ``median``, ``low`` and ``high`` of the ratios to the baseline of the same round
        (absent for the baseline), ``cost`` (the same three of the costs) and all ``costs``.

    Raises:
        ValueError: if ``baseline`` is not among the runs or a count is out of range.
    """
    if baseline not in runs:
        raise ValueError(f"baseline must be one of {sorted(runs)}, got {baseline!r}")
    if pairs < 1 or warmup < 0:
        raise ValueError(f"pairs must be at least 1 and warmup at least 0, got {pairs} and {warmup}")
    costs: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + pairs):
        order = list(runs) if turn % 2 == 0 else list(runs)[::-1]
        for name in order:
            returned: list[float | None] = []
            seconds = timed(lambda run=runs[name], to=returned: to.append(run()))  # type: ignore[misc]
            cost = seconds if returned[0] is None else float(returned[0])
            if turn >= warmup:
                costs[name].append(cost)
            if progress is not None:
                label = f"round {turn - warmup + 1}/{pairs}" if turn >= warmup else "warm-up"
                progress(f"{label}  {name}: {cost:.4g}")
    report: dict[str, dict[str, Any]] = {}
    for name, own in costs.items():
        report[name] = {"cost": spread(own), "costs": own}
        if name != baseline:
            ratios = [a / b if b else math.nan for a, b in zip(own, costs[baseline], strict=True)]
            report[name] |= spread(ratios)
    return report


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the range of some numbers.

    Args:
        values: at least one number.

    Returns:
        ``median``, ``low`` and ``high``.
    """
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def command() -> str:
    """Return the command line of this process, as a reader would type it in the repository.

    ``--out`` is left out, and of absolute paths only the last part is kept.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    script, *given = sys.argv
    kept, skip = [], False
    for word in given:
        if skip or word == "--out" or word.startswith("--out="):
            skip = word == "--out"
            continue
        kept.append(Path(word).name if Path(word).is_absolute() else word)
    how = ["-m", spec.name] if spec is not None else [f"benchmarks/{Path(script).name}"]
    return shlex.join(["python", *how, *kept])


def commit() -> str | None:
    """Return the commit that is checked out, ``+`` behind it if package or benchmarks differ from it.

    ``None`` outside of a git checkout.
    """
    git = ["git", "-C", str(REPOSITORY)]
    paths = ["lightning_sym", "benchmarks"]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        status = [*git, "status", "--porcelain", "--untracked-files=no", "--", *paths]
        changed = subprocess.run(status, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def environment() -> dict[str, Any]:
    """Return what a reader needs to place the numbers: versions, processor, threads.

    No host name and no path: where it ran is nobody's business.
    """
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "packages": versions,
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def write_json(path: str | Path, *, config: Mapping[str, Any], results: Any) -> Path:
    """Write a benchmark's results beside its command, commit, configuration and environment.

    Args:
        path: the file; folders are made.
        config: what was run.
        results: what came out; not-a-numbers become ``null``, which JSON has.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "command": command(),
        "commit": commit(),
        "config": dict(config),
        "environment": environment(),
        "results": results,
    }
    path.write_text(json.dumps(_plain(content), indent=1, sort_keys=False, allow_nan=False) + "\n")
    return path


def _plain(value: Any) -> Any:
    """Return what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        raise TypeError(f"a path does not belong into a report, got {value.name!r}")
    return value


def table(report: Mapping[str, Mapping[str, Any]], *, unit: str = "s") -> str:
    """Return a report of :func:`paired` as a plain table."""
    lines = [f"{'':24} {'cost [' + unit + ']':>12} {'ratio':>8}   range"]
    for name, row in report.items():
        line = f"{name:24} {row['cost']['median']:12.4g}"
        if "median" in row:
            line += f" {row['median']:8.3f}   {row['low']:.3f} to {row['high']:.3f}"
        lines.append(line)
    return "\n".join(lines)
