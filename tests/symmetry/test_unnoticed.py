"""Nothing of the user's notices the search: hooks, counters, closures, logs, metrics, random states."""

from __future__ import annotations

import functools
import gc
import random
import threading
import weakref
from typing import ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import prune

from lightning_sym.symmetry import find_symmetries

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def net() -> nn.Sequential:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))


def kinds(module: nn.Module, *inputs) -> list[str]:
    found = find_symmetries(module, *(inputs or (X,)))
    assert found.untraced == found.refuted == ()
    return [s.kind for s in found]


BOTH = ["permutation", "rescaling"]


def test_no_hook_fires():
    fired = []

    def note(*_, **__):
        fired.append(1)

    model = net()
    for child in model.modules():
        child.register_forward_hook(note)
        child.register_forward_hook(note, with_kwargs=True, always_call=True)
        child.register_forward_pre_hook(note)
        child.register_forward_pre_hook(note, with_kwargs=True)
        child.register_full_backward_hook(note)
        child.register_state_dict_post_hook(note)
    handles = [register_module_forward_hook(note), register_module_forward_pre_hook(note)]
    try:
        assert kinds(model) == BOTH
        assert fired == []
        model(X)
        assert fired  # they are still there
    finally:
        for handle in handles:
            handle.remove()


def test_a_hook_that_cannot_be_copied_is_no_hindrance():
    class Watcher:
        def __init__(self) -> None:
            self.lock, self.seen = threading.Lock(), []

        def see(self, module, args, output) -> None:
            self.seen.append(output)

    model, watcher = net(), Watcher()
    model[0].register_forward_hook(watcher.see)
    assert kinds(model) == BOTH
    assert watcher.seen == []


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_hooks_of_torch_that_compute_a_weight_do():
    """The weight that they leave behind is one step old: only they make it follow its parameters."""
    model = net()
    torch.nn.utils.weight_norm(model[0])
    found = find_symmetries(model, X)
    moved = {s.kind: set(s.parameters) for s in found}
    assert moved["rescaling"] == {"0.weight_g", "0.bias", "2.weight"}
    assert moved["scale"] == {"0.weight_v"}
    model = net()
    prune.random_unstructured(model[2], "weight", amount=0.4)
    assert kinds(model) == ["rescaling"]  # a mask is a constant, and tells units apart
    model = net()
    prune.identity(model[0], "weight")
    assert kinds(model) == BOTH
    assert {s.parameters["0.weight_orig"] for s in find_symmetries(model, X)} == {(0,)}
    model = net()
    torch.nn.utils.spectral_norm(model[0])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    find_symmetries(model, X)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Counting(nn.Sequential):
    """A network that counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Captured(nn.Module):
    """Its forward goes through a function that captured the network."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net = Counting(*net())
        self.seen: list[int] = []
        inner, seen, bound = self.net, self.seen, self.net.forward
        ways = {
            "a lambda": lambda x: self.net(x),
            "the network alone": lambda x: inner(x),
            "a list beside it": lambda x: seen.append(1) or self.net(x),
            "a partial": functools.partial(lambda scale, x: self.net(x) * scale, 2.0),
            "a default": lambda x, net=self.net: net(x),
            "a keyword default": functools.partial(lambda x, *, net=self.net: net(x)),
            "a function in a function": (lambda run: lambda x: run(x))(lambda x: self.net(x)),
            "a bound method": self.net.forward,
            "a compiled method": torch.compile(self.net.forward, backend="eager"),
        }
        if how == "a wrapped method":
            self.net.forward = functools.wraps(bound)(lambda x: bound(x))
        self.run = ways.get(how, lambda x: self.net(x))
        self.table = {"runs": [self.run]}

    def forward(self, x: Tensor) -> Tensor:
        return self.table["runs"][0](x)


@pytest.mark.parametrize(
    "how",
    [
        *("a lambda", "the network alone", "a list beside it", "a partial", "a default", "a keyword default"),
        *("a function in a function", "a bound method", "a wrapped method", "a compiled method"),
    ],
)
def test_functions_that_captured_the_module_run_its_copy(how):
    model = Captured(how)
    fired = []
    model.net.register_forward_hook(lambda *_: fired.append(1))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert kinds(model) == BOTH
    assert (model.net.calls, model.seen, fired) == (0, [], [])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model(X)
    assert model.net.calls == 1


GLOBAL: list[nn.Module] = []


def test_a_global_variable_is_followed_and_what_can_not_be_is_said():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Counting(*net())
            self.run = namespace["run"]

        def forward(self, x: Tensor) -> Tensor:
            return self.run(x)

    namespace: dict = {}
    exec("def run(x):\n    return network(x)", namespace)
    model = Reads()
    namespace["network"] = model.net
    assert kinds(model) == BOTH
    assert model.net.calls == 0
    assert namespace["network"] is model.net

    class Through(nn.Module):
        """By a list of the test's, which no copy of the module knows."""

        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            return GLOBAL[0].net(x)

    hidden = Through()
    GLOBAL[:] = [hidden]
    with pytest.warns(UserWarning, match="reaches the module itself"):
        found = find_symmetries(hidden, X)
    assert list(found) == []
    assert len(found.untraced) == 1


def test_an_unregistered_parameter_is_held_in_place():
    """Its zeros are no constant: training may move them."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
            self.kept = [nn.Parameter(torch.zeros(6))]

        def forward(self, x: Tensor) -> Tensor:
            return self.b((self.a(x) + self.kept[0]).relu())

    with pytest.warns(UserWarning, match="a parameter is not registered"):
        found = find_symmetries(seeded(Hidden), X)
    assert list(found) == []


class Trainer:
    def __init__(self) -> None:
        self.logged, self.lock, self.scale = [], threading.Lock(), 2.0


class Logs(LightningModule):
    """Logs through the trainer that it hangs on."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self.net, self._trainer = net(), trainer

    def log(self, name: str, value: Tensor) -> None:
        self._trainer.logged.append(name)

    log_dict = print = log

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        self.log("mean", out.mean())
        self.log_dict({"mean": out.mean()}, 0)
        self.print("mean", 0)
        return out * self._trainer.scale


def test_what_is_logged_in_forward_goes_nowhere():
    trainer = Trainer()
    model = Logs(trainer)
    assert kinds(model) == BOTH
    assert trainer.logged == []
    assert type(model) is Logs
    model(X)
    assert trainer.logged == ["mean", {"mean": trainer.logged[1]["mean"]}, "mean"]


class Drawing(nn.Module):
    """Draws from every random state there is, keeps counters and lists, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls, self.seen = net(), 0, []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x)
        self.count += 1
        noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        return self.net(x) * (1 + noise)


def test_counters_and_random_states_stay():
    model = Drawing()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    assert kinds(model) == BOTH
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert all(np.array_equal(a, b) for a, b in zip(states[2], np.random.get_state(), strict=True))  # noqa: NPY002
    assert (model.calls, model.seen, float(model.count)) == (0, [], 0.0)


def test_the_copy_is_gone_at_once():
    """Its memory is that of the network in double precision: it does not wait for the garbage collector."""

    class Followed(nn.Sequential):
        alive: ClassVar[weakref.WeakSet] = weakref.WeakSet()

        def __setstate__(self, state):
            super().__setstate__(state)
            self.alive.add(self)

    model = Followed(*net())
    gc.collect()
    gc.disable()
    try:
        assert kinds(model) == BOTH
        assert len(Followed.alive) == 0
    finally:
        gc.enable()


def test_errors_leave_no_trace_either():
    class Fails(Drawing):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise RuntimeError("out of range")

    model = Fails()
    states = torch.get_rng_state(), random.getstate()
    with pytest.raises(RuntimeError, match="out of range"):
        find_symmetries(model, X)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert "_call_impl" not in vars(model)
    assert model.calls == 0


def test_what_can_not_be_copied_and_what_has_no_shape_yet():
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.lock = net(), threading.Lock()

        def forward(self, x: Tensor) -> Tensor:
            with self.lock:
                return self.net(x)

    assert kinds(Held()) == BOTH  # a lock is replaced by one of the copy's own

    class Refuses(Held):
        def __reduce_ex__(self, protocol):
            raise RuntimeError("out of reach")

    with pytest.raises(TypeError, match=r"can be copied, got Refuses: .*out of reach"):
        find_symmetries(Refuses(), X)
    with pytest.raises(ValueError, match="module must have been run once: it has lazy parameters"):
        find_symmetries(nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 3)), X)
