"""Who may import whom, looked up in ``sys.modules`` of fresh interpreters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {
    "timm",
    "torchvision",
    "kornia",
    "matplotlib",
    "sklearn",
    "scipy",
    "curvlinops",
    "pandas",
    "datasets",
}
LIGHTNING = {"lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning", "torchmetrics"}

# What every sub-package may use: modules beside them that import nothing.
SHARED = {"_extras", "_names"}

# Arrows run downwards only: a sub-package, and which others it may pull in.
LIGHT = {
    "functional": set(),
    "losses": set(),
    "sandbox": set(),
    "observe": {"functional"},
    "symmetry": {"functional", "sandbox"},
    "optim": {"functional", "sandbox", "symmetry"},
    "diagnosis": {"functional", "observe", "sandbox", "symmetry"},
    "plots": {"diagnosis", "functional", "observe", "sandbox", "symmetry"},
}
ON_LIGHTNING = {
    "engine": {"functional", "observe", "sandbox"},
    "callbacks": {"diagnosis", "engine", "functional", "observe", "optim", "plots", "sandbox", "symmetry"},
    "modules": {"functional", "losses"},
    "cli": {
        "callbacks",
        "datamodules",
        "diagnosis",
        "engine",
        "functional",
        "losses",
        "modules",
        "observe",
        "optim",
        "plots",
        "sandbox",
        "symmetry",
    },
    "datamodules": {"functional"},
    # Papers stand on everything else; that nothing else names them is what keeps the arrow.
    "papers": {
        "callbacks",
        "datamodules",
        "diagnosis",
        "engine",
        "functional",
        "losses",
        "modules",
        "observe",
        "optim",
        "plots",
        "sandbox",
        "symmetry",
    },
}

# After the base is imported, one forked child a package imports all of it and tells what is new.
PROGRAM = """
import importlib, json, os, pkgutil, sys
base, names = sys.argv[1], sys.argv[2:]
if base:
    importlib.import_module(base)
before = set(sys.modules)
found = {}
for name in names:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            module = importlib.import_module(name)
            if name.count("."):
                for part in pkgutil.walk_packages(getattr(module, "__path__", ()), name + "."):
                    importlib.import_module(part.name)
            os.write(writer, json.dumps(sorted(set(sys.modules) - before)).encode())
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found[name] = json.loads(pipe.read())
    os.waitpid(child, 0)
print(json.dumps(found))
"""


def new_modules(base, names, *, root=ROOT):
    """Return which modules importing each name adds to those of ``import base``."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, base, *names],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: set(modules) for name, modules in json.loads(done.stdout).items()}


def offences(base, arrows, *, forbidden, root=ROOT):
    """Return what each sub-package imports and may not."""
    found = new_modules(base, [f"lightning_sym.{package}" for package in arrows], root=root)
    wrong = []
    for package, allowed in arrows.items():
        for module in sorted(found[f"lightning_sym.{package}"]):
            top, _, rest = module.partition(".")
            inner = rest.partition(".")[0]
            if top in forbidden or (
                top == "lightning_sym" and inner and inner not in {package, *allowed, *SHARED}
            ):
                wrong.append(f"{package} imports {module}")
    return wrong


def test_what_needs_torch_alone_imports_torch_alone():
    assert offences("torch", LIGHT, forbidden=HEAVY | LIGHTNING) == []


def test_what_builds_on_lightning_adds_nothing_heavy_to_it():
    assert offences("lightning.pytorch", ON_LIGHTNING, forbidden=HEAVY) == []


@pytest.mark.parametrize("name", ["lightning_sym", *(f"lightning_sym.{shared}" for shared in sorted(SHARED))])
def test_the_package_itself_imports_next_to_nothing(name):
    modules = new_modules("", [name])[name]
    assert name in modules
    assert not {module.partition(".")[0] for module in modules} & (HEAVY | LIGHTNING | {"torch", "numpy"})


def test_every_sub_package_has_its_arrows_written_down():
    packages = {path.parent.name for path in (ROOT / "lightning_sym").glob("*/__init__.py")}
    assert packages == {*LIGHT, *ON_LIGHTNING}


def test_no_room_of_a_paper_uses_another():
    rooms = [path.parent.name for path in (ROOT / "lightning_sym" / "papers").glob("*/__init__.py")]
    assert len(rooms) == 10
    found = new_modules("lightning.pytorch", [f"lightning_sym.papers.{room}" for room in rooms])
    for name, modules in found.items():
        others = {m for m in modules if m.startswith("lightning_sym.papers.") and not m.startswith(name)}
        assert others == set(), name


@pytest.mark.parametrize(
    ("line", "offence"),
    [
        ("import lightning_sym.observe", "functional imports lightning_sym.observe"),
        ("from lightning_sym import observe", "functional imports lightning_sym.observe"),
        ("import timm", "functional imports timm"),
    ],
)
def test_a_wrong_import_anywhere_below_is_caught(tmp_path, line, offence):
    for file, text in {
        "timm.py": "",
        "lightning_sym/__init__.py": "",
        "lightning_sym/observe/__init__.py": "",
        "lightning_sym/functional/__init__.py": "",
        "lightning_sym/functional/deep/__init__.py": "",
        "lightning_sym/functional/deep/rank.py": f"{line}\n",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    assert offences("", {"functional": set()}, forbidden=HEAVY, root=tmp_path) == [offence]
    allowed = offences("", {"functional": {"observe"}}, forbidden=set(), root=tmp_path)
    assert allowed == []


def test_a_package_that_does_not_import_is_an_error(tmp_path):
    (tmp_path / "lightning_sym").mkdir()
    (tmp_path / "lightning_sym" / "__init__.py").write_text("raise RuntimeError('broken')\n")
    with pytest.raises(AssertionError):
        offences("", {"functional": set()}, forbidden=HEAVY, root=tmp_path)
