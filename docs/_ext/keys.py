"""Write ``docs/keys.md``, the contract of keys, from the ``Logs:`` blocks of the monitors' docstrings.

python docs/_ext/keys.py
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from logs import Block, parse

from lightning_sym import callbacks
from lightning_sym.callbacks import Monitor

PAGE = Path(__file__).parent.parent / "keys.md"
HEAD = """# Keys

What each monitor logs, under which key, with its range and meaning. This page is generated from the monitors'
docstrings (`python docs/_ext/keys.py`), and a test runs every monitor and compares: each key that is logged is
here, and each key that is here is logged, but for those said to be logged *only* when or where.

A key is `<quantity>/<layer>/<what>`, a summary of the network `<quantity>/<what>`. `<layer>` is the module's
name as in `named_modules()`, without what wrappers add (`_orig_mod.`). With `name="..."` a monitor's keys begin
with that instead of the quantity. What is written in angle brackets stands for:

| placeholder | values |
|---|---|
| `<layer>` | a layer's name; `embedding` or `representation` for `EigenmodeMonitor` |
| `<side>` | `in`, `out` |
| `<relation>` | `rga`, `rwa`, `gwa` |
| `<kind>`, `<what>` | a kind of symmetry: `permutation`, `rescaling`, `signflip`, `rotation`, `scale`; a layer's second of one kind ends in `_2` |
| `<set>` | `id`, `ood` |
| `<pair>` | `WWt_RRt`, `VVt_LLt`, `VRt_LWt`, `W_Vt` |
| `<parameter>` | a parameter's name in its module |
| `<j>` | number of a mode, from 1 |

Every row of `monitor.history` also has `step` (optimizer steps made) and `fit` (which fit of this monitor,
from 1). Rows with a number are scalars in every logger; a histogram, text or picture goes to loggers that take such.
"""  # noqa: E501


def blocks() -> dict[str, tuple[type[Monitor], Block]]:
    """Return each monitor that has a quantity, with what its docstring says it logs."""
    found = {}
    for name, kind in sorted(vars(callbacks).items()):
        if inspect.isclass(kind) and issubclass(kind, Monitor) and kind.quantity:
            block = parse(inspect.cleandoc(kind.__doc__ or "").split("\n"))
            if block is None:
                raise ValueError(f"the docstring of {name} has no Logs: block")
            found[name] = (kind, block)
    return found


def markdown(text: str) -> str:
    """Return reStructuredText of our docstrings as Markdown."""
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = re.sub(r":\w+:`~?([^`]*)`", lambda m: f"{{py:obj}}`~{m[1]}`", text)
    text = text.replace("``", "`")
    return text.replace("|", r"\|")


def page() -> str:
    """Return the whole page."""
    parts = [HEAD]
    for name, (kind, block) in blocks().items():
        first = inspect.cleandoc(kind.__doc__ or "").split("\n")[0]
        parts.append(f"## {{py:obj}}`~{kind.__module__}.{name}`\n\n{markdown(first)}\n")
        for number, group in enumerate(block.groups):
            heading = group.heading
            if number == 0:
                heading = heading.removeprefix("Logs").removeprefix(",").strip()
            if heading:
                parts.append(markdown(heading[0].upper() + heading[1:]) + ":\n")
            parts.append("| key | meaning |\n|---|---|")
            for item in group.items:
                keys = "<br>".join(f"`{key}`" for key in item.keys)
                note = "" if item.kind == "scalar" else f" ({item.kind})"
                parts.append(f"| {keys}{note} | {markdown(item.text)} |")
            parts.append("")
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
