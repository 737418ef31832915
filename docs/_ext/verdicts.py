"""Write the tables of claims: for each paper what was tried, its numbers and its verdict.

``docs/papers/_verdicts/<room>.txt`` is included by the paper's page and, all ten, by the page of verdicts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent
TABLES = DOCS / "papers" / "_verdicts"
#: The room of each paper.
ROOMS = {
    "2303.15438": "stepwise_ssl",
    "2308.06671": "law_of_balance",
    "2309.16932": "mirror_symmetry",
    "2401.07085": "feature_learning",
    "2402.07193": "noise_equilibrium",
    "2408.15495": "syre",
    "2410.03006": "alignment",
    "2412.20018": "learning_circuit",
    "2501.18797": "composition",
    "2502.05300": "hierarchy",
}
HEAD = "| claim | setting | paper | ours | verdict | cause where short |\n|---|---|---|---|---|---|\n"


def number(value: Any) -> str:
    """Return a number, or a summary over seeds, in a few characters."""
    if isinstance(value, dict) and "median" in value:
        spread = f" [{value['low']:.3g}, {value['high']:.3g}]" if value.get("n", 1) > 1 else ""
        return f"{value['median']:.3g}{spread}"
    if isinstance(value, dict):  # of a result that kept no extremes
        return f"{value['mean']:.3g} +- {value['std']:.2g} ({value['n']} seeds)"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def cell(value: Any) -> str:
    """Return what stands in a cell of the table."""
    if isinstance(value, dict):
        return "; ".join(f"{name}: {number(part)}" for name, part in value.items())
    return number(value).replace("|", "\\|").replace("\n", " ")


def tables() -> dict[str, str]:
    """Return each room's table.

    Raises:
        KeyError: if a claim is of a paper that has no room.
    """
    rows = json.loads((DOCS / "results" / "papers.json").read_text())["rows"]
    found = dict.fromkeys(ROOMS.values(), HEAD)
    for row in rows:
        parts = [cell(row[part]) for part in ("claim", "setting", "theirs", "ours", "verdict")]
        parts.append(cell("; ".join(part for part in (row["cause"], row["note"]) if part)))
        found[ROOMS[row["paper"]]] += "| " + " | ".join(parts) + " |\n"
    return found


if __name__ == "__main__":
    TABLES.mkdir(exist_ok=True)
    for room, table in tables().items():
        (TABLES / f"{room}.txt").write_text(table)
