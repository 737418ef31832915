"""Regimes and mechanisms at reduced size."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "feature_mechanisms.py"


def test_growth_is_exact_and_the_scale_decides_the_regime(tmp_path):
    command = [sys.executable, str(SCRIPT), "--smoke", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    result = json.loads((tmp_path / "feature_mechanisms.json").read_text())
    expected = {
        "NTK": ("kernel", "none"),
        "standard": ("mixed", "alignment"),
        "mean-field": ("mixed", "alignment"),
        "small": ("rich", "alignment"),
        "aligned, too large": ("mixed", "disalignment"),
        "aligned, small": ("rich", "rescaling"),
    }
    assert result["solved"].keys() == expected.keys()
    for name, words in expected.items():
        row = result["solved"][name]
        assert (*row["verdict"], *row["mechanism"]) == words, name
        assert all(abs(seed["error"]) < 0.01 for seed in row["seeds"]), name
    assert result["relu"]["0.03"]["verdict"] == ["rich"]
    assert result["relu"]["3.0"]["verdict"] == ["kernel"]
    assert (
        result["relu"]["0.03"]["kernel_change"]["mean"] > 10 * result["relu"]["3.0"]["kernel_change"]["mean"]
    )
    for row in result["relu"].values():  # both regimes learn: what differs is how
        assert row["test"]["mean"] > 0.6
    assert (tmp_path / "feature_mechanisms.png").stat().st_size > 5000
