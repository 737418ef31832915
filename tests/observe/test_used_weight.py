"""Layers whose forward does not use the parameter as it stands: what was used is read, or nothing is."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import Monitor
from lightning_sym.observe import SecondMoments, Weight, WeightUpdate
from tests.models import Classifier, trainer

SIDES = ("inputs", "outputs", "input_gradients", "output_gradients")


class Keep(Monitor):
    sides = tuple(SecondMoments(side, max_positions=None) for side in SIDES)
    needs = (*sides, Weight(), WeightUpdate())

    def __init__(self):
        super().__init__(every_n_steps=1, max_layers=99)

    def read(self, seen):
        self.seen = {layer.name: {need: layer.get(need) for need in self.needs} for layer in seen.layers}
        return iter(())


class Masked(nn.Linear):
    def forward(self, x):
        mask = (torch.arange(self.weight.numel()) % 3 > 0).reshape(self.weight.shape)
        return F.linear(x, self.weight * mask, self.bias)

    def used(self):
        mask = (torch.arange(self.weight.numel()) % 3 > 0).reshape(self.weight.shape)
        return self.weight * mask


class Quantised(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.used(), self.bias)

    def used(self):
        scale = self.weight.abs().max() / 7
        return self.weight + ((self.weight / scale).round() * scale - self.weight).detach()


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.used(), self.bias, self.stride, self.padding, self.dilation, self.groups)

    def used(self):
        w = self.weight.flatten(1)
        return ((w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1e-5)).view_as(self.weight)


class Same(nn.Conv2d):
    """Pads by itself, one more behind than before."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class LoRA(nn.Linear):
    """As loralib's: factors beside a frozen weight, in the layer itself."""

    def __init__(self, inputs, outputs, dropout=0.0):
        super().__init__(inputs, outputs)
        self.weight.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))
        self.scaling, self.drop = 0.5, nn.Dropout(dropout)

    def forward(self, x):
        result = F.linear(x, self.weight, self.bias)
        result = result + (self.drop(x) @ self.lora_A.T @ self.lora_B.T) * self.scaling
        return result

    def used(self):
        return self.weight + self.scaling * self.lora_B @ self.lora_A


class Gated(nn.Linear):
    """What it puts out is no linear map of what it takes in."""

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * x.mean(-1, keepdim=True).sigmoid()


def linear(make):
    return lambda: nn.Sequential(make(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,)


def convolution(make, out):
    return lambda: nn.Sequential(make(), nn.ReLU(), nn.Flatten(), nn.Linear(out, 3)), (2, 5, 5)


MADE = {
    "masked": linear(Masked),
    "quantised": linear(Quantised),
    "standardised": convolution(lambda: Standardised(2, 4, 3, stride=2, padding=1), 36),
    "same": convolution(lambda: Same(2, 4, 2, stride=2), 36),
    "lora": linear(LoRA),
}


def fit(net, x):
    monitor = Keep()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(max_steps=1, callbacks=[monitor])
        run.fit(Classifier(net), DataLoader(TensorDataset(x, torch.arange(len(x)) % 3), batch_size=len(x)))
    return monitor.seen["net.0"], [str(w.message) for w in caught if "no readings of" in str(w.message)]


@pytest.mark.parametrize("name", MADE)
def test_the_weight_that_was_used_is_read(name):
    """As that of a plain layer which holds it."""
    make, shape = MADE[name]
    torch.manual_seed(0)
    net = make().double()
    plain = copy.deepcopy(net)
    x = torch.randn(7, *shape).double()
    layer = net[0]
    used = layer.used().detach() if hasattr(layer, "used") else layer.weight.detach()
    if isinstance(layer, nn.Linear):
        twin, given = nn.Linear(layer.in_features, layer.out_features), x
    else:
        padding = 0 if name == "same" else layer.padding
        twin = nn.Conv2d(2, 4, layer.kernel_size, layer.stride, padding)
        given = F.pad(x, (0, 1, 0, 1)) if name == "same" else x
    twin.weight, twin.bias = nn.Parameter(used.clone()), nn.Parameter(layer.bias.detach().clone())
    plain[0] = twin.double()
    got, said = fit(net, x)
    expected, _ = fit(plain, given)
    torch.testing.assert_close(got[Keep.needs[4]].blocks, expected[Keep.needs[4]].blocks)
    torch.testing.assert_close(got[Keep.needs[4]].bias, expected[Keep.needs[4]].bias)
    for side in Keep.sides:
        torch.testing.assert_close(got[side].second_halves, expected[side].second_halves)
    if name == "same":
        assert got[Keep.needs[5]] == pytest.approx(expected[Keep.needs[5]])
        assert not said
    else:
        assert got[Keep.needs[5]] is None
        assert said == [
            "layer net.0 has no readings of WeightUpdate (Keep): its forward makes the weight, so that the "
            "next one is not known yet."
        ]


@pytest.mark.parametrize(
    "make", [Gated, lambda i, o: LoRA(i, o, dropout=0.5)], ids=["gated", "lora with dropout"]
)
def test_what_needs_a_weight_that_is_not_known_is_left_out_in_one_sentence_each(make):
    torch.manual_seed(0)
    got, said = fit(
        nn.Sequential(make(6, 5), nn.Tanh(), nn.Linear(5, 3)).double(), torch.randn(7, 6).double()
    )
    missing = {need for need, value in got.items() if value is None}
    assert missing == {Keep.sides[2], Keep.needs[4], Keep.needs[5]}
    assert len(said) == 3
    assert all("its output is not W h + b of its weight" in text for text in said)


def counted(module):
    """Count how often a parametrization is computed."""
    calls = []
    module.parametrizations.weight.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.spectral_norm,
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        lambda m: prune.random_unstructured(m, "weight", 0.5),
        lambda m: torch.nn.utils.spectral_norm(m),
    ],
    ids=["spectral", "weight", "orthogonal", "pruned", "old spectral"],
)
def test_parametrizations_are_read_as_used_and_never_called(wrap):
    calls, used = [], []
    for watched in (False, True):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer = wrap(nn.Linear(6, 5)).double()
        calls.append(counted(layer) if hasattr(layer, "parametrizations") else [])
        monitor = Keep()
        run = trainer(max_steps=1, callbacks=[monitor] if watched else [])
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)).double()
        net = Seen(layer, used)
        run.fit(Classifier(net), DataLoader(TensorDataset(x, torch.arange(8) % 3), batch_size=8))
    found = monitor.seen["net.layer"][Keep.needs[4]].blocks[0]
    # what was used, out of what the layer put out
    solved = torch.linalg.lstsq(used[1][0], used[1][1]).solution.T
    torch.testing.assert_close(found, solved)
    assert len(calls[0]) == len(calls[1])


class Seen(nn.Module):
    """Keeps what a layer took in and put out."""

    def __init__(self, layer, kept):
        super().__init__()
        self.layer, self.head, self.kept = layer, nn.Linear(5, 3).double(), kept

    def forward(self, x):
        y = self.layer(x)
        self.kept.append((x.detach(), (y - self.layer.bias).detach()))
        return self.head(y.tanh())
