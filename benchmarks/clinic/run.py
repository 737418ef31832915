"""Fit the clinic's cases and store what monitors read beside what is true.

    python -m benchmarks.clinic.run --only 'mlp/*' --seed 0 --bare

One JSON file a case and seed, below an output folder: the truth, the curve of the outcome, the losses, the
monitors' histories as tables and the findings. ``--bare`` writes to ``bare/`` and has no histories.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import math
import multiprocessing
import tempfile
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..common import commit, environment
from .cases import all_cases, chosen
from .fitting import fit, judge

OUT = Path(tempfile.gettempdir()) / "lightning_sym_clinic"


def to_table(history: Iterable[Mapping[str, float]]) -> dict[str, Any]:
    """Return rows as one table: every key once, six digits a number, None where a row lacks it."""
    history = list(history)
    keys = list(dict.fromkeys(key for row in history for key in row))
    return {
        "keys": keys,
        "rows": [[compact(row[key]) if key in row else None for key in keys] for row in history],
    }


def from_table(table: Mapping[str, Any]) -> list[dict[str, float]]:
    """Return the rows of :func:`to_table`."""
    return [
        {key: float(value) for key, value in zip(table["keys"], row, strict=True) if value is not None}
        for row in table["rows"]
    ]


def compact(value: Any) -> Any:
    """Return a number with six digits; NaN and infinities as strings that ``float`` reads."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def plain(value: Any) -> Any:
    """Return something JSON can hold, numbers compact."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else compact(value)


def path_of(out: Path, name: str, seed: int, *, bare: bool) -> Path:
    """Return the file of a case and seed."""
    return out / ("bare" if bare else "watched") / f"{name.replace('/', '.')}.{seed}.json"


def load(path: Path) -> dict[str, Any]:
    """Return a stored run, its histories as rows again."""
    stored = json.loads(path.read_text())
    stored["histories"] = {name: from_table(table) for name, table in stored["histories"].items()}
    return stored


def control_of(name: str, seed: int, out: Path) -> Mapping[str, Any]:
    """Return a control's record: the newest stored one, watched or bare, or a bare fit made now."""
    paths = [path for bare in (True, False) if (path := path_of(out, name, seed, bare=bare)).exists()]
    if not paths:
        return run_one(name, seed, out=out, bare=True)
    stored = json.loads(max(paths, key=lambda path: path.stat().st_mtime).read_text())
    return {key: numbers(stored[key]) for key in ("outcome", "curve")}


def numbers(value: Any) -> Any:
    """Return stored numbers as floats again, the non-finite ones too."""
    if isinstance(value, Mapping):
        return {key: numbers(each) for key, each in value.items()}
    return [numbers(each) for each in value] if isinstance(value, list) else float(value)


def run_one(name: str, seed: int, *, out: Path, bare: bool) -> dict[str, Any]:
    """Fit a case, judge and store it; return its record."""
    torch.set_num_threads(1)
    case = all_cases()[name]
    record = fit(case, seed, bare=bare)
    control = None if case.control is None else control_of(case.control, seed, out)
    truth = judge(case, record, control)
    about = {
        "name": name,
        "seed": seed,
        "architecture": case.architecture,
        "half": case.half,
        "sick": case.sick,
        "cause": case.cause,
        "also": list(case.also),
        "layers": list(case.layers),
        "truth": truth,
        "commit": commit(),
        "environment": environment(),
    }
    stored = {**about, **record, "histories": {k: to_table(rows) for k, rows in record["histories"].items()}}
    path = path_of(out, name, seed, bare=bare)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain(stored), separators=(",", ":")))
    return {**about, **record}


def tell(record: Mapping[str, Any]) -> str:
    """Return one line on a run."""
    checks = ", ".join(
        f"{c['measure']} {c['value']:.3g} {'' if c['holds'] else 'NOT '}{c['relation']} {c['bound']:.3g}"
        for c in record["truth"]["checks"]
    )
    left = record["truth"]["leaves"]
    words = "ok   " if record["truth"]["holds"] else "FAILS"
    gradual = "" if left is None else f" [from step {left:.0f}]"
    kind = record["sick"] or "healthy"
    return f"{words} {record['name']}.{record['seed']} ({record['seconds']:.1f} s) {kind}: {checks}{gradual}"


def attempt(pair: tuple[str, int], *, out: Path, bare: bool) -> tuple[bool, str]:
    """Run one, and return whether its truth holds and a line; an error is told, not raised."""
    try:
        record = run_one(*pair, out=out, bare=bare)
    except Exception:
        return False, f"ERROR {pair[0]}.{pair[1]}: {traceback.format_exc()}"
    return bool(record["truth"]["holds"]), tell(record)


def main() -> None:
    """Fit what the command line asks for; exit with an error if a truth does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="GLOB", help="names of cases; may be repeated")
    parser.add_argument("--seed", type=int, action="append", help="may be repeated (0)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (1)")
    parser.add_argument("--bare", action="store_true", help="without monitors: the truths alone")
    parser.add_argument("--missing", action="store_true", help="only what has not been stored yet")
    parser.add_argument("--out", type=Path, default=OUT, help="output folder (%(default)s)")
    args = parser.parse_args()
    pairs = [(case.name, seed) for seed in args.seed or [0] for case in chosen(args.only)]
    if args.missing:
        pairs = [pair for pair in pairs if not path_of(args.out, *pair, bare=args.bare).exists()]
    work = functools.partial(attempt, out=args.out, bare=args.bare)
    held = 0
    if args.jobs == 1:
        for ok, line in map(work, pairs):
            held += ok
            print(line, flush=True)
    else:
        # spawn: a process forked after torch has started threads may hang
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
            for ok, line in pool.map(work, pairs):
                held += ok
                print(line, flush=True)
    print(f"the truth holds in {held} of {len(pairs)}")
    raise SystemExit(held < len(pairs))


if __name__ == "__main__":
    main()
