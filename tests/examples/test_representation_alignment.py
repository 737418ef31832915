"""Two networks become alike, at reduced size."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "representation_alignment.py"


def test_training_makes_two_networks_alike(tmp_path):
    command = [sys.executable, str(SCRIPT), "--smoke", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    result = json.loads((tmp_path / "representation_alignment.json").read_text())
    assert result["accuracy"]["mean"] > 0.85
    assert result["same_end"]["mean"] > result["same_start"]["mean"] + 0.2
    assert result["same_end"]["mean"] > result["inputs"]["mean"]
    assert result["seeds"] == [0, 1]
    for run in result["runs"]:
        assert run["steps"][0] == 0
        assert run["steps"][-1] == 300
        assert len(run["same"]) == len(run["steps"])
        assert run["same"][0] == run["same_start"]
        assert run["rank_end"][0] > run["rank_end"][-1]
    assert (tmp_path / "representation_alignment.png").stat().st_size > 5000
