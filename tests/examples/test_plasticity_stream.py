"""The continual stream runs at reduced size, and every arm learns its first tasks."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "plasticity_stream.py"


def test_every_arm_learns_the_first_tasks(tmp_path):
    command = [sys.executable, str(SCRIPT), "--smoke", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    results = json.loads((tmp_path / "plasticity_stream.json").read_text())["results"]
    assert set(results) == {"plain", "decay 0.001", "syre 0.001", "init 0.001"}
    for result in results.values():
        assert result["early_accuracy"]["mean"] > 0.8
        assert 1 <= result["late"]["rank"]["mean"] <= 64
        assert 0 <= result["late"]["dormant"]["mean"] < 1
    assert (tmp_path / "plasticity_stream.png").stat().st_size > 10_000
