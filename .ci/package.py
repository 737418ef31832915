"""Wheel and sdist: built, complete, and enough in an environment that has the hard dependencies alone.

python .ci/package.py

The environment is new. What torch and the others consist of is linked into it from the one that runs this,
not downloaded again; extras are not there. Then the wheel is installed, imported, and watches a plain loop.
"""

from __future__ import annotations

import importlib.metadata as metadata
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
#: What must be in the wheel besides the modules, and in the sdist.
DATA = (
    "py.typed",
    "cli/presets/bumps.yaml",
    "cli/vendor/uplot/uPlot.iife.min.js",
    "cli/vendor/uplot/LICENSE",
)
SOURCES = (
    "pyproject.toml",
    "Makefile",
    "tests/models.py",
    "examples/monitor_digits.py",
    "docs/conf.py",
    ".ci/run",
)
#: What the installed package must do, and be: not the checkout's.
USE = (
    (ROOT / "tests" / "plain_loop.py").read_text()
    + """
    import sys, lightning_sym

    assert lightning_sym.__file__.startswith(sys.prefix), lightning_sym.__file__
"""
)


def closure(names: list[str]) -> dict[str, metadata.Distribution]:
    """Return the distributions that these need, themselves included, without any extra of ours."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [Requirement(name) for name in names]
    while waiting:
        wanted = waiting.pop()
        key = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if key in found:
            continue
        distribution = found[key] = metadata.distribution(wanted.name)
        extras = [*wanted.extras, ""]
        for line in distribution.requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    return found


def link(distribution: metadata.Distribution, site: Path) -> None:
    """Link a distribution's files into another site-packages."""
    base = Path(str(distribution.locate_file("")))
    for file in distribution.files or ():
        if file.parts[0] == ".." or "__pycache__" in file.parts:
            continue
        target = site / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.symlink_to(base / file)


def main() -> None:
    """Build, look into what was built, install and use it.

    Raises:
        SystemExit: if a file is missing in what was built.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        subprocess.run([sys.executable, "-m", "build", "--outdir", work / "dist", ROOT], check=True,
                       stdout=subprocess.DEVNULL)  # the wheel is built from the sdist  # fmt: skip
        (wheel,), (sdist,) = work.glob("dist/*.whl"), work.glob("dist/*.tar.gz")
        inside = set(zipfile.ZipFile(wheel).namelist())
        modules = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_sym").rglob("*.py")}
        missing = {*modules, *(f"lightning_sym/{name}" for name in DATA)} - inside
        with tarfile.open(sdist) as archive:
            packed = {name.partition("/")[2] for name in archive.getnames()}
        missing |= {*modules, *SOURCES} - packed
        if missing:
            raise SystemExit(f"not in the wheel or the sdist: {sorted(missing)}")
        subprocess.run([sys.executable, "-m", "venv", work / "venv"], check=True)
        python = work / "venv" / "bin" / "python"
        (site,) = (work / "venv" / "lib").glob("python3*/site-packages")
        hard = [Requirement(line) for line in metadata.distribution("lightning-sym").requires or ()]
        for distribution in closure([str(r) for r in hard if r.marker is None]).values():
            link(distribution, site)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
        for command in (
            pip,
            [python, "-m", "pip", "check"],
            [python, "-c", USE],
            [work / "venv/bin/lightning-sym"],
        ):
            subprocess.run(command, check=True, cwd=work, env=clean)


if __name__ == "__main__":
    main()
