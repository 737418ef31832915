"""Features of layers are those of a pass by hand; likeness of networks that differ by a symmetry."""

import pytest
import torch
from torch import nn

from lightning_sym.functional import gram_alignment
from lightning_sym.observe import layer_features, representation_alignment
from tests.models import convnet, mlp


def test_features_are_those_of_a_pass_by_hand():
    net, x = convnet().eval(), torch.randn(5, 1, 8, 8)
    found = layer_features(net, x)
    assert list(found) == ["0", "3", "7", "9"]
    h = net[0](x)
    torch.testing.assert_close(found["0"], h.flatten(1))
    h = net[3](torch.relu(net[1](h)))
    torch.testing.assert_close(found["3"], h.flatten(1))
    torch.testing.assert_close(found["9"], net(x))
    assert not any(child._forward_hooks for child in net.modules())
    assert not found["0"].requires_grad
    assert list(layer_features(net, x, layers="[37]", function=lambda x: net[:4](x))) == ["3"]


def test_an_activation_in_place_does_not_reach_back():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
    x = torch.randn(6, 3)
    torch.testing.assert_close(layer_features(net, x)["0"], net[0](x))


def test_a_permuted_network_is_the_same_and_another_is_not():
    torch.manual_seed(0)
    a, other, wide = mlp(4, 8, 3), mlp(4, 8, 3), mlp(4, 11, 7, 3)
    b, x = mlp(4, 8, 3), torch.randn(20, 4)
    order = torch.randperm(8)
    with torch.no_grad():
        b[0].weight.copy_(a[0].weight[order])
        b[0].bias.copy_(a[0].bias[order])
        b[2].weight.copy_(a[2].weight[:, order])
        b[2].bias.copy_(a[2].bias)
    a.train()
    same = representation_alignment(a, b, x)
    assert same["0", "0"] == pytest.approx(1)
    assert same["2", "2"] == pytest.approx(1)
    assert a.training
    assert a[1].training
    assert same["0", "2"] == pytest.approx(float(gram_alignment(a[0](x).detach(), a(x).detach())), rel=1e-5)
    assert representation_alignment(a, other, x)["2", "2"] < 0.99
    assert representation_alignment(a, wide, x).keys() == {(i, j) for i in "02" for j in "024"}
    turned = torch.linalg.qr(torch.randn(4, 4)).Q
    with torch.no_grad():
        b[0].weight.copy_(a[0].weight @ turned.T)
        b[0].bias.copy_(a[0].bias)
    seen = representation_alignment(a, b, x, x_of_b=x @ turned.T)
    assert seen["0", "0"] == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="matches no layer"):
        representation_alignment(a, b, x, layers="head")
