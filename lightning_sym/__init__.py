"""Is a network collapsing, aligning or losing its ability to learn, and why?

The main job from one place; each name is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_sym.callbacks import Syre, monitors
    from lightning_sym.engine.loop import watch
    from lightning_sym.optim import attach_syre
    from lightning_sym.symmetry import find_symmetries

__version__ = "0.1.0"

_WHERE = {
    "Syre": "lightning_sym.callbacks",
    "attach_syre": "lightning_sym.optim",
    "find_symmetries": "lightning_sym.symmetry",
    "monitors": "lightning_sym.callbacks",
    "watch": "lightning_sym.engine.loop",
}

__all__ = ["Syre", "attach_syre", "find_symmetries", "monitors", "watch"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
