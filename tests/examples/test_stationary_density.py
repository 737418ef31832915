"""The stationary density at reduced size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "stationary_density.py"


def test_the_equation_is_distributed_as_the_formula_says(tmp_path):
    command = [sys.executable, str(SCRIPT), "--smoke", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    result = json.loads((tmp_path / "stationary_density.json").read_text())
    assert result["critical_temperature"] == pytest.approx(1 / 3, rel=1e-5)
    for temperature, tolerance in (("0.05", 0.02), ("0.1", 0.03), ("0.2", 0.1)):
        row = result["equation"][temperature]
        assert row["mean"]["mean"] == pytest.approx(row["formula"]["mean"], abs=tolerance)
        assert row["std"]["mean"] == pytest.approx(row["formula"]["std"], abs=tolerance)
        assert row["worst_share"]["mean"] < 2 * tolerance
    above = result["equation"]["0.5"]
    assert (above["formula"]["mean"], above["exact"][0]) == (0, 1)
    assert above["mean"]["mean"] < result["equation"]["0.2"]["mean"]["mean"] - 0.1
    for row in result["deep"].values():
        assert row["mean"]["mean"] == pytest.approx(row["formula"]["mean"], abs=0.03)
    diverged = [result["sgd"][T]["diverged"]["mean"] for T in ("0.05", "0.5")]
    assert diverged[0] < 0.1 < diverged[1]
    assert (tmp_path / "stationary_density.png").stat().st_size > 5000
