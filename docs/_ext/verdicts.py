"""Write ``docs/papers/verdicts.md``: every claim that was tried, its numbers and its verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent
HEAD = """# Claims and verdicts

Written by `docs/_ext/verdicts.py` from `docs/results/papers.json`, which `examples/papers_table.py` makes of
the results of single scripts. Ours: median, and in brackets the least and the largest of the seeds.

| paper | claim | setting | paper | ours | verdict | cause where short |
|---|---|---|---|---|---|---|
"""


def number(value: Any) -> str:
    """Return a number, or a summary over seeds, in a few characters."""
    if isinstance(value, dict) and "median" in value:
        spread = f" [{value['low']:.3g}, {value['high']:.3g}]" if value.get("n", 1) > 1 else ""
        return f"{value['median']:.3g}{spread}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def cell(value: Any) -> str:
    """Return what stands in a cell of the table."""
    if isinstance(value, dict) and "median" not in value:
        return "; ".join(f"{name}: {number(part)}" for name, part in value.items())
    return number(value).replace("|", "\\|").replace("\n", " ")


def page() -> str:
    """Return the page."""
    rows = json.loads((DOCS / "results" / "papers.json").read_text())["rows"]
    parts = ("paper", "claim", "setting", "theirs", "ours", "verdict", "cause")
    return HEAD + "".join("| " + " | ".join(cell(row[part]) for part in parts) + " |\n" for row in rows)


if __name__ == "__main__":
    (DOCS / "papers" / "verdicts.md").write_text(page())
