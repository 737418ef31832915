"""``lightning-sym fit``: LightningCLI with monitors and packaged presets."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_sym.cli import Refused

PRESETS = Path(__file__).parent / "presets"
LEVELS = ("light", "standard", "full")
_HELP = """\
usage: lightning-sym fit [--preset NAME] [--monitors light|standard|full|none]
                         [--every-n-steps N] [--targets WHERE] [LightningCLI options]

Train with monitors. What is trained is named by class path; names of the package's own modules and
datamodules need no path, nor do those of its callbacks:

  lightning-sym fit --preset barlow_cifar10
  lightning-sym fit --preset simclr_folder --data.source path/to/images --trainer.max_epochs 100
  lightning-sym fit --model my_project.MyModule --data my_project.MyData --monitors standard
  lightning-sym fit --config run.yaml --trainer.callbacks+=SharpnessMonitor

options of ours:
  --preset NAME        a packaged configuration, before any --config:
{presets}
  --monitors LEVEL     light, standard (the default), full or none; ready monitors as callbacks
  --every-n-steps N    the monitors' interval in optimizer steps (200)
  --targets WHERE      where the class labels are in a batch: an index or a key (1 in batches (x, y))
  --print-preset NAME  print a preset, to start a configuration of your own

All else is LightningCLI's: --trainer.max_epochs 10, --model.lr 0.1, --config run.yaml, --print_config.
lightning-sym fit --help-all lists them; --model.help CLASS and --data.help CLASS list a class's.
"""


def run(argv: Sequence[str]) -> int:
    """Run the verb; return the exit code.

    Args:
        argv: arguments after the verb.

    Raises:
        Refused: if an option of ours is wrong.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text(), end="")  # noqa: T201
        return 0
    ours, theirs = split(argv)
    if ours["print-preset"] is not None:
        print(preset(ours["print-preset"]).read_text(encoding="utf-8"), end="")  # noqa: T201
        return 0
    if ours["preset"] is not None:
        theirs = ["--config", str(preset(ours["preset"])), *theirs]
    callbacks = _monitors(ours)
    from lightning.pytorch.cli import LightningCLI

    _importable()
    every = ["--help" if argument == "--help-all" else argument for argument in theirs]
    settings = {"callbacks": callbacks} if callbacks else {}
    with warnings.catch_warnings():
        # We give the arguments by hand, which LightningCLI warns of where sys.argv holds some too.
        warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
        LightningCLI(
            args=["fit", *every],
            trainer_defaults=settings,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "lightning-sym"},
            auto_configure_optimizers=True,
        )
    return 0


def names() -> dict[str, str]:
    """Return the packaged presets, each with the comment that its first line is."""
    return {
        path.stem: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        for path in sorted(PRESETS.glob("*.yaml"))
    }


def preset(name: str) -> Path:
    """Return a packaged preset's file.

    Args:
        name: without ``.yaml``.

    Raises:
        Refused: if there is none of that name.
    """
    if name not in names():
        raise Refused(f"--preset must be among {', '.join(names())}, got {name!r}")
    return PRESETS / f"{name}.yaml"


def help_text() -> str:
    """Return what ``lightning-sym fit --help`` prints."""
    width = max(map(len, names()))
    told = [f"                         {name:<{width}}  {what}" for name, what in names().items()]
    return _HELP.format(presets="\n".join(told))


def split(argv: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
    """Return our own options, and what is LightningCLI's.

    Args:
        argv: arguments after the verb.

    Raises:
        Refused: if an option of ours has no value.
    """
    ours: dict[str, str | None] = dict.fromkeys(
        ("preset", "print-preset", "monitors", "every-n-steps", "targets")
    )
    theirs: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name.replace("_", "-")
        if not argument.startswith("--") or name not in ours:
            theirs.append(argument)
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise Refused(f"--{name} needs a value")
            value = rest.pop(0)
        ours[name] = value
    return ours, theirs


def _monitors(ours: dict[str, str | None]) -> list[Any]:
    """Return the callbacks that --monitors asks for.

    Raises:
        Refused: if an option is wrong.
    """
    level = ours["monitors"] or "standard"
    if level == "none":
        return []
    if level not in LEVELS:
        raise Refused(f"--monitors must be among {', '.join(LEVELS)} and none, got {level!r}")
    interval = ours["every-n-steps"]
    if interval is not None and (not interval.isdigit() or int(interval) < 1):
        raise Refused(f"--every-n-steps must be a whole number above 0, got {interval!r}")
    where = ours["targets"]
    from lightning_sym.callbacks import monitors

    return list(
        monitors(
            level,  # type: ignore[arg-type]
            every_n_steps=None if interval is None else int(interval),
            targets=int(where) if where is not None and where.lstrip("-").isdigit() else where,
        )
    )


def _importable() -> None:
    """Let the package's classes be named without a path, and the user's be found in the working folder."""
    for package in ("callbacks", "datamodules", "modules"):
        importlib.import_module(f"lightning_sym.{package}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
