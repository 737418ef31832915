"""The composition examples run, and what they promise shows even in a smoke run."""

import json
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout


def test_forced_factorisation_helps_out_of_distribution(tmp_path):
    printed = run("compose_bumps.py", "--smoke", "--out", tmp_path)
    result = json.loads((tmp_path / "compose_bumps.json").read_text())
    free, forced = (result["summary"][f"embedding, {how}"] for how in ("free", "factorised"))
    assert free["id"]["mean"] < 0.3 * free["ood"]["mean"]
    assert result["summary"]["gain"]["mean"] > 3
    assert forced["ood_over_blank"]["mean"] > 0
    assert result["runs"]["cnn"][0]["curve"][-1]["epoch"] == result["config"]["cnn_epochs"]
    assert (tmp_path / "compose_bumps.png").stat().st_size > 10_000
    assert "bumps found" in printed
    assert str(tmp_path) not in json.dumps(result)
