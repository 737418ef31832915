"""The composition examples run, and what they promise shows even in a smoke run."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout


def test_forced_factorisation_helps_out_of_distribution(tmp_path):
    printed = run("compose_bumps.py", "--smoke", "--out", tmp_path)
    result = json.loads((tmp_path / "compose_bumps.json").read_text())
    free, forced = (result["summary"][f"embedding, {how}"] for how in ("free", "factorised"))
    assert free["id"]["mean"] < 0.3 * free["ood"]["mean"]
    assert result["summary"]["gain_of_medians"] > 3
    last = result["summary"]["last"]
    assert last["gain_of_medians"] == pytest.approx(last["gain_by_seed"][0])
    for arm, runs in result["runs"].items():
        assert len(runs[0]["ood_last"]) == min(result["config"]["last"], runs[0]["epochs"]), arm
        if arm != "cnn":
            assert last["ood"][arm]["mean"] == pytest.approx(sum(runs[0]["ood_last"]) / 20, rel=1e-4)
            assert runs[0]["ood_last"][-1] == pytest.approx(runs[0]["ood"], rel=1e-4)
    assert forced["ood_over_blank"]["mean"] > 0
    assert result["runs"]["cnn"][0]["curve"][-1]["epoch"] == result["config"]["cnn_epochs"]
    assert (tmp_path / "compose_bumps.png").stat().st_size > 10_000
    assert "bumps found" in printed
    assert str(tmp_path) not in json.dumps(result)


def test_stripes_help_out_of_distribution(tmp_path):
    printed = run("stripes_vs_bumps.py", "--smoke", "--out", tmp_path)
    result = json.loads((tmp_path / "stripes_vs_bumps.json").read_text())
    most = max(row["images"] for row in result["runs"])
    ood = {row["arm"]: row["ood"] for row in result["runs"] if row["images"] == most}
    found = {row["arm"]: row["ood_found"] for row in result["runs"] if row["images"] == most}
    assert ood["stripes"] < ood["bumps"]
    assert found["stripes"] > 0.5 > found["bumps"]
    assert (tmp_path / "stripes_vs_bumps.png").stat().st_size > 10_000
    assert "images needed" in printed


def test_what_is_counted(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import stripes_vs_bumps as example

    rows = [{"images": n, "ood": e} for n, e in ((20, 0.9), (40, 0.2), (80, 0.1))]
    assert example.needed(rows, 0.25) == 40
    assert example.needed(rows, 0.01) == float("inf")
    lucky = [{"images": n, "ood": e} for n, e in ((20, 0.1), (40, 0.5), (80, 0.1))]
    assert example.needed(lucky, 0.25) == 80  # composing by luck is not what is counted
    assert abs(example.exponent([10, 20, 40], [7.0, 56.0, 448.0]) - 3) < 1e-12
    assert example.exponent([10, 20], [7.0, float("inf")]) is None
    never = float("inf")
    counts = {
        "bumps": {10: [never, 20, never], 20: [never] * 3},
        "stripes": {10: [20, 20, 20], 20: [40, 30, 50]},
    }
    slopes = example.slopes(counts)
    assert slopes["bumps"] == {"of_medians": None, "by_seed": [None] * 3, "spread": None}
    assert abs(slopes["stripes"]["of_medians"] - 1) < 1e-12
    assert slopes["stripes"]["by_seed"] == pytest.approx([1, math.log2(1.5), math.log2(2.5)])
