"""The law of balance at reduced size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "law_of_balance.py"


def test_sgd_decays_as_predicted_and_gradient_descent_conserves(tmp_path):
    command = [sys.executable, str(SCRIPT), "--smoke", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    arms = json.loads((tmp_path / "law_of_balance.json").read_text())["arms"]
    for name in ("SGD", "SGD with decay"):
        assert arms[name]["kept"]["mean"] < 0.95
        assert arms[name]["law_over_measured"]["mean"] == pytest.approx(1, abs=0.15)
    assert arms["GD"]["predicted_kept"]["mean"] == 1
    assert arms["GD"]["kept"]["mean"] == pytest.approx(1, abs=2e-3)
    assert arms["SGD with decay"]["kept"]["mean"] < arms["SGD"]["kept"]["mean"]
    assert max(seed["worst_step_error"] for arm in arms.values() for seed in arm["seeds"]) < 1e-3
    assert (tmp_path / "law_of_balance.png").stat().st_size > 5000
