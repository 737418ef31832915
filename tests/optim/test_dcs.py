"""Constraints by symmetry against the closed forms of the penalties that they amount to."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.optim import dcs
from lightning_sym.optim.dcs import KINDS, constrain, finalize, penalty
from tests.models import trainer


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
    # Nearly balanced, where no factors with this product decay less; the first is never the smaller one.
    decayed = first.square().sum() + second.square().sum()
    product = {"sparse": before.abs().sum(), "low_rank": torch.linalg.matrix_norm(before.flatten(1), "nuc")}
    apart = before.flatten(1) - (before.flatten(1).mean(0) if kind == "equal" else 0)
    bound = 2 * product.get(kind, apart.norm(dim=1).sum())
    assert 1 - 1e-12 <= decayed / bound < 1.1
    assert first.norm() >= second.norm() * (1 - 1e-9)


def test_an_entry_can_change_its_sign_and_leave_zero():
    """Factors of exactly equal size could do neither."""
    target = torch.tensor([[1.0, -2.0, 1.5]], dtype=torch.float64)
    for begin in (-target, torch.zeros_like(target)):
        module = nn.Linear(3, 1, bias=False).double()
        with torch.no_grad():
            module.weight.copy_(begin)
        factors = constrain(module, kind="sparse")
        assert torch.equal(module.weight, begin)
        optimizer = torch.optim.SGD(factors, lr=0.1, weight_decay=0.1)
        for _ in range(2000):
            optimizer.zero_grad()
            (0.5 * (module.weight - target).square().sum()).backward()
            optimizer.step()
        torch.testing.assert_close(module.weight.detach(), target - 0.1 * target.sign(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("trainable", [True, False])
def test_a_finalized_weight_is_a_parameter_as_before(trainable):
    module = layer()
    module.weight.requires_grad_(trainable)
    constrain(module, kind="group")
    finalize(module)
    assert [(n, p.requires_grad) for n, p in module.named_parameters()] == [("weight", trainable)]
    assert not list(module.buffers())


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


@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_is_coupled_decay_and_at_balance_that_of_the_weight(kind):
    module = layer()
    rows = module.weight.detach().clone()
    factors = constrain(module, kind=kind)
    found = penalty(factors)
    apart = rows - rows.mean(0) if kind == "equal" else rows
    weights = {"sparse": rows.abs().sum(), "low_rank": torch.linalg.matrix_norm(rows, "nuc")}
    least = float(weights.get(kind, apart.norm(dim=1).sum()))
    assert least - 1e-12 <= float(found.detach()) < 1.1 * least
    for factor, gradient in zip(factors, torch.autograd.grad(found, factors), strict=True):
        torch.testing.assert_close(gradient, factor.detach())


def test_with_adam_the_penalty_follows_the_soft_threshold():
    module = layer(8, 8)
    target = module.weight.detach().clone()
    factors = constrain(module, kind="sparse")
    optimizer = torch.optim.Adam(factors, lr=0.02)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.998)
    for _ in range(3000):
        optimizer.zero_grad()
        (0.5 * (module.weight - target).square().sum() + 0.3 * penalty(factors)).backward()
        optimizer.step()
        decay.step()
    gone = finalize(module, tolerance=1e-3)
    expected = target.sign() * (target.abs() - 0.3).clamp_min(0)
    torch.testing.assert_close(module.weight.detach(), expected, rtol=0, atol=5e-3)
    sure = (target.abs() - 0.3).abs() > 0.02
    assert torch.equal(gone[sure], (expected == 0)[sure])


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
    with pytest.raises(ValueError, match="factors must hold"):
        penalty([])
    with pytest.raises(ValueError, match="two dimensions"):
        constrain(nn.Linear(2, 2), "bias", kind="group")


class Regression(LightningModule):
    """A constrained linear layer, its factors alone under decay, fitted to given outputs."""

    def __init__(self, kind: str, *, decay: float, lr: float = 0.5) -> None:
        super().__init__()
        self.layer, self.decay, self.lr = layer(6, 5), decay, lr
        self.factors = constrain(self.layer, kind=kind)

    def training_step(self, batch, batch_idx):
        x_N5, y_N6 = batch
        return 0.5 * (self.layer(x_N5) - y_N6).square().mean(0).sum()

    def configure_optimizers(self):
        free = [p for p in self.parameters() if not any(p is f for f in self.factors)]
        groups = [{"params": self.factors, "weight_decay": self.decay}, {"params": free, "weight_decay": 0.0}]
        return torch.optim.SGD([g for g in groups if g["params"]], lr=self.lr)


TARGET = layer(6, 5, seed=3).weight.detach() * torch.tensor([1.0, 0.2, 1.5, 0.1, 1.0, 0.3])[:, None]


def whitened(repeats: int) -> DataLoader:
    """Full batches of inputs whose covariance is the identity: the loss is |W - TARGET|^2 / 2."""
    draw = torch.randn(20, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x_N5 = torch.linalg.qr(draw)[0] * 20**0.5
    return DataLoader(
        TensorDataset(x_N5.repeat(repeats, 1), (x_N5 @ TARGET.mT).repeat(repeats, 1)), batch_size=20
    )


def least(kind: str, target, strength):
    """The minimum of |W - T|^2 / 2 + strength * penalty, in closed form."""
    if kind == "sparse":
        return target.sign() * (target.abs() - strength).clamp_min(0)
    if kind == "low_rank":
        u, s, v = torch.linalg.svd(target, full_matrices=False)
        return u @ torch.diag((s - strength).clamp_min(0)) @ v
    norm = target.norm(dim=1, keepdim=True)
    return target * (1 - strength / norm).clamp_min(0)


@pytest.mark.parametrize("kind", ["sparse", "group", "low_rank"])
def test_a_fit_ends_at_the_closed_form_and_its_zeros_are_exact(kind):
    strength = 0.4
    model = Regression(kind, decay=strength)
    trainer(max_epochs=4).fit(model, whitened(400))
    expected = least(kind, TARGET, strength)
    torch.testing.assert_close(model.layer.weight.detach(), expected, rtol=0, atol=2e-3)
    x = torch.randn(7, 5, dtype=torch.float64)
    before = model.layer(x)
    gone = finalize(model.layer, tolerance=1e-3)
    assert 0 < int(gone.sum()) < gone.numel()
    assert isinstance(model.layer.weight, nn.Parameter)
    torch.testing.assert_close(model.layer(x), before, rtol=0, atol=2e-2)
    weight = model.layer.weight.detach()
    if kind == "low_rank":
        assert torch.linalg.matrix_rank(weight) == gone.numel() - int(gone.sum())
    else:
        assert (weight[gone] == 0).all()
        assert (weight[~gone].flatten(1 if kind == "group" else 0).norm(dim=-1) > 1e-3).all()


def test_equal_units_are_the_minimum_of_distances_to_a_free_mean():
    """A slow twin: the group lasso on distances from a mean that is minimised over, by alternation."""
    strength, free = 0.4, TARGET.mean(0)
    for _ in range(2000):
        apart = least("group", TARGET - free, strength)
        free = (TARGET - apart).mean(0)
    model = Regression("equal", decay=strength, lr=0.1)
    trainer(max_epochs=10).fit(model, whitened(400))
    torch.testing.assert_close(model.layer.weight.detach(), free + apart, rtol=0, atol=2e-3)
    gone = finalize(model.layer, tolerance=1e-3)
    assert int(gone.sum()) >= 2
    weight = model.layer.weight.detach()
    assert (weight[gone] == weight[gone][0]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_continues_bitwise(kind, tmp_path):
    def run(epochs, path=None):
        keep = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
        model = Regression(kind, decay=0.1, lr=0.05)
        trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=[keep]).fit(
            model, whitened(5), ckpt_path=path
        )
        return model, keep.last_model_path

    unbroken, _ = run(4)
    _, path = run(2)
    resumed, path = run(4, path)
    assert torch.equal(unbroken.layer.weight, resumed.layer.weight)
    stored = torch.load(path, weights_only=True)["state_dict"]
    fresh = Regression(kind, decay=0.1)
    assert not torch.equal(fresh.layer.weight, resumed.layer.weight)
    fresh.load_state_dict(stored)
    assert torch.equal(fresh.layer.weight, resumed.layer.weight)
    # In one piece again, it is an ordinary layer's checkpoint.
    finalize(fresh.layer)
    torch.save(fresh.state_dict(), tmp_path / "final.pt")
    plain = layer()
    state = torch.load(tmp_path / "final.pt", weights_only=True)
    plain.load_state_dict({name.removeprefix("layer."): value for name, value in state.items()})
    assert torch.equal(plain.weight, fresh.layer.weight)


def test_that_the_form_is_derived_is_said():
    assert "derived" in (dcs.__doc__ or "")
    assert "derived" in (constrain.__doc__ or "")
