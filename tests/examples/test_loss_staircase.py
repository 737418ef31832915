"""The staircase at reduced size, and the arithmetic of its chance level."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("loss_staircase")


def test_small_weights_make_steps_and_large_ones_none(tmp_path, example):
    command = [sys.executable, str(EXAMPLES / "loss_staircase.py"), "--smoke", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    result = json.loads((tmp_path / "loss_staircase.json").read_text())
    small, large = result["runs"]["0.01"], result["runs"]["100.0"]
    assert all(run["drops"] for run in small["seeds"])
    assert not any(run["drops"] for run in large["seeds"])
    assert all(sum(run["broken_at_start"].values()) == 0 for run in small["seeds"])
    assert all(min(run["broken_at_start"].values()) > 0.5 for run in large["seeds"])
    assert small["test"]["mean"] < large["test"]["mean"] / 5
    first, other = small["seeds"][0], large["seeds"][0]
    for run in (first, other):  # the monitor's drops are those of the curve
        assert example.drops(run) == run["drops"]
    assert first["curve"][0] == pytest.approx(other["curve"][0], rel=1e-2)  # both start at f = 0
    assert result["seeds"] == [100, 101]  # none of those on which a drop was defined
    assert result["config"]["frozen"] == example.FROZEN
    assert (tmp_path / "loss_staircase.png").stat().st_size > 5000


def test_chance_is_the_time_that_is_covered(example):
    assert example.coverage([10.0], window=10.0, steps=1000) == pytest.approx(2 / 3)
    assert example.coverage([10.0, 12.0], window=1.5, steps=1000) == pytest.approx(
        math.log(12 * 1.5 / 10 * 1.5) / math.log(1000)
    )
    assert example.coverage([1.0, 1000.0], window=10.0, steps=1000) == pytest.approx(2 / 3)
    assert example.coverage([], window=2.0, steps=10) == 0
    assert example.met([5, 50, 500], [4, 700], window=1.5) == 2
    run = {"drops": [10.0], "broken": {"permutation": [[8.0, 1]], "rescaling": [[8.0, 1], [300.0, 1]]}}
    assert example.dates(run) == [8.0]
    found = example.chance([run], options=SimpleNamespace(steps=1000), draws=4000)
    share = math.log(1.5**2) / math.log(1000)
    assert (found["drops"], found["met"]) == (1, 1)
    assert found["by_chance"] == pytest.approx(share)
    assert found["p"] == pytest.approx(share, abs=0.03)
