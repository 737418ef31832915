"""How far a copy learns random targets, against a loop over its own copies; nothing of the module changes."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_sym.engine.batch import Arguments
from lightning_sym.engine.trainability import trainability
from lightning_sym.sandbox import Sandbox


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


X = torch.linspace(-1, 1, 40).reshape(10, 4)


def slow_progress(module, x, *, steps, lr, seed):
    """Adam by its formulas, in float64."""
    module = copy.deepcopy(module).double()
    x = x.double()
    noise = torch.randn(10, 3, generator=torch.Generator().manual_seed(seed)).double()
    target = module(x).detach() + noise
    parameters = list(module.parameters())
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    losses = []
    for t in range(1, steps + 2):
        loss = ((module(x) - target) ** 2).mean()
        losses.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
                first[i] = 0.9 * first[i] + 0.1 * g
                second[i] = 0.999 * second[i] + 0.001 * g * g
                p -= lr * (first[i] / (1 - 0.9**t)) / ((second[i] / (1 - 0.999**t)).sqrt() + 1e-8)
    return 1 - losses[-1] / losses[0]


def slow(module, *, steps, lr, seed):
    fresh = copy.deepcopy(module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in (fresh[0], fresh[2]):
            layer.reset_parameters()
    options = {"steps": steps, "lr": lr, "seed": seed}
    return slow_progress(module, X, **options) / slow_progress(fresh, X, **options)


@pytest.mark.parametrize("seed", [0, 5])
def test_it_is_what_a_loop_in_float64_gives(seed):
    module = network()
    with torch.no_grad():
        module[0].weight.mul_(0.2)
    found = trainability(Sandbox(module), Arguments((X,)), steps=20, lr=0.01, seed=seed)
    assert found == pytest.approx(slow(module, steps=20, lr=0.01, seed=seed), rel=1e-4)
    assert found != pytest.approx(1, abs=1e-3)


def test_dead_units_learn_less():
    module = network()
    with torch.no_grad():
        module[0].bias.fill_(-100)
    assert 0 < trainability(Sandbox(module), Arguments((X,)), steps=30, lr=0.01) < 0.5


def test_nothing_changes_and_it_repeats():
    module = nn.Sequential(network(), nn.BatchNorm1d(3), nn.Dropout(0.5))
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x, state = X.clone(), torch.get_rng_state()
    first = trainability(Sandbox(module), Arguments((x,)), steps=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert trainability(Sandbox(module), Arguments((x,)), steps=3) == first
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.training
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(x, X)


def test_compiled_parts_are_drawn_anew_once():
    wrapped = network()
    wrapped[0] = torch.compile(wrapped[0], backend="eager")
    plain = trainability(Sandbox(network()), Arguments((X,)), steps=5)
    assert trainability(Sandbox(wrapped), Arguments((X,)), steps=5) == plain


def test_other_forwards_and_named_arguments():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x, *, scale):
            return self.net(x) * scale

        def encode(self, x):
            return self.net(x)

    sandbox = Sandbox(Encoder())
    plain = trainability(Sandbox(network()), Arguments((X,)), steps=5)
    ways = [
        trainability(sandbox, Arguments((X,), {"scale": torch.ones(3)}), steps=5),
        trainability(sandbox, Arguments((X,)), forward="encode", steps=5),
        trainability(sandbox, Arguments((X,)), forward=lambda module, x: module.net(x), steps=5),
    ]
    assert ways == [plain] * 3


def test_half_modules_are_trained_in_full_precision():
    module = network().bfloat16()
    found = trainability(Sandbox(module), Arguments((X,)), steps=5)
    assert found == trainability(Sandbox(copy.deepcopy(module).float()), Arguments((X,)), steps=5)
    assert module[0].weight.dtype == torch.bfloat16


def test_what_cannot_be_trained_is_said():
    with pytest.raises(TypeError, match="trainability_steps=0"):
        trainability(Sandbox(nn.LSTM(4, 3)), Arguments((X,)), steps=1)
    with pytest.raises(ValueError, match="steps must"):
        trainability(Sandbox(network()), Arguments((X,)), steps=0)
    with pytest.raises(ValueError, match="found none"):
        trainability(Sandbox(network().requires_grad_(False)), Arguments((X,)), steps=1)


def test_a_twin_that_cannot_learn_is_nan():
    class Still(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.weight * 0 + x[:, :3]

    value = trainability(Sandbox(Still()), Arguments((X,)), steps=2)
    assert value != value


def test_no_hook_for_all_optimizers_sees_it():
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    seen = []
    handles = [
        register(lambda *_: seen.append(1))
        for register in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook)
    ]
    try:
        trainability(Sandbox(network()), Arguments((X,)), steps=2)
    finally:
        for handle in handles:
            handle.remove()
    assert not seen


def test_reentrant_checkpoints_and_parameters_that_are_not_used():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.spare = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(2, 2)

        def forward(self, x):
            h = self.first(x)
            return checkpoint(self.second, h, use_reentrant=True) if self.again else self.second(h)

    found = []
    for again in (False, True):
        torch.manual_seed(0)
        module = Net()
        module.again = again
        found.append(trainability(Sandbox(module), Arguments((X,)), steps=3, lr=0.01))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
