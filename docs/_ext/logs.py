"""``Logs:`` blocks of docstrings: what a monitor logs, parsed, and laid out for Sphinx.

The Sphinx hooks of this project are here as well.

A block begins at a line ``Logs:`` or ``Logs, of what:`` and holds groups of items::

    Logs, of each layer:
        ``gap/<layer>/first``, ``second``: what these are; a bare name stands for the last part of the key
            before it.
        ``.../ratio``: the dots stand for all of the key before it but its last part.
    and with ``details``, also:
        ``gap/<layer>/count``: a group with an option; an item is said to be logged ``only`` when or where.

It ends at the first line that belongs to neither.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

OPTION = re.compile(r"\bwith ``(\w+)``")
LITERAL = re.compile(r"``([^`]+)``")
BAR = re.compile(r"``.*?``|:\w+:`[^`]*`|`[^`]*`|(\|)")  # a bar, outside of literals and roles
CODED_LIST = re.compile(r"^((?:``[^`]+``(?: \((?:text|histogram|picture)\))?(?:, | and )?)+): ")


@dataclass
class Item:
    """Keys that are explained together.

    Attributes:
        keys: in full, with ``<layer>`` and the like.
        text: their range and meaning.
        option: the argument that asks for them, or ``""``.
        kind: ``scalar``, ``text``, ``histogram`` or ``picture``.
    """

    keys: list[str]
    text: str
    option: str
    kind: str = "scalar"

    @property
    def conditional(self) -> bool:
        """Whether a monitor with every option on may leave them out."""
        return bool(re.search(r"\bonly (when|where|if)\b", self.text))


@dataclass
class Group:
    """Items under one line that says of what they are."""

    heading: str
    items: list[Item] = field(default_factory=list)


@dataclass
class Block:
    """A ``Logs:`` block: where it is among a docstring's lines, and what is in it."""

    start: int
    end: int
    groups: list[Group]


def parse(lines: list[str]) -> Block | None:
    """Return the block of a docstring's lines (without indentation), or None.

    Raises:
        ValueError: if an item does not begin with its keys and a colon.
    """
    start = next((n for n, line in enumerate(lines) if re.match(r"Logs(:|,)", line)), None)
    if start is None:
        return None
    groups, n = [], start
    while n < len(lines):
        head = n
        while n < len(lines) and lines[n] and not lines[n].startswith(" "):
            n += 1
        heading = " ".join(lines[head:n]).strip()
        after = n
        while after < len(lines) and not lines[after]:
            after += 1
        indented = after < len(lines) and lines[after].startswith("    ``")
        if not (heading.endswith(":") or (not heading and groups)) or not indented:
            n = head
            break
        n, body = after, []
        while n < len(lines) and (not lines[n] or lines[n].startswith("    ")):
            body.append(lines[n])
            n += 1
        if heading:
            groups.append(Group(heading.removesuffix(":")))
        found = OPTION.search(heading)
        groups[-1].items += _items(body, option=found[1] if found else "")
    while n > start and not lines[n - 1]:
        n -= 1
    return Block(start, n, groups)


def _items(body: list[str], *, option: str) -> list[Item]:
    texts: list[str] = []
    for line in body:
        if line.startswith("    ``"):
            texts.append(line.strip())
        elif line:
            texts[-1] += " " + line.strip()
    items, previous = [], ""
    for text in texts:
        match = CODED_LIST.match(text + " ")
        if match is None:
            raise ValueError(f"an item of Logs must begin with ``keys``: and their meaning, got {text!r}")
        keys = []
        for literal in LITERAL.findall(match[1]):
            if literal.startswith(".../"):
                literal = previous.rpartition("/")[0] + literal.removeprefix("...")
            elif "/" not in literal:
                literal = previous.rpartition("/")[0] + "/" + literal
            previous = literal
            keys.append(literal)
        kind = re.search(r"\((text|histogram|picture)\)", match[1])
        own = OPTION.match(text[match.end() :])
        items.append(
            Item(keys, text[match.end() :].strip(), own[1] if own else option, kind[1] if kind else "scalar")
        )
    return items


def lay_out(lines: list[str]) -> None:
    """Turn the block among a docstring's lines into definition lists, in place."""
    block = parse(lines)
    if block is None:
        return
    new: list[str] = []
    for number, group in enumerate(block.groups):
        heading = group.heading
        if number == 0:
            rest = heading.removeprefix("Logs").removeprefix(",").strip()
            heading = "**Logs**" + (f", {rest}" if rest else "")
        new += [f"{heading}:", ""]
        for item in group.items:
            new += ["    " + ", ".join(f"``{key}``" for key in item.keys), f"        {item.text}", ""]
    lines[block.start : block.end] = ["", *new]


def on_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Lay out the block of a docstring that autodoc is about to show; bars in text are norms."""
    lay_out(lines)
    lines[:] = [BAR.sub(lambda m: m[0] if m[1] is None else r"\|", line) for line in lines]


def on_missing(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Find a name of a module below at the sub-package that offers it."""
    parts = node.get("reftarget", "").split(".")
    if node.get("refdomain") != "py" or parts[0] != "lightning_sym" or len(parts) < 4:
        return None
    for package in (2, 3):
        for rest in range(package + 1, len(parts)):
            offered = ".".join([*parts[:package], *parts[rest:]])
            how = (node["refdoc"], app.builder, node["reftype"], offered, node, content)
            found = env.get_domain("py").resolve_xref(env, *how)
            if found is not None:
                return found
    return None


def setup(app: Any) -> dict[str, Any]:
    """Let Sphinx call :func:`on_docstring` before napoleon reads the docstring."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", on_docstring, priority=400)
    app.connect("missing-reference", on_missing)
    return {"parallel_read_safe": True}
