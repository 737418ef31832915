"""Constraints by symmetry against the closed forms of the penalties that they amount to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_sym.optim.dcs import KINDS, constrain, finalize


def layer(o=6, i=5, seed=0):
    module = nn.Linear(i, o, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.randn(o, i, generator=torch.Generator().manual_seed(seed)))
    return module


def shrunk(target, kind, strength, *, steps=6000, lr=0.1):
    """Minimise |W - target|^2 / 2 under the constraint's decay; return the weight and what was set to 0."""
    module = layer(*target.shape)
    with torch.no_grad():
        module.weight.copy_(target)
    factors = constrain(module, kind=kind)
    free = [p for p in module.parameters() if not any(p is f for f in factors)]
    groups = [{"params": factors, "weight_decay": strength}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD([g for g in groups if g["params"]], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (module.weight - target).square().sum()).backward()
        optimizer.step()
    gone = finalize(module, tolerance=1e-4)
    return module.weight.detach(), gone


@pytest.mark.parametrize("kind", KINDS)
def test_factorising_keeps_the_weight_and_the_output(kind):
    module = nn.Conv2d(3, 4, 2).double()
    before, x = module.weight.detach().clone(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    output = module(x)
    first, second = constrain(module, kind=kind)
    assert torch.allclose(module.weight, before, atol=1e-12)
    assert torch.allclose(module(x), output, atol=1e-12)
    # Balanced: no factors with this product decay less.
    assert first.norm().item() == pytest.approx(second.norm().item(), rel=1e-9)


def test_sparsity_is_the_soft_threshold():
    """The zeros of the two-factor regression follow sign(t) max(|t| - g, 0)."""
    target = layer(8, 8).weight.detach()
    for strength in (0.1, 0.3, 0.6):
        weight, gone = shrunk(target, "sparse", strength)
        expected = target.sign() * (target.abs() - strength).clamp_min(0)
        assert torch.allclose(weight, expected, atol=2e-3)
        sure = (target.abs() - strength).abs() > 0.02  # at the threshold itself the way down is endless
        assert torch.equal(gone[sure], (target.abs() <= strength)[sure])
        assert (weight[gone] == 0).all()
        assert 0 < int(gone.sum()) < gone.numel()


def test_groups_follow_the_group_lasso():
    target = layer().weight.detach() * torch.tensor([0.1, 0.2, 1.0, 0.05, 1.5, 0.3])[:, None]
    weight, gone = shrunk(target, "group", 0.5)
    norm = target.norm(dim=1, keepdim=True)
    assert torch.allclose(weight, target * (1 - 0.5 / norm).clamp_min(0), atol=2e-3)
    assert torch.equal(gone, norm[:, 0] <= 0.5)
    assert (weight[gone] == 0).all()


def test_low_rank_shrinks_singular_values():
    target = layer().weight.detach()
    u, s, v = torch.linalg.svd(target, full_matrices=False)
    strength = float(s[2])  # below s[0], s[1]; above the rest
    strength = (strength + float(s[1])) / 2
    weight, gone = shrunk(target, "low_rank", strength)
    assert torch.allclose(weight, u @ torch.diag((s - strength).clamp_min(0)) @ v, atol=2e-3)
    assert gone.tolist() == [False, False, True, True, True]
    assert torch.linalg.matrix_rank(weight) == 2


def test_equal_units_share_their_mean():
    base = torch.randn(5, generator=torch.Generator().manual_seed(1)).double()
    target = base + layer().weight.detach() * torch.tensor([0.01, 0.02, 0.01, 2.0, 0.02, 0.01])[:, None]
    weight, gone = shrunk(target, "equal", 0.5)
    assert gone.tolist() == [True, True, True, False, True, True]
    units = weight[gone]
    assert all(torch.equal(unit, units[0]) for unit in units)


def test_what_is_refused():
    module = layer()
    with pytest.raises(ValueError, match=r"kind.*'odd'"):
        constrain(module, kind="odd")
    with pytest.raises(ValueError, match="name='bias'"):
        constrain(module, "bias", kind="sparse")
    with pytest.raises(ValueError, match="not factorised"):
        finalize(module)
    constrain(module, kind="sparse")
    with pytest.raises(ValueError, match="plain parameter"):
        constrain(module, kind="group")
    with pytest.raises(ValueError, match=r"tolerance.*-1"):
        finalize(module, tolerance=-1)
    with pytest.raises(ValueError, match="two dimensions"):
        constrain(nn.Linear(2, 2), "bias", kind="group")
