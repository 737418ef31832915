"""syre against its paper's notation: theta kept apart, the forward pass at theta + theta_0."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_sym.callbacks import Syre
from lightning_sym.optim import attach_syre
from tests.models import Classifier, images, mlp, trainer

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 2e-3, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 2e-3, "weight_decay": 0.3}),
    "fused adamw": (torch.optim.AdamW, {"lr": 2e-3, "weight_decay": 0.3, "fused": True}),
    "nadam": (torch.optim.NAdam, {"lr": 2e-3, "weight_decay": 0.3, "decoupled_weight_decay": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-3, "weight_decay": 0.1}),
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-2, "weight_decay": 0.1}),
    "adamax": (torch.optim.Adamax, {"lr": 2e-3, "weight_decay": 0.1}),
    "adadelta": (torch.optim.Adadelta, {"lr": 0.5, "weight_decay": 0.1}),
    "coupled nadam": (torch.optim.NAdam, {"lr": 2e-3, "weight_decay": 0.1}),
    "radam": (torch.optim.RAdam, {"lr": 2e-3, "weight_decay": 0.1}),
    "decoupled radam": (
        torch.optim.RAdam,
        {"lr": 2e-3, "weight_decay": 0.3, "decoupled_weight_decay": True},
    ),
}


class Lookalike(torch.optim.SGD):
    """An optimizer that the package does not know: it takes the way of moved parameters."""


def problem(dtype=torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = mlp(4, 8, 6, 2).to(dtype)
    x, y = torch.randn(40, 4), torch.randn(40, 2)
    return net, x.to(dtype), y.to(dtype)


def rows(step: int) -> Tensor:
    """The batch of a step. (In full batches weights come to rest, and float32's rounding adds up.)"""
    return (torch.arange(16) + 7 * step) % 40


def paper(net, x, y, kind, settings, offsets, *, steps, sign=1):
    """Minimise loss(theta + theta_0) with decay of theta, theta being the optimizer's own parameter."""
    theta = {
        name: nn.Parameter(p.detach() - offsets.get(name, torch.zeros_like(p)))
        for name, p in net.named_parameters()
    }
    optimizer = kind(theta.values(), **settings)
    for step in range(steps):
        phi = {name: p + offsets.get(name, torch.zeros_like(p)) for name, p in theta.items()}
        loss = sign * F.mse_loss(functional_call(net, phi, (x[rows(step)],)), y[rows(step)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: p.detach() + offsets.get(name, torch.zeros_like(p)) for name, p in theta.items()}


def ours(net, x, y, kind, settings, *, steps, closure, sign=1, **syre):
    optimizer = kind(net.parameters(), **settings)
    handle = attach_syre(optimizer, named_parameters=net.named_parameters(), **syre)

    def evaluate(step: int) -> Tensor:
        optimizer.zero_grad()
        loss = sign * F.mse_loss(net(x[rows(step)]), y[rows(step)])
        loss.backward()
        return loss

    for step in range(steps):
        if closure:
            optimizer.step(functools.partial(evaluate, step))
        else:
            evaluate(step)
            optimizer.step()
    return handle


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_training_follows_the_papers_notation(name, closure, dtype):
    kind, settings = OPTIMIZERS[name]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    net, x, y = problem(dtype)
    twin = copy.deepcopy(net)
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    handle = ours(net, x, y, kind, settings, steps=200, closure=closure, sigma=0.1, seed=0)
    expected = paper(twin, x, y, kind, settings, handle.offsets(), steps=200)
    for n, p in net.named_parameters():
        assert not torch.equal(p, start[n])
        assert torch.allclose(p, expected[n], rtol=tolerance, atol=tolerance), (p - expected[n]).abs().max()


@pytest.mark.parametrize("anisotropy", [0.0, 0.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loss_that_is_maximised_is_pulled_to_the_offset_too(name, anisotropy):
    """The optimizer turns the gradient round, and then adds its decay: the pull must be turned before."""
    kind, settings = OPTIMIZERS[name]
    ends = []
    for sign in (1, -1):
        net, x, y = problem()
        own = {**settings, "maximize": sign < 0}
        twin = copy.deepcopy(net)
        handle = ours(
            net, x, y, kind, own, steps=50, closure=False, sign=sign, sigma=0.5, anisotropy=anisotropy
        )
        ends.append(dict(net.named_parameters()))
        if not anisotropy:
            expected = paper(twin, x, y, kind, own, handle.offsets(), steps=50, sign=sign)
            for n, p in net.named_parameters():
                torch.testing.assert_close(p.detach(), expected[n], rtol=1e-10, atol=1e-12)
    for n, p in ends[0].items():
        torch.testing.assert_close(p, ends[1][n], rtol=1e-10, atol=1e-12)


def test_a_line_search_sees_shifted_coordinates_at_every_call_of_its_closure():
    settings = {"lr": 0.5, "max_iter": 4, "line_search_fn": "strong_wolfe"}
    net, x, y = problem()
    twin = copy.deepcopy(net)

    class Decaying(torch.optim.LBFGS):
        """Has a group's weight decay, as syre asks for, and adds it to the gradient."""

        def step(self, closure):
            def decayed():
                loss = closure()
                for p in self.param_groups[0]["params"]:
                    p.grad.add_(p.detach(), alpha=0.1)
                    loss = loss + 0.05 * p.detach().square().sum()
                return loss

            with torch.enable_grad():
                return super().step(decayed)

    def run(parameters, evaluate, attach):
        optimizer = Decaying(parameters, **settings)
        optimizer.param_groups[0]["weight_decay"] = 0.1
        handle = attach(optimizer)
        for _ in range(5):

            def closure():
                optimizer.zero_grad()
                loss = evaluate()
                loss.backward()
                return loss

            optimizer.step(closure)
        return handle

    handle = run(
        net.parameters(),
        lambda: F.mse_loss(net(x), y),
        lambda optimizer: attach_syre(optimizer, sigma=0.5, named_parameters=net.named_parameters()),
    )
    offsets = handle.offsets()
    theta = {n: nn.Parameter(p.detach() - offsets.get(n, 0)) for n, p in twin.named_parameters()}
    run(
        theta.values(),
        lambda: F.mse_loss(
            functional_call(twin, {n: p + offsets.get(n, 0) for n, p in theta.items()}, (x,)), y
        ),
        lambda optimizer: None,
    )
    for n, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), (theta[n] + offsets.get(n, 0)).detach(), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("sigma", [0.01, 0.1])
def test_at_common_settings_float32_is_as_near_the_truth_as_the_papers_form(sigma):
    """lr * weight_decay * theta_0 is a ten-millionth of a weight: added to it alone it would be lost."""
    settings = {"lr": 1e-3, "weight_decay": 1e-2}
    net, x, y = problem(torch.float32)
    twin, exact = copy.deepcopy(net), copy.deepcopy(net).double()
    handle = ours(net, x, y, torch.optim.AdamW, settings, steps=200, closure=False, sigma=sigma)
    offsets = handle.offsets()
    expected = paper(twin, x, y, torch.optim.AdamW, settings, offsets, steps=200)
    doubles = {n: value.double() for n, value in offsets.items()}
    truth = paper(exact, x.double(), y.double(), torch.optim.AdamW, settings, doubles, steps=200)
    paths = {"ours": dict(net.named_parameters()), "paper": expected}
    gaps = {
        path: max(float((weights[n].detach() - truth[n]).abs().max()) for n in truth)
        for path, weights in paths.items()
    }
    assert gaps["ours"] < 1.5 * gaps["paper"] < 1e-5
    for n, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), expected[n], rtol=0, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_the_optimizers_own_decay_is_there_outside_of_a_step_and_for_what_has_no_offset(fused):
    net, *_ = problem(torch.float32)
    bare = copy.deepcopy(net)
    settings = {"lr": 0.01, "weight_decay": 0.5, "fused": fused}
    optimizer = torch.optim.AdamW(net.parameters(), **settings)
    plain = torch.optim.AdamW(bare.parameters(), **settings)
    attach_syre(optimizer, sigma=0.3, named_parameters=net.named_parameters())
    seen = []

    def evaluate() -> Tensor:
        seen.append(optimizer.param_groups[0]["weight_decay"])
        return torch.zeros(())

    for _ in range(3):
        for p, q in zip(net.parameters(), bare.parameters(), strict=True):
            p.grad, q.grad = torch.full_like(p, 0.1), torch.full_like(q, 0.1)
        optimizer.step(evaluate)
        plain.step()
        seen.append(optimizer.param_groups[0]["weight_decay"])
    assert seen == [0.5] * 6
    for (n, p), q in zip(net.named_parameters(), bare.parameters(), strict=True):
        if p.ndim == 1:
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        else:
            assert not torch.allclose(p, q, atol=1e-4), n


def test_a_step_that_breaks_off_leaves_the_decay_to_the_next_one_and_to_remove():
    class Broken(torch.optim.AdamW):
        broken = True

        @torch.no_grad()
        def step(self, closure=None):
            if self.broken:
                raise RuntimeError("out of memory")
            return super().step(closure)

    Broken.__module__, Broken.__qualname__, Broken.__name__ = "torch.optim.adamw", "AdamW", "AdamW"
    layer = nn.Linear(3, 2)
    optimizer = Broken(layer.parameters(), lr=0.1, weight_decay=0.5)
    handle = attach_syre(optimizer, sigma=0.3, named_parameters=layer.named_parameters())
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    for after in (optimizer.step, handle.remove):
        with pytest.raises(RuntimeError, match="memory"):
            optimizer.step()
        optimizer.broken = False
        after()
        assert optimizer.param_groups[0]["weight_decay"] == 0.5
        optimizer.broken = True


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, Lookalike])
def test_a_group_that_comes_later_gets_its_offset_by_name(kind):
    net, x, y = problem()
    twin = copy.deepcopy(net)
    settings = {"lr": 0.01, "weight_decay": 0.3}
    runs = []
    for model, later in ((net, True), (twin, False)):
        first = [*model[4].parameters()]
        optimizer = kind(
            first if later else [{"params": first}, {"params": [*model[0].parameters()]}], **settings
        )
        handle = attach_syre(optimizer, sigma=0.3, named_parameters=model.named_parameters())
        if later:
            assert handle.names == ["4.weight"]
            optimizer.add_param_group({"params": [*model[0].parameters()]})
        for _ in range(20):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        assert handle.names == ["4.weight", "0.weight"]
        assert handle.forces().keys() == {"4.weight", "4.bias", "0.weight", "0.bias"}
        assert torch.equal(handle.forces()["0.weight"], 0.3 * handle.offset(model[0].weight))
        runs.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_later_group_without_names_says_so():
    net, *_ = problem()
    optimizer = torch.optim.SGD(net[0].parameters(), lr=0.1, weight_decay=0.3)
    attach_syre(optimizer, named_parameters=net[0].named_parameters())
    optimizer.add_param_group({"params": [*net[2].parameters()]})
    with pytest.raises(ValueError, match=r"lacks 2.*1\.0, 1\.1"):
        optimizer.step()


@pytest.mark.parametrize("closure", [False, True])
def test_an_unknown_optimizer_runs_in_shifted_coordinates(closure):
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    net, x, y = problem()
    twin = copy.deepcopy(net)
    handle = ours(net, x, y, Lookalike, settings, steps=200, closure=closure, sigma=0.5)
    expected = paper(twin, x, y, torch.optim.SGD, settings, handle.offsets(), steps=200)
    for n, p in net.named_parameters():
        assert torch.allclose(p, expected[n], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["sgd", "adamw", "adam", "momentum"])
def test_anisotropic_decay_is_the_loss_with_d(name):
    """The twin writes the decay by hand: coupled into the gradient, decoupled as a step of its own."""
    kind, settings = OPTIMIZERS[name]
    net, x, y = problem()
    twin = copy.deepcopy(net)
    handle = ours(net, x, y, kind, settings, steps=100, closure=False, sigma=0.5, anisotropy=0.5)
    bare = {**settings, "weight_decay": 0.0}
    optimizer = kind(twin.parameters(), **bare)
    decay, lr = settings["weight_decay"], settings["lr"]
    by_name = dict(net.named_parameters())
    for step in range(100):
        optimizer.zero_grad()
        F.mse_loss(twin(x[rows(step)]), y[rows(step)]).backward()
        with torch.no_grad():
            for n, p in twin.named_parameters():
                own = by_name[n]
                d = 1 + handle._stretches.get(own, torch.zeros((), dtype=torch.float64))
                force = decay * d * (p - handle.offset(own))
                if name == "adamw":
                    p -= lr * force
                else:
                    p.grad += force
        optimizer.step()
    for n, p in twin.named_parameters():
        assert torch.allclose(by_name[n], p, rtol=1e-10, atol=1e-12)


def test_no_offset_is_the_bare_optimizer_bitwise():
    for kind, settings in OPTIMIZERS.values():
        net, x, y = problem(torch.float32)
        bare = copy.deepcopy(net)
        ours(net, x, y, kind, settings, steps=20, closure=False, sigma=0.0)
        paper_free = kind(bare.parameters(), **settings)
        for step in range(20):
            paper_free.zero_grad()
            F.mse_loss(bare(x[rows(step)]), y[rows(step)]).backward()
            paper_free.step()
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), bare.parameters(), strict=True))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_without_a_gradient_weights_go_to_the_offset(name):
    kind, settings = OPTIMIZERS[name]
    layer = nn.Linear(5, 3).double()
    optimizer = kind(layer.parameters(), **{**settings, "weight_decay": 1.0, "lr": 0.05})
    handle = attach_syre(optimizer, sigma=0.3, named_parameters=layer.named_parameters())
    for _ in range(600):
        for p in layer.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.allclose(layer.weight, handle.offset(layer.weight), atol=1e-9)
    assert torch.allclose(layer.bias, torch.zeros_like(layer.bias), atol=1e-9)


def test_offsets_depend_on_seed_and_name_alone():
    def draw(seed, prefix=""):
        layer = nn.Linear(500, 40)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
        named = [(prefix + n, p) for n, p in layer.named_parameters()]
        return attach_syre(optimizer, sigma=0.1, seed=seed, named_parameters=named).offset(layer.weight)

    torch.manual_seed(5)
    before = torch.get_rng_state()
    layer_state = draw(1)
    assert torch.equal(layer_state, draw(1, prefix="_orig_mod."))
    assert not torch.equal(layer_state, draw(2))
    assert not torch.equal(layer_state, draw(1, prefix="other."))
    assert layer_state.std() == pytest.approx(0.1 / 500**0.5, rel=0.02)
    torch.manual_seed(5)
    assert torch.equal(before, torch.get_rng_state())


def test_what_gets_an_offset():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3), nn.Linear(3, 2))
    net[3].weight.requires_grad_(False)
    groups = [
        {"params": [*net[:4].parameters()], "weight_decay": 0.1},
        {"params": [*net[4].parameters()], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    handle = attach_syre(optimizer, named_parameters=net.named_parameters())
    assert handle.names == ["0.weight"]
    assert not handle.offset(net[4].weight).any()
    with pytest.raises(KeyError):
        handle.offset(nn.Parameter(torch.zeros(2, 2)))


def test_shift_adds_the_offset_and_keep_does_not():
    for start in ("keep", "shift"):
        layer = nn.Linear(6, 4)
        before = layer.weight.detach().clone()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
        handle = attach_syre(optimizer, start=start, named_parameters=layer.named_parameters())
        moved = handle.offset(layer.weight) if start == "shift" else 0
        assert torch.equal(layer.weight, before + moved)


def test_remove_gives_the_optimizer_back():
    net, x, y = problem(torch.float32)
    bare = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    attach_syre(optimizer, sigma=0.3).remove()
    F.mse_loss(net(x), y).backward()
    optimizer.step()
    plain = torch.optim.SGD(bare.parameters(), lr=0.1, weight_decay=0.1)
    F.mse_loss(bare(x), y).backward()
    plain.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), bare.parameters(), strict=True))
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_step_skipped_by_the_scaler_leaves_the_weights():
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5, fused=True)
    attach_syre(optimizer, sigma=0.5, named_parameters=layer.named_parameters())
    for p in layer.parameters():
        p.grad = torch.full_like(p, float("inf"))
    before = [p.detach().clone() for p in layer.parameters()]
    # What a GradScaler sets on a fused optimizer whose gradients overflowed.
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": -1.0}, "sigma.*-1"),
        ({"anisotropy": 1.0}, "anisotropy.*1"),
        ({"start": "jump"}, "start.*jump"),
        ({"named_parameters": []}, "named_parameters lacks 2"),
    ],
)
def test_bad_arguments(settings, message):
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match=message):
        attach_syre(optimizer, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 0.5}, "seed.*0.5"),
        ({"named_parameters": nn.Linear(2, 2)}, "named_parameters.*got the module"),
        ({"named_parameters": nn.Linear(2, 2).parameters()}, "named_parameters.*got a Parameter"),
    ],
)
def test_arguments_of_a_wrong_type(settings, message):
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(TypeError, match=message):
        attach_syre(optimizer, **settings)
    assert not optimizer._optimizer_step_pre_hooks
    with pytest.raises(TypeError, match=r"optimizer.*got Linear"):
        attach_syre(nn.Linear(2, 2))


def test_lightnings_wrapper_is_looked_into():
    layer = nn.Linear(2, 2)
    wrapper = LightningOptimizer(torch.optim.AdamW(layer.parameters(), weight_decay=0.1))
    assert attach_syre(wrapper)._route == "native"
    with pytest.raises(ValueError, match="attached to this optimizer already"):
        attach_syre(wrapper.optimizer)


@pytest.mark.parametrize(
    "settings", [{"sigma": -1.0}, {"sigma": torch.inf}, {"anisotropy": 2.0}, {"start": "no"}]
)
def test_the_callback_refuses_at_once(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Syre(**settings)
    with pytest.raises(TypeError, match="seed"):
        Syre(seed="zero")


def test_it_warns_where_it_can_do_nothing_and_where_it_harms():
    layer = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match="syre does nothing"):
        attach_syre(torch.optim.SGD(layer.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match=r"larger than the weights of weight"):
        attach_syre(
            torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1),
            sigma=50.0,
            named_parameters=layer.named_parameters(),
        )
    with pytest.warns(UserWarning, match=r"lost to rounding.* of 0\.0; keep"):
        attach_syre(torch.optim.SGD(nn.Linear(4, 4).bfloat16().parameters(), lr=0.1, weight_decay=0.1))


class Manual(Classifier):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize("kind", [Classifier, Manual])
@pytest.mark.parametrize("name", ["adamw", "nesterov"])
def test_the_callback_in_automatic_and_manual_optimization(kind, name):
    optimizer, settings = OPTIMIZERS[name]
    torch.manual_seed(0)
    model: LightningModule = kind(flat_net().double(), optimizer=optimizer, **settings)
    twin = copy.deepcopy(model.net)
    syre = Syre(sigma=0.5, seed=4)
    loader = images()
    loader.dataset.tensors = (loader.dataset.tensors[0].double(), loader.dataset.tensors[1])
    trainer(max_epochs=3, callbacks=[syre]).fit(model, loader)
    handle = syre.handles[0]
    offsets = {n.removeprefix("net."): v for n, v in handle.offsets().items()}
    theta = {n: nn.Parameter(p.detach() - offsets.get(n, 0)) for n, p in twin.named_parameters()}
    reference = optimizer(theta.values(), **settings)
    for _ in range(3):
        for x, y in loader:
            phi = {n: p + offsets.get(n, 0) for n, p in theta.items()}
            reference.zero_grad()
            F.cross_entropy(functional_call(twin, phi, (x,)), y).backward()
            reference.step()
    for n, p in model.net.named_parameters():
        assert torch.allclose(p, theta[n] + offsets.get(n, 0), rtol=1e-10, atol=1e-12)


def flat_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), *mlp(64, 8, 4))


def test_a_resumed_run_continues_bitwise_and_another_seed_is_refused(tmp_path):
    def run(epochs, syre, path=None):
        torch.manual_seed(0)
        keep = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
        model = Classifier(flat_net(), optimizer=torch.optim.AdamW, weight_decay=0.3)
        fit = trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=[syre, keep])
        fit.fit(model, images(), ckpt_path=path)
        return model, keep.last_model_path

    unbroken, _ = run(4, Syre(sigma=0.2, start="shift"))
    _, path = run(2, Syre(sigma=0.2, start="shift"))
    resumed, _ = run(4, Syre(sigma=0.2, start="shift"), path)
    for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    stored = torch.load(path, weights_only=True)
    assert not any(isinstance(v, Tensor) for v in stored["callbacks"]["Syre"].values())
    with pytest.raises(ValueError, match=r"seed=1.*seed=0"):
        run(4, Syre(sigma=0.2, start="shift", seed=1), path)


def test_the_force_at_a_mirror_is_decay_times_the_offset_across_it():
    """Equal units of a hidden layer: the force that parts two of them, by hand."""
    from lightning_sym.symmetry import Action, Permutation

    net = mlp(4, 3, 2).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.3)
    handle = attach_syre(optimizer, sigma=0.2, named_parameters=net.named_parameters())
    index = torch.arange(3).reshape(1, 3, 1)
    actions = (Action("0.weight", 0, index), Action("0.bias", 0, index), Action("2.weight", 1, index))
    symmetry = Permutation(actions=actions)
    force = handle.residual_force([symmetry])[symmetry]
    offsets = handle.offsets()
    units = torch.cat([offsets["0.weight"], offsets["2.weight"].T], dim=1)  # the bias has no offset
    for unit, found in enumerate(force.flatten().tolist()):
        apart = [
            0.3 * float((units[unit] - units[other]).norm()) / 2**0.5 for other in range(3) if other != unit
        ]
        assert found == pytest.approx(min(apart), rel=1e-9)
