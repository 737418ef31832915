"""Circuits side by side against the room's own circuit, which knows one at a time."""

import importlib
from pathlib import Path

import pytest
import torch

from lightning_sym.papers.learning_circuit import FourSynapse, LearningCircuit

EXAMPLES = Path(__file__).parents[2] / "examples"
WIDTHS = [6, 5, 4, 3]


@pytest.fixture
def circuits(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("_circuits")


class Rule(FourSynapse):
    """The four-synapse rule that leaves some laterals as they are."""

    def __init__(self, rate, *, held):
        super().__init__(rate, unit_rows=False)
        self.held = held

    def updates(self, site):
        found = super().updates(site)
        top = site.geometry.upper == (WIDTHS[-1],)
        if self.held == "all" or (self.held == "output" and top):
            found.pop("R")
        if self.held == "all":
            found.pop("L", None)
        return found


@pytest.mark.parametrize(("arm", "held"), [("assembled", "output"), ("frozen", "all"), ("plain", "none")])
def test_a_circuit_among_others_learns_as_the_room_s_own(circuits, arm, held):
    settings = [
        circuits.Setting(other, eta=eta, gamma=0.02, scale=0.5, lateral_rate=0.3, seed=3)
        for other, eta in (("sign", 0.5), (arm, 0.1), ("backprop", 0.2))
    ]
    stack = circuits.Circuits(WIDTHS, settings, dtype=torch.float64)
    room = LearningCircuit((6,), layers=WIDTHS[1:], rule=Rule(0.3, held=held), lr=0.1, decay=0.02).double()
    with torch.no_grad():
        for layer, synapses in zip(room.stack, stack.synapses, strict=True):
            for name, synapse in synapses.items():
                getattr(layer, name).copy_(synapse[1])
    optimizer = room.configure_optimizers()
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        x = torch.randn(7, 6, generator=generator).double()
        y = torch.randint(3, (7,), generator=generator)
        stack.learn(x.expand(3, -1, -1), y.expand(3, -1), share=1.0)
        room.learn((x, y), optimizer)
    for layer, synapses, bias in zip(room.stack, stack.synapses, stack.bias, strict=True):
        for name, synapse in synapses.items():
            assert torch.allclose(getattr(layer, name), synapse[1], atol=1e-12), name
        assert torch.allclose(layer.bias, bias[1, 0], atol=1e-12)


def test_backprop_among_circuits_follows_the_gradient(circuits):
    setting = circuits.Setting("backprop", eta=0.1, gamma=0.0, scale=1.0, lateral_rate=1.0, seed=0)
    stack = circuits.Circuits(WIDTHS, [setting], dtype=torch.float64)
    x, y = torch.randn(1, 9, 6).double(), torch.randint(3, (1, 9))
    changes = stack.changes(x, y)
    weights = [s["W"].clone().requires_grad_() for s in stack.synapses]
    h = x
    for k, weight in enumerate(weights):
        h = h @ weight.mT
        h = torch.relu(h) if k < 2 else h
    loss = torch.nn.functional.cross_entropy(h[0], y[0])
    for change, gradient in zip(changes, torch.autograd.grad(loss, weights), strict=True):
        assert torch.allclose(change["W"], -gradient, atol=1e-12)
        assert torch.allclose(change["bp"], -gradient, atol=1e-12)
    readings = stack.readings(x[0], y[0])
    assert readings["update"][0] == pytest.approx([1, 1])
    assert readings["laterals"][0] == pytest.approx([1, 1])


def test_a_circuit_that_diverges_is_set_to_zero_and_leaves_the_others_alone(circuits):
    settings = [circuits.Setting("backprop", 0.1, 0.0, 1.0, 1.0, seed=k) for k in range(2)]
    stack, twin = (circuits.Circuits(WIDTHS, settings) for _ in range(2))
    stack.synapses[1]["W"][0] = float("nan")
    x, y = torch.randn(2, 9, 6), torch.randint(3, (2, 9))
    for each in (stack, twin):
        each.clear()
        each.learn(x, y, share=1.0)
    assert stack.diverged.tolist() == [True, False]
    for ours, theirs in zip(stack.synapses, twin.synapses, strict=True):
        assert torch.equal(ours["W"][1], theirs["W"][1])
    assert stack.synapses[0]["W"].isfinite().all()


def test_an_unknown_arm_is_refused(circuits):
    with pytest.raises(ValueError, match=r"arm must be one of .* got 'magic'"):
        circuits.Circuits(WIDTHS, [circuits.Setting("magic", 0.1, 0.0, 1.0, 1.0, seed=0)])
