"""The neuron trap at reduced size: who stays, who gets out."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "escape_the_trap.py"


def test_only_decay_towards_a_random_point_and_frozen_weights_get_out(tmp_path):
    command = [sys.executable, str(SCRIPT), "--smoke", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    results = json.loads((tmp_path / "escape_the_trap.json").read_text())["results"]
    for arm in ("plain", "decay", "offset", "offset_rounded", "l2_init"):
        assert all(seed["distinct"] == 5 for seed in results[arm]["seeds"]), arm
        assert all(seed["rank"] == 5 for seed in results[arm]["seeds"]), arm
    for arm in ("syre", "syre_d"):
        assert all(seed["distinct"] >= 18 for seed in results[arm]["seeds"]), arm
        assert results[arm]["error"]["mean"] < results["decay"]["error"]["mean"] / 2
    assert all(seed["distinct"] > 5 for seed in results["frozen"]["seeds"])
    assert (tmp_path / "escape_the_trap.png").stat().st_size > 5000
