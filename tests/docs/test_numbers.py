"""Numbers in README and docs come from the files of ``docs/results``."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "_ext"))
import results  # noqa: E402
import verdicts  # noqa: E402

from benchmarks.clinic import page as clinic  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs").glob("*/*.md"))]
TRACED = re.compile(r"\[([^\]]+)\]\((?:docs/)?results/(\w+)\.json \"([^\"]+)\"\)")
# What is no result, and is read like a word: names, versions, papers, years, sides of an image.
WORDS = (
    r"\b(?:19|20)\d\d, arXiv|"
    r"ResNet-\d+|CIFAR-\d+|\b\d{4}\.\d{5}\b|FSDP\d|ZeRO-\d|bf16|Apache-2\.0|\b\d+ x \d+\b"
    r"|nc\d|two-layer|11 million|every 1000 steps|32 pixels|224 pixels"
)
# Pages that scripts write as a whole, from files of results or from docstrings, and the hand-written table of
# versions that are supported.
WRITTEN = ("keys.md", "clinic.md", "compatibility.md")
# What a reading's ends mean, how presets are made and which version is stable is no result on these pages.
DEFINED = r"\b[012]\b(?![.,]?\d)|version 1\.0|From 1\.0|\b(?:4|12) layers"
DEFINITIONS = ("command.md", "monitors.md", "recipes.md", "stability.md", "start.md")


def prose(text):
    """Leave out code, traced numbers, and numbers that are no results."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$|\$[^$\n]*\$", "", text, flags=re.DOTALL)  # formulas are no results
    text = results.ROLE.sub("", text)
    text = TRACED.sub("", text)
    text = re.sub(r"`[^`]*`", "", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return re.sub(WORDS, "", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_traced_number_is_what_its_file_says(page):
    text = page.read_text()
    for place in results.ROLE.findall(text):
        assert re.fullmatch(r"-?[\d.,]+( %)?", results.shown(place)), place
    for written, file, place in TRACED.findall(text):
        assert results.shown(f"{file}: {place}") == written


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in WRITTEN], ids=lambda page: str(page.relative_to(ROOT))
)
def test_no_number_of_a_result_is_written_by_hand(page):
    text = prose(page.read_text())
    if page.name in DEFINITIONS:
        text = re.sub(DEFINED, "", text)
    assert re.findall(r"\d[\d.,]*", text) == []


def test_pages_that_scripts_write_are_what_their_results_say():
    for room, table in verdicts.tables().items():
        assert (verdicts.TABLES / f"{room}.txt").read_text() == table, "run: python docs/_ext/verdicts.py"
    text = (ROOT / "docs/clinic.md").read_text()
    assert text.split() == clinic.page().split(), "run: python -m benchmarks.clinic.page"


def test_the_findings_of_the_readme_are_those_of_its_run():
    found = results.load("pictures")["results"]["findings"]["mlp/rank_by_decay"]
    blocks = re.findall(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks == ["".join(f"{finding}\n" for finding in found)]


def test_some_numbers_are_traced():
    texts = {page.name: page.read_text() for page in PAGES}
    assert TRACED.findall(texts["README.md"])
    assert len(results.ROLE.findall((ROOT / "docs/papers/index.md").read_text())) > 30
    assert len(results.ROLE.findall(texts["benchmarks.md"])) > 30


def test_a_number_is_found_combined_and_formatted(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    results.load.cache_clear()
    found = {"a b, c": [{"x": 1}, {"x": 3}, {"x": 2000}], "share": 0.0176, "none": None, "yes": True}
    (tmp_path / "made.json").write_text(json.dumps(found))
    assert results.shown("made: a b, c/1/x d") == "3"
    assert results.shown("made: median a b, c/*/x .0f") == "3"
    assert results.shown("made: max a b, c/*/x ,d") == "2,000"
    assert results.shown("made: share .1%") == "1.8 %"
    for text in ("made: none .1f", "made: yes d", "made: a b, c/*/x d", "made share", "made: a b, c .1f"):
        with pytest.raises(ValueError, match=r"num must be|must be one number"):
            results.shown(text)
    with pytest.raises(KeyError):
        results.shown("made: nowhere d")
    results.load.cache_clear()


def test_a_number_by_hand_is_noticed():
    for said in ("2.5 steps", "0.97", "100 %", "1.5", "13 layers"):
        assert re.findall(r"\d", re.sub(DEFINED, "", prose(f"it takes {said} here")))
    fine = 'ResNet-18, `x = 2`, [1 %](docs/results/a.json "b d")'
    assert not re.findall(r"\d", prose(fine))
    assert re.findall(r"\d[\d.,]*", prose(f"{fine} takes 3.1 steps")) == ["3.1"]
