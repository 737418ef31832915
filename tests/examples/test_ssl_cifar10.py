"""The CIFAR-10 comparison runs on the digits, and leaves curves and checkpoints that can be reloaded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

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
        # All images are no more than the curve's here: what the fit's probe read is what is reported.
        assert each["knn_whole"] == pytest.approx(each["knn"][-1])
        assert result["summary"][each["method"]]["knn_whole"]["mean"] == each["knn_whole"]
        assert (each["epochs"], each["resumed_at_epoch"]) == (2, 0)
    for name, kind in {"barlow_twins": BarlowTwins, "simclr": SimCLR, "vicreg": VICReg}.items():
        module = kind.load_from_checkpoint(tmp_path / f"{name}-0.ckpt")
        features = module.eval().backbone.forward_features(torch.zeros(1, 3, 32, 32))
        assert features.shape == (1, 128, 4, 4)  # a quarter of the width, eight times below 32 pixels
        assert module.backbone(torch.zeros(1, 3, 32, 32)).shape == (1, 128)


class Stopped(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import ssl_cifar10

    def run(out, *callbacks):
        own = ssl_cifar10.quiet_trainer
        command = ["ssl_cifar10.py", "--smoke", "--methods", "simclr", "--out", str(tmp_path / out)]
        with monkeypatch.context() as changed:
            changed.setattr(sys, "argv", command)
            changed.setattr(
                ssl_cifar10,
                "quiet_trainer",
                lambda **settings: own(**{**settings, "callbacks": [*settings["callbacks"], *callbacks]}),
            )
            ssl_cifar10.main()
        (found,) = json.loads((tmp_path / out / "ssl_cifar10.json").read_text())["runs"]
        return {key: value for key, value in found.items() if "seconds" not in key}

    with pytest.raises(SystemExit):  # how Lightning passes on Ctrl-C
        run("stopped", Stopped())
    assert not (tmp_path / "stopped" / "ssl_cifar10.json").exists()
    rest, through = run("stopped"), run("through")
    assert (rest.pop("resumed_at_epoch"), through.pop("resumed_at_epoch")) == (1, 0)
    assert rest == through
    assert not list((tmp_path / "stopped").glob("*unfinished*"))
