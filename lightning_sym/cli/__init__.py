"""The command ``lightning-sym``: fit with monitors, diagnose weights, report on runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from lightning_sym._extras import MissingExtraError, need

VERBS = {
    "fit": "train with monitors: LightningCLI over the package's modules and any class path",
    "diagnose": "tell from a checkpoint's weights what is wrong with a network",
    "report": "make one self-contained page of the logs of one or several runs",
}
_USAGE = """\
usage: lightning-sym {fit,diagnose,report} ...

Is a network collapsing, aligning or losing its ability to learn, and why?

"""


class Refused(Exception):  # noqa: N818 - it is told, not raised at users
    """What was asked for can't or must not be done; the message is one sentence for the user."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its arguments; ``None``: those of the process.

    Returns:
        The exit code: 0; 1 where ``--fail-on`` was reached; 2 for a wrong or refused call.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0] in ("-h", "--help"):
        _write(sys.stdout, help_text())
        return 0
    if given[0] == "--version":
        from lightning_sym import __version__

        _write(sys.stdout, f"lightning-sym {__version__}\n")
        return 0
    verb = given[0]
    if verb not in VERBS:
        _write(sys.stderr, f"lightning-sym: the verb must be among {', '.join(VERBS)}, got {verb!r}\n")
        return 2
    try:
        need("jsonargparse", what=f"lightning-sym {verb}")
        return int(importlib.import_module(f"lightning_sym.cli.{verb}").run(given[1:]))
    except (Refused, MissingExtraError) as error:
        _write(sys.stderr, f"lightning-sym {verb}: {error}\n")
        return 2


def help_text() -> str:
    """Return what ``lightning-sym --help`` prints."""
    lines = [f"  {verb:<10}{text}\n" for verb, text in VERBS.items()]
    return _USAGE + "".join(lines) + "\nlightning-sym VERB --help tells more of each.\n"


def _write(stream: object, text: str) -> None:
    print(text, end="", file=stream)  # type: ignore[call-overload]
