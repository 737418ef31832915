"""Breaking distances and effective units against loops; subgroups of fewer units."""

import math

import pytest
import torch
from torch import nn

from lightning_sym.symmetry import breaking_distances, effective_units, find_symmetries, narrowed
from tests.models import convnet, mlp


def network(*widths, act=nn.ReLU, seed=0):
    torch.manual_seed(seed)
    return mlp(*widths, act=act).double()


def units(net):
    """All that moves with each hidden unit of a network of two layers, one row a unit."""
    into, bias, out = net[0].weight.detach(), net[0].bias.detach(), net[2].weight.detach()
    return [torch.cat([into[u], bias[u : u + 1], out[:, u]]) for u in range(6)]


def found(net, kind):
    (symmetry,) = find_symmetries(net, torch.randn(3, 4)).of_kind(kind)
    return symmetry


def test_distances_are_those_of_a_loop():
    net = network(4, 6, 3)
    with torch.no_grad():
        for p in net.parameters():
            p *= torch.rand(len(p)).double().reshape(-1, *[1] * (p.ndim - 1))
    rows = units(net)
    rms = math.sqrt(sum(float(row @ row) for row in rows) / 6)
    for scale in (None, 0.7):
        length = math.inf if scale is None else 1 / scale
        twins, zeros = [], []
        for u, row in enumerate(rows):
            nearest = []
            for v, other in enumerate(rows):
                if v != u:
                    gap = float((row - other).norm())
                    relative = gap / math.sqrt(float(row @ row + other @ other))
                    nearest.append(min(relative, length * gap / math.sqrt(2), 1.0))
            twins.append(min(nearest))
            zeros.append(min(float(row.norm()) / rms, length * float(row.norm()), 1.0))
        for kind, expected in (("permutation", twins), ("rescaling", zeros)):
            read = breaking_distances(found(net, kind), net, scale=scale)
            torch.testing.assert_close(read, torch.tensor(expected).double())


def test_directions_of_a_linear_network_are_its_singular_ones():
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)).double()
    both = torch.cat([net[0].weight, net[1].weight.T], dim=1)
    sigma = torch.linalg.svdvals(both.detach())
    rms = sigma.square().mean().sqrt()
    symmetry = found(net, "rotation")
    expected = torch.minimum(sigma / rms, sigma / 2).clamp(max=1)
    torch.testing.assert_close(breaking_distances(symmetry, scale=2.0), expected)
    assert effective_units(symmetry, threshold=0.4, scale=2.0) == int((expected > 0.4).sum())


@pytest.mark.parametrize("by_direction", [False, True])
def test_effective_units_are_those_of_a_search(by_direction):
    net = network(4, 6, 3)
    symmetry = found(net, "permutation")
    for seed in range(12):
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn_like(p) * 0.5)
            for a, b, factor in ((0, 1, 1.02), (2, 1, 0.4), (3, 4, 1e-3)):
                net[0].weight[a], net[0].bias[a] = factor * net[0].weight[b], factor * net[0].bias[b]
                net[2].weight[:, a] = factor * net[2].weight[:, b]
        rows = units(net)
        left = {u for u in range(6) if float(rows[u].norm()) / 1.5 > 0.3}

        def apart(u, v, rows=rows):
            a, b = rows[u], rows[v]
            if by_direction:
                return math.sqrt(max(0.0, 1 - float(a @ b / a.norm() / b.norm())))
            gap = float((a - b).norm())
            return min(gap / math.sqrt(float(a @ a + b @ b)), gap / math.sqrt(2) / 1.5)

        groups = 0
        while left:
            groups, reached = groups + 1, [left.pop()]
            while reached:
                u = reached.pop()
                near = {v for v in left if apart(u, v) <= 0.3}
                left -= near
                reached += near
        read = effective_units(symmetry, net, threshold=0.3, scale=1.5, by_direction=by_direction)
        assert read == groups


def test_twins_and_zeros_are_not_counted():
    net = network(4, 6, 3)
    symmetry = found(net, "permutation")
    assert effective_units(symmetry, scale=None) == 6
    with torch.no_grad():
        net[0].weight[1], net[0].bias[1] = 2 * net[0].weight[0], 2 * net[0].bias[0]
        net[2].weight[:, 1] = 2 * net[2].weight[:, 0]
        net[0].weight[2:4], net[0].bias[2:4], net[2].weight[:, 2:4] = 0, 0, 0
    for scale in (None, 1.0):
        assert effective_units(symmetry, scale=scale) == 4
        assert effective_units(symmetry, scale=scale, by_direction=True) == 3
    with torch.no_grad():
        net[0].weight[5] = math.nan
    assert effective_units(symmetry) <= 4
    assert breaking_distances(symmetry)[5].isnan()


def test_a_subgroup_leaves_the_function_alone_and_moves_its_units():
    net = convnet().double().eval()
    x = torch.randn(2, 1, 8, 8).double()
    for symmetry in find_symmetries(net, x):
        part, numbers = narrowed(symmetry, most=2)
        assert part.units == min(symmetry.units, 2)
        assert len(numbers) == part.size
        before = net(x)
        part.transform(part.random_element(0))
        torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)  # scales: up to the norm's eps
    symmetry = found(network(4, 6, 3), "rescaling")
    part, numbers = narrowed(symmetry, most=4)
    assert numbers.tolist() == [0, 1, 3, 4]
    norms = symmetry.mirror_norm(dict(symmetry.module.named_parameters()))
    torch.testing.assert_close(part.mirror_norm(dict(part.module.named_parameters())), norms[numbers])
    assert narrowed(symmetry, most=6)[0] is symmetry


def test_bad_input_is_named():
    symmetry = found(network(4, 6, 3), "permutation")
    with pytest.raises(ValueError, match="most must be at least 2, got 1"):
        narrowed(symmetry, most=1)
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\), got 1.0"):
        effective_units(symmetry, threshold=1.0)
    with pytest.raises(ValueError, match="scale must be positive or None, got 0"):
        breaking_distances(symmetry, scale=0)
