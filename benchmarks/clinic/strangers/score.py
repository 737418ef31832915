"""How well findings agree with the strangers' runs, at first sight and now.

    python -m benchmarks.clinic.strangers.score --as now --json docs/results/strangers.json

``--as first`` writes the other part of the file: it is asked with the package as it was before anything was
mended, of the same stored histories (``git archive`` it somewhere, put that first on ``PYTHONPATH`` and say
``--rules``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...common import command, commit, environment
from ..common import KINDS as ALL
from ..fitting import diagnosed
from .base import CASES
from .run import OUT, stored

MOST_KINDS = 3


def judged(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was said of a run beside what is expected."""
    found = diagnosed([row for rows in run["histories"].values() for row in rows]) or []
    kinds = list(dict.fromkeys(f["kind"] for f in found if f["level"] == "alarm"))
    return {
        "name": f"{run['name']}.{run['seed']}",
        "seed": run["seed"],
        "expected": run["expected"],
        "holds": run["sick"] == bool(run["expected"]),
        "truth": run["truth"],
        "alarms": kinds,
    }


def right(run: Mapping[str, Any]) -> bool:
    """Return whether a right kind is among few kinds of alarm."""
    return bool(set(run["expected"]) & set(run["alarms"])) and len(run["alarms"]) <= MOST_KINDS


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of runs whose truth holds."""
    sick = [run for run in runs if run["holds"] and run["expected"]]
    healthy = [run for run in runs if run["holds"] and not run["expected"]]
    return {
        "sick": len(sick),
        "healthy": len(healthy),
        "sensitivity": sum(bool(run["alarms"]) for run in sick) / max(len(sick), 1),
        "false_alarms": sum(bool(run["alarms"]) for run in healthy) / max(len(healthy), 1),
        "kind_right": sum(map(right, sick)) / max(len(sick), 1),
        "most_kinds": max((len(run["alarms"]) for run in runs), default=0),
    }


def report(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return figures over all, by seed and by the kind that is expected first."""
    seeds = sorted({run["seed"] for run in runs})
    firsts = {kind: [run for run in runs if run["expected"][:1] == [kind]] for kind in ALL}
    return {
        "all": summary(runs),
        "seeds": {str(seed): summary([run for run in runs if run["seed"] == seed]) for seed in seeds},
        "kinds": {kind: summary(own) for kind, own in firsts.items() if own},
        "runs": list(runs),
        "environment": environment(),
    }


def main() -> None:
    """Score the stored runs and print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--as", dest="part", choices=("first", "now"), default="now", help="which part")
    parser.add_argument("--rules", help="commit of the package that is asked, if not the one checked out")
    parser.add_argument("--out", type=Path, default=OUT, help="where run.py stored (%(default)s)")
    parser.add_argument("--json", type=Path, help="write figures and runs here too")
    args = parser.parse_args()
    runs = [judged(run) for run in stored(args.out)]
    if not runs:
        parser.error(f"no runs below {args.out}")
    found = report(runs)
    for seed, figures in {"all": found["all"], **found["seeds"]}.items():
        print(seed, figures)
    for run in runs:
        wrong = not run["holds"] or (not right(run) if run["expected"] else run["alarms"])
        if wrong:
            words = "" if run["holds"] else "  (not counted: its truth does not hold)"
            print(f"{run['name']}: expected {run['expected']}, alarms {run['alarms']}{words}")
    if args.json is not None:
        whole = json.loads(args.json.read_text()) if args.json.exists() else {}
        done = {run["name"] for run in runs}
        found["not_run"] = [name for name in CASES if not any(f"{name}.{seed}" in done for seed in range(9))]
        whole[args.part] = {"command": command(), "commit": args.rules or commit(), **found}
        args.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
