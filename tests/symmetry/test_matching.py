"""Aligning networks: a network after a random element is found exactly, and a function never changes."""

from __future__ import annotations

import copy
import itertools
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sym.symmetry import find_symmetries, loss_barrier, match
from lightning_sym.symmetry._assignment import assign, augmented
from lightning_sym.symmetry._features import _features
from lightning_sym.symmetry._gauge import balance
from tests.symmetry.test_architectures import IDS, GPTBlock, Last, SwiGLU, draw

KINDS = ("permutation", "signflip", "rescaling")


def seeded(make, seed: int = 0) -> nn.Module:
    """Return a network whose biases and gains are generic, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1 and tensor.is_floating_point():
                noise = 0.1 * torch.randn_like(tensor)
                tensor.copy_(tensor * noise.exp() if "running_var" in name else tensor + noise)
        return model.eval()


def mlp(*widths: int, act: type[nn.Module]) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


class Residual(nn.Module):
    """Two blocks on a stream of channels, as residual networks have."""

    def __init__(self, norm: type[nn.Module] | None = nn.BatchNorm2d) -> None:
        super().__init__()

        def after(width: int) -> nn.Module:
            return nn.Identity() if norm is None else norm(width)

        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), after(8))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 6, 3, padding=1), after(6), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), after(8)
            )
            for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((2, 3)))


def grouped(act: type[nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), act(), nn.Conv2d(8, 12, 3, groups=4), act(), nn.Conv2d(12, 5, 1), nn.Flatten()
    )


class Tied(nn.Module):
    """A stream that one matrix meets on both sides, and a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.head(h + F.gelu(self.inner(h)))


CASES = {
    "relu": (lambda: mlp(5, 8, 7, 6, 3, act=nn.ReLU), draw(40, 5)),
    "tanh": (lambda: mlp(5, 8, 7, 6, 3, act=nn.Tanh), draw(40, 5)),
    "residual with batch norm": (Residual, draw(6, 3, 6, 6)),
    "residual": (lambda: Residual(None), draw(6, 3, 6, 6)),
    "grouped relu": (lambda: grouped(nn.ReLU), draw(6, 3, 6, 6)),
    "grouped tanh": (lambda: grouped(nn.Tanh), draw(6, 3, 6, 6)),
    "transformer": (GPTBlock, IDS),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), draw(12, 5, 8)),
    "gated": (SwiGLU, draw(16, 5, 5)),
    "recurrent": (lambda: Last(nn.LSTM), draw(12, 5, 4)),
    "tied": (Tied, IDS),
}


def scrambled(model: nn.Module, x: Tensor, *, seed: int, kinds=KINDS) -> tuple[nn.Module, list[str]]:
    """Return a network after a random element of every symmetry, and their kinds."""
    twin = copy.deepcopy(model).double()
    found = find_symmetries(twin, x.double() if x.is_floating_point() else x, kinds=kinds)
    for number, symmetry in enumerate(found):
        symmetry.transform(symmetry.random_element(100 * seed + number))
    return twin, [s.kind for s in found]


@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("name", CASES)
def test_a_network_after_a_random_element_is_found_exactly(name, by):
    make, x = CASES[name]
    a = seeded(make).double()
    b, kinds = scrambled(a, x, seed=1)
    assert kinds
    kept = {n: p.clone() for n, p in b.state_dict().items()}
    found = match(a, b, x, by=by)
    assert found.before > 0.5
    assert found.after < 1e-9
    assert found.error < 1e-12
    for n, value in a.state_dict().items():
        torch.testing.assert_close(found.tensors[n], value, rtol=1e-9, atol=1e-10)
    # The elements, applied one by one, are the way there.
    assert all(torch.equal(p, kept[n]) for n, p in b.state_dict().items())
    for symmetry, element in found.elements:
        symmetry.transform(element)
    for n, value in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[n], value, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("name", CASES)
def test_networks_drawn_apart_come_nearer_and_keep_their_function(name, by):
    make, x = CASES[name]
    a, b = seeded(make, 0), seeded(make, 1)
    found = match(a, b, x, by=by)
    x = x.to(next(a.parameters()).dtype) if x.is_floating_point() else x
    with torch.no_grad():
        before = b(x)
        twin = copy.deepcopy(b)
        found.load_into(twin)
        torch.testing.assert_close(twin(x), before, rtol=1e-4, atol=1e-5)
        pairs = zip(a.parameters(), twin.parameters(), strict=True)
        gap = torch.stack([(p - q).square().sum() for p, q in pairs])
    assert float(gap.double().sum().sqrt()) == pytest.approx(found.after, rel=1e-4)
    if by == "weights":
        assert found.after < found.before
    assert all(tensor.dtype == b.state_dict()[n].dtype for n, tensor in found.tensors.items())


def test_an_alignment_needs_no_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    make, x = CASES["tanh"]
    a = seeded(make).double()
    b, _ = scrambled(a, x, seed=1)
    assert match(a, b, x).after < 1e-9


def test_activations_do_not_turn_the_sign_of_a_normalisations_gain():
    """The gain makes up for what goes in: outputs do not tell of that sign, and weights do."""
    make, x = CASES["residual with batch norm"]
    for seed in (1, 2, 3):
        found = match(seeded(make, 0), seeded(make, seed), x, by="activations")
        for name in ("stem.1", "blocks.0.1", "blocks.0.4", "blocks.1.1", "blocks.1.4"):
            assert bool((found.tensors[f"{name}.weight"] > 0).all())


def test_features_are_those_of_deviations():
    rows = draw(20, 6).double()
    for width in (1, 2):
        index = torch.arange(6).reshape(1, 6 // width, width)
        shifted = _features(3 * rows + 100, index)
        torch.testing.assert_close(shifted, _features(rows, index))
        torch.testing.assert_close(shifted.norm(dim=2), torch.ones(1, 6 // width).double())


@torch.no_grad()
def test_it_is_the_best_of_all_orders_and_signs():
    """Every order and sign of three hidden units, tried one by one."""
    a, b = (seeded(lambda: mlp(4, 3, 2, act=nn.Tanh), seed).double() for seed in (3, 4))
    least = torch.inf
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            s = torch.tensor(signs).double()
            own = (
                s[:, None] * b[0].weight[list(order)],
                s * b[0].bias[list(order)],
                b[2].weight[:, list(order)] * s,
            )
            goal = (a[0].weight, a[0].bias, a[2].weight)
            gap = sum(float((p - q).square().sum()) for p, q in zip(own, goal, strict=True))
            least = min(least, gap + float((a[2].bias - b[2].bias).square().sum()))
    assert match(a, b, draw(5, 4)).after == pytest.approx(least**0.5, rel=1e-9)


@torch.no_grad()
def test_factors_come_as_near_as_they_can():
    """One hidden layer: after the match no factor of any unit brings it nearer."""
    a, b = (seeded(lambda: mlp(4, 5, 2, act=nn.ReLU), seed).double() for seed in (3, 4))
    found = match(a, b, draw(5, 4))
    w, bias, out = (found.tensors[n] for n in ("0.weight", "0.bias", "2.weight"))
    for unit in range(5):

        def gap(factor: float, u: int = unit) -> float:
            return float(
                (a[0].weight[u] - factor * w[u]).square().sum()
                + (a[0].bias[u] - factor * bias[u]).square()
                + (a[2].weight[:, u] - out[:, u] / factor).square().sum()
            )

        assert all(gap(1.0) <= gap(factor) + 1e-12 for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0))


def test_kinds_and_symmetries_can_be_chosen():
    make, x = CASES["relu"]
    a = seeded(make).double()
    b, _ = scrambled(a, x, seed=1, kinds=["permutation"])
    found = match(a, b, x, kinds=["permutation"])
    assert found.after == 0
    assert {symmetry.kind for symmetry, _ in found.elements} == {"permutation"}
    assert match(a, b, x, kinds=["rescaling"]).after > 0.5
    known = find_symmetries(a, x)
    assert match(a, b, x, symmetries=known).after < 1e-9
    assert match(a, b, x, symmetries=[]).elements == []
    assert match(a, a, x).after == 0


def test_units_without_incoming_or_outgoing_weights_are_no_hindrance():
    a = seeded(CASES["relu"][0]).double()
    with torch.no_grad():
        a[0].weight[0], a[0].bias[0], a[2].weight[:, 1] = 0.0, 0.0, 0.0
    b, _ = scrambled(a, CASES["relu"][1], seed=1, kinds=["permutation"])
    found = match(a, b, CASES["relu"][1])
    assert found.after < 1e-9
    assert all(bool(tensor.isfinite().all()) for tensor in found.tensors.values())


def test_nothing_of_the_users_changes():
    make, x = CASES["residual with batch norm"]
    a, b = seeded(make, 0).train(), seeded(make, 1)
    fired = []
    a.head.register_forward_hook(lambda *_: fired.append(1))
    states = [copy.deepcopy(model.state_dict()) for model in (a, b)]
    random = torch.get_rng_state()
    match(a, b, x, by="activations")
    for model, state in zip((a, b), states, strict=True):
        assert all(torch.equal(value, state[n]) for n, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert a.training
    assert fired == []


def test_a_network_that_changed_its_function_is_refused(monkeypatch):
    """What is no symmetry of b, given as one, does not go through."""
    a, b = (seeded(lambda: mlp(4, 5, 5, 2, act=nn.ReLU), seed) for seed in (0, 1))
    plain = find_symmetries(a, draw(5, 4), kinds=["permutation"])
    wrong = type(plain[0])(plain[0].actions[:2], a, "0")  # the outgoing weights stay behind
    with pytest.raises(RuntimeError, match="moved model_b's output by"):
        match(a, b, draw(5, 4), symmetries=[wrong])


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"by": "eye"}, ValueError, "by must be 'weights' or 'activations', got 'eye'"),
        ({"kinds": ["rotation"]}, ValueError, "kinds must be some of"),
        ({"kinds": "permutation"}, ValueError, "kinds must be some of"),
        ({"sweeps": 0}, ValueError, "sweeps must be at least 1, got 0"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be positive, got 0.0"),
    ],
)
def test_bad_arguments(options, kind, text):
    a = mlp(4, 5, 2, act=nn.ReLU)
    with pytest.raises(kind, match=text):
        match(a, copy.deepcopy(a), draw(5, 4), **options)


def test_networks_that_do_not_fit():
    a = mlp(4, 5, 2, act=nn.ReLU)
    with pytest.raises(ValueError, match=r"model_b must have '0.weight' of shape \(5, 4\), got \(6, 4\)"):
        match(a, mlp(4, 6, 2, act=nn.ReLU), draw(5, 4))
    with pytest.raises(ValueError, match=r"none named '2\.bias'"):
        match(a, nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2, bias=False)), draw(5, 4))
    with pytest.raises(TypeError, match=r"model_b must be a torch\.nn\.Module, got dict"):
        match(a, dict(a.state_dict()), draw(5, 4))
    other = find_symmetries(nn.ModuleDict({"net": a})["net"], draw(5, 4))
    renamed = [type(s)(tuple(_renamed(s)), None, s.path) for s in other]
    with pytest.raises(ValueError, match=r"symmetries must be of model_a.*there is no 'net\.0"):
        match(a, copy.deepcopy(a), draw(5, 4), symmetries=renamed)


def _renamed(symmetry):
    from dataclasses import replace

    return [replace(action, name=f"net.{action.name}") for action in symmetry.actions]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 30])
@pytest.mark.parametrize("ties", [False, True])
def test_assignments_are_scipys(size, ties):
    from scipy.optimize import linear_sum_assignment

    for seed in range(10):
        gain = (
            draw(size, size)
            if seed == 0
            else torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
        )
        gain = (2 * gain).round().double() if ties else gain.double()
        rows, columns = linear_sum_assignment(gain.numpy(), maximize=True)
        best = float(gain[rows, columns].sum())
        for found in (assign(gain), augmented(gain)):
            assert sorted(found.tolist()) == list(range(size))
            assert float(gain[torch.arange(size), found].sum()) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("gain", [torch.zeros(2, 3), torch.zeros(2), torch.full((2, 2), torch.nan)])
def test_what_can_not_be_assigned(gain):
    with pytest.raises(ValueError, match="gain_NN must be a square matrix of finite numbers"):
        assign(gain)


@pytest.mark.parametrize("name", ["relu", "grouped relu", "transformer"])
def test_the_point_of_least_norm_is_one(name):
    """From any factors the same point is reached, and there every charge is zero."""
    make, x = CASES[name]
    a = seeded(make).double()
    b, _ = scrambled(a, x, seed=2, kinds=["rescaling"])
    rescalings = find_symmetries(a, x, kinds=["rescaling"])
    ends = []
    for model in (a, b):
        tensors = {n: p.detach().clone() for n, p in model.named_parameters()}
        balance(tensors, rescalings)
        ends.append(tensors)
    for n, value in ends[0].items():
        torch.testing.assert_close(ends[1][n], value, rtol=1e-8, atol=1e-10)
    moved = copy.deepcopy(a)
    moved.load_state_dict(ends[0], strict=False)
    for rescaling in rescalings:
        norms = sum(float(p.square().sum()) for p in ends[0].values())
        assert float(rescaling.charge(moved).abs().max()) < 1e-8 * norms


def quadratic(x: float, y: float) -> nn.Module:
    model = nn.Linear(1, 1).double()
    with torch.no_grad():
        model.weight.fill_(x)
        model.bias.fill_(y)
    return model


def test_a_barrier_in_closed_form():
    """Of (w^2 - 1)^2 between its minima -1 and 1 it is 1, half-way."""
    barrier = loss_barrier(
        quadratic(-1, 0), quadratic(1, 0), lambda m: (m.weight.square() - 1).square().sum()
    )
    assert barrier.height == pytest.approx(1.0)
    assert barrier.at.tolist() == pytest.approx([k / 10 for k in range(11)])
    assert barrier.losses.tolist() == pytest.approx([((2 * k / 10 - 1) ** 2 - 1) ** 2 for k in range(11)])
    # Of a convex loss there is none, of ends at different losses the straight line is taken off.
    convex = loss_barrier(quadratic(-1, 0), quadratic(3, 2), lambda m: m.weight.square().sum() + m.bias.sum())
    assert convex.height == 0
    share = convex.at
    expected = (4 * share - 1).square() + 2 * share - (1 - share) - 11 * share
    torch.testing.assert_close(convex.excess, expected)


def test_a_barrier_takes_tensors_prepares_and_leaves_the_ends():
    a, b = (seeded(Residual, seed) for seed in (0, 1))
    x = draw(6, 3, 6, 6)
    state, calls = copy.deepcopy(a.state_dict()), []
    with torch.no_grad():
        goal = a(x)

        def loss(model: nn.Module) -> Tensor:
            return F.mse_loss(model(x), goal)

        barrier = loss_barrier(a, b, loss, points=5, prepare=lambda m: calls.append(m.training))
        middle = copy.deepcopy(a)
        for p, q in zip(middle.state_dict().values(), b.state_dict().values(), strict=True):
            p.copy_((p + q) / 2 if p.is_floating_point() else p)
        assert float(barrier.losses[2]) == pytest.approx(float(loss(middle)), rel=1e-5)
    assert calls == [False] * 5
    assert float(barrier.losses[0]) == 0
    assert all(torch.equal(value, state[n]) for n, value in a.state_dict().items())
    tensors = match(a, b, x).tensors
    twin = copy.deepcopy(b)
    twin.load_state_dict(tensors)
    for end in (tensors, twin):
        assert loss_barrier(a, end, loss, points=5).height == pytest.approx(
            loss_barrier(a, twin, loss, points=5).height
        )


def test_a_barrier_of_losses_without_a_number_has_none():
    barrier = loss_barrier(quadratic(-1, 0), quadratic(1, 0), lambda m: m.weight.sum().log(), points=3)
    assert barrier.height != barrier.height


@pytest.mark.parametrize(
    ("ends", "options", "kind", "text"),
    [
        ((quadratic(0, 0), quadratic(1, 1)), {"points": 2}, ValueError, "points must be at least 3, got 2"),
        (
            (quadratic(0, 0), nn.Linear(2, 1)),
            {},
            ValueError,
            r"'weight' of shape \(1, 1\), got shape \(1, 2\)",
        ),
        ((quadratic(0, 0), {}), {}, ValueError, r"must have 'weight' of shape \(1, 1\), got none"),
        (({}, quadratic(0, 0)), {}, TypeError, "model_a must be a torch.nn.Module, got dict"),
    ],
)
def test_bad_ends(ends, options, kind, text):
    with pytest.raises(kind, match=text):
        loss_barrier(*ends, lambda m: m.weight.sum(), **options)
    with pytest.raises(ValueError, match=r"loss must return a scalar, got shape \(2,\)"):
        loss_barrier(quadratic(0, 0), quadratic(1, 1), lambda m: torch.zeros(2))
