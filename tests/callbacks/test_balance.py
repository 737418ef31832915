"""BalanceMonitor against single samples, the exact step and the law over many; ranks, resumption, silence."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import BalanceMonitor, CollapseMonitor, Syre
from lightning_sym.papers.law_of_balance import DiagonalLinearNetwork
from tests.models import Classifier, Flatten, SelfAttention, convnet, images, mlp, trainer

ETA, DECAY = 0.1, 0.3


def data(n=24, seed=0, shape=(4,)):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=generator)


def fit(module, *callbacks, pairs=None, batch_size=8, ckpt_path=None, **options):
    run = trainer(callbacks=list(callbacks), **{"max_epochs": 2, **options})
    run.fit(module, DataLoader(TensorDataset(*(pairs or data())), batch_size), ckpt_path=ckpt_path)
    return run


def classifier(net, **settings):
    return Classifier(net.double(), **{"lr": ETA, **settings})


def relu(*, seed=0):
    torch.manual_seed(seed)
    return mlp(4, 9, 7, 3, act=nn.ReLU)


def watch(**options):
    return BalanceMonitor(**{"every_n_steps": 1, "strict": True, "details": True, **options})


def single_gradients(net, x, y):
    """Return each parameter's gradient on each sample alone, ``{name: [N, ...]}``."""
    rows = []
    for n in range(len(x)):
        net.zero_grad()
        nn.functional.cross_entropy(net(x[n : n + 1]), y[n : n + 1]).backward()
        rows.append({name: p.grad.clone() for name, p in net.named_parameters()})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def trace(gradients, unit, dim):
    """Return the trace of the covariance of the gradients of one unit's slice."""
    total, n = 0.0, len(gradients)
    rows = [g.select(dim, unit).flatten() for g in gradients]
    for entry in range(len(rows[0])):
        values = [float(row[entry]) for row in rows]
        mean = sum(values) / n
        total += sum((v - mean) ** 2 for v in values) / (n - 1)
    return total


def test_readings_are_those_of_single_samples():
    net, (x, y) = relu(), data(8)
    module, before = classifier(net, weight_decay=DECAY), copy.deepcopy(net).double()
    monitor = watch()
    fit(module, monitor, pairs=(x, y), max_steps=1)
    row, gradients = monitor.history[-1], single_gradients(before, x, y)
    old, new = dict(before.named_parameters()), dict(module.net.named_parameters())
    imbalances = []
    for first, second in (("0", "2"), ("2", "4")):
        noise = {"in": 0.0, "out": 0.0}
        norms = {"in": [], "out": []}
        charge_before = 0.0
        for unit in range(len(old[f"{first}.weight"])):
            noise["in"] += trace(gradients[f"{first}.weight"], unit, 0)
            noise["in"] += trace(gradients[f"{first}.bias"], unit, 0)
            noise["out"] += trace(gradients[f"{second}.weight"], unit, 1)
            for tensors, norm in ((new, norms), (old, None)):
                into = tensors[f"{first}.weight"][unit].square().sum().item()
                into += tensors[f"{first}.bias"][unit].item() ** 2
                out = tensors[f"{second}.weight"][:, unit].square().sum().item()
                if norm is None:
                    charge_before += into - out
                else:
                    norm["in"].append(into)
                    norm["out"].append(out)
        charge = sum(norms["in"]) - sum(norms["out"])
        law = ETA**2 / 8 * (noise["in"] - noise["out"]) - 2 * ETA * DECAY * charge_before
        charges = [a - b for a, b in zip(norms["in"], norms["out"], strict=True)]
        sums = [a + b for a, b in zip(norms["in"], norms["out"], strict=True)]
        imbalances.append(math.hypot(*charges) / math.hypot(*sums))
        expected = {
            "charge": charge,
            "flow": charge - charge_before,
            "step_flow": charge - charge_before,
            "imbalance": imbalances[-1],
            "norm_in": sum(norms["in"]),
            "norm_out": sum(norms["out"]),
            "noise_in": noise["in"],
            "noise_out": noise["out"],
            "noise_ratio": noise["in"] / noise["out"],
            "predicted_flow": law,
            "step_predicted": law,
            "step_discretisation": charge - charge_before - law,
        }
        for what, value in expected.items():
            assert row[f"balance/net.{first}/rescaling/{what}"] == pytest.approx(value), what
    assert row["balance/imbalance"] == pytest.approx(sum(imbalances) / 2)


def test_a_rotation_is_read_as_its_matrix():
    torch.manual_seed(1)
    net, (x, y) = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3)), data(8)
    module, before = classifier(net), copy.deepcopy(net).double()
    monitor = watch()
    fit(module, monitor, pairs=(x, y), max_steps=1)
    row, gradients = monitor.history[-1], single_gradients(before, x, y)
    w, u = module.net[0].weight.detach(), module.net[1].weight.detach()
    charge, whole = w @ w.T - u.T @ u, w @ w.T + u.T @ u
    at = "balance/net.0/rotation"
    assert row[f"{at}/charge"] == pytest.approx(float(charge.trace()))
    assert row[f"{at}/imbalance"] == pytest.approx(float(charge.norm() / whole.norm()))
    noise_in = sum(trace(gradients["0.weight"], i, 0) for i in range(5))
    noise_out = sum(trace(gradients["1.weight"], i, 1) for i in range(5))
    assert row[f"{at}/noise_ratio"] == pytest.approx(noise_in / noise_out)
    assert row[f"{at}/step_error"] < 1e-9  # of the whole matrix
    assert not any("rescaling" in key for key in row)


def grouped():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, groups=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 9, 6),
        nn.ReLU(),
        nn.Linear(6, 3),
    )


CASES = {
    "relu": (relu, (4,), 2),
    "convolutions": (grouped, (1, 8, 8), 4),
    "attention": (
        lambda: nn.Sequential(nn.Linear(4, 8), SelfAttention(8, 2), Flatten(), nn.Linear(8, 3)),
        (5, 4),
        4,
    ),
    "gains": (
        lambda: nn.Sequential(
            nn.Linear(4, 8),
            nn.LayerNorm(8, eps=1e-30),
            nn.Linear(8, 6),
            nn.GroupNorm(2, 6, eps=1e-30),
            nn.ReLU(),
            nn.Linear(6, 3),
        ),
        (4,),
        6,
    ),
    "layer norm": (
        lambda: nn.Sequential(
            nn.Linear(4, 8), nn.LayerNorm(8, eps=1e-30, elementwise_affine=False), nn.Linear(8, 3)
        ),
        (4,),
        1,
    ),
}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_explained_to_the_last_digit(name, accumulate):
    build, shape, count = CASES[name]
    torch.manual_seed(0)
    monitor = watch()
    module = classifier(build(), weight_decay=DECAY)
    fit(module, monitor, pairs=data(shape=shape), accumulate_grad_batches=accumulate)
    for row in monitor.history:
        errors = [value for key, value in row.items() if key.endswith("step_error")]
        assert len(errors) == count
        assert max(errors) < 1e-8
        for key in [key for key in row if key.endswith("step_flow")]:
            at = key.removesuffix("step_flow")
            parts = row[f"{at}step_predicted"] + row[f"{at}step_discretisation"]
            assert parts == pytest.approx(row[key], rel=1e-6, abs=1e-12)


def test_flows_are_those_since_the_last_reading():
    dense, sparse = watch(details=False), watch(details=False, every_n_steps=4)
    fit(classifier(relu(), weight_decay=0.1), dense, sparse, max_epochs=3)
    at = "balance/net.0/rescaling"
    assert [row["step"] for row in sparse.history] == [1, 4, 8]
    flows = [row[f"{at}/flow"] for row in dense.history]
    assert sparse.history[2][f"{at}/flow"] == pytest.approx(sum(flows[4:8]) / 4)
    laws = [row[f"{at}/predicted_flow"] for row in dense.history]
    assert laws[1] != laws[0]
    assert sparse.history[1].keys() == dense.history[1].keys()
    assert set(sparse.history[0]) == {
        "step",
        "fit",
        "balance/imbalance",
        *(
            f"balance/net.{i}/rescaling/{what}"
            for i in (0, 2)
            for what in ("charge", "flow", "imbalance", "noise_ratio", "predicted_flow")
        ),
    }


class Linear(Classifier):
    """Two linear layers that have learned y = x but for its noise, out of balance."""

    def __init__(self, *, width=8, **settings):
        layers = [nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)]
        super().__init__(nn.Sequential(*layers).double(), **settings)
        with torch.no_grad():
            for layer, size in zip(layers, (1.3, 1 / 1.3), strict=True):
                layer.weight.copy_(size * torch.eye(width))

    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - batch[1]).square().sum(1).mean()


def noisy_identity(n, width=8):
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, n, width, generator=generator, dtype=torch.float64)
    return x, x + noise


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_the_law_holds_over_many_steps(momentum):
    rate = 0.004
    settings = {"momentum": 0.8, "dampening": 0.3, "lr": rate * 0.2 / 0.7} if momentum else {"lr": rate}
    monitor = watch(every_n_steps=2)
    fit(Linear(**settings), monitor, pairs=noisy_identity(1500), batch_size=10, max_epochs=1)
    rows, at = monitor.history[10:], "balance/net.0/rotation"
    flow = sum(row[f"{at}/flow"] for row in rows)
    law = sum(row[f"{at}/predicted_flow"] for row in rows)
    assert law == pytest.approx(flow, rel=0.1)
    assert (f"{at}/step_error" in rows[0]) == (not momentum)
    # The closed form, at the first step's point: |G|^2 of the two layers of a mean of 10.
    scatter = 4 * 8 * 8 / 10  # per entry of the product's gradient 2 x e: 4
    expected = rate**2 * scatter * (1 / 1.3**2 - 1.3**2)
    assert law / len(rows) == pytest.approx(expected, rel=0.15)


def test_gradient_descent_conserves_and_is_predicted_to():
    x = torch.linspace(-2, 2, 16, dtype=torch.float64)
    module = DiagonalLinearNetwork(3, start=0.9, imbalance=1.0, lr=1e-3)
    monitor = watch(every_n_steps=20, population=16)
    fit(module, monitor, pairs=(x, x + 0.3 * x.sin()), batch_size=16, max_epochs=60)
    rows = monitor.history
    for i in range(3):
        at = f"balance/factors.{i}/rescaling"
        assert all(row[f"{at}/predicted_flow"] == 0 for row in rows)
        assert rows[-1][f"{at}/charge"] == pytest.approx(rows[0][f"{at}/charge"], rel=1e-3)
        assert max(row[f"{at}/step_error"] for row in rows) < 1e-6


class Normalised(nn.Module):
    """A linear map whose weight's length has no effect."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3, bias=False)
        self.norm = nn.LayerNorm(3, eps=1e-30, elementwise_affine=False)

    def forward(self, x):
        return self.norm(self.layer(x))


def test_a_norm_does_not_flow_where_noise_and_decay_cancel():
    torch.manual_seed(0)
    at, settings, pairs = "balance/net.layer/scale", {"weight_decay": 0.05}, data(8, shape=(6,))
    net = Normalised().double()
    moved = copy.deepcopy(net)
    start, monitor = float(net.layer.weight.detach().square().sum()), watch()
    fit(Classifier(net, **settings), monitor, pairs=pairs, max_steps=1)
    row = monitor.history[0]
    settled = (start * 0.05 * row[f"{at}/noise_in"] / (2 * 0.05 * 8)) ** 0.5
    assert row[f"{at}/equilibrium"] == pytest.approx(settled)
    assert abs(row[f"{at}/predicted_flow"]) > 1e-4
    with torch.no_grad():
        moved.layer.weight.mul_((settled / start) ** 0.5)
    fit(Classifier(moved, **settings), monitor := watch(), pairs=pairs, max_steps=1)
    row = monitor.history[0]
    assert row[f"{at}/equilibrium"] == pytest.approx(settled)
    assert row[f"{at}/predicted_flow"] == pytest.approx(0, abs=1e-12)
    # With the noise of this norm it is the law's own formula.
    assert row[f"{at}/noise_in"] * 0.05 / (2 * 0.05 * 8) == pytest.approx(settled)
    fit(Classifier(Normalised().double()), monitor := watch(), pairs=pairs, max_steps=1)
    assert monitor.history[0][f"{at}/equilibrium"] == math.inf


@pytest.mark.parametrize(
    ("settings", "options", "callbacks", "why"),
    [
        ({"optimizer": torch.optim.AdamW}, {}, [], "AdamW is not torch.optim.SGD"),
        ({}, {"gradient_clip_val": 0.1}, [], "gradients are clipped"),
        ({"weight_decay": 0.1}, {}, [Syre], "syre changes the decay"),
        ({"maximize": True}, {}, [], "the loss is maximized"),
    ],
)
def test_where_nothing_is_predicted_charges_and_noise_are_read(settings, options, callbacks, why):
    monitor = watch()
    extra = [kind() for kind in callbacks]
    fit(classifier(relu(), **{"lr": 1e-3, **settings}), monitor, *extra, max_epochs=1, **options)
    assert monitor.unpredicted == why
    row = monitor.history[-1]
    assert row["balance/net.0/rescaling/noise_ratio"] > 0
    assert row["balance/net.0/rescaling/flow"] != 0
    assert not any("predicted" in key or "step_error" in key for key in row)


def test_steps_made_by_hand_are_not_predicted():
    class Manual(Classifier):
        def __init__(self, net):
            super().__init__(net)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    monitor = watch()
    fit(Manual(relu().double()), monitor)
    assert monitor.unpredicted == "there is not one optimizer under automatic optimization"
    assert monitor.history[-1]["balance/net.0/rescaling/noise_ratio"] > 0


def test_two_learning_rates_conserve_nothing_and_are_not_predicted():
    class Two(Classifier):
        def configure_optimizers(self):
            first, rest = [*self.net[0].parameters()], [*self.net[2].parameters(), *self.net[4].parameters()]
            return torch.optim.SGD([{"params": first, "lr": 0.1}, {"params": rest, "lr": 0.2}], lr=0.1)

    monitor = watch()
    fit(Two(relu().double()), monitor)
    row = monitor.history[-1]
    assert "balance/net.0/rescaling/predicted_flow" not in row
    assert row["balance/net.2/rescaling/step_error"] < 1e-8


def test_batch_norms_gains_are_read_and_explain_the_step():
    monitor = watch()
    fit(Classifier(convnet().double()), monitor, pairs=data(shape=(1, 8, 8)))
    row = monitor.history[-1]
    for key in ("net.1/rescaling", "net.1/rescaling_2", "net.3/rescaling", "net.7/rescaling"):
        assert row[f"balance/{key}/noise_ratio"] > 0
        assert row[f"balance/{key}/step_error"] < 1e-8
    assert row["balance/net.0/scale/step_error"] < 1e-2  # up to the normalisation's eps


class Scaled(nn.Module):
    """A parameter of its own on the way."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.last(torch.relu(self.first(x)) * self.scale)


def test_sides_that_are_not_observed_have_no_noise():
    monitor = watch()
    fit(classifier(Scaled()), monitor)
    row = monitor.history[-1]
    assert sum(key.endswith("/charge") for key in row) == 2
    assert not any("noise_ratio" in key or "predicted" in key for key in row)

    net = nn.Sequential(nn.Embedding(5, 6), Flatten(), nn.Linear(6, 3))
    words = torch.randint(0, 5, (16, 4), generator=torch.Generator().manual_seed(0))
    monitor = watch()
    fit(classifier(net), monitor, pairs=(words, data(16)[1]))
    assert "balance/net.0/rotation/charge" in monitor.history[-1]
    assert monitor.unread == {"net.0": "its input is an index"}

    net = relu()
    net[2] = nn.Linear(9, 9)
    net[4] = nn.Linear(9, 9)
    net[4].weight = net[2].weight  # tied
    monitor = watch()
    fit(classifier(net), monitor)
    assert not any("noise" in key for key in monitor.history[-1] if "net.2" in key)
    net = relu()
    net[0].requires_grad_(False)
    monitor = watch()
    fit(classifier(net), monitor)
    assert {key.split("/")[1] for key in monitor.history[-1] if "rescaling" in key} == {"net.2"}


def test_layers_are_chosen():
    for options, expected in (
        ({"layers": "net.2"}, {"net.2"}),
        ({"max_layers": 1}, {"net.2"}),
        ({"layers": ["net.0", "net.2"]}, {"net.0", "net.2"}),
        ({"layers": "net.4"}, set()),
    ):
        monitor = watch(**options)
        fit(classifier(relu()), monitor, max_steps=1)
        assert {key.split("/")[1] for key in monitor.history[0] if "rescaling" in key} == expected


def test_a_run_with_the_monitor_is_bitwise_the_run_without():
    states = []
    for callbacks in ([], [watch(), CollapseMonitor(every_n_steps=1, strict=True)]):
        torch.manual_seed(0)
        module = Classifier(convnet(), momentum=0.9, weight_decay=0.01)
        trainer(callbacks=callbacks, max_epochs=3).fit(module, images(shuffle=True))
        state = [*module.state_dict().values(), *module.losses]
        state += [p.grad for p in module.parameters() if p.grad is not None]
        states.append((state, torch.get_rng_state()))
        assert all(not m._forward_hooks and not m._backward_hooks for m in module.modules())
        if callbacks:
            assert callbacks[0]._tracks is None
    assert torch.equal(states[0][1], states[1][1])
    assert all(torch.equal(a, b) for a, b in zip(states[0][0], states[1][0], strict=True))


def test_resuming_goes_on_with_the_last_reading(tmp_path):
    whole = watch(every_n_steps=4)
    fit(classifier(relu(), weight_decay=0.1), whole, max_epochs=4)
    first = watch(every_n_steps=4)
    fit(classifier(relu(), weight_decay=0.1), first, max_epochs=2).save_checkpoint(tmp_path / "c.ckpt")
    second = watch(every_n_steps=4)
    fit(classifier(relu(), weight_decay=0.1), second, max_epochs=4, ckpt_path=tmp_path / "c.ckpt")
    assert second.history == whole.history
    fit(classifier(relu(), weight_decay=0.1), second, max_epochs=1)  # a run of its own
    assert second.history[-1] == whole.history[0] | {"fit": 2}


def test_two_ranks_read_what_one_reads(tmp_path):
    class Dump(BalanceMonitor):
        def on_train_end(self, trainer, pl_module):
            file = tmp_path / f"{trainer.world_size}-{trainer.global_rank}.json"
            file.write_text(json.dumps(self.history))

    options = {"every_n_steps": 1, "strict": True, "details": True}
    pairs = data(16)
    fit(classifier(relu()), Dump(**options), pairs=pairs, batch_size=16, max_epochs=3)
    two = {"devices": 2, "strategy": "ddp_fork"}
    fit(classifier(relu()), Dump(**options), pairs=pairs, batch_size=8, max_epochs=3, **two)
    one, a, b = (json.loads((tmp_path / name).read_text()) for name in ("1-0.json", "2-0.json", "2-1.json"))
    assert a == b
    for row, expected in zip(a, one, strict=True):
        assert row.keys() == expected.keys()
        assert row == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_faults_are_one_warning_and_bad_input_is_named():
    with pytest.raises(ValueError, match="population must be at least 2, got 1"):
        BalanceMonitor(population=1)
    with pytest.raises(ValueError, match=r"layers='net\.9' matches no layer"):
        fit(classifier(relu()), BalanceMonitor(layers="net.9"))
    with pytest.raises(ValueError, match="inputs='image' is not in the batch"):
        fit(classifier(relu()), BalanceMonitor(inputs="image"))
    monitor = BalanceMonitor(inputs=lambda batch: batch[7], every_n_steps=1)
    with pytest.warns(UserWarning, match=r"BalanceMonitor failed in prepare at step 0.*IndexError"):
        fit(classifier(relu()), monitor)
    assert all(set(row) == {"step", "fit"} for row in monitor.history)


def test_it_is_built_from_plain_values():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(BalanceMonitor, "monitor")
    config = parser.parse_args(["--monitor.every_n_steps=7", "--monitor.population=100"])
    assert parser.instantiate(config).monitor.population == 100
