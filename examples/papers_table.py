"""The ten papers' claims beside what the results of this repository say: one row a claim.

Every number is read from a JSON that an example left, and every verdict follows from the numbers by a rule:
*reproduced*, *direction only* (the effect is there and the paper's size is not) or *not seen*. Claims, rules
and why one falls short are in ``_claims``.

    python examples/papers_table.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from _claims import CLAIMS, Claim
from _report import REPOSITORY, commit, rounded, table

VERDICTS = ("reproduced", "direction only", "not seen")


def row(claim: Claim, results: Path) -> dict[str, Any]:
    """Return the row of a claim, read from its JSON.

    Raises:
        FileNotFoundError: if there is no such JSON.
        ValueError: if the rule returns no verdict that there is.
    """
    file = results / f"{claim.source}.json"
    if not file.exists():
        raise FileNotFoundError(f"{claim.paper}: no {file.name} in {results}; run its example first")
    stored = json.loads(file.read_text())
    ours = claim.read(stored)
    verdict = claim.judge(ours)
    if verdict not in VERDICTS:
        raise ValueError(f"{claim.paper}: verdict must be one of {VERDICTS}, got {verdict!r}")
    return {
        "paper": claim.paper,
        "claim": claim.claim,
        "setting": claim.setting,
        "theirs": claim.theirs,
        "ours": ours,
        "verdict": verdict,
        "cause": claim.cause if verdict != "reproduced" else "",
        "note": claim.note,
        "source": f"docs/results/{file.name}",
        "command": stored.get("command"),
        "commit": stored.get("commit"),
    }


def short(ours: dict[str, Any]) -> str:
    """Return numbers in a few words: median and extremes, or mean and deviation of older results."""
    words = []
    for name, cell in ours.items():
        if isinstance(cell, dict) and "median" in cell:
            words.append(f"{name} {cell['median']:.3g} [{cell['low']:.3g}, {cell['high']:.3g}]")
        elif isinstance(cell, dict):
            words.append(f"{name} {cell['mean']:.3g} +- {cell['std']:.2g}")
        else:
            words.append(f"{name} {cell:.3g}" if isinstance(cell, float) else f"{name} {cell}")
    return ", ".join(words)


def main() -> None:
    """Read all, print the table, write ``papers.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=REPOSITORY / "docs" / "results")
    parser.add_argument("--out", type=Path, default=None, help="a folder; default: that of the results")
    options = parser.parse_args()
    rows = [row(claim, options.results) for claim in CLAIMS]
    shown = [
        (r["paper"], r["claim"][:60], r["theirs"][:24], short(r["ours"])[:90], r["verdict"]) for r in rows
    ]
    print(table(shown, ("paper", "claim", "paper's", "ours", "verdict")))
    counts = {verdict: sum(r["verdict"] == verdict for r in rows) for verdict in VERDICTS}
    print(counts)
    out = options.out or options.results
    out.mkdir(parents=True, exist_ok=True)
    result = {
        "command": "python examples/papers_table.py",
        "commit": commit(),
        "counts": counts,
        "rows": rows,
    }
    (out / "papers.json").write_text(json.dumps(rounded(result), indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
