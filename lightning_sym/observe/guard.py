"""Nothing of ours ends the user's step: what goes wrong in a hook is kept, and told with the readings."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any


def guarded(hook: Callable[..., None], fail: Callable[[Exception], None]) -> Callable[..., None]:
    """Return a hook that gives what goes wrong in it to ``fail``."""

    def call(*args: Any) -> None:
        try:
            hook(*args)
        except Exception as error:
            fail(error)

    return call


def without_frames(error: Exception) -> Exception:
    """Return an error that tells where it was raised in words, not by the frames of the user's pass.

    These hold activations, whose hooks hold what keeps the error: a ring through the autograd graph, which no
    garbage collector sees.
    """
    if error.__traceback__ is not None:
        error.add_note("Observed here:\n" + "".join(traceback.format_tb(error.__traceback__)))
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__
    return error
