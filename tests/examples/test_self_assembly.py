"""Rules next to backprop, and the search of settings, at reduced size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "self_assembly.py"


def run(out, *more):
    command = [sys.executable, str(SCRIPT), "--smoke", "--out", str(out), *more]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout


def test_every_rule_stands_next_to_backprop_with_its_gap(tmp_path):
    said = run(tmp_path)
    rules = json.loads((tmp_path / "self_assembly_digits.json").read_text())["rules"]
    reference = rules["backprop"]
    assert reference["end"]["circuit/update_cosine"]["mean"] == pytest.approx(1, abs=1e-5)
    assert min(reference["accuracies"]) > 0.8
    assert {"backprop", "kolen_pollack", "feedback_alignment"} < rules.keys()
    for name, row in rules.items():
        assert row["reconstruction"] == name.startswith("four_synapse")
        assert (f"{name} (reconstruction)" in said) == row["reconstruction"]
        if not row["diverged"]:
            pairs = zip(row["accuracies"], reference["accuracies"], strict=True)
            gaps = [100 * (a - b) for a, b in pairs]
            assert row["gap"]["mean"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-3)
    for name in ("kolen_pollack", "four_synapse, identity"):
        start, end = (rules[name][part]["circuit/feedback_cosine"]["mean"] for part in ("start", "end"))
        assert abs(start) < 0.05 < end - 0.1
    fixed = rules["feedback_alignment"]
    assert (
        fixed["end"]["circuit/feedback_cosine"]["mean"]
        < rules["kolen_pollack"]["end"]["circuit/feedback_cosine"]["mean"]
    )
    assert "parity within" in said
    assert (tmp_path / "self_assembly_digits.png").stat().st_size > 5000


def test_the_search_writes_down_all_it_tried(tmp_path):
    run(tmp_path, "--search")
    result = json.loads((tmp_path / "self_assembly_search_digits.json").read_text())
    assert len(result["tried"]) == sum(count["tried"] for count in result["counts"].values()) > 8
    for row in result["tried"]:
        assert (None in row["accuracy"]) == bool(row["diverged"])
        assert not row["diverged"] or "layers." in row["diverged"]
        assert row["rule"] == row["group"].split(",")[0]
    assert any(row["diverged"] for row in result["tried"])
    for group, best in result["best"].items():
        rivals = [
            row["accuracy"] for row in result["tried"] if row["group"] == group and len(row["accuracy"]) > 1
        ]
        assert sum(best["accuracy"]) == max(sum(rival) for rival in rivals if None not in rival)
    assert (
        "tried" not in run(tmp_path, "--search").split("best of")[0]
    )  # gone on with: nothing is left to try
    assert json.loads((tmp_path / "self_assembly_search_digits.json").read_text()) == result
