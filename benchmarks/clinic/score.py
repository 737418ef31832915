"""How well findings agree with the truths: sensitivity, false alarms, the right kind, lead times.

    python -m benchmarks.clinic.score --again

Only runs whose truth holds count; the others are listed. ``--again`` asks today's
:func:`lightning_sym.diagnosis.diagnose_run` about the stored histories instead of using the findings stored
with them. Figures are given for each half of the architectures apart: rules are tuned on one and reported on
the other (:data:`benchmarks.clinic.common.HALVES`); and for fresh cases, which rules were not changed after.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common import command, commit, environment
from .cases import all_cases
from .common import KINDS
from .fitting import EVERY_N_STEPS, diagnosed
from .run import OUT, load

LEVELS = {"note": 1, "warning": 2, "alarm": 3}
#: What rules are tuned on, what is reported, and what was written after the rules and scored once.
PARTS = ("tuning", "reported", "fresh")
#: The outcome is looked at every so many steps, and monitors read as often: what is worse at the first look
#: nothing can lead.
FIRST_LOOK = EVERY_N_STEPS
MOST_KINDS = 3  # a sick run is named right by its kind among at most so many kinds of alarm

Findings = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Judged:
    """A run, its truth and what was said of it.

    Args:
        name: of the case, with its seed.
        half: ``"tuning"`` or ``"reported"``.
        sick: its kind, or None.
        also: kinds that are true of it too.
        kinds: of the alarms, in the order of their steps.
        strengths: of the strongest finding by kind, see :func:`strength`.
        cause: whether an alarm of the right kind has the right cause; None without one.
        layer: whether one sits on a right layer; None without one, or where it sits nowhere.
        lead: steps from the step at which the first alarm says it began to the one where the outcome left the
            control's; None where it never did, the sickness is not gradual or there is no alarm.
        told: the same from the step at which an alarm could first be told, from the readings until then.
        left: the step at which the outcome left the control's, if there is a lead.
    """

    name: str
    half: str
    sick: str | None
    also: tuple[str, ...]
    kinds: tuple[str, ...]
    strengths: Mapping[str, float]
    cause: bool | None
    layer: bool | None
    lead: float | None
    told: float | None = None
    left: float | None = None

    @property
    def right(self) -> bool:
        """Whether the kind is among the alarms' kinds, of which there are few."""
        return self.sick in self.kinds and len(self.kinds) <= MOST_KINDS

    @property
    def wrong(self) -> tuple[str, ...]:
        """The alarms' kinds that are not true of the run."""
        return tuple(kind for kind in self.kinds if kind != self.sick and kind not in self.also)


def strength(finding: Mapping[str, Any]) -> float:
    """Return the level as a number plus a part below one that grows with the distance from its limit."""
    value, limit = finding.get("value"), finding.get("limit")
    if value is None or limit is None or not np.isfinite([value, limit]).all() or value <= 0 or limit <= 0:
        return float(LEVELS[finding["level"]])
    distance = abs(float(np.log(value / limit)))
    return LEVELS[finding["level"]] + distance / (1 + distance)


def first_told(rows: Sequence[Mapping[str, float]]) -> float | None:
    """Return the first step whose readings, with those before, make an alarm; None where none do.

    Args:
        rows: of all histories of one fit.
    """
    for step in sorted({row["step"] for row in rows}):
        found = diagnosed([dict(row) for row in rows if row["step"] <= step]) or []
        if any(finding["level"] == "alarm" for finding in found):
            return step
    return None


def judge(run: Mapping[str, Any], findings: Findings, *, told: float | None = None) -> Judged:
    """Hold findings against a run's truth.

    Args:
        run: as stored.
        findings: as dicts: kind, level, layer, step, value, limit, cause.
        told: the step at which the first alarm could be told, if known.
    """
    alarms = sorted((f for f in findings if f["level"] == "alarm"), key=lambda f: f["step"])
    own = [f for f in alarms if f["kind"] == run["sick"]]
    strengths: dict[str, float] = {}
    for finding in findings:
        strengths[finding["kind"]] = max(strengths.get(finding["kind"], 0.0), strength(finding))
    left = run["truth"]["leaves"]
    globs = run["layers"]
    return Judged(
        name=f"{run['name']}.{run['seed']}",
        half=run["half"],
        sick=run["sick"],
        also=tuple(run["also"]),
        kinds=tuple(dict.fromkeys(f["kind"] for f in alarms)),
        strengths=strengths,
        cause=any(run["cause"] in f["cause"].lower() for f in own) if own else None,
        layer=any(fnmatch.fnmatchcase(f["layer"] or "", g) for f in own for g in globs)
        if own and globs
        else None,
        lead=left - alarms[0]["step"] if run["sick"] and left is not None and alarms else None,
        told=left - told if run["sick"] and left is not None and alarms and told is not None else None,
        left=left if run["sick"] and alarms else None,
    )


def summary(runs: Sequence[Judged]) -> dict[str, Any]:
    """Return the figures of some runs; None where there is nothing to divide by."""
    sick, healthy = [r for r in runs if r.sick], [r for r in runs if not r.sick]
    leads = [r.lead for r in sick if r.lead is not None]
    told = [r.told for r in sick if r.told is not None]
    late = [r for r in sick if r.lead is not None and (r.left or 0.0) > FIRST_LOOK]
    late_told = [r.told for r in late if r.told is not None]
    return {
        "sick": len(sick),
        "healthy": len(healthy),
        "sensitivity": share(bool(r.kinds) for r in sick),
        "false_alarms": share(bool(r.kinds) for r in healthy),
        "kind_right": share(r.right for r in sick),
        "kind_wrong": share(bool(r.wrong) for r in sick),
        "cause_right": share(r.cause for r in sick if r.cause is not None),
        "layer_right": share(r.layer for r in sick if r.layer is not None),
        "median_lead": statistics.median(leads) if leads else None,
        "leads": len(leads),
        "median_told": statistics.median(told) if told else None,
        "late": len(late),
        "median_late_lead": statistics.median(r.lead for r in late if r.lead is not None) if late else None,
        "median_late_told": statistics.median(late_told) if late_told else None,
    }


def share(values: Iterable[bool | None]) -> float | None:
    """Return the share of true values, or None of none."""
    found = list(values)
    return sum(map(bool, found)) / len(found) if found else None


def roc(runs: Sequence[Judged], kind: str) -> dict[str, Any] | None:
    """Return the ROC of one kind: its runs against the healthy ones, over the strength of its findings.

    Other sick runs are left out: the kind may be true of them too.

    Returns:
        ``false`` and ``true`` rates from strict to lenient, and the ``area`` below, with ties counted half;
        None where the kind has no run.
    """
    own = np.array([r.strengths.get(kind, 0.0) for r in runs if r.sick == kind])
    other = np.array([r.strengths.get(kind, 0.0) for r in runs if r.sick is None])
    if not len(own) or not len(other):
        return None
    limits = sorted({*own, *other}, reverse=True)
    above = own[:, None] - other[None]
    return {
        "false": [float((other >= limit).mean()) for limit in limits],
        "true": [float((own >= limit).mean()) for limit in limits],
        "area": float((above > 0).mean() + (above == 0).mean() / 2),
        "runs": len(own),
    }


def table(judged: Sequence[Judged]) -> str:
    """Return a line for each half, each kind and each run that was missed or wronged."""
    lines = [
        f"{'half':10}{'sick':>6}{'healthy':>9}{'sens.':>8}{'false':>8}{'kind':>8}{'cause':>8}{'layer':>8}{'lead':>8}{'told':>8}"
    ]
    for half in PARTS:
        s = summary([run for run in judged if run.half == half])
        cells = [s[k] for k in ("sensitivity", "false_alarms", "kind_right", "cause_right", "layer_right")]
        shown = "".join(f"{'-' if cell is None else format(cell, '.2f'):>8}" for cell in cells)
        leads = ("-" if s[k] is None else format(s[k], ".0f") for k in ("median_lead", "median_told"))
        lines.append(f"{half:10}{s['sick']:6}{s['healthy']:9}{shown}" + "".join(f"{x:>8}" for x in leads))
    lines.append("")
    for kind in KINDS:
        own = [run for run in judged if run.sick == kind]
        curve = roc(judged, kind)
        area = "-" if curve is None else format(curve["area"], ".2f")
        false = [run.name for run in judged if run.sick is None and kind in run.kinds]
        lines.append(
            f"{kind:32} {sum(run.right for run in own)} of {len(own)} right, area {area}, false: {false}"
        )
    lines.append("")
    for run in judged:
        if run.sick and not run.right:
            lines.append(f"missed {run.name}: {run.sick}; alarms: {', '.join(run.kinds) or 'none'}")
        if run.wrong:
            lines.append(f"{'false ' if run.sick is None else 'beside'} {run.name}: {', '.join(run.wrong)}")
    return "\n".join(lines)


def main() -> None:
    """Score the stored runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="ask today's rules about the stored histories")
    parser.add_argument("--half", choices=PARTS, help="this half alone")
    parser.add_argument("--out", type=Path, default=OUT, help="where run.py stored (%(default)s)")
    parser.add_argument("--json", type=Path, help="write figures, curves and runs here too")
    args = parser.parse_args()
    judged, untrue, stored = [], [], []
    for path in sorted((args.out / "watched").glob("*.json")):
        run = load(path)
        stored.append(f"{run['name']}.{run['seed']}")
        if args.half not in (None, run["half"]):
            continue
        if not run["truth"]["holds"]:
            untrue.append(f"{run['name']}.{run['seed']}")
            continue
        rows = [row for history in run["histories"].values() for row in history]
        findings = diagnosed(rows) if args.again else run["findings"]
        if findings is None:
            parser.error(
                f"{path.name} has no findings: lightning_sym.diagnosis is not there, or was not; --again?"
            )
        gradual = run["sick"] and run["truth"]["leaves"] is not None
        judged.append(judge(run, findings, told=first_told(rows) if gradual else None))
    if not judged:
        parser.error(f"no runs below {args.out / 'watched'}")
    print(table(judged))
    print(f"\nnot counted, their truth does not hold: {untrue}")
    if args.json is not None:
        seeds = sorted({int(name.rpartition(".")[2]) for name in stored})
        report = {
            "config": {"command": command(), "commit": commit(), "seeds": seeds},
            "environment": environment(),
            "halves": {h: summary([r for r in judged if r.half == h]) for h in PARTS},
            "roc": {kind: roc(judged, kind) for kind in KINDS},
            "runs": [asdict(run) for run in judged],
            "not_counted": untrue,
            "not_run": [
                f"{name}.{seed}" for name in all_cases() for seed in seeds if f"{name}.{seed}" not in stored
            ],
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
