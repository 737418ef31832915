"""What every result says of how it was made."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("_report")


def test_a_result_says_how_to_make_it_again(tmp_path, report, monkeypatch):
    given = [
        "/somewhere/examples/thing.py",
        "--data",
        "/private/place/MNIST",
        "--out",
        str(tmp_path),
        "--lr",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", given)
    report.save(tmp_path / "deep", "thing", {"config": {"seeds": 3}, "x": [0.123456789, math.nan]})
    text = (tmp_path / "deep" / "thing.json").read_text()
    saved = json.loads(text)
    assert saved["command"] == "python examples/thing.py --data MNIST --lr 1"
    assert saved["seeds"] == [0, 1, 2]
    assert saved["x"] == [0.123457, None]
    assert saved["environment"]["torch"] == torch.__version__
    assert "cpu" in saved["environment"]["device"] or torch.cuda.is_available()
    assert "private" not in text
    assert str(tmp_path) not in text
    head = subprocess.run(
        ["git", "-C", str(EXAMPLES), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    assert (saved["commit"] or "").removesuffix("+") == head.stdout.strip()


def test_an_analysis_of_stored_runs_names_those(tmp_path, report):
    report.save(tmp_path, "old", {"config": {"seeds": [4, 5]}})
    old = json.loads((tmp_path / "old.json").read_text())
    report.save(tmp_path, "new", {"config": {"seeds": [4, 5]}}, trained=old)
    new = json.loads((tmp_path / "new.json").read_text())
    assert new["trained"] == {key: old[key] for key in ("command", "commit", "seeds", "environment")}


def test_a_result_may_not_replace_the_header(tmp_path, report):
    with pytest.raises(ValueError, match=r"result must leave .* to the header, got \['seeds'\]"):
        report.save(tmp_path, "thing", {"config": {"seeds": 2}, "seeds": [{"loss": 1.0}, {"loss": 2.0}]})
    assert not list(tmp_path.iterdir())


def test_a_result_without_seeds_is_refused(tmp_path, report):
    with pytest.raises(ValueError, match="must have config and in it seeds"):
        report.save(tmp_path, "thing", {"config": {"lr": 1}})
    with pytest.raises(ValueError, match="must have config and in it seeds"):
        report.save(tmp_path, "thing", {})


def test_spread_leaves_out_and_counts_what_diverged(report):
    found = report.spread([1.0, math.nan, 3.0, 8.0, math.inf])
    assert found == {
        "mean": 4.0,
        "std": 13**0.5,
        "median": 3.0,
        "low": 1.0,
        "high": 8.0,
        "n": 3,
        "not_finite": 2,
    }
    assert report.spread([2])["std"] == 0
    assert "not_finite" not in report.spread([2])
    lost = report.spread([math.nan])
    assert lost["n"] == 0
    assert math.isnan(lost["mean"])
