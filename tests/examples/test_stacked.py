"""Networks trained side by side against the same ones trained alone."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def stacked(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("_stacked")


def alone(stack, k):
    """Return one network of a stack as a module."""
    layers = []
    for weight in stack.weights:
        layer = nn.Linear(weight.shape[1], weight.shape[2], bias=False).double()
        with torch.no_grad():
            layer.weight.copy_(weight[k].mT)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def test_each_network_is_trained_as_if_alone(stacked):
    stack = stacked.Stack([4, 6, 5, 3], seeds=[0, 7, 0], activation=torch.tanh, dtype=torch.float64)
    assert torch.equal(stack.weights[0][0], stack.weights[0][2])
    lrs, decays = [0.1, 0.2, 0.1], [0.0, 0.01, 0.3]
    modules = [alone(stack, k) for k in range(3)]
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=lr, weight_decay=decay)
        for m, lr, decay in zip(modules, lrs, decays, strict=True)
    ]
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        x, y = torch.randn(3, 8, 4, generator=generator), torch.randn(3, 8, 3, generator=generator)
        x, y = x.double(), y.double()
        stack.step(
            (stack.outputs(x) - y).square().sum() / 8,
            lr=torch.tensor(lrs).view(-1, 1, 1),
            decay=torch.tensor(decays).view(-1, 1, 1),
        )
        for k, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
            optimizer.zero_grad()
            ((module(x[k]) - y[k]).square().sum() / 8).backward()
            optimizer.step()
    for k, module in enumerate(modules):
        for weight, parameter in zip(stack.weights, module.parameters(), strict=True):
            assert torch.allclose(weight[k].mT, parameter, atol=1e-7)  # lr and decay are float32


def test_gradients_are_of_single_samples(stacked):
    stack = stacked.Stack([3, 5, 2], seeds=[0, 1], activation=torch.tanh, dtype=torch.float64)
    x, y = torch.randn(2, 4, 3).double(), torch.randn(2, 4, 2).double()
    below, above, g_below, g_above = stack.gradients(x, loss=lambda out: (out - y).square().sum())
    first, second = (w.detach() for w in stack.weights)
    for k in range(2):
        for n in range(4):
            pre = x[k, n] @ first[k]
            g_out = 2 * (torch.tanh(pre) @ second[k] - y[k, n])
            g_hidden = second[k] @ g_out
            g_pre = g_hidden * (1 - torch.tanh(pre) ** 2)
            assert torch.allclose(below[1][k, n], torch.tanh(pre))
            assert torch.allclose(above[0][k, n], pre)
            assert torch.allclose(g_above[1][k, n], g_out)
            assert torch.allclose(g_below[1][k, n], g_hidden)
            assert torch.allclose(g_above[0][k, n], g_pre)
            assert torch.allclose(g_below[0][k, n], first[k] @ g_pre)


def test_stacked_convolutions_are_torch_s(stacked):
    stack = stacked.ConvolutionStack(
        7, (3, 4), hidden=6, outputs=5, seeds=[0, 1], gain=1.4, dtype=torch.float64
    )
    x = torch.randn(2, 9, 49, generator=torch.Generator().manual_seed(0)).double()
    below, above = stack.forward(x)
    gradients = torch.autograd.grad(above[-1].square().sum(), stack.weights)
    for k in range(2):
        first, second, hidden, output = (w[k].detach().clone().requires_grad_() for w in stack.weights)
        h = x[k].view(9, 1, 7, 7)
        for weight in (first, second):
            kernel = weight.mT.view(weight.shape[1], -1, 3, 3)
            h = torch.relu(nn.functional.conv2d(h, kernel, stride=2, padding=1))
        flat = torch.relu(h.flatten(1) @ hidden)
        logits = flat @ output
        torch.testing.assert_close(above[-1][k], logits)
        torch.testing.assert_close(below[-1][k], flat)
        alone = torch.autograd.grad(logits.square().sum(), [first, second, hidden, output])
        for ours, theirs in zip(gradients, alone, strict=True):
            torch.testing.assert_close(ours[k], theirs)
