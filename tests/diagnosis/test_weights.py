"""What weights alone tell, against closed forms and spoiled copies of timm's models."""

import copy
import math

import pytest
import timm
import torch
from torch import nn

from lightning_sym.diagnosis import diagnose_tensors, diagnose_weights, inspect_weights
from lightning_sym.diagnosis.weight_facts import chance_tolerance, random_spectrum, weight_facts


def kinds(found, level=None):
    return {(f.kind, f.layer) for f in found if level is None or f.level == level}


def mlp(activation=nn.ReLU, width=32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, width), activation(), nn.Linear(width, 4))


# Facts of one weight.


def slow_facts(weight, bias=None):
    """The twin: loops, float64, singular values."""
    w = weight.double()
    full = w if bias is None else torch.cat([w, bias.double()[:, None]], dim=1)
    sigma = torch.linalg.svdvals(w)
    p = sigma / sigma.sum()
    group = list(range(len(w)))
    for i in range(len(w)):
        for j in range(i):
            if min(torch.cosine_similarity(a[i], a[j], dim=0) for a in (full, w)) >= 0.99:
                group[i] = group[j]
                break
    return {
        "size": math.sqrt(float((w**2).mean()) * w.shape[1]),
        "rank": int((sigma > 1e-3 * sigma[0]).sum()),
        "effective_rank": math.exp(float(-(p * p.clamp_min(1e-300).log()).sum())),
        "group": group,
    }


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_facts_are_those_of_a_slow_twin(shape):
    torch.manual_seed(1)
    weight, bias = torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], dtype=torch.float64)
    weight[5], bias[5] = 2 * weight[2], 2 * bias[2]
    weight[:, -3:] = 0
    facts, twin = weight_facts("w", weight[None], bias), slow_facts(weight, bias)
    assert facts.size == pytest.approx(twin["size"], rel=1e-12)
    assert facts.rank == twin["rank"]
    assert facts.effective_rank == pytest.approx(twin["effective_rank"], rel=1e-6)
    assert facts.group.tolist() == twin["group"]
    assert facts.redundant == 1
    assert facts.equal.nonzero().flatten().tolist() == [2, 5]


def test_groups_of_a_convolution_are_read_one_by_one():
    torch.manual_seed(0)
    half = torch.randn(8, 20)
    facts = weight_facts("w", torch.stack([half, half]))  # equal, but of other inputs
    assert facts.redundant == 0
    depthwise = weight_facts("w", torch.ones(64, 1, 9))
    assert depthwise.redundant == 0
    lost = torch.stack([half, torch.outer(torch.randn(8), torch.randn(20))])
    assert (weight_facts("w", lost).rank, weight_facts("w", lost).possible) == (1, 8)


def test_a_bias_does_not_make_units_equal():
    torch.manual_seed(0)
    weight = 1e-5 * torch.randn(16, 24)
    assert weight_facts("w", weight[None], torch.rand(16) + 1).redundant == 0
    weight[1] = weight[0]
    assert weight_facts("w", weight[None], torch.ones(16)).redundant == 1
    assert weight_facts("w", 1e5 * weight[None], torch.randn(16) * 1e2).redundant == 0  # biases differ


def test_units_of_a_low_rank_weight_are_not_taken_for_copies():
    torch.manual_seed(0)
    low = torch.randn(256, 2) @ torch.randn(2, 64)
    facts = weight_facts("w", low[None])
    assert (facts.rank, facts.redundant, facts.possible) == (2, 0, 64)
    assert weight_facts("w", torch.outer(torch.rand(64) + 1, torch.randn(32))[None]).redundant == 0


@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_units_all_alike_are_copies_however_low_their_rank(noise):
    torch.manual_seed(0)
    row = torch.randn(48)
    facts = weight_facts("w", (row + noise * torch.randn(32, 48))[None])
    assert facts.redundant == 31


def test_chance_tolerance_is_what_chance_brings():
    # In the plane, an angle below t has probability t / pi; 0.01 of 1000 pairs: t = pi * 1e-5.
    assert chance_tolerance(2, 1000) == pytest.approx(1 - math.cos(math.pi * 1e-5), rel=1e-6)
    # On the sphere it is (1 - cos t) / 2, about t^2 / 4.
    assert chance_tolerance(3, 1000) == pytest.approx(2e-5, rel=1e-3)
    assert chance_tolerance(400, 10**6) == 0.01


def test_random_spectrum_is_a_random_matrix():
    rank, effective = random_spectrum(20, 50)
    torch.manual_seed(3)
    other = slow_facts(torch.randn(20, 50))
    assert rank == 20
    assert effective == pytest.approx(other["effective_rank"], rel=0.05)


# Rules, on a small network.


def test_dead_units_need_the_relu_of_the_graph():
    for activation, kind in [(nn.ReLU, "dead_units"), (nn.ReLU6, "dead_units"), (nn.Tanh, "zero_units")]:
        net = mlp(activation)
        with torch.no_grad():
            net[0].weight[:8] = 0
            net[0].bias[:8] = -0.1
        found = diagnose_weights(net)
        assert kinds(found) == {(kind, "0")}
        assert found[0].value == 0.25


def test_a_positive_bias_is_not_dead():
    net = mlp()
    with torch.no_grad():
        net[0].weight[:8] = 0
        net[0].bias[:8] = torch.tensor([-0.1, 0, 0, 0, 0.1, 0.2, 0.3, 0.4])
    found = {f.kind: f.value for f in diagnose_weights(net)}
    assert found == {"dead_units": 4 / 32, "zero_units": 4 / 32}


def test_dead_units_are_dead_and_others_are_not():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3)).eval()
    with torch.no_grad():
        net[0].weight[:4] = 0
        net[0].bias[:4] = 0
        net[1].bias[:4] = torch.tensor([-1.0, 0.0, 1.0, -1.0])
        net[1].running_mean[3] = -5.0  # in evaluation this constant is above zero
        net[1].weight[8], net[1].bias[8] = 0.0, -1.0
    report = inspect_weights(net)
    assert report.certified == {"0": 2, "1": 1}
    out = net[:3](100 * torch.randn(50, 3, 8, 8)).amax((0, 2, 3))
    assert (out == 0).nonzero().flatten().tolist() == [0, 1, 8]


def test_a_relu_beside_another_reader_certifies_nothing():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            h = self.a(x)
            return self.b(h.relu() + h)

    net = Split()
    with torch.no_grad():
        net.a.weight[:8] = 0
        net.a.bias[:8] = -1
    assert kinds(diagnose_weights(net)) == {("zero_units", "a")}


def test_units_on_a_mirror_are_told_with_it():
    net = mlp(width=32)
    with torch.no_grad():
        for tensor in (net[0].weight, net[0].bias):
            tensor[8:16] = tensor[:8]
        net[2].weight[:, 8:16] = net[2].weight[:, :8]
    (found,) = diagnose_weights(net)
    assert (found.kind, found.layer, found.level, found.value) == ("equal_units", "0", "alarm", 0.25)
    assert "50% of its units equal another one (permutation mirror)" in found.cause
    assert "Syre" in found.remedy
    with torch.no_grad():
        net[2].weight[:, 8:16] += torch.randn(4, 8)
    (found,) = diagnose_weights(net)
    assert found.cause.startswith("its units are on no mirror")
    assert "Syre" not in found.remedy
    assert "not looked for" in diagnose_weights(net, search=False)[0].cause


def test_zero_initialisations_are_excused_by_the_gradient_not_by_a_name():
    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.head = nn.Linear(16, 8), nn.Linear(8, 3)
            self.a, self.b = nn.Linear(16, 2, bias=False), nn.Linear(2, 8, bias=False)
            nn.init.zeros_(self.b.weight)
            nn.init.zeros_(self.head.weight)  # b gets a gradient only once this has left zero

        def forward(self, x):
            return self.head(torch.tanh(self.base(x) + self.b(self.a(x))))

    net = LowRank()
    report = inspect_weights(net)
    assert report.findings == []
    assert set(report.initial_zeros) == {"b.weight", "head.weight"}
    nn.init.zeros_(net.a.weight)
    assert kinds(diagnose_weights(net)) == {("zero_units", "a"), ("zero_units", "b")}


def test_a_vanished_layer_is_an_alarm_and_a_branch_that_starts_small_is_none():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(3)
            )

        def forward(self, x):
            for block in self.blocks:
                x = x + block(x)
            return x

    net = Residual()
    with torch.no_grad():
        for block in net.blocks:
            block[2].weight.mul_(1e-5)
    assert {f.level for f in diagnose_weights(net)} == {"note"}
    net = Residual()
    with torch.no_grad():
        net.blocks[1][2].weight.mul_(1e-5)  # one of three
        net.blocks[2][0].weight.mul_(1e-8)
    wanted = {("weights_vanish", "blocks.1.2"), ("weights_vanish", "blocks.2.0")}
    assert kinds(diagnose_weights(net), "alarm") == wanted


def test_what_is_not_finite_is_named_where_it_is():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    net.register_buffer("mask", torch.full((3,), -math.inf))  # as attention masks are
    assert diagnose_weights(net) == []
    net[0].weight.data[0, 0, 0, 0] = math.nan
    net[1].running_var[2] = math.inf
    assert kinds(diagnose_weights(net), "alarm") == {("divergence", "0"), ("divergence", "1.running_var")}


def test_a_network_that_nobody_can_guess_an_input_for_says_so():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 16)

        def forward(self, *, left, right):
            return self.fc(left + right).relu()

    net = Odd()
    net.fc.weight.data[:8] = 0
    net.fc.bias.data[:8] = -1
    report = inspect_weights(net)
    assert kinds(report.findings) == {("zero_units", "fc")}
    assert any("not asked" in note for note in report.notes)
    assert "not looked for" in report.findings[0].cause


def test_the_network_is_left_as_it_is():
    net = timm.create_model("test_resnet").train()
    net.layer1[0].conv1.weight.data[:16] = 0
    before = copy.deepcopy(net.state_dict())
    state = torch.random.get_rng_state()
    diagnose_weights(net)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert net.training
    assert all(p.grad is None for p in net.parameters())


def test_only_modules_are_taken():
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got dict"):
        diagnose_weights({})


# timm's families.

FAMILIES = [
    *("test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_mambaout", "test_nfnet"),
    *("resnet18", "mobilenetv3_small_050", "regnetx_002", "vit_tiny_patch16_224", "xcit_nano_12_p8_224"),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_untrained_networks_are_sound(name):
    torch.manual_seed(0)
    assert diagnose_weights(timm.create_model(name)) == []


def equal(w, b):
    for tensor in (w, b) if b is not None else (w,):
        tensor[1::2] = tensor[::2]


def dead(w, b):
    w[: len(w) // 2] = 0
    if b is not None:
        b[: len(w) // 2] = -0.1


def lost(w, b):
    u, s, v = torch.linalg.svd(w.flatten(1), full_matrices=False)
    w.copy_((u[:, :2] * s[:2] @ v[:2]).view_as(w))


SPOILED = {
    "equal_units": equal,
    "dead": dead,
    "rank_collapse": lost,
    "weights_vanish": lambda w, b: w.mul_(1e-8),
    "divergence": lambda w, b: w.view(-1)[3].fill_(math.nan),
}


@pytest.mark.parametrize("kind", SPOILED)
@pytest.mark.parametrize(
    ("name", "layer", "into"),
    [
        ("test_resnet", "layer1.0.conv1", "dead_units"),
        ("test_resnet", "layer2.0.conv2", "zero_units"),  # added to the shortcut before the ReLU
        ("test_vit", "blocks.2.mlp.fc1", "zero_units"),
        ("test_vit", "blocks.1.attn.proj", "zero_units"),
        ("test_efficientnet", "blocks.1.0.conv_exp", "zero_units"),
    ],
)
def test_spoiled_copies_are_named(name, layer, into, kind):
    torch.manual_seed(0)
    net = timm.create_model(name)
    spoiled = net.get_submodule(layer)
    with torch.no_grad():
        SPOILED[kind](spoiled.weight, spoiled.bias)
    kind = into if kind == "dead" else kind
    assert kinds(diagnose_weights(net, search=False), "alarm") == {(kind, layer)}


# Tensors without a module.


def test_tensors_tell_the_same_but_for_the_graph():
    torch.manual_seed(0)
    net = timm.create_model("test_vit")
    healthy = diagnose_tensors(net.state_dict())
    assert kinds(healthy) == {("symmetries_not_looked_for", "")}
    with torch.no_grad():
        equal(net.blocks[1].mlp.fc1.weight, net.blocks[1].mlp.fc1.bias)
        dead(net.blocks[2].mlp.fc1.weight, net.blocks[2].mlp.fc1.bias)
        lost(net.blocks[3].mlp.fc1.weight, None)
        net.blocks[4].mlp.fc1.weight.mul_(1e-8)
        net.blocks[5].mlp.fc1.bias[0] = math.inf
    found = diagnose_tensors(net.state_dict())
    assert kinds(found, "alarm") == {
        ("equal_units", "blocks.1.mlp.fc1"),
        ("zero_units", "blocks.2.mlp.fc1"),
        ("rank_collapse", "blocks.3.mlp.fc1"),
        ("divergence", "blocks.5.mlp.fc1.bias"),
    }
    assert kinds(found, "warning") == {("weights_vanish", "blocks.4.mlp.fc1")}
    assert found[-1].message.startswith("Symmetries not looked for")


def test_a_table_of_embeddings_may_have_unused_rows():
    torch.manual_seed(0)
    table = torch.randn(4096, 64)
    table[:2000] = 0
    assert kinds(diagnose_tensors({"embed.weight": table})) == {("symmetries_not_looked_for", "")}
    assert diagnose_weights(nn.Sequential(nn.Embedding.from_pretrained(table), nn.Linear(64, 8))) == []


def test_tensors_must_be_a_mapping():
    with pytest.raises(TypeError, match="tensors must be a mapping"):
        diagnose_tensors([torch.ones(2, 2)])
