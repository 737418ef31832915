"""Every kind is found on a network that has it, and not on the same network changed so that it hasn't."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sym.symmetry import find_symmetries


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def example(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def kinds(module: nn.Module, x: Tensor, **options) -> set[str]:
    return {symmetry.kind for symmetry in find_symmetries(module, x, **options)}


class Offset(nn.Module):
    """A fixed number for each unit: a bias that no symmetry may move."""

    def __init__(self, size: int, *, alike: bool = False) -> None:
        super().__init__()
        self.register_buffer("offset", torch.ones(size) if alike else torch.linspace(0.1, 1.0, size))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offset


def mlp(*between: nn.Module) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 6), *between, nn.Linear(6, 3)))


def conv(*between: nn.Module) -> nn.Module:
    return seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), *between, nn.ReLU(), nn.Conv2d(6, 2, 3), nn.Flatten())
    )


HAVE = [
    ("permutation", mlp(nn.GELU()), mlp(Offset(6), nn.GELU())),
    ("permutation", mlp(Offset(6, alike=True), nn.GELU()), mlp(Offset(6), nn.GELU())),
    ("rescaling", mlp(nn.ReLU()), mlp(nn.GELU())),
    ("rescaling", mlp(nn.LeakyReLU(0.2)), mlp(Offset(6, alike=True), nn.LeakyReLU(0.2))),
    ("rescaling", mlp(nn.PReLU(6)), mlp(nn.ELU())),
    ("signflip", mlp(nn.Tanh()), mlp(nn.Sigmoid())),
    ("signflip", mlp(nn.Softsign()), mlp(Offset(6), nn.Softsign())),
    ("signflip", mlp(nn.Hardtanh()), mlp(nn.Hardtanh(-1.0, 2.0))),
    ("rotation", mlp(), mlp(nn.ReLU())),
    ("rotation", mlp(nn.Dropout()), mlp(Offset(6))),
]
CONV = [
    ("scale", conv(nn.BatchNorm2d(6)), conv(nn.Identity())),
    ("scale", conv(nn.BatchNorm2d(6, affine=False)), conv(nn.Softplus())),
    ("scale", conv(nn.GroupNorm(2, 6)), conv(nn.Sigmoid(), nn.GroupNorm(2, 6))),
    ("scale", conv(nn.GroupNorm(1, 6)), conv(nn.Sigmoid(), nn.GroupNorm(1, 6))),
    ("scale", conv(nn.InstanceNorm2d(6)), conv(nn.Sigmoid(), nn.InstanceNorm2d(6))),
]


class Attention(nn.Module):
    """Attention written out, with something done to a part of it."""

    def __init__(self, where: str = "", what: nn.Module | None = None, slopes: Tensor | None = None) -> None:
        super().__init__()
        self.qkv, self.out, self.where = nn.Linear(8, 24), nn.Linear(8, 8), where
        self.what = what
        self.register_buffer("slopes", torch.ones(2) if slopes is None else slopes)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (part.view(b, t, 2, 4).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
        q = self.what(q) if self.where == "query" else q
        far = (torch.arange(t)[:, None] - torch.arange(t)).abs() * self.slopes[:, None, None]
        mixed = (q @ k.transpose(-2, -1) - far).softmax(-1) @ v
        mixed = self.what(mixed) if self.where == "value" else mixed
        return self.out(mixed.transpose(1, 2).reshape(b, t, 8))


def attention(*args) -> nn.Module:
    return seeded(lambda: Attention(*args))


def moved(module: nn.Module, x: Tensor, kind: str) -> list[tuple[int, int, set[str]]]:
    """Blocks, units and parameters of each symmetry of a kind."""
    return [(s.blocks, s.units, set(s.parameters)) for s in find_symmetries(module, x).of_kind(kind)]


def test_rotations_of_attention_are_lost_one_by_one():
    x = example(2, 5, 8)
    query_key = (2, 4, {"qkv.weight", "qkv.bias"})
    value_out = (2, 4, {"qkv.weight", "qkv.bias", "out.weight"})
    assert moved(attention(), x, "rotation") == [query_key, value_out]
    assert moved(attention("query", nn.Tanh()), x, "rotation") == [value_out]
    assert moved(attention("value", nn.Tanh()), x, "rotation") == [query_key]
    assert moved(attention("value", nn.Identity()), x, "rotation") == [query_key, value_out]


def test_heads_change_places_where_none_is_told_from_another():
    x = example(2, 5, 8)
    heads = (1, 2, {"qkv.weight", "qkv.bias", "out.weight"})
    assert heads in moved(attention(), x, "permutation")
    unlike = moved(attention("", None, torch.tensor([0.5, 1.0])), x, "permutation")
    assert heads not in unlike
    assert unlike  # the units inside of heads still do


class Adapted(nn.Module):
    """A linear layer and what a low-rank adapter adds to it."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(5, 6), nn.Linear(5, 2, bias=False), nn.Linear(2, 6)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + 0.5 * self.b(self.between(self.a(x))))


def depthwise(between: nn.Module) -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), between, nn.ReLU(), nn.Conv2d(6, 2, 1)
        )
    )


class ChannelOffset(nn.Module):
    """A fixed number for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.linspace(0.1, 1.0, 6)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offset


class Normed(nn.Module):
    """Everything written into a layer normalisation, through an activation or plain."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.norm(self.between(self.a(x)))))


@pytest.mark.parametrize(
    ("kind", "has", "has_not", "shape", "names"),
    [
        (
            "rotation",
            seeded(lambda: Adapted(nn.Identity())),
            seeded(lambda: Adapted(nn.ReLU())),
            (7, 5),
            {"a.weight": (0,), "b.weight": (1,)},
        ),
        (
            "permutation",
            depthwise(nn.Identity()),
            depthwise(ChannelOffset()),
            (2, 3, 5, 5),
            {"0.weight": (0,), "0.bias": (0,), "1.weight": (0,), "1.bias": (0,), "4.weight": (1,)},
        ),
        (
            "rescaling",
            depthwise(nn.Identity()),
            depthwise(ChannelOffset()),
            (2, 3, 5, 5),
            {"1.weight": (0,), "1.bias": (0,), "4.weight": (1,)},
        ),
        (
            "scale",
            seeded(lambda: Normed(nn.Identity())),
            seeded(lambda: Normed(nn.Sigmoid())),
            (7, 4),
            {"a.weight": (0,), "a.bias": (0,)},
        ),
    ],
)
def test_a_named_symmetry_goes_with_one_change(kind, has, has_not, shape, names):
    assert names in [s.parameters for s in find_symmetries(has, example(*shape)).of_kind(kind)]
    assert names not in [s.parameters for s in find_symmetries(has_not, example(*shape)).of_kind(kind)]


def test_what_does_not_run_says_what_is_wrong():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        find_symmetries(mlp(nn.ReLU()), example(5, 3))

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> str:
            return str(self.a(x).sum().item())

    with pytest.raises(ValueError, match=r"floating-point tensors, found none"):
        find_symmetries(seeded(Words), example(5, 4))


@pytest.mark.parametrize(("kind", "has", "has_not"), HAVE)
def test_found_where_it_is_and_only_there(kind, has, has_not):
    assert kind in kinds(has, example(5, 4))
    found = find_symmetries(has_not, example(5, 4))
    assert not found.of_kind(kind)
    assert found.refuted == ()  # the rules know, the trial needn't


@pytest.mark.parametrize(("kind", "has", "has_not"), CONV)
def test_found_in_front_of_normalisation_and_only_there(kind, has, has_not):
    assert kind in kinds(has, example(4, 3, 7, 7))
    assert kind not in kinds(has_not, example(4, 3, 7, 7))


def test_translation_needs_a_loss_that_ignores_it():
    model, x, y = mlp(nn.ReLU()), example(5, 4), torch.tensor([0, 1, 2, 0, 1])
    assert "translation" not in kinds(model, x)
    assert "translation" not in kinds(model, x, loss=lambda out: F.mse_loss(out, F.one_hot(y, 3).double()))
    found = find_symmetries(model, x, loss=lambda out: F.cross_entropy(out, y)).of_kind("translation")
    assert [s.parameters for s in found] == [{"2.weight": (0,), "2.bias": (0,)}]
    assert found[0].size == 7  # six inputs and the bias


def test_every_symmetry_leaves_the_users_module_alone_until_asked():
    model, x = mlp(nn.ReLU()).double(), example(5, 4).double()
    before, state = model(x), copy.deepcopy(model.state_dict())
    for symmetry in find_symmetries(model, x):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        element = symmetry.random_element(3)
        symmetry.transform(element)
        assert not all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-12)
        symmetry.transform(element, inverse=True)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, state[name], rtol=1e-10, atol=1e-12)


def test_the_trial_refutes_what_the_trace_allows():
    class Sly(nn.Module):
        """Reads a weight behind the trace's back."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            first = self.a.weight.tolist()[0][0]  # which unit comes first matters
            return self.b(torch.relu(self.a(x))) * (1 + first)

    model = seeded(Sly)
    found = find_symmetries(model, example(5, 4))
    assert list(found) == []
    assert len(found.refuted) == 2


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Tanh()])
def test_no_seed_proves_by_leaving_units_where_they_are(act):
    """Of two units a random order is the identity every other time, and so are half of all signs."""

    class Sly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Linear(4, 2), nn.Linear(2, 3), act

        def forward(self, x: Tensor) -> Tensor:
            first = self.a.weight.tolist()[0][0]
            return self.b(self.act(self.a(x))) * (1 + first)

    for seed in range(8):
        found = find_symmetries(seeded(Sly), example(5, 4), seed=seed)
        assert list(found) == []
        assert len(found.refuted) == 2


def test_a_norm_computed_in_single_precision_hides_nothing():
    class Norm(nn.Module):
        """As language models write it."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(width))

        def forward(self, x: Tensor) -> Tensor:
            kind, x = x.dtype, x.to(torch.float32)
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            return self.gain * x.to(kind)

    model = seeded(lambda: nn.Sequential(nn.Linear(4, 64), Norm(64), nn.GELU(), nn.Linear(64, 3)))
    found = find_symmetries(model, example(5, 4))
    assert [s.parameters for s in found.of_kind("permutation")] == [
        {"0.weight": (0,), "0.bias": (0,), "1.gain": (0,), "3.weight": (1,)}
    ]


def test_infinite_outputs_are_compared_and_nan_is_refused():
    class Masked(nn.Module):
        def __init__(self, value: float, act: type[nn.Module] = nn.ReLU) -> None:
            super().__init__()
            self.net, self.value = mlp(act()), value

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).masked_fill(torch.tensor([True, False, False]), self.value)

    assert kinds(Masked(-torch.inf), example(5, 4)) == {"permutation", "rescaling"}
    assert kinds(Masked(-torch.inf, nn.GELU), example(5, 4)) == {"permutation"}
    with pytest.raises(ValueError, match="found NaN"):
        find_symmetries(Masked(torch.nan), example(5, 4))

    class Sly(Masked):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + self.net[0].weight.tolist()[0][0])

    assert not find_symmetries(seeded(lambda: Sly(-torch.inf)), example(5, 4))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("old", [False, True])
def test_a_direction_under_weight_normalisation_has_a_scale_and_its_gain_a_rescaling(old):
    model = mlp(nn.ReLU())
    if old:
        torch.nn.utils.weight_norm(model[0])
        model(example(5, 4))  # leaves a computed tensor on the module, which can't be copied
        gain, direction = "0.weight_g", "0.weight_v"
    else:
        torch.nn.utils.parametrizations.weight_norm(model[0])
        gain, direction = (f"0.parametrizations.weight.original{i}" for i in (0, 1))
    found = find_symmetries(model, example(5, 4))
    parameters = {s.kind: set(s.parameters) for s in found}
    assert parameters["permutation"] == {gain, direction, "0.bias", "2.weight"}
    assert parameters["rescaling"] == {gain, "0.bias", "2.weight"}
    assert parameters["scale"] == {direction}
    assert len(found.of_kind("scale")[0].distance()) == 6


def test_cosines_divide_the_lengths_out():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.cosine_similarity(self.a(x[1:]), self.a(x[:-1]))

    found = find_symmetries(seeded(Pair), example(5, 4))
    assert {"a.weight"} in [set(s.parameters) for s in found.of_kind("scale")]
    assert found.untraced == ()


def test_a_zero_weight_proves_nothing():
    class Silent(nn.Module):
        """Breaks its symmetry behind the trace's back, where a zero gain hides it."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.gain = nn.Linear(4, 6), nn.Linear(6, 3), nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            first = self.a.weight.tolist()[0][0]
            return x[:, :3] + self.gain * self.b(torch.relu(self.a(x))) * (1 + first)

    found = find_symmetries(seeded(Silent), example(5, 4))
    assert not any("a.weight" in symmetry.parameters for symmetry in found)
    assert found.refuted


def test_what_has_no_rule_is_said_and_the_rest_returned():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(self.a(x).cumsum(1))))

    with pytest.warns(UserWarning, match="cumsum"):
        found = find_symmetries(seeded(Odd), example(5, 4))
    assert any("cumsum" in line for line in found.untraced)
    assert {next(iter(s.parameters)) for s in found} == {"b.weight"}


def test_residual_connections_tie_layers_together():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 6)
            self.out = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.into(x)
            return self.out(F.relu(h + self.down(F.relu(self.up(h)))))

    found = find_symmetries(seeded(Residual), example(5, 4), kinds=["permutation"])
    tied = {
        "into.weight": (0,), "into.bias": (0,), "up.weight": (1,),
        "down.weight": (0,), "down.bias": (0,), "out.weight": (1,),
    }  # fmt: skip
    assert tied in [s.parameters for s in found]
    assert len(found) == 2


def test_depthwise_convolution_moves_with_its_channels():
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 2, 1)
        )
    )
    found = find_symmetries(model, example(2, 3, 5, 5))
    assert [set(s.parameters) for s in found.of_kind("permutation")] == [
        {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight"}
    ]
    assert [set(s.parameters) for s in found.of_kind("rescaling")] == [
        {"0.weight", "0.bias", "2.weight"},
        {"2.weight", "2.bias", "4.weight"},
    ]


def test_low_rank_adapter_has_a_rotation_of_its_rank():
    found = find_symmetries(seeded(lambda: Adapted(nn.Identity())), example(7, 5)).of_kind("rotation")
    assert [s.parameters for s in found] == [{"a.weight": (0,), "b.weight": (1,)}]
    assert found[0].size == 2


def test_tied_weights_move_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x) + F.gelu(self.inner(self.embed(x))))

    model = seeded(Tied)
    found = find_symmetries(model, torch.arange(8).reshape(2, 4), kinds=["permutation"])
    assert [s.parameters for s in found] == [
        {"embed.weight": (1,), "inner.weight": (1, 0), "inner.bias": (0,)},
    ] or [set(s.parameters) for s in found] == [{"embed.weight", "inner.weight", "inner.bias"}]


def test_frozen_parameters_are_constants_on_request():
    model = mlp(nn.ReLU())
    model[0].bias.requires_grad_(False)
    assert kinds(model, example(5, 4)) == {"permutation", "rescaling"}
    assert kinds(model, example(5, 4), include_frozen=False) == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_that_forward_writes_into_are_given_anew(dtype):
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.mul_(2))

    x = example(5, 4).to(dtype)
    before = x.clone()
    assert kinds(Doubled(), x) == {"permutation", "rescaling"}
    assert torch.equal(x, before)


def test_a_module_is_copied_without_its_trainer_and_the_graphs_it_keeps():
    class Hung(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.losses = mlp(nn.ReLU()), []
            self._trainer = threading.Lock()  # can't be copied, as little as some loggers

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    model = Hung()
    model.losses.append(model(example(5, 4)).sum())
    assert kinds(model, example(5, 4)) == {"permutation", "rescaling"}
    assert model.losses[0].grad_fn is not None


def test_compiled_names_are_clean():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(mlp(nn.ReLU()))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    found = find_symmetries(seeded(Outer), example(5, 4))
    assert found[0].parameters == {"net.0.weight": (0,), "net.0.bias": (0,), "net.2.weight": (1,)}
    found[0].transform(found[0].random_element(0))


def test_reproducible_and_silent_on_the_global_generator():
    model, x = mlp(nn.Dropout(), nn.ReLU()).train(), example(5, 4)
    state = torch.get_rng_state()
    first, second = find_symmetries(model, x), find_symmetries(model, x)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert list(map(repr, first)) == list(map(repr, second))
    assert repr(first[0]) == "Permutation(6 units of 0: 0.weight[0], 0.bias[0], 3.weight[1])"


@pytest.mark.parametrize(
    ("options", "match"),
    [({"kinds": ["rotations"]}, "rotations"), ({"tolerance": 0.0}, "tolerance"), ({}, "example_inputs")],
)
def test_user_errors(options, match):
    inputs = () if not options else (example(5, 4),)
    with pytest.raises(ValueError, match=match):
        find_symmetries(mlp(), *inputs, **options)
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got function"):
        find_symmetries(mlp, example(5, 4))


def test_one_kind_may_go_without_its_list():
    assert kinds(mlp(nn.ReLU()), example(5, 4), kinds="rescaling") == {"rescaling"}
