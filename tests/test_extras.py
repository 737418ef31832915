"""What works without the extras, and what a missing one says."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lightning_sym._extras import EXTRAS, need
from lightning_sym.datamodules import MultiViewDataModule
from lightning_sym.modules import SimCLR
from lightning_sym.plots import summary

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Every distribution that only an extra brings, by its import names.
OPTIONAL = {"timm", "torchvision", "PIL", "matplotlib", "tensorboard", "sklearn", "jsonargparse", "datasets"}

BARE = (
    f"OPTIONAL = {OPTIONAL!r}"
    + """
from importlib import machinery, metadata

find, named = machinery.PathFinder.find_spec, metadata.Distribution.from_name


def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in OPTIONAL else find(name, path, target)


def from_name(name):
    if name.lower() in {*OPTIONAL, "pillow", "scikit-learn"}:
        raise metadata.PackageNotFoundError(name)
    return named(name)


machinery.PathFinder.find_spec, metadata.Distribution.from_name = find_spec, from_name
import importlib, pkgutil, sys
import lightning_sym

for part in pkgutil.walk_packages(lightning_sym.__path__, "lightning_sym."):
    if ".cli" in part.name or "__main__" in part.name:
        continue
    try:
        importlib.import_module(part.name)
    except ModuleNotFoundError as error:
        assert part.name.startswith("lightning_sym.datamodules."), part.name
        assert str(error).endswith("pip install 'lightning-sym[ssl]'"), error
"""
    + (ROOT / "tests" / "plain_loop.py").read_text()
    + """
    print(sorted({name.partition(".")[0] for name in sys.modules} & OPTIONAL))
"""
)


def test_every_module_imports_and_a_plain_loop_is_watched_without_any_extra():
    done = subprocess.run(
        [sys.executable, "-c", BARE], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["watched three steps of a plain loop", "[]"]


def test_the_hard_dependencies_are_four():
    names = [re.match(r"[\w-]+", line).group() for line in PROJECT["dependencies"]]
    assert names == ["torch", "lightning", "torchmetrics", "safetensors"]
    assert "!=2.6.2" in PROJECT["dependencies"][1]
    assert "!=2.6.3" in PROJECT["dependencies"][1]


def test_each_extra_that_is_named_exists():
    assert set(EXTRAS.values()) <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("matplotlib", lambda: summary([{"step": 1, "a/b": 1.0}, {"step": 2, "a/b": 2.0}])),
        ("timm", lambda: SimCLR(backbone="resnet18")),
        ("sklearn", lambda: MultiViewDataModule("digits", batch_size=8).setup()),
        ("torchvision", lambda: MultiViewDataModule("cifar10", batch_size=8).setup()),
        ("datasets", lambda: MultiViewDataModule("hub:pictures", batch_size=8).setup()),
    ],
)
def test_a_missing_extra_is_one_sentence(package, use, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError) as caught:
        use()
    message = str(caught.value)
    assert f"needs {package}, which is not installed" in message
    assert f"pip install 'lightning-sym[{EXTRAS[package]}]'" in message
    assert "\n" not in message


def test_a_package_that_is_there_and_broken_raises_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "timm.py").write_text("import nowhere_to_be_found")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        need("timm", what="The backbone")
