"""The matrix of ways to train and what watches or changes them: rows, and how a cell is judged.

A column is a way to train beside a reference that must come to the same. Of each way there are three fits:
without us, with every monitor, and with syre. A cell is right if the first two end bitwise alike and the
monitor reads what it reads in the reference; syre's, if its weights are those of the reference.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sym.callbacks import Diagnosis, Monitor, SignalMonitor, Syre
from tests.models import trainer
from tests.promises.every import BATCH, Module, dataset, every_monitor, same

SYRE = "Syre"


def watching(kind: str = "mlp", *, double: bool = True, targets: bool = True, **shared: Any) -> list[Monitor]:
    """Return one monitor of each kind, and the diagnosis after them."""
    every = every_monitor(kind, samples=4, double=double, strict=True, **shared)
    first = {type(monitor).__name__: monitor for monitor in reversed(every) if monitor.prefix != "circuit"}
    more = [
        SignalMonitor(every_n_steps=1, strict=True, **shared),
        Diagnosis(every_n_steps=2, picture=False, strict=True, **shared),
    ]
    return [*reversed(first.values()), *more]


def names() -> list[str]:
    """Return the rows."""
    found = [type(monitor).__name__ for monitor in watching()]
    return [*(name if name != "Norms" else "a monitor of one's own" for name in found), SYRE]


def name_of(monitor: Any) -> str:
    """Return the row of a monitor."""
    return "a monitor of one's own" if type(monitor).__name__ == "Norms" else type(monitor).__name__


def syre() -> list[Callback]:
    """Return syre, as a list of callbacks."""
    return [Syre(sigma=0.5, seed=1)]


def plain(kind: str = "mlp", **settings: Any) -> Module:
    """Return a module in float64 without random draws and without statistics of a rank's own batch."""
    torch.manual_seed(0)
    module = Module(kind, **settings).double()
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
    return module


def batches(size: int = BATCH, *, double: bool = True) -> DataLoader:
    """Return the batches of the matrix, always in one order."""
    return DataLoader(dataset("mlp", double=double), size)


@dataclass
class Outcome:
    """What a fit came to.

    Attributes:
        rows: histories, by the monitor's row.
        weights: parameters and buffers.
        state: all that must be bitwise that of a fit without us.
        error: what ended it.
    """

    rows: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    state: Any = None
    error: str = ""


def outcome(
    module: nn.Module, optimizers: Sequence[Any], callbacks: Sequence[Any], error: str = ""
) -> Outcome:
    """Return what a fit came to."""
    found = {name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()}
    weights = {name: _whole(value).clone() for name, value in found.items()}
    kept = [copy.deepcopy(list(_torch(each).state.values())) for each in optimizers]
    state = [list(weights.values()), kept, [p.grad for p in module.parameters()], torch.get_rng_state()]
    rows = {name_of(each): list(each.history) for each in callbacks if isinstance(each, Monitor)}
    return Outcome(rows, weights, state, error)


def _torch(optimizer: Any) -> Any:
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def fitted(
    callbacks: Sequence[Any],
    module: Any = None,
    *,
    loader: Any = None,
    ckpt_path: Any = None,
    weights_only: bool | None = None,
    then: Callable[[Trainer, Any], Any] | None = None,
    **settings: Any,
) -> Outcome:
    """Fit with a Trainer, for two epochs of three batches or as told."""
    module = plain() if module is None else module
    run = trainer(callbacks=list(callbacks), **{"max_epochs": 2, **settings})
    error = ""
    try:
        run.fit(
            module, batches() if loader is None else loader, ckpt_path=ckpt_path, weights_only=weights_only
        )
        if then is not None:
            then(run, module)
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    return outcome(module, run.optimizers, callbacks, error)


Way = Callable[[list[Any]], Outcome]


@dataclass(frozen=True)
class Cell:
    """A verdict.

    Args:
        verdict: "right", "refused", "red" or "none" (there is nothing to read, or another has to be asked).
        why: the reason where it is not "right".
    """

    verdict: str
    why: str = ""


@dataclass(frozen=True)
class Column:
    """A way to train, and what must come to the same.

    Args:
        name: of the way, as the table has it.
        way: fits with callbacks.
        reference: fits in another way.
        told: what the reference is, for the page.
        places: how far numbers may differ, relatively; 0: not in a bit.
        unread: keys that there are not, or that mean something else here, by a regular expression; and why.
        none: rows that have no reading here, and why.
        refused: rows that are refused, and a part of what is said.
        watch: makes the monitors.
        watch_reference: makes those of the reference, if they are others.
        syre_reference: what syre's weights are compared with, if it is another fit.
        silent: whether the fit with monitors is compared with one without bitwise.
        slow: whether the suite leaves it to the script.
        needs: a package without which it can't be run.
    """

    name: str
    way: Callable[[list[Any], Path], Outcome]
    reference: Callable[[list[Any], Path], Outcome]
    told: str
    places: float = 0.0
    unread: str = ""
    note: str = ""
    none: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    watch: Callable[[], list[Monitor]] = watching
    watch_reference: Callable[[], list[Monitor]] | None = None
    syre_reference: Callable[[list[Any], Path], Outcome] | None = None
    silent: bool = True
    slow: bool = False
    needs: str = ""

    def cells(self, folder: Path) -> dict[str, Cell]:
        """Run the fits and judge each row."""
        found = {name: Cell("none", why) for name, why in self.none.items()}
        for name, message in self.refused.items():
            found[name] = self._refusal(name, message, folder)
        chosen = [m for m in self.watch() if name_of(m) not in found]
        right = [m for m in (self.watch_reference or self.watch)() if name_of(m) not in found]
        bare = self.way([], _made(folder / "bare")) if self.silent else None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*lightning_sym.*:|.*readings.*")
            watched = self.way(chosen, _made(folder / "watched"))
            expected = self.reference(right, _made(folder / "reference"))
        for monitor in chosen:
            name = name_of(monitor)
            found[name] = self._judge(name, bare, watched, expected)
        if SYRE not in found:
            found[SYRE] = self._judge_syre(bare, folder)
        return {name: found[name] for name in names()}

    def _judge(self, name: str, bare: Outcome | None, watched: Outcome, expected: Outcome) -> Cell:
        if watched.error or expected.error:
            return Cell("red", watched.error or f"the reference: {expected.error}")
        if bare is not None and not same(bare.state, watched.state):
            return Cell("red", "the fit with monitors ends in another state than the one without")
        a, b = expected.rows[name], watched.rows[name]
        wrong = differences(a, b, self.places, self.unread)
        if wrong:
            return Cell("red", wrong[0])
        if not any(len(row) > 2 for row in b):
            return Cell("red", "nothing was read")
        return Cell("right", self.note if re.search(self.unread or "(?!)", " ".join(a[-1])) else "")

    def _judge_syre(self, bare: Outcome | None, folder: Path) -> Cell:
        ours = self.way(syre(), _made(folder / "syre"))
        expected = (self.syre_reference or self.reference)(syre(), _made(folder / "syre_reference"))
        if ours.error or expected.error:
            return Cell("red", ours.error or f"the reference: {expected.error}")
        far = [n for n, w in ours.weights.items() if not close(w, expected.weights[n], self.places)]
        if far:
            return Cell("red", f"{far[0]} has other weights than in the reference")
        if bare is not None and same(ours.weights, bare.weights):
            return Cell("red", "it changes nothing")
        return Cell("right")

    def _refusal(self, name: str, message: str, folder: Path) -> Cell:
        one = syre() if name == SYRE else [m for m in self.watch() if name_of(m) == name]
        error = self.way(one, _made(folder / name)).error
        if message not in error:
            return Cell("red", f"it must be refused with {message!r}, and ended with {error!r}")
        return Cell("refused", error.partition(": ")[2])


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def close(a: Tensor, b: Tensor, places: float) -> bool:
    """Return whether two tensors agree."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not places:
        return torch.equal(a, b)
    return torch.allclose(a.double(), b.double(), rtol=places, atol=places)


def differences(
    expected: list[dict[str, float]], found: list[dict[str, float]], places: float, unread: str = ""
) -> list[str]:
    """Return what differs between two histories, but for keys that are not compared."""
    if len(expected) != len(found):
        return [f"{len(found)} readings, {len(expected)} in the reference"]
    wrong = []
    for a, b in zip(expected, found, strict=True):
        keys = [key for key in sorted(a.keys() | b.keys()) if not (unread and re.search(unread, key))]
        for key in keys:
            x, y = a.get(key), b.get(key)
            fine = same(x, y)
            if not fine and places and x is not None and y is not None:
                fine = math.isclose(x, y, rel_tol=places, abs_tol=places)
            if not fine:
                wrong.append(f"{key} is {y} at step {b['step']}, {x} in the reference")
    return wrong
