"""The sandbox: a copy computes what the module computes, and nothing of the user's changes."""

import functools
import random
import threading
import warnings
import weakref
from dataclasses import dataclass

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_sym.sandbox import NotApartError, Sandbox, training_loss
from tests.sandbox.nasty_modules import NASTY, Base, CountsInItsClass, Kept, Statistics, shared_weight


def no_function(apart, x):
    return apart("forward", x)


def a_function(apart, x):
    return apart(lambda module, x: module(x) * 2, x)


def a_method(apart, x):
    return apart("loss", x)


def a_gradient(apart, x):
    loss = apart("loss", x)
    loss.backward()
    with torch.no_grad():
        for parameter in apart.module.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    return loss


def a_curvature(apart, x):
    parameters = [p for p in apart.module.parameters() if p.requires_grad]
    loss = apart("loss", x)
    first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    scale = sum(g.square().sum() for g in first if g is not None)
    torch.autograd.grad(scale, parameters, allow_unused=True)
    return loss


WAYS = {
    "evaluation": (no_function, {}),
    "training": (no_function, {"train": True}),
    "as it is": (a_function, {"train": None}),
    "a method": (a_method, {"train": True, "seed": 3}),
    "a gradient": (a_gradient, {"train": True, "grad": True}),
    "second derivatives": (a_curvature, {"twice_differentiable": True, "full_precision": True, "seed": 1}),
}
HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_state_dict_pre_hook",
)


def attach_hooks(module):
    """Attach a user's hooks everywhere, and return the list of what fired."""
    fired = []

    def hook(*args, **kwargs):
        fired.append(1)

    for child in module.modules():
        for register in HOOKS:
            getattr(child, register)(hook)
    return fired


def ready(make):
    """Return a module as in the middle of a fit: modes mixed, gradients there, one pass made."""
    torch.manual_seed(0)
    module = make()
    module.train()
    next(module.children()).eval()
    for parameter in module.parameters():
        if not nn.parameter.is_lazy(parameter):
            parameter.grad = torch.full_like(parameter, 0.5)
    return module


def plain(value, seen=()):
    """Return a value as one that ``==`` compares bitwise: tensors as bytes, objects by their attributes."""
    if id(value) in seen:
        return "..."
    seen = (*seen, id(value))
    if isinstance(value, torch.Tensor):
        if nn.parameter.is_lazy(value):
            return "lazy"
        return (
            id(value),
            value._version,
            value.detach().numpy().tobytes(),
            plain(value.grad) if value.is_leaf else 0,
        )
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, dict):
        return {
            key if isinstance(key, str | int) else id(key): plain(item, seen) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return id(value) if isinstance(value, list) else 0, [plain(item, seen) for item in value]
    if isinstance(value, nn.Module | Kept):
        return id(value), type(value), plain(vars(value), seen)
    if isinstance(value, functools.partial):
        return id(value), plain(value.args, seen)
    if hasattr(value, "cache_info"):
        return value.cache_info()
    return value if isinstance(value, str | int | float | type(None)) else id(value)


def everything(module):
    peek = getattr(module, "peek", None)
    return {
        "module": plain(module),
        "class": {
            k: list(v) if isinstance(v, list) else v for k, v in vars(type(module)).items() if k[0] != "_"
        },
        "unseen": peek() if peek else None,
        "modes": [child.training for child in module.modules()],
        "random": (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()),  # noqa: NPY002
        "global": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_inference_mode_enabled()),
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", NASTY)
def test_nothing_of_the_users_changes(kind, way, capsys):
    module = ready(NASTY[kind])
    if kind == "lazy" and "grad" in str(WAYS[way]):
        module(torch.ones(2, 4))
    fired = attach_hooks(module) if kind not in ("lazy", "compiled child", "scripted") else []
    before = everything(module)
    run, options = WAYS[way]
    x = torch.linspace(-1, 1, 24).reshape(6, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Sandbox(module).open(**options) as apart:
            placed = apart.place(x)
            run(apart, placed)
            run(apart, placed)
    assert everything(module) == before
    assert not fired
    assert "spoken" not in capsys.readouterr().out


def test_hooks_for_all_modules_fire_for_all_but_the_copies():
    from torch.nn.modules import module as everywhere

    heard = []

    def hear(module, *_):
        heard.append(module)

    net, other = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4)
    registered = [
        everywhere.register_module_forward_pre_hook(hear),
        everywhere.register_module_forward_hook(hear),
        everywhere.register_module_forward_hook(
            lambda module, args, out: heard.append(module), always_call=True
        ),
        everywhere.register_module_full_backward_pre_hook(hear),
        everywhere.register_module_full_backward_hook(hear),
    ]
    try:
        with Sandbox(net).open(grad=True) as apart:
            seen = []
            apart.module[0].register_full_backward_hook(lambda *_: seen.append("ours"))
            x = torch.ones(2, 4, requires_grad=True)
            apart("forward", x).sum().backward()
            copy = weakref.ref(apart.module[0])
            assert heard == []
            assert seen == ["ours"]
            other(x).sum().backward()
            assert heard == [other] * 5
        del apart
        assert copy() is None  # at once, without the garbage collector
    finally:
        for handle in registered:
            handle.remove()


@pytest.mark.parametrize("train", [False, True, None])
@pytest.mark.parametrize("kind", NASTY)
def test_results_are_those_of_an_independent_module(kind, train):
    x = torch.linspace(-1, 1, 24).reshape(6, 4)
    CountsInItsClass.seen.clear()
    module, twin = ready(NASTY[kind]), ready(NASTY[kind])  # made from the same seed
    if kind == "lightning":
        for child in (twin, twin.inner):
            child.log = child.log_dict = child.print = lambda *args: None
    for seeder in (torch.manual_seed, random.seed, np.random.seed):
        seeder(5)
    if train is not None:
        twin.train(train)
    with torch.no_grad():
        expected = [twin(x), twin(x)]
    with Sandbox(module).open(train=train, seed=5) as apart:
        found = [apart("forward", x), apart("forward", x)]
        names = [name for name, _ in apart.module.named_parameters()]
        assert all(p.is_leaf and p.grad is None for p in apart.module.parameters())
    assert names == [name for name, _ in module.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# A tensor that was kept is cut from its graph, which leads to the original.
@pytest.mark.parametrize("kind", sorted(set(NASTY) - {"lazy", "graphs kept"}))
def test_gradients_are_those_of_an_independent_module_and_its_own(kind):
    x = torch.linspace(-1, 1, 24).reshape(6, 4)
    module, twin = ready(NASTY[kind]), ready(NASTY[kind])
    if kind == "lightning":
        for child in (twin, twin.inner):
            child.log = child.log_dict = child.print = lambda *args: None
    for seeder in (torch.manual_seed, random.seed, np.random.seed):
        seeder(5)
    twin.train()
    twin.zero_grad()
    twin.loss(x).backward()
    with Sandbox(module).open(train=True, grad=True, seed=5) as apart:
        apart("loss", x).backward()
        found = {name: p.grad for name, p in apart.module.named_parameters()}
    for name, parameter in twin.named_parameters():
        assert (found[name] is None) == (parameter.grad is None), name
        assert parameter.grad is None or torch.equal(found[name], parameter.grad), name
    assert all(bool((p.grad == 0.5).all()) for p in module.parameters())


def test_attention_takes_its_fast_path_as_on_its_own():
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    x = torch.linspace(-1, 1, 80).reshape(2, 5, 8)
    with torch.no_grad():
        expected = layer(x)
    with Sandbox(layer).open() as apart:
        assert torch.equal(apart("forward", x), expected)
        assert torch.equal(apart("forward", x), expected)


def test_shared_parameters_stay_shared_and_keep_their_attributes():
    with Sandbox(shared_weight()).open() as apart:
        assert apart.module.tied.weight is apart.module.net[0].weight
        assert apart.module.tied.weight.tag == "kept"


# What is not apart is said.

OUTSIDE = Base()


def call_outside(x):
    return OUTSIDE.net(x)


class ByGlobal(Base):
    """A method looks its own module up by a global name: no copy of a function changes that."""

    def forward(self, x):
        return OUTSIDE.net(x)


class ByGlobalWeights(Base):
    def forward(self, x):
        return F.linear(x, OUTSIDE.net[0].weight.t().t())


class Catching(Base):
    def forward(self, x):
        try:
            return OUTSIDE.net[1](x)
        except RuntimeError:
            return x


@pytest.mark.parametrize("kind", [ByGlobal, ByGlobalWeights, Catching])
def test_a_module_that_runs_its_original_is_refused(kind, monkeypatch):
    module = kind()
    monkeypatch.setitem(globals(), "OUTSIDE", module)
    hooks = plain(module)
    with pytest.raises(NotApartError, match="original"), Sandbox(module).open() as apart:
        apart("forward", torch.ones(2, 4))
    assert plain(module) == hooks


def test_functions_that_know_the_module_by_a_global_name_are_rebuilt(monkeypatch):
    module = Base()
    module.forward = lambda x: call_outside(x)
    monkeypatch.setitem(globals(), "OUTSIDE", module)
    x = torch.ones(2, 4)
    with Sandbox(module).open() as apart:
        nn.init.zeros_(apart.module.net[2].weight)
        assert torch.equal(apart("forward", x), module.net[2].bias.expand(2, 3))


def test_another_module_of_the_users_is_no_original():
    loss = Base()
    with Sandbox(Base()).open() as apart:
        apart(lambda module, x: loss(module.net(x)[:, :1].expand(-1, 4)), torch.ones(2, 4))


def test_another_thread_may_run_the_original():
    module = Base()
    results = []
    with Sandbox(module).open() as apart:
        thread = threading.Thread(target=lambda: results.append(module(torch.ones(2, 4))))
        thread.start()
        thread.join()
        apart("forward", torch.ones(2, 4))
    assert len(results) == 1


def test_overlapping_sandboxes_of_threads_leave_no_setting_behind():
    first, second = Sandbox(Base()), Sandbox(nn.MultiheadAttention(4, 2))
    flags = torch.backends.cuda.flash_sdp_enabled()
    torch.compile(lambda x: x, backend="eager")(torch.ones(1))
    stance = torch._dynamo.eval_frame._stance.stance
    outer = first.open(twice_differentiable=True)
    outer.__enter__()
    inner = second.open(twice_differentiable=True)
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    inner.__exit__(None, None, None)
    assert torch._dynamo.eval_frame._stance.stance == stance
    assert torch.backends.cuda.flash_sdp_enabled() == flags


@pytest.mark.parametrize("use", [next, lambda stream: stream.send(None), lambda stream: max(stream)])
def test_what_cannot_be_copied_is_said_where_it_is_used(use):
    class Streams(Base):
        def __init__(self):
            super().__init__()
            self.stream = (i for i in range(3))

        def forward(self, x):
            return self.net(x) + use(self.stream)

    module = Streams()
    with pytest.raises(NotApartError, match="generator"), Sandbox(module).open() as apart:
        apart("forward", torch.ones(2, 4))
    assert next(module.stream) == 0


def test_a_module_that_refuses_to_be_copied():
    class Refuses(nn.Linear):
        def __getstate__(self):
            raise TypeError("no copies of this layer")

    module = Base()
    module.net[0] = Refuses(4, 5)
    with pytest.raises(NotApartError, match="no copies of this layer"), Sandbox(module).open():
        pass


def test_gradients_of_plain_tensors_are_left_out():
    module = NASTY["plain leaf"]()
    with Sandbox(module).open() as apart:
        assert apart.module.table[0].grad is None
        assert apart.module.table[0].requires_grad


def test_what_is_compiled_is_replaced_by_what_was_compiled():
    with Sandbox(NASTY["compiled method"]()).open() as apart:
        assert "_torchdynamo_orig_callable" not in vars(apart.module.run)
    with Sandbox(NASTY["compiled child"]()).open() as apart:
        assert not isinstance(apart.module.net, torch._dynamo.OptimizedModule)


def test_sharded_modules_are_refused():
    class FullyShardedDataParallel(nn.Module):
        pass

    module = Base()
    module.net.append(FullyShardedDataParallel())
    with pytest.raises(NotApartError, match="FullyShardedDataParallel"), Sandbox(module).open():
        pass
    module = Base()
    module.net[0].weight.ds_tensor = 1
    with pytest.raises(NotApartError, match="ZeRO-3"), Sandbox(module).open():
        pass


def test_dtensors_are_refused(tmp_path):
    distributed = torch.distributed
    from torch.distributed.tensor import DTensor, Replicate

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        module = Base()
        module.net[0].weight = nn.Parameter(DTensor.from_local(torch.ones(5, 4), mesh, [Replicate()]))
        with pytest.raises(NotApartError, match="DTensor"), Sandbox(module).open():
            pass
        wrapped = nn.parallel.DistributedDataParallel(Base())
        with Sandbox(wrapped).open(grad=True) as apart:
            assert not isinstance(apart.module, nn.parallel.DistributedDataParallel)
            assert [n for n, _ in apart.module.named_parameters()] == [
                n for n, _ in wrapped.named_parameters()
            ]
            apart("forward", torch.ones(2, 4)).sum().backward()
            apart("loss", torch.ones(2, 4))
        assert all(p.grad is None for p in wrapped.parameters())
    finally:
        distributed.destroy_process_group()


def test_an_exception_leaves_nothing_behind():
    module = ready(Statistics)
    before = everything(module)

    def fails(model, x):
        model(x)
        raise ZeroDivisionError

    options = {"train": True, "twice_differentiable": True, "seed": 1}
    with pytest.raises(ZeroDivisionError), Sandbox(module).open(**options) as apart:
        apart(fails, torch.ones(2, 4))
    with pytest.raises(TypeError, match="nowhere"), Sandbox(module).open() as apart:
        apart("nowhere", torch.ones(2, 4))
    assert everything(module) == before


# Precision.


def test_full_precision_of_a_half_fit():
    class Half(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

        def forward(self, x):
            made = torch.ones(3)
            return self.net(x.to(self.dtype)) * made

    module = Half().to(torch.bfloat16)
    plugin = pl.plugins.precision.HalfPrecision("bf16-true")
    sandbox = Sandbox(module, precision=plugin.forward_context, convert=plugin.convert_input)
    x = torch.linspace(-1, 1, 24).reshape(6, 4)
    with sandbox.open() as apart:
        assert apart.place(x).dtype == torch.bfloat16
        assert apart("forward", apart.place(x)).dtype == torch.bfloat16
    with sandbox.open(full_precision=True, train=True) as apart:
        assert torch.equal(apart.place(x), x)
        assert apart("forward", apart.place(x)).dtype == torch.float32
        assert {t.dtype for t in apart.module.parameters()} == {torch.float32}
    assert torch.get_default_dtype() == torch.float32
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_passes_run_under_autocast_and_not_in_full_precision():
    sandbox = Sandbox(Base(), precision=lambda: torch.autocast("cpu", torch.bfloat16))
    x = torch.ones(2, 4)
    with sandbox.open() as apart:
        assert apart("forward", x).dtype == torch.bfloat16
        assert (apart.module.net[0].weight @ x.T).dtype == torch.float32
    with sandbox.open(full_precision=True) as apart:
        assert apart("forward", x).dtype == torch.float32


def test_a_double_fit_stays_double():
    plugin = pl.plugins.precision.DoublePrecision()
    sandbox = Sandbox(Base().double(), precision=plugin.forward_context, convert=plugin.convert_input)
    with sandbox.open(full_precision=True) as apart:
        assert apart("forward", apart.place(torch.ones(2, 4))).dtype == torch.float64


def test_a_seed_is_the_modules_devices_and_not_another_threads_matter():
    with Sandbox(nn.Dropout(0.5)).open(train=True, seed=7) as apart:
        first = apart("forward", torch.ones(100))
    with Sandbox(nn.Dropout(0.5)).open(train=True, seed=7) as apart:
        assert torch.equal(apart("forward", torch.ones(100)), first)


def test_inside_of_inference_mode():
    module = Base()
    with torch.inference_mode(), Sandbox(module).open(grad=True) as apart:
        apart("loss", apart.place(torch.ones(2, 4))).backward()
        assert apart.module.net[0].weight.grad is not None


def test_attention_has_second_derivatives():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, x):
            return F.scaled_dot_product_attention(x @ self.weight, x, x).sum()

    with Sandbox(Attends()).open(twice_differentiable=True) as apart:
        [gradient] = torch.autograd.grad(
            apart("forward", torch.randn(1, 1, 3, 4)), apart.module.weight, create_graph=True
        )
        assert torch.autograd.grad(gradient.square().sum(), apart.module.weight)[0].isfinite().all()


# Placing.


@dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor


class Graph:
    def __init__(self, x):
        self.x, self.moved = x, 0

    def to(self, device):
        self.x, self.moved = self.x.to(device), self.moved + 1
        return self


def test_placing_shares_nothing():
    x = torch.ones(2, 4, requires_grad=True) * 1
    graph = Graph(x)
    batch = {"a": [x, (x, 3)], "b": Sample(x, torch.arange(2)), "c": graph, "d": None, "e": "text"}
    with Sandbox(
        Base().double(), convert=lambda t: t.double() if t.is_floating_point() else t
    ).open() as apart:
        placed = apart.place(batch)
    assert placed["a"][0] is placed["a"][1][0] or torch.equal(placed["a"][0], placed["a"][1][0])
    assert placed["b"].x.dtype == torch.float64
    assert placed["b"].y.dtype == torch.int64
    assert not placed["b"].x.requires_grad
    assert placed["c"] is not graph
    assert (placed["c"].moved, graph.moved) == (1, 0)
    assert placed["d"] is None
    assert placed["e"] == "text"
    placed["a"][0].zero_()
    assert bool((x == 1).all())
    assert batch["b"].x is x


# The loss of a step.


def steps():
    def by(step):
        return type("Steps", (pl.LightningModule,), {"training_step": step})()

    return {
        "batch_idx": by(lambda self, batch, batch_idx: batch.sum() + batch_idx),
        "another name": by(lambda self, b, _: b.sum() + _),
        "any": by(lambda self, *args: args[0].sum() + args[1]),
        "batch alone": by(lambda self, batch: batch.sum()),
        "a third": by(lambda self, batch, i, loader: batch.sum() + i + loader),
        "a third with a default": by(
            lambda self, batch, i, name="train": {"loss": batch.sum() + len(name) - 5}
        ),
    }


@pytest.mark.parametrize("kind", steps())
def test_a_step_is_called_by_position(kind):
    with Sandbox(steps()[kind]).open() as apart:
        assert training_loss(apart, torch.ones(3), "training_step") == 3


@pytest.mark.parametrize("found", [None, torch.ones(2), {"losses": torch.ones(())}, 3.0])
def test_what_is_no_loss_is_said(found):
    with Sandbox(Base()).open() as apart, pytest.raises(TypeError, match="scalar tensor"):
        training_loss(apart, torch.ones(3), lambda module, batch: found)


def test_a_loss_by_method_and_function():
    x = torch.ones(2, 4)
    with Sandbox(Base()).open() as apart:
        assert training_loss(apart, x, "loss") == training_loss(apart, x, lambda module, x: module.loss(x))
