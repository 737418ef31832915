"""The autoencoders run at reduced size; where beta is far too large they have collapsed, and it is seen."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "collapse_vae.py"


def test_collapse_is_measured_and_rank_alone_does_not_show_it(tmp_path):
    command = [sys.executable, str(SCRIPT), "--smoke", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    results = json.loads((tmp_path / "collapse_vae.json").read_text())["results"]
    arms = ("plain", "decay 0.01", "syre 0.01", "large 0.01", "init 0.01")
    assert set(results) == {f"beta {beta} {arm}" for beta in ("0.5", "50") for arm in arms}
    for arm in arms:
        alive, collapsed = results[f"beta 0.5 {arm}"], results[f"beta 50 {arm}"]
        assert alive["active"]["mean"] > 5
        assert alive["error"]["mean"] < 0.7  # of the error of the mean image
        assert collapsed["active"]["mean"] == 0
        assert collapsed["kl"]["mean"] < 0.01 < alive["kl"]["mean"]
        assert collapsed["error"]["mean"] > 0.95
    assert results["beta 50 syre 0.01"]["rank"]["mean"] > results["beta 0.5 syre 0.01"]["rank"]["mean"]
    assert (tmp_path / "collapse_vae.png").stat().st_size > 10_000
