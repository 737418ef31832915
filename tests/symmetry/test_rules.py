"""The register of rules: what it refuses, and that a fault of a rule is not taken for a missing one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_sym.symmetry import find_symmetries
from lightning_sym.symmetry._legs import Mismatch
from lightning_sym.symmetry.rules import NoRule, registry, rule


def net(*between: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), *between, nn.Linear(6, 3))


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fault", [AttributeError, NameError, TypeError, ValueError, KeyError, IndexError])
def test_a_fault_of_a_rule_is_raised(fault, monkeypatch):
    def wrong(equations, step):
        raise fault("a typo")

    monkeypatch.setitem(registry.RULES, "relu", wrong)
    with pytest.raises(fault, match="a typo"):
        find_symmetries(net(nn.ReLU()), X)


@pytest.mark.parametrize("kind", [NoRule, Mismatch])
def test_a_rule_that_does_not_apply_is_said(kind, monkeypatch):
    def given_up(equations, step):
        equations.pin(equations.of(step.args[0])[0])
        raise kind

    monkeypatch.setitem(registry.RULES, "relu", given_up)
    with pytest.warns(UserWarning, match=r"relu in 1: no rule"):
        found = find_symmetries(net(nn.ReLU()), X)
    assert list(found) == []
    assert found.untraced == ("relu in 1: no rule, units that pass through it are held in place",)


def test_every_rule_is_for_an_operation_of_torch():
    missing = [
        name
        for name in registry.RULES
        if not hasattr(torch.ops.aten, name) and not hasattr(torch.ops.aten, f"{name}_")
    ]
    assert missing == []


def test_an_operation_has_one_rule():
    with pytest.raises(ValueError, match="'relu', which has one"):
        rule("surely_new", "relu")
    assert "surely_new" not in registry.RULES


def test_another_librarys_operation_of_the_same_name_is_not_taken_for_torchs():
    with torch.library._scoped_library("lightning_sym_test", "DEF") as library:
        library.define("relu(Tensor x) -> Tensor")
        library.impl("relu", lambda x: x + torch.arange(x.shape[-1]), "CPU")

        class Custom(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.ops.lightning_sym_test.relu(x)

        with pytest.warns(UserWarning, match=r"lightning_sym_test\.relu in 1: no rule"):
            found = find_symmetries(net(Custom()), X)
        assert list(found) == []
        assert found.refuted == ()


class Apply(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "kinds"),
    [
        # An empty part of a concatenation adds nothing.
        (lambda h: torch.cat([h, h[:, :0]], 1).relu(), ["permutation", "rescaling"]),
        (lambda h: torch.cat([h[:, 6:], h], 1).tanh(), ["permutation", "signflip"]),
        # Numbers where a tensor usually stands.
        (lambda h: (2.0**h).relu(), []),
        (lambda h: (2.0 / (h + 9)).relu(), ["permutation"]),
        (lambda h: h.pow(torch.inf).nan_to_num(posinf=1.0), []),
    ],
)
@pytest.mark.filterwarnings("ignore:some symmetries may be missing")
def test_forms_that_few_networks_have(function, kinds):
    found = find_symmetries(net(Apply(function)), X)
    assert [s.kind for s in found] == kinds
    assert found.refuted == ()
