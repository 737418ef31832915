"""The symmetries of the module in training: found on a copy, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_sym.engine.batch import Locator, first_samples, locate
from lightning_sym.engine.run import Run
from lightning_sym.symmetry import Symmetries, find_symmetries

#: Samples the search runs on: a trial costs two passes in float64, whatever the batch.
SAMPLES = 16


def symmetries_of(
    run: Run, *, inputs: Locator, forward: str | Callable[..., Any] = "forward", **options: Any
) -> Symmetries:
    """Return the module's symmetries, bound to it and so read as it is by then.

    They are searched for on the first samples of rank 0's batch, by that rank alone.

    Args:
        run: the fit.
        inputs: where the module's input is in the batch.
        forward: what is called on it.
        options: keywords of :func:`~lightning_sym.symmetry.find_symmetries`.
    """

    def search() -> Symmetries:
        if run.ranks.rank:
            return Symmetries()
        arguments = first_samples(locate(run.batch, inputs, run.function(forward)), SAMPLES)
        with run.sandbox.open() as apart:
            module = apart.module
            if forward != "forward":  # the copy is ours to change
                module.forward = _Through(module, forward)
            try:
                found = find_symmetries(module, *arguments.args, example_kwargs=arguments.kwargs, **options)
            finally:
                vars(module).pop("forward", None)  # it holds the copy, which holds it
        unbound = [replace(symmetry, module=None) for symmetry in found]
        return Symmetries(unbound, untraced=found.untraced, refuted=found.refuted)

    alike = run.ranks.broadcast(run.ranks.attempt(search))
    bound = [symmetry.bind(run.module) for symmetry in alike]
    return Symmetries(bound, untraced=alike.untraced, refuted=alike.refuted)


class _Through:
    """Stands for a module's forward: calls something else, in which the module itself runs as ever."""

    def __init__(self, module: nn.Module, how: str | Callable[..., Any]) -> None:
        self.module, self.how, self.own = module, how, module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.module.forward = self.own
        try:
            if isinstance(self.how, str):
                return getattr(self.module, self.how)(*args, **kwargs)
            return self.how(self.module, *args, **kwargs)
        finally:
            self.module.forward = self
