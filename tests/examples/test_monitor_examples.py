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
    sick, healthy = printed.split("What the monitors saw of the healthy run")
    assert "Alarm: " in sick
    assert "are dead: 0 on every sample" in sick
    assert "No alarm: no rule finds anything wrong" in healthy
    assert f"lightning-sym report {tmp_path}" in healthy
    assert "Alignment: the mean of the six relations went" in printed
    assert f"tensorboard --logdir {tmp_path}" in printed
    accuracy = float(healthy.split("Validation accuracy at the end: ")[1].split()[0].rstrip("."))
    assert accuracy > 0.8
    assert (tmp_path / "monitor_digits.png").stat().st_size > 20_000
    for name in ("monitor_digits", "monitor_digits_sick"):
        assert (tmp_path / f"{name}_overview.png").stat().st_size > 20_000
    assert len(list(tmp_path.rglob("events.out.tfevents.*"))) == 2


def test_a_timm_resnet_is_watched(tmp_path):
    printed = run("monitor_cifar10.py", "--smoke", "--out", tmp_path)
    assert "Read 3 times, from step 1 to step 4" in printed
    assert (tmp_path / "monitor_cifar10.png").stat().st_size > 20_000
