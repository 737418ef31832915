"""The CIFAR-10 comparison runs on the digits, and leaves curves and checkpoints that can be reloaded."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from lightning_sym.modules import BarlowTwins, SimCLR, VICReg

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_three_losses_are_compared(tmp_path):
    command = [sys.executable, str(EXAMPLES / "ssl_cifar10.py"), "--smoke", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=400)
    assert (tmp_path / "ssl_cifar10.png").stat().st_size > 5_000
    text = (tmp_path / "ssl_cifar10.json").read_text()
    assert str(tmp_path) not in text
    result = json.loads(text)
    assert [each["method"] for each in result["runs"]] == ["barlow_twins", "simclr", "vicreg"]
    for each in result["runs"]:
        assert (each["steps"], each["epoch"], each["images"]) == (4, [0, 1, 2], [256, 180])
        assert all(0.1 < accuracy <= 1 for accuracy in each["knn"])
        assert result["summary"][each["method"]]["trained"]["mean"] == each["knn"][-1]
    for name, kind in {"barlow_twins": BarlowTwins, "simclr": SimCLR, "vicreg": VICReg}.items():
        module = kind.load_from_checkpoint(tmp_path / f"{name}-0.ckpt")
        features = module.eval().backbone.forward_features(torch.zeros(1, 3, 32, 32))
        assert features.shape == (1, 128, 4, 4)  # a quarter of the width, eight times below 32 pixels
        assert module.backbone(torch.zeros(1, 3, 32, 32)).shape == (1, 128)
