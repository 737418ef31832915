"""Units kept at reduced size: decay merges them, and the width matters less."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "effective_units.py"


def test_decay_keeps_fewer_units(tmp_path):
    command = [sys.executable, str(SCRIPT), "--smoke", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    rows = json.loads((tmp_path / "effective_units.json").read_text())["rows"]
    assert rows.keys() == {f"{width}, {decay}" for width in (16, 48) for decay in (0.0, 0.1)}
    for width in (16, 48):
        free, decayed = rows[f"{width}, 0.0"]["units"]["mean"], rows[f"{width}, 0.1"]["units"]["mean"]
        assert 3 <= decayed < free <= width
    assert (tmp_path / "effective_units.png").stat().st_size > 5000
