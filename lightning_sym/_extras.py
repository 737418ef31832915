"""Packages that only some of what is here needs: one sentence says which extra brings a missing one."""

from __future__ import annotations

import importlib

EXTRAS = {
    "PIL": "ssl",
    "datasets": "hub",
    "jsonargparse": "cli",
    "matplotlib": "plots",
    "sklearn": "demo",
    "tensorboard": "tensorboard",
    "timm": "ssl",
    "torchvision": "ssl",
}


class MissingExtraError(ModuleNotFoundError):
    """An optional package is not installed; the message says which extra brings it."""


def need(package: str, *, what: str) -> None:
    """Make sure that an optional package can be imported.

    Args:
        package: its import name, a key of ``EXTRAS``.
        what: what needs it; the beginning of the error's sentence.

    Raises:
        MissingExtraError: if it is not installed, naming the extra that brings it. A package that is there
            but fails to import raises its own error.
    """
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingExtraError(
            f"{what} needs {package}, which is not installed: pip install 'lightning-sym[{EXTRAS[package]}]'",
            name=package,
        ) from error
