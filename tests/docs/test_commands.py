"""The page of the command line shows what commands print, numbers aside: machines round differently."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "_ext"))
import commands  # noqa: E402


def shape(text):
    """Return the words of each line, with every number as one sign, rows of the table in any order."""
    lines = [re.sub(r"\s+", " ", re.sub(r"\d[\d.,]*(e-?\d+)?", "#", line)) for line in text.splitlines()]
    return sorted(lines)


def test_every_printed_block_is_what_its_command_prints():
    text = commands.PAGE.read_text()
    assert len(commands.BLOCK.findall(text)) == 3
    assert shape(commands.page(text)) == shape(text), "run: python docs/_ext/commands.py"


def test_every_option_of_a_verb_is_on_the_page():
    from lightning_sym.cli import diagnose, fit

    text = commands.PAGE.read_text()
    options = set(re.findall(r"--[a-z][\w-]*", diagnose._parser().format_help() + fit.help_text()))
    known = {"--help", "--print_config", "--help-all", "--model", "--data", "--config"}
    assert {option for option in options - known if option not in text} == set()
    for name in fit.names():
        assert f"`{name}`" in text
