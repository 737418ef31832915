"""One balanced point and one sharpness, at reduced size."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "noise_equilibrium.py"


def test_sgd_ends_balanced_and_as_sharp_as_predicted(tmp_path):
    command = [sys.executable, str(SCRIPT), "--smoke", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    found = json.loads((tmp_path / "noise_equilibrium.json").read_text())["found"]
    for kind in ("uneven", "even"):
        for ratio in ("1:3", "1:1", "3:1"):
            row = found[kind][ratio]
            assert row["sgd"]["residual"]["mean"] < 0.5 * row["gd"]["residual"]["mean"], (kind, ratio)
            assert row["sgd"]["cosine"]["mean"] > 0.9, (kind, ratio)
            for how in ("sgd", "gd"):
                assert row[how]["monitor_error"]["mean"] < 1e-9, (kind, ratio, how)
        assert found[kind]["apart_sgd"]["mean"] < 0.5 * found[kind]["apart_gd"]["mean"]
    assert found["uneven"]["1:1"]["predicted"]["mean"] > 0.1
    assert found["uneven"]["1:1"]["seen"]["mean"] > 0.05  # sharper than gradient descent leaves it
    assert found["even"]["1:3"]["predicted"]["mean"] < -0.1
    assert found["even"]["1:3"]["seen"]["mean"] < -0.1  # flatter
    assert (tmp_path / "noise_equilibrium.png").stat().st_size > 5000
