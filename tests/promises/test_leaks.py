"""Promise 8: after a fit, an exception or Ctrl-C there is no hook, no Trainer and no module kept alive.

Memory and checkpoints grow with the history alone.
"""

from __future__ import annotations

import gc
import io
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from lightning_sym import watch
from lightning_sym.callbacks import AlignmentMonitor, CollapseMonitor, Every, Monitor, monitors
from lightning_sym.observe import Reading
from tests.promises.every import Module, apart, every_monitor, fit, hooks


class Fails(Module):
    """Raises in a training step, with the hooks on and a backward pass behind it."""

    def __init__(self, error: type[BaseException] | None, at: int = 3) -> None:
        super().__init__("mlp")
        self.error, self.at, self.steps = error, at, 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.steps += 1
        if self.error is not None and self.steps == self.at:
            raise self.error("mine")
        return loss


class Strict(Monitor):
    """Raises at its second reading."""

    quantity = "strict"

    def read(self, seen: Any) -> Any:
        yield Reading("", "one", 1.0)
        if seen.step > 1:
            raise ArithmeticError("mine")


def ended(error: type[BaseException] | None, watching: list[Any], *, strict: bool = False) -> list[Any]:
    """Fit, to its end or not; return weak references to what must be let go of."""
    module, linear = Fails(error), nn.functional.linear
    more = [Strict(every_n_steps=1, strict=True)] if strict else []
    try:
        fit(module, *watching, *more)
    except (
        RuntimeError,
        KeyboardInterrupt,
        SystemExit,
        ArithmeticError,
    ):  # Lightning's of Ctrl-C is the third
        assert error is not None or strict
    else:
        assert error is None
        assert not strict
    run = module._trainer
    assert hooks(module) == 0
    assert nn.functional.linear is linear
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in run.optimizers)
    assert "training_step" not in vars(run.strategy)
    assert any(each.history for each in watching)
    kept = [module, run, run.strategy, module.net[0].weight, *run.optimizers]
    return [weakref.ref(thing) for thing in kept]


@pytest.mark.parametrize(
    ("error", "strict"), [(None, False), (RuntimeError, False), (KeyboardInterrupt, False), (None, True)]
)
def test_nothing_is_kept_alive_by_monitors_that_are(error, strict):
    watching = every_monitor("mlp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        references = ended(error, watching, strict=strict)
    gc.collect()
    alive = [type(found).__name__ for reference in references if (found := reference()) is not None]
    assert not alive
    # and they are good for another fit
    torch.manual_seed(0)
    fit(Module("mlp"), *watching)
    fresh = every_monitor("mlp")
    torch.manual_seed(0)
    fit(Module("mlp"), *fresh)
    for kept, new in zip(watching, fresh, strict=False):
        again = [{**row, "fit": 1} for row in kept.history if row["fit"] == kept.fit]
        assert not apart(new.history, again), type(kept).__name__


def test_the_test_of_what_is_alive_can_fail():
    class Keeps(CollapseMonitor):
        def read(self, seen: Any) -> Any:
            self.kept = seen.run.module
            return super().read(seen)

    watching = [Keeps(every_n_steps=1)]
    references = ended(None, watching)
    gc.collect()
    assert references[0]() is not None


def test_a_loop_lets_go_too():
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    chosen = monitors("standard", every_n_steps=1, strict=True)
    with watch(net, optimizer, chosen) as watching:
        net(torch.randn(4, 6)).sum().backward()
        optimizer.step()
    references = [weakref.ref(net), weakref.ref(optimizer), weakref.ref(watching.engine)]
    del net, optimizer, watching
    gc.collect()
    assert not [reference() for reference in references if reference() is not None]
    assert all(monitor.history for monitor in chosen)


def no_labels(batch):
    """Return something that is no tensor, which is seen when it is asked for."""
    return "none"


def test_what_failed_keeps_no_activations_alive():
    """An error kept with its frames would be a ring through the graph, which no collector sees."""
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    # The second one's hooks on gradients hang on the graph.
    wrong = [CollapseMonitor(every_n_steps=1, targets=no_labels), AlignmentMonitor(every_n_steps=1)]
    with warnings.catch_warnings(record=True) as caught, watch(net, optimizer, wrong) as watching:
        warnings.simplefilter("always")
        for _ in range(2):
            watching.batch((x := torch.randn(4, 6),))
            net(x).sum().backward()
            optimizer.step()
    assert sum("no_labels" in str(each.message) for each in caught) == 1
    references = [weakref.ref(net), weakref.ref(watching.engine)]
    del net, optimizer, watching
    gc.collect()
    assert not [reference() for reference in references if reference() is not None]


def test_what_failed_says_where_if_strict():
    with pytest.raises(ValueError, match="no_labels") as raised:
        fit(Module("mlp"), CollapseMonitor(every_n_steps=1, targets=no_labels, strict=True))
    assert "class_means.py" in "".join(raised.value.__notes__)


def tensors_alive() -> int:
    """Bytes of all tensors there are."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {id(x): x for x in gc.get_objects() if isinstance(x, torch.Tensor)}
    return sum(x.numel() * x.element_size() for x in found.values())


def stored(state: Any) -> int:
    """Bytes of a state in a checkpoint."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return len(buffer.getvalue())


def test_two_hundred_due_steps_keep_nothing_but_the_history():
    """Tensors do not grow at all; checkpoints without the history grow by what tells where they are."""
    sizes: dict[int, Any] = {}

    class Sizes(Monitor):
        quantity = "sizes"

        def read(self, seen: Any) -> Any:
            if seen.step in (20, 200):
                states = [{**m.state_dict(), "history": []} for m in watching]
                sizes[seen.step] = tensors_alive(), [stored(state) for state in states]
            return ()

    chosen = every_monitor("mlp", strict=True)
    # These keep what they say that they keep: spectra and distances of each reading.
    watching = [m for m in chosen if m.prefix not in ("eigenmodes", "hierarchy", "knn", "linear", "norms")]
    watching = [
        m for m in watching if m.prefix not in ("sharpness", "step", "named")
    ]  # for the time they take
    for monitor in watching:  # those that run the module apart take longer
        monitor.schedule = Every(1 if monitor.needs else 10)
    fit(Module("mlp"), *watching, Sizes(every_n_steps=1), max_steps=200, max_epochs=-1)
    assert all(len(m.history) >= (200 if m.needs else 20) for m in watching)
    (early, early_states), (late, late_states) = sizes[20], sizes[200]
    assert late <= early + 1024
    for monitor, a, b in zip(watching, early_states, late_states, strict=True):
        assert b <= a + 256, type(monitor).__name__
