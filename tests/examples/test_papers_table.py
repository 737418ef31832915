"""The table of the papers says what the results say, and no more."""

import importlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
SCRIPT = ROOT / "examples" / "papers_table.py"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("papers_table")


def test_the_table_on_record_is_what_the_results_give(tmp_path):
    subprocess.run([sys.executable, str(SCRIPT), "--out", str(tmp_path)], check=True, capture_output=True)
    fresh = json.loads((tmp_path / "papers.json").read_text())
    stored = json.loads((RESULTS / "papers.json").read_text())
    assert fresh["rows"] == stored["rows"]
    assert fresh["counts"] == stored["counts"]
    assert {row["paper"] for row in fresh["rows"]} == {
        *("2303.15438", "2308.06671", "2309.16932", "2401.07085", "2402.07193"),
        *("2408.15495", "2410.03006", "2412.20018", "2501.18797", "2502.05300"),
    }
    for row in fresh["rows"]:
        assert (ROOT / row["source"]).exists()
        assert row["ours"]
        assert row["cause"] or row["verdict"] == "reproduced", row["claim"]


@pytest.mark.parametrize(
    ("source", "keys", "value", "claim", "before", "after"),
    [
        (
            "loss_staircase",
            ("all", "p"),
            0.3,
            "the loss drops where symmetries break",
            "reproduced",
            "direction only",
        ),
        (
            "trained_apart",
            ("summary", "sgd", "across_cooled", "low"),
            0.97,
            "networks trained apart become alike (deep linear, noisy SGD)",
            "reproduced",
            "direction only",
        ),
        (
            "stepwise_linear",
            ("summary", "largest_tau_error"),
            0.5,
            "modes are learned at times known in closed form",
            "reproduced",
            "not seen",
        ),
    ],
)
def test_a_worse_number_makes_a_worse_verdict(tmp_path, example, source, keys, value, claim, before, after):
    (wanted,) = [each for each in example.CLAIMS if each.claim == claim]
    assert example.row(wanted, RESULTS)["verdict"] == before
    stored = json.loads((RESULTS / f"{source}.json").read_text())
    part = stored
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    (tmp_path / f"{source}.json").write_text(json.dumps(stored))
    assert example.row(wanted, tmp_path)["verdict"] == after


@pytest.mark.parametrize(
    ("least", "bumps", "power", "verdict"),
    [
        (0.5, 16, 1.0, "reproduced"),
        (1, 16, 1.0, "direction only"),  # the smallest set that was tried: how few are enough is not known
        (0.5, 16, 1.8, "direction only"),
        (0.5, None, 1.0, "reproduced"),  # more than were tried
        (0.5, 2, 1.0, "not seen"),
    ],
)
def test_the_ends_of_the_grid_of_images_are_bounds(example, least, bumps, power, verdict):
    (claim,) = [each for each in example.CLAIMS if each.source == "stripes_vs_bumps"]
    sides, arms = (12, 16), ("stripes", "bumps")
    ratios = {"stripes": 1, "bumps": bumps}
    ours = claim.read(
        {
            "summary": {
                "median": {a: {str(n): ratios[a] and ratios[a] * n for n in sides} for a in arms},
                "exponent": {"stripes": {"of_medians": power, "spread": None}},
            },
            "runs": [
                {"arm": a, "size": n, "images": r * n} for a in arms for n in sides for r in (least, 2, 32)
            ],
        }
    )
    assert claim.judge(ours) == verdict
    assert ours["stripes, N = 12"] == ("at most 12" if least == 1 else 12)
    assert ours["bumps, N = 16"] == ("more than 512" if bumps is None else 16 * bumps)


def test_a_claim_without_a_result_is_an_error(tmp_path, example):
    with pytest.raises(FileNotFoundError, match=r"2410.03006: no canonical_representation.json in .*run its"):
        example.row(example.CLAIMS[0], tmp_path)


def test_a_verdict_must_be_one_of_three(tmp_path, example):
    shutil.copy(RESULTS / "loss_staircase.json", tmp_path)
    (claim,) = [each for each in example.CLAIMS if each.source == "loss_staircase"]
    with pytest.raises(ValueError, match=r"verdict must be one of .* got 'splendid'"):
        example.row(replace(claim, judge=lambda ours: "splendid"), tmp_path)


def test_the_pages_show_its_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    verdicts = importlib.import_module("verdicts")
    pages = ROOT / "docs" / "papers"
    whole = (pages / "verdicts.md").read_text()
    found = verdicts.tables()
    for room, table in found.items():
        assert (pages / "_verdicts" / f"{room}.txt").read_text() == table, "run docs/_ext/verdicts.py"
        page, include = (pages / f"{room}.md").read_text(), f"```{{include}} _verdicts/{room}.txt"
        assert include in page
        assert include in whole
        assert f"(figures/{room}.png)" in page
        assert (pages / "figures" / f"{room}.png").stat().st_size > 10_000
    rows = json.loads((RESULTS / "papers.json").read_text())["rows"]
    assert sum(table.count("\n") - 2 for table in found.values()) == len(rows)
    assert verdicts.number({"mean": 0.5, "std": 0.25, "n": 3}) == "0.5 +- 0.25 (3 seeds)"


def test_every_paper_has_its_picture(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    figures = importlib.import_module("papers_figures")
    monkeypatch.setattr(sys, "argv", ["papers_figures.py", "--out", str(tmp_path)])
    figures.main()
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert drawn == {path.stem for path in (ROOT / "docs" / "papers" / "figures").glob("*.png")}
    assert all(path.stat().st_size > 10_000 for path in tmp_path.glob("*.png"))
