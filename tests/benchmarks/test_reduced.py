"""Every benchmark of `make bench`, and the one for a GPU, runs, small; each file says how it was made."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "overhead": "--pairs 1 --steps 12 --batch 2 --arms signal",
    "sharpness": "--batch 2 --steps 1 --only one",
    "syre": "--pairs 1 --width 8 --only 100",
    "bumps": "--images 16 --rounds 2",
    "views": "--pairs 1 --one-core --sizes 32 --count 32 --batch 16",
    "keeping": "--readings 3",
    "gpu": "--reduced",
}
#: Which start processes, and take minutes however little they measure.
LONG = {"growth", "tools"}


def main_of(name):
    """Return the main function of a script, which is not part of the package, with the files beside it."""
    spec = importlib.util.spec_from_file_location(f"reduced_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def run(monkeypatch, tmp_path):
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT)

    def run(name, arguments):
        out = tmp_path / f"{name}.json"
        argv = [str(ROOT / "benchmarks" / f"{name}.py"), *arguments.split(), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", argv)
        main_of(name)()
        return json.loads(out.read_text())

    yield run
    torch.set_num_threads(threads)


def spreads(value):
    """Yield everything that has a median."""
    if isinstance(value, dict):
        if "median" in value:
            yield value
        for part in value.values():
            yield from spreads(part)


@pytest.mark.filterwarnings("ignore")  # of few batches and workers, which measurements have enough of
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_and_its_file_says_how_it_was_made(run, name):
    made = run(name, SCRIPTS[name])
    assert list(made) == ["command", "commit", "config", "environment", "results"]
    assert "--out" not in made["command"]
    assert made["command"].startswith("python ")
    assert made["command"].endswith(SCRIPTS[name])
    assert made["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", made["commit"])
    assert made["environment"]["packages"]["torch"]
    assert "environment" not in made["config"]
    found = [*spreads(made["results"])]
    assert found or name == "keeping"  # bytes don't vary
    for each in found:
        assert {"low", "high"} <= set(each)
    if name in ("overhead", "gpu"):
        rows = made["results"].get("overhead", made["results"])["resnet18"]
        assert rows["none"]["step_seconds"]["median"] > 0
    if name == "gpu":
        assert (
            made["results"]["device"] == made["environment"]["accelerator"] or not torch.cuda.is_available()
        )


def test_the_script_for_a_gpu_writes_no_costs_of_anything_else(monkeypatch, run):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no GPU is at hand"):
            run("gpu", "")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--reduced"])
    with pytest.raises(SystemExit, match="give it an --out of its own"):
        main_of("gpu")()


def test_make_bench_runs_these():
    made = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"benchmarks/(\w+)\.py", made))
    assert named <= {*SCRIPTS, *LONG}
    assert all((ROOT / "benchmarks" / f"{name}.py").exists() for name in named)
    assert {"overhead", "gpu"} <= named
