"""Every sub-package and paper has its page, every page is in a table of contents, every picture is shown."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS, PACKAGE = ROOT / "docs", ROOT / "lightning_sym"
INSIDE = {"engine", "papers"}  # by name, and a page each


def automodules(folder):
    return {
        name for page in folder.glob("*.md") for name in re.findall(r"automodule:: (\S+)", page.read_text())
    }


def test_every_sub_package_with_public_names_is_in_the_reference():
    named = {
        path.parent.name
        for path in PACKAGE.glob("*/__init__.py")
        if re.search(r"import \w|__all__", path.read_text()) and path.parent.name not in {*INSIDE, "cli"}
    }
    assert {f"lightning_sym.{name}" for name in named} <= automodules(DOCS / "api")


def test_every_paper_has_its_page():
    rooms = {path.parent.name for path in (PACKAGE / "papers").glob("*/__init__.py")}
    assert automodules(DOCS / "papers") == {f"lightning_sym.papers.{room}" for room in rooms}


def test_every_page_is_in_a_table_of_contents():
    listed = {DOCS / "index.md"}
    for page in DOCS.rglob("*.md"):
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), flags=re.DOTALL):
            lines = [line for line in tree.split() if not line.startswith((":", "auto_gallery/"))]  # made
            listed |= {page.parent / f"{line}.md" for line in lines}
    assert listed == set(DOCS.rglob("*.md"))


def test_every_picture_is_shown():
    pages = "\n".join(page.read_text() for page in [ROOT / "README.md", *DOCS.rglob("*.md")])
    pictures = [*DOCS.glob("pictures/*.png"), *DOCS.glob("papers/figures/*.png")]
    assert pictures
    assert [picture.name for picture in pictures if f"/{picture.name}" not in pages] == []
