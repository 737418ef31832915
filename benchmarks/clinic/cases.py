"""All cases by name."""

from __future__ import annotations

import fnmatch
import importlib

from .common import Case

FAMILIES: tuple[str, ...] = (
    *("mlp", "cnn", "resnet", "vit", "gpt", "recurrent", "vae", "gan", "ssl", "regression", "streams"),
    *("lora", "fresh", "fresh_sick"),
)


def all_cases() -> dict[str, Case]:
    """Return every case by name, controls before those that are held against them.

    Raises:
        ValueError: if a name is used twice or a control is no healthy case.
    """
    found: dict[str, Case] = {}
    for family in FAMILIES:
        for case in importlib.import_module(f"{__package__}.{family}").CASES:
            if case.name in found:
                raise ValueError(f"two cases are called {case.name!r}")
            found[case.name] = case
    for case in found.values():
        if case.control is not None and (case.control not in found or found[case.control].sick):
            raise ValueError(f"{case.name}: control must name a healthy case, got {case.control!r}")
        if case.control is None and (case.leaves or any(check.of_control for check in case.checks)):
            raise ValueError(f"{case.name}: control must be given for its checks, got None")
    return dict(sorted(found.items(), key=lambda item: item[1].control is not None))


def chosen(globs: list[str] | None) -> list[Case]:
    """Return the cases whose names match one of the globs; all without any.

    Raises:
        ValueError: if a glob matches none.
    """
    every = all_cases()
    if not globs:
        return list(every.values())
    for glob in globs:
        if not any(fnmatch.fnmatchcase(name, glob) for name in every):
            raise ValueError(f"--only must match a case, got {glob!r}; families are {FAMILIES}")
    return [case for name, case in every.items() if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]
