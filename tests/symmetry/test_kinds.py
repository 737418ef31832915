"""Distances, mirrors and charges against slow twins that only use ``transform``."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sym.symmetry import (
    Action,
    Permutation,
    Rescaling,
    Rotation,
    SignFlip,
    Symmetry,
    collapse_causes,
    collapsed_units,
    find_symmetries,
    least_force,
)


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def example(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Recurrent(nn.Module):
    """A linear or tanh cell whose hidden matrix is acted on from both sides."""

    def __init__(self, activation=torch.tanh) -> None:
        super().__init__()
        self.into, self.hidden, self.out = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.into(x))
        h = self.activation(self.hidden(h) + self.into(x))
        return self.out(h)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.attention(x, x, x)[0]))


def mlp(*between: nn.Module) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(3, 5), *between, nn.Linear(5, 2))).double()


MODELS = {
    "relu": (lambda: mlp(nn.ReLU()), (4, 3)),
    "tanh": (lambda: mlp(nn.Tanh()), (4, 3)),
    "linear": (lambda: mlp(), (4, 3)),
    "recurrent": (lambda: seeded(Recurrent).double(), (4, 3)),
    "attention": (lambda: seeded(Attention).double(), (2, 3, 6)),
}


def found(name: str, kind: type[Symmetry]) -> list[Symmetry]:
    make, shape = MODELS[name]
    return [s for s in find_symmetries(make(), example(*shape)) if isinstance(s, kind)]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def moved(symmetry: Symmetry, element: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what ``transform`` makes of a vector in parameter space."""
    assert symmetry.module is not None
    module = copy.deepcopy(symmetry.module)
    module.load_state_dict(tensors, strict=False)
    symmetry.transform(element, module=module)
    return state(module)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


def exchange(symmetry: Symmetry, block: int, a: int, b: int) -> Tensor:
    element = torch.arange(symmetry.units).repeat(symmetry.blocks, 1)
    element[block, a], element[block, b] = b, a
    return element


@pytest.mark.parametrize("name", ["relu", "recurrent", "attention"])
def test_permutation_distance_is_that_of_exchanged_networks(name):
    symmetries = found(name, Permutation)
    assert symmetries
    for symmetry in symmetries:
        theta = state(symmetry.module)
        # What an exchange moves: the entries of numbered tensors that change place.
        numbered = {
            n: torch.arange(p.numel(), dtype=torch.float64).reshape(p.shape) for n, p in theta.items()
        }
        distances, norms = [], []
        for block, a in itertools.product(range(symmetry.blocks), range(symmetry.units)):
            best, least = torch.inf, torch.inf
            for b in range(symmetry.units):
                if a == b:
                    continue
                element = exchange(symmetry, block, a, b)
                there, places = moved(symmetry, element, theta), moved(symmetry, element, numbered)
                gap = sum(float((there[n] - theta[n]).square().sum()) for n in theta)
                # Entries on the crossing that stay in place under the exchange aren't moved.
                size = sum(float(theta[n][places[n] != numbered[n]].square().sum()) for n in theta)
                best = min(best, (gap / 2 / size) ** 0.5)
                least = min(least, gap**0.5 / 2)
            distances.append(min(best, 1.0))
            norms.append(least)
        torch.testing.assert_close(symmetry.distance(), torch.tensor(distances, dtype=torch.float64))
        torch.testing.assert_close(symmetry.mirror_norm(theta), torch.tensor(norms, dtype=torch.float64))
        assert symmetry.distance().shape == (symmetry.size,)


@pytest.mark.parametrize(("name", "kind"), [("relu", Rescaling), ("tanh", SignFlip), ("recurrent", SignFlip)])
def test_distance_to_zero_is_that_of_flipped_networks(name, kind):
    for symmetry in found(name, kind):
        theta = state(symmetry.module)
        norms = []
        for unit in range(symmetry.size):
            if kind is SignFlip:
                element = torch.ones(1, symmetry.size, dtype=torch.float64)
                element[0, unit] = -1
                flipped = moved(symmetry, element, theta)
                norms.append(sum(float((flipped[n] - theta[n]).square().sum()) for n in theta) ** 0.5 / 2)
            else:
                slices = [
                    theta["0.weight"][unit],
                    theta["0.bias"][unit : unit + 1],
                    theta["2.weight"][:, unit],
                ]
                norms.append(float(torch.cat(slices).norm()))
        twin = torch.tensor(norms, dtype=torch.float64)
        torch.testing.assert_close(symmetry.mirror_norm(theta), twin)
        torch.testing.assert_close(symmetry.distance(), (twin / twin.square().mean().sqrt()).clamp(max=1))


def test_rotation_distance_is_the_least_over_directions():
    (symmetry,) = found("linear", Rotation)
    theta = state(symmetry.module)
    # The least of |n^T Theta| over many directions comes near the smallest singular value, from above.
    n_KU = F.normalize(example(20000, 5), dim=1)
    stacked = torch.cat([theta["0.weight"], theta["0.bias"][:, None], theta["1.weight"].T], dim=1)
    norms = (n_KU @ stacked).norm(dim=1)
    sigma = symmetry.mirror_norm(theta)
    assert sigma[-1] <= norms.min() <= 1.2 * sigma[-1]
    assert 0.9 * sigma[0] <= norms.max() <= sigma[0]
    torch.testing.assert_close(symmetry.distance(), (sigma / sigma.square().mean().sqrt()).clamp(max=1))


@pytest.mark.parametrize(
    ("name", "kind"), [("relu", Permutation), ("recurrent", Permutation), ("tanh", SignFlip)]
)
def test_fixed_part_is_the_mean_over_the_group(name, kind):
    for symmetry in found(name, kind):
        theta = state(symmetry.module)
        if kind is Permutation:
            elements = [torch.tensor([p]) for p in itertools.permutations(range(symmetry.units))]
        else:
            elements = [
                torch.tensor([s], dtype=torch.float64)
                for s in itertools.product([1, -1], repeat=symmetry.units)
            ]
        total = {n: torch.zeros_like(p) for n, p in theta.items()}
        for element in elements:
            for n, p in moved(symmetry, element, theta).items():
                total[n] += p / len(elements)
        fixed = symmetry.fixed_part(theta)
        for n in theta:
            torch.testing.assert_close(fixed[n], total[n])


@pytest.mark.parametrize("name", ["relu", "recurrent", "attention", "linear"])
def test_fixed_part_is_fixed_and_a_projection(name):
    for symmetry in found(name, Symmetry):
        fixed = symmetry.fixed_part(state(symmetry.module))
        again = symmetry.fixed_part(fixed)
        there = moved(symmetry, symmetry.random_element(5), fixed)
        for n in fixed:
            torch.testing.assert_close(again[n], fixed[n])
            torch.testing.assert_close(there[n], fixed[n])


def conv() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, eps=1e-12), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2)
        )
    ).double()


@pytest.mark.parametrize(
    ("make", "shape"),
    [(MODELS["relu"]), (MODELS["linear"]), (MODELS["attention"]), (conv, (4, 1, 5, 5))],
    ids=["relu", "linear", "attention", "batchnorm"],
)
def test_charges_are_conserved_by_gradient_flow(make, shape):
    model, x = make(), example(*shape)
    y = torch.arange(shape[0]) % 2

    def loss(out: Tensor) -> Tensor:
        return F.cross_entropy(out if out.ndim == 2 else out.mean(1), y.to(out.device))

    charged = [s for s in find_symmetries(model, x, loss=loss) if s.conserved]
    assert charged
    before, start = [s.charge() for s in charged], state(model)
    drift = []
    for steps in (100, 400):  # the same time: a quarter of the step, a quarter of the drift
        model.load_state_dict(start, strict=False)
        for _ in range(steps):
            grads = torch.autograd.grad(loss(model(x)), list(model.parameters()), allow_unused=True)
            with torch.no_grad():
                for p, g in zip(model.parameters(), grads, strict=True):
                    if g is not None:
                        p -= (1.0 / steps) * g
        drift.append([float((s.charge() - c).abs().max()) for s, c in zip(charged, before, strict=True)])
    travelled = max(float((p.detach() - start[n]).abs().max()) for n, p in model.named_parameters())
    assert travelled > 0.05
    for symmetry, coarse, fine in zip(charged, *drift, strict=True):
        assert coarse < 0.02, symmetry
        assert fine < 0.35 * coarse + 1e-12, symmetry


def test_charge_is_not_conserved_where_the_symmetry_is_broken():
    model, x = mlp(nn.ReLU()), example(4, 3)
    (symmetry,) = [s for s in find_symmetries(model, x) if s.kind == "rescaling"]
    broken = nn.Sequential(model[0], nn.GELU(), model[2])
    before = symmetry.charge()
    for _ in range(400):
        grads = torch.autograd.grad(
            F.cross_entropy(broken(x), torch.tensor([0, 1, 0, 1])), list(model.parameters())
        )
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= 0.0025 * g
    assert (symmetry.charge() - before).abs().max() > 0.01


def test_collapse_and_its_causes():
    model = mlp(nn.ReLU())
    with torch.no_grad():
        for unit in (1, 3):
            model[0].weight[unit], model[0].bias[unit], model[2].weight[:, unit] = 0, 0, 0
        model[0].weight[2], model[0].bias[2] = model[0].weight[0], model[0].bias[0]
        model[2].weight[:, 2] = model[2].weight[:, 0]
    symmetries = find_symmetries(model, example(4, 3))
    permutation, rescaling = symmetries
    assert collapsed_units(permutation).tolist() == [True, True, True, True, False]
    assert collapsed_units(rescaling).tolist() == [False, True, False, True, False]
    assert collapse_causes(symmetries, "0") == pytest.approx({"permutation": 0.4, "rescaling": 0.4})
    assert collapse_causes(symmetries, "2") == {}
    with pytest.raises(ValueError, match="tolerance"):
        collapsed_units(permutation, tolerance=-1)


def test_lost_rank_is_named_a_rotation():
    model = mlp()
    with torch.no_grad():
        n_U = F.normalize(example(5), dim=0)
        away_UU = torch.eye(5).double() - torch.outer(n_U, n_U)
        model[0].weight.copy_(away_UU @ model[0].weight)
        model[0].bias.copy_(away_UU @ model[0].bias)
        model[1].weight.copy_(model[1].weight @ away_UU)
    causes = collapse_causes(find_symmetries(model, example(4, 3)), "0")
    assert causes["rotation"] == pytest.approx(0.2)
    assert causes["rescaling"] == causes["permutation"] == 0


def test_packed_projections_of_attention_are_layers_of_their_own():
    make, shape = MODELS["attention"]
    model = make()
    symmetries = find_symmetries(model, example(*shape))
    with torch.no_grad():
        values = model.attention.in_proj_weight[12:15], model.attention.in_proj_bias[12:15]  # head 0's
        n_U = F.normalize(example(3), dim=0)
        away_UU = torch.eye(3).double() - torch.outer(n_U, n_U)
        for part in values:
            part.copy_(away_UU @ part)
        out = model.attention.out_proj.weight[:, :3]
        out.copy_(out @ away_UU)
        for first, second in ((3, 4), (9, 10)):  # head 1: two units equal in queries and keys
            model.attention.in_proj_weight[first] = model.attention.in_proj_weight[second]
            model.attention.in_proj_bias[first] = model.attention.in_proj_bias[second]
    causes = {
        part: collapse_causes(symmetries, f"attention.{part}") for part in ("q_proj", "k_proj", "v_proj")
    }
    # Equal units span one direction less than they are.
    equal = {"permutation": 2 / 6, "rescaling": 0, "rotation": 1 / 6}
    assert causes["q_proj"] == causes["k_proj"] == pytest.approx(equal)
    assert causes["v_proj"] == pytest.approx({"permutation": 0, "rescaling": 0, "rotation": 1 / 6})
    forces = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    assert least_force(symmetries, "attention.v_proj", forces) == pytest.approx(0, abs=1e-12)
    assert least_force(symmetries, "attention.no", forces) is None


@pytest.mark.parametrize("name", list(MODELS))
def test_inverse_elements_and_names(name):
    for symmetry in found(name, Symmetry):
        theta = state(symmetry.module)
        assert torch.equal(symmetry.random_element(2), symmetry.random_element(2))
        draws = [symmetry.random_element(seed) for seed in range(8)]  # some may be the identity
        element = next(e for e in draws if not same(moved(symmetry, e, theta), theta))
        there = moved(symmetry, element, theta)
        back = moved(symmetry, symmetry.inverse(element), there)
        for n in theta:
            torch.testing.assert_close(back[n], theta[n])
        assert set(symmetry.parameters) <= set(theta)
        assert "\n" not in repr(symmetry)
        if not symmetry.continuous:
            with pytest.raises(TypeError, match="charge"):
                symmetry.charge()


def test_wrong_elements_and_modules_are_refused():
    action = Action("weight", 0, torch.arange(3).reshape(1, 3, 1))
    layer = nn.Linear(2, 3)
    for kind, bad, match in (
        (Permutation, torch.tensor([[0, 0, 1]]), "once"),
        (Permutation, torch.arange(4), "must be"),
        (Rescaling, torch.tensor([1.0, -1.0, 1.0]), "positive"),
        (SignFlip, torch.tensor([1.0, 0.5, 1.0]), "signs"),
        (Rotation, torch.zeros(3, 3), "invertible"),
    ):
        with pytest.raises(ValueError, match=match):
            kind((action,), layer).transform(bad)
    with pytest.raises(ValueError, match="bound to no module"):
        Rescaling((action,)).distance()
    with pytest.raises(ValueError, match="no tensor named 'weight'"):
        Rescaling((action,)).distance(nn.ReLU())
    with pytest.raises(ValueError, match=r"'weight' of shape \(3, 2\).*got \(4, 2\)"):
        Rescaling((action,), layer).distance(nn.Linear(2, 4))
    with pytest.raises(ValueError, match="element must be a tensor"):
        Rescaling((action,), layer).transform([1, 1, 1])
    with pytest.raises(ValueError, match="orthogonal"):
        Rotation((action,), layer, orthogonal=True).transform(2 * torch.eye(3))
    with pytest.raises(TypeError, match="orthogonal"):
        Rotation((action,), layer, orthogonal=True).charge()
