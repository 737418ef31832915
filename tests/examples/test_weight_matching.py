"""Weight matching at reduced size: barriers fall, functions stay, and the file says what was seen."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "weight_matching.py"
NETWORKS, WAYS = ("mlp", "resnet", "transformer"), ("before", "weights", "activations")


def test_alignment_lowers_the_barrier(tmp_path):
    command = [sys.executable, str(SCRIPT), "--smoke", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    found = json.loads((tmp_path / "weight_matching.json").read_text())
    rows = found["rows"]
    assert rows.keys() == {f"{network}, {way}" for network in NETWORKS for way in WAYS}
    for network in NETWORKS:
        before = rows[f"{network}, before"]
        assert before["test"]["mean"] > 0.3  # trained apart: there is something to lower
        assert before["ends"]["mean"] > 0.6
        weights = rows[f"{network}, weights"]
        assert weights["test"]["mean"] < before["test"]["mean"]
        for way in WAYS[1:]:
            assert rows[f"{network}, {way}"]["error"]["mean"] < 1e-10
            assert 0 < rows[f"{network}, {way}"]["distance"]["mean"] < 1, (network, way)
    for way in WAYS[1:]:
        assert rows[f"mlp, {way}"]["test"]["mean"] < 0.3 * rows["mlp, before"]["test"]["mean"]
        assert rows[f"mlp, {way}"]["half-way"]["mean"] > rows["mlp, before"]["half-way"]["mean"] + 0.1
    assert len(found["pairs"]["mlp"][0]["before"]["test_line"]) == 5
    assert (tmp_path / "weight_matching.png").stat().st_size > 5000
