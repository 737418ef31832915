"""Does the package work with the lowest versions that it allows? A part of the suite says so.

    python -m benchmarks.lowest

Makes an environment with exactly the lower bounds of the hard dependencies, runs a part of the suite in it
and writes what passed to ``docs/results/lowest.json``. The newest are those of the ordinary environment.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "results" / "lowest.json"
#: What the tests below need besides; no bound of ours is tried by these.
TOOLS = ("pytest>=8.2", "hypothesis", "scipy", "matplotlib>=3.8", "tensorboard>=2.16")
TESTS = (
    "tests/functional",
    "tests/engine",
    "tests/observe",
    "tests/sandbox",
    "tests/symmetry/test_find.py",
    "tests/symmetry/test_rules.py",
    "tests/optim",
    "tests/callbacks/test_fit.py",
    "tests/callbacks/test_readings.py",
    "tests/callbacks/test_diagnosis.py",
    "tests/promises/test_loop.py",
    "tests/promises/test_silence.py",
    "tests/plots",
    "tests/test_import_cost.py",
)


def bounds() -> list[str]:
    """Return the hard dependencies, each at its lower bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [re.match(r"([\w-]+)>=([\d.]+)", line) for line in project["dependencies"]]
    return [f"{match[1]}=={match[2]}" for match in found if match is not None]


def make(venv: Path) -> None:
    """Make the environment, unless it is there; the package itself is this tree."""
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *bounds(), *TOOLS], check=True)
    (site,) = (venv / "lib").glob("python3*/site-packages")
    (site / "lightning_sym_tree.pth").write_text(f"{ROOT}\n")


def versions(venv: Path) -> dict[str, str]:
    """Return what is installed of the dependencies."""
    names = [bound.partition("==")[0] for bound in bounds()] + ["numpy"]
    code = f"import importlib.metadata as m; print(*[m.version(n) for n in {names!r}])"
    told = subprocess.run([venv / "bin" / "python", "-c", code], check=True, capture_output=True, text=True)
    return dict(zip(names, told.stdout.split(), strict=True))


def run(venv: Path) -> dict[str, Any]:
    """Run the tests; return their counts and the names of those that failed."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "-rfE", *TESTS]
    done = subprocess.run(
        [venv / "bin" / "python", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    sys.stdout.write(done.stdout[-6000:])
    last = done.stdout.strip().splitlines()[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE)
    return {"passed": 0, "failed": 0, **counts, "failures": failed}


def main() -> None:
    """Make, run, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "lightning_sym_lowest")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    make(options.venv)
    record = {
        "command": "python -m benchmarks.lowest",
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip(),
        "python": sys.version.split()[0],
        "versions": versions(options.venv),
        "tests": list(TESTS),
        **run(options.venv),
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    raise SystemExit(bool(record["failures"]))


if __name__ == "__main__":
    main()
