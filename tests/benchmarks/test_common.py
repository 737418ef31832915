import importlib.util
import json
import math
import socket
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent


def load(name):
    """Import a script that is not part of the package."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


common = load("common")


def test_rounds_alternate_and_ratios_are_taken_within_a_round():
    calls = []
    costs = {"a": iter([100.0, 1.0, 2.0, 4.0]), "b": iter([100.0, 3.0, 4.0, 4.0])}

    def run(name):
        calls.append(name)
        return next(costs[name])

    report = common.paired({"a": lambda: run("a"), "b": lambda: run("b")}, baseline="a", pairs=3, warmup=1)
    assert "".join(calls) == "abbaabba"
    assert report["a"]["costs"] == [1.0, 2.0, 4.0]
    assert (report["b"]["median"], report["b"]["low"], report["b"]["high"]) == (2.0, 1.0, 3.0)
    assert report["b"]["cost"] == {"median": 4.0, "low": 3.0, "high": 4.0}
    assert "median" not in report["a"]
    text = common.table(report)
    assert "2.000   1.000 to 3.000" in text
    assert len(text.splitlines()) == 3


def test_a_run_without_a_number_has_its_time_taken(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(common.time, "perf_counter", lambda: float(next(clock)))
    said = []
    runs = {"a": lambda: None, "b": lambda: next(clock) and None}
    report = common.paired(runs, baseline="a", pairs=2, warmup=1, progress=said.append)
    assert report["a"]["costs"] == [1.0, 1.0]
    assert report["b"]["costs"] == [2.0, 2.0]
    assert len(said) == 6
    assert said[0].startswith("warm-up")


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="baseline must be one of"):
        common.paired({"a": lambda: 1.0}, baseline="b")
    with pytest.raises(ValueError, match="pairs must be at least 1"):
        common.paired({"a": lambda: 1.0}, baseline="a", pairs=0)


def test_json_holds_the_environment_and_nothing_about_the_place(tmp_path):
    path = common.write_json(
        tmp_path / "deep" / "out.json",
        config={"pairs": 3},
        results={"x": [1.0, math.nan, math.inf], "t": torch.tensor([1, 2]), 3: (True, None)},
    )
    text = path.read_text()
    content = json.loads(text)
    assert content["config"] == {"pairs": 3}
    assert content["results"] == {"x": [1.0, None, None], "t": [1, 2], "3": [True, None]}
    assert content["environment"]["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert content["environment"]["threads"] == torch.get_num_threads()
    for private in (str(Path.home()), str(ROOT), sys.executable, f'"{socket.gethostname()}"'):
        assert len(private) == 1 or private not in text  # a home of / is in every path
    with pytest.raises(TypeError, match="a path does not belong into a report"):
        common.write_json(tmp_path / "out.json", config={"root": tmp_path}, results={})
