"""The directive ``matrix``: a table of ``docs/results/compatibility.json``, for each group of columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent.parent / "results" / "compatibility.json"
SIGNS = {"right": "✓", "refused": "refused", "none": "–", "red": "✗"}


def short(row: str) -> str:
    """Return a row's name as it stands at the head of a column of the page."""
    return row.removesuffix("Monitor").removesuffix("Probe")


def page(group: str, results: dict[str, Any]) -> str:
    """Return the table of a group in Markdown, and what is to be said of single cells.

    Raises:
        ValueError: if there is no such group.
    """
    chosen = {name: column for name, column in results.items() if column["group"] == group}
    if not chosen:
        groups = sorted({column["group"] for column in results.values()})
        raise ValueError(f"group must be one of {groups}, got {group!r}")
    rows = list(next(iter(chosen.values()))["cells"])
    notes: dict[str, int] = {}
    lines = [
        "| | " + " | ".join(short(row) for row in rows) + " | compared with |",
        "|---" * (len(rows) + 2) + "|",
    ]
    for name, column in chosen.items():
        cells = []
        for row in rows:
            cell = column["cells"][row]
            why = cell["why"].replace(row, "it") if cell["why"] else ""
            number = f" [{notes.setdefault(why, len(notes) + 1)}]" if why else ""
            cells.append(SIGNS[cell["verdict"]] + number)
        places = f", to {column['places']:.0e}" if column["places"] else ", bitwise"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {column['reference']}{places} |")
    said = [
        f"{number}. {why[0].upper()}{why[1:]}{'' if why.endswith('.') else '.'}"
        for why, number in notes.items()
    ]
    return "\n".join([*lines, "", *said])


def setup(app: Any) -> dict[str, Any]:
    """Add the directive."""
    from docutils import nodes
    from docutils.parsers.rst import Directive

    class Matrix(Directive):
        has_content = False
        required_arguments = 1
        final_argument_whitespace = True

        def run(self) -> list[Any]:
            text = page(self.arguments[0], json.loads(FILE.read_text())["results"])
            node = nodes.container()
            self.state.nested_parse(text.splitlines(), self.content_offset, node)
            return [node]

    app.add_directive("matrix", Matrix)
    return {"parallel_read_safe": True}
