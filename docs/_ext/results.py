"""The role ``num``: a number on a page, read from a file of ``docs/results`` when the page is built.

``{num}`overhead: results/resnet18/standard/probe_in_steps/median .2g` `` is what is found at that place of
``overhead.json``, formatted. ``*`` stands for every entry of a list; ``min``, ``max``, ``mean`` or ``median``
before the place makes one number of several. A missing place is an error: no number outlives its file.
"""

from __future__ import annotations

import json
import re
import statistics
from functools import cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results"
COMBINE = {"min": min, "max": max, "mean": statistics.fmean, "median": statistics.median}
ROLE = re.compile(r"\{num\}`([^`]*)`")
TEXT = re.compile(r"(?P<file>\w+): (?:(?P<how>min|max|mean|median) )?(?P<place>.+) (?P<form>[.,\d]*[a-z%])")


@cache
def load(name: str) -> Any:
    """Return a file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def entries(value: Any, place: list[str]) -> list[Any]:
    """Return what is found at a place; several values where it holds a star."""
    if not place:
        return [value]
    head, rest = place[0], place[1:]
    if head == "*":
        each = value if isinstance(value, list) else value.values()
        return [found for entry in each for found in entries(entry, rest)]
    return entries(value[int(head)] if isinstance(value, list) else value[head], rest)


def shown(text: str) -> str:
    """Return the formatted number.

    Raises:
        ValueError: if the text is not understood or the place does not hold one number.
        KeyError: if there is no such place.
    """
    match = TEXT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"num must be 'file: place format', got {text!r}")
    found = entries(load(match["file"]), match["place"].strip().split("/"))
    if match["how"]:
        found = [COMBINE[match["how"]](found)]
    if len(found) != 1 or isinstance(found[0], bool) or not isinstance(found[0], int | float):
        raise ValueError(f"{text!r} must be one number, got {found}")
    number = format(found[0], match["form"])
    return number.replace("%", " %")


def role(name: str, rawtext: str, text: str, lineno: int, inliner: Any, *_: Any, **__: Any) -> Any:
    """Make the node of one number; a faulty one is an error of the build."""
    from docutils import nodes  # only where Sphinx runs

    try:
        return [nodes.Text(shown(text))], []
    except (KeyError, ValueError, IndexError, OSError) as error:
        told = inliner.reporter.error(f"num: {text!r}: {type(error).__name__}: {error}", line=lineno)
        return [inliner.problematic(rawtext, rawtext, told)], [told]


def setup(app: Any) -> dict[str, Any]:
    """Add the role."""
    app.add_role("num", role)
    return {"parallel_read_safe": True}
