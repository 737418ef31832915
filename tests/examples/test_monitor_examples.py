"""The main job and its larger sisters run, print what they saw and leave what they say they leave."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


def test_the_demo_says_what_it_saw(tmp_path):
    printed = run("monitor_digits.py", "--out", tmp_path, "--epochs", 3)
    assert "No alarm: no rule finds anything wrong" in printed
    assert "Alignment: the mean of the six relations went" in printed
    assert f"tensorboard --logdir {tmp_path}" in printed
    accuracy = float(printed.split("Validation accuracy at the end: ")[1].split()[0].rstrip("."))
    assert accuracy > 0.8
    assert (tmp_path / "monitor_digits.png").stat().st_size > 20_000
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_a_timm_resnet_is_watched(tmp_path):
    printed = run("monitor_cifar10.py", "--smoke", "--out", tmp_path)
    assert "Read 3 times, from step 1 to step 4" in printed
    assert (tmp_path / "monitor_cifar10.png").stat().st_size > 20_000
