"""Multi-layer perceptrons."""

import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F

from .base import Lit, Run, accuracy, case, dead_share, digits, loader


def mlp(*widths, act=nn.ReLU):
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


def classify(
    net,
    steps,
    *,
    optim=None,
    batch=64,
    low=None,
    high=None,
    extra=None,
    train=None,
    test=None,
    loss=F.cross_entropy,
    schedule=None,
    **more,
):
    (a, b), (c, d) = digits()
    if train is not None:
        a, b = train
    if test is not None:
        c, d = test
    m = Lit(net, loss, optim or (lambda p: torch.optim.Adam(p, 0.001)), schedule)

    def truth():
        numbers = {"accuracy": accuracy(m, c, d)}
        if extra:
            numbers.update(extra(m, c))
        sick = numbers["accuracy"] < low if low is not None else not numbers["accuracy"] > high
        return (numbers, sick)

    return Run([(m, loader(a, b, batch=batch), steps)], truth, targets=1, **more)


@case("mlp_adam_rate_too_high", "dead_units")
def _(seed):
    r = classify(
        mlp(64, 200, 120, 80, 10),
        400,
        optim=lambda p: torch.optim.Adam(p, 0.08),
        batch=48,
        low=0.9,
        extra=dead_share,
    )
    return r


@case("mlp_negative_bias", "dead_units")
def _(seed):
    net = mlp(64, 96, 96, 10)
    for l in net:
        if isinstance(l, nn.Linear):
            nn.init.constant_(l.bias, -2.0)
    nn.init.zeros_(net[-1].bias)
    return classify(
        net, 300, optim=lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), low=0.6, extra=dead_share
    )


@case("mlp_inputs_far_from_zero", "dead_units", "rank_collapse", "equal_units")
def _(seed):
    (a, b), (c, d) = digits()
    return classify(
        mlp(64, 128, 64, 10),
        400,
        train=(a + 300.0, b),
        test=(c + 300.0, d),
        optim=lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
        low=0.5,
        extra=dead_share,
    )


@case("regression_huge_targets", "dead_units", "divergence")
def _(seed):
    x = torch.randn(1200, 12)
    w = torch.randn(12, 1)
    y = 800 + 30 * (x @ w).tanh()
    net = mlp(12, 100, 100, 1)
    m = Lit(net, F.mse_loss, lambda p: torch.optim.SGD(p, 0.01))

    def truth():
        xt = torch.randn(500, 12)
        yt = 800 + 30 * (xt @ w).tanh()
        with torch.no_grad():
            r2 = float(1 - F.mse_loss(m(xt), yt) / yt.var())
        n = {"r2": r2 if math.isfinite(r2) else -99.0, **dead_share(m, xt)}
        return (n, not r2 > 0.2)

    return Run([(m, loader(x, y, batch=40), 300)], truth)


@case("mlp_constant_init", "equal_units")
def _(seed):
    net = mlp(64, 50, 50, 10, act=nn.Tanh)
    for l in net:
        if isinstance(l, nn.Linear):
            nn.init.constant_(l.weight, 0.02)

    def extra(m, x):
        w = m.net[2].weight
        return {"row_spread": float((w - w.mean(0)).norm() / w.norm())}

    return classify(net, 350, low=0.6, extra=extra, optim=lambda p: torch.optim.SGD(p, 0.1))


@case(
    "mlp_zero_init",
    "equal_units",
    "dead_units",
    "weights_vanish",
    "frozen",
    "vanishing_gradients",
    "rank_collapse",
)
def _(seed):
    net = mlp(64, 80, 80, 10)
    for p in net.parameters():
        nn.init.zeros_(p)
    return classify(net, 200, low=0.3, optim=lambda p: torch.optim.Adam(p, 0.002))


@case("mlp_sgd_decay_far_too_strong", "weights_vanish")
def _(seed):
    net = mlp(64, 150, 100, 10, act=nn.GELU)
    start = sum(float(p.square().sum()) for p in net.parameters()) ** 0.5
    return classify(
        net,
        400,
        optim=lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.3),
        low=0.3,
        extra=lambda m, x: {
            "norm_ratio": sum(float(p.square().sum()) for p in m.net.parameters()) ** 0.5 / start
        },
    )


@case("mlp_l1_in_the_loss", "weights_vanish", "rank_collapse", "dead_units")
def _(seed):
    net = mlp(64, 128, 64, 10)
    r = classify(net, 500, low=0.4, optim=lambda p: torch.optim.Adam(p, 0.002))
    r.fits[0][0].loss = lambda o, y: (
        F.cross_entropy(o, y) + 0.02 * sum(p.abs().sum() for p in net.parameters())
    )
    return r


@case("mlp_decay_takes_directions", "rank_collapse", "weights_vanish")
def _(seed):
    """Decay that leaves a few classes: gradual."""
    net = mlp(64, 64, 64, 64, 10, act=nn.Tanh)
    return classify(net, 600, optim=lambda p: torch.optim.SGD(p, 0.2, weight_decay=0.045), low=0.7, batch=100)


@case("mlp_deep_default_init", "vanishing_gradients", "rank_collapse")
def _(seed):
    return classify(mlp(64, *[64] * 16, 10), 300, optim=lambda p: torch.optim.SGD(p, 0.05), low=0.4)


@case("regression_rate_too_high", "divergence", "exploding_gradients")
def _(seed):
    x = torch.randn(1000, 20) * 3
    y = x @ torch.randn(20, 2)
    m = Lit(
        nn.Sequential(nn.Linear(20, 40), nn.SiLU(), nn.Linear(40, 2)),
        F.mse_loss,
        lambda p: torch.optim.SGD(p, 0.2),
    )

    def truth():
        with torch.no_grad():
            r2 = float(1 - F.mse_loss(m(x), y) / y.var())
        return ({"r2": r2 if math.isfinite(r2) else -99.0}, not r2 > 0)

    return Run([(m, loader(x, y, batch=50), 200)], truth)


@case("regression_sqrt_of_zero", "divergence")
def _(seed):
    """A distance of equal points: the root's gradient is infinite, once a sample has target zero."""
    x = torch.randn(900, 8).relu()
    y = x.sum(1, keepdim=True)
    x[450:460] = 0
    y[450:460] = 0

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Sequential(nn.Linear(8, 32, bias=False), nn.ReLU(), nn.Linear(32, 16, bias=False))

        def forward(self, x):
            return self.f(x).square().sum(-1, keepdim=True).sqrt()

    m = Lit(Net(), F.mse_loss, lambda p: torch.optim.Adam(p, 0.001))
    return Run(
        [(m, loader(x, y, batch=30, shuffle=False), 240)],
        lambda: ({"finite": float(torch.isfinite(m(x)).all())}, not torch.isfinite(m(x)).all()),
    )


@case("mlp_deep_large_init", "exploding_gradients", "divergence")
def _(seed):
    net = mlp(64, *[80] * 9, 10)
    for l in net:
        if isinstance(l, nn.Linear):
            nn.init.normal_(l.weight, 0, 0.5)
    return classify(net, 250, low=0.8, optim=lambda p: torch.optim.Adam(p, 0.0001))


@case("mlp_sigmoid_deep", "vanishing_gradients")
def _(seed):
    return classify(
        mlp(64, *[100] * 7, 10, act=nn.Sigmoid),
        400,
        low=0.4,
        optim=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    )


@case("mlp_tanh_raw_pixels", "saturation")
def _(seed):
    (a, b), (c, d) = digits()
    a, c = (a * 255, c * 255)
    net = mlp(64, 90, 60, 10, act=nn.Tanh)

    def extra(m, x):
        with torch.no_grad():
            return {"saturated": float((m.net[1](m.net[0](x)).abs() > 0.97).float().mean())}

    r = classify(
        net, 300, train=(a, b), test=(c, d), low=0.9, extra=extra, optim=lambda p: torch.optim.SGD(p, 0.004)
    )
    return r


@case("mlp_sigmoid_wide_init", "saturation", "vanishing_gradients")
def _(seed):
    net = mlp(64, 120, 120, 10, act=nn.Sigmoid)
    for l in net:
        if isinstance(l, nn.Linear):
            nn.init.normal_(l.weight, 0, 4.0)

    def extra(m, x):
        with torch.no_grad():
            h = m.net[3](m.net[2](m.net[1](m.net[0](x))))
            return {"saturated": float(((h < 0.02) | (h > 0.98)).float().mean())}

    return classify(net, 300, low=0.85, extra=extra, optim=lambda p: torch.optim.SGD(p, 0.01))


@case("mlp_lazy_output_scale", "lazy_training")
def _(seed):
    """The output is scaled by 300, the loss by 1/300^2: weights hardly move, and parity is not learned."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = mlp(40, 400, 400, 1)
            self.f0 = [None]
            self.base = __import__("copy").deepcopy(self.f).requires_grad_(False)

        def forward(self, x):
            return 300.0 * (self.f(x) - self.base(x))

    x = torch.randn(600, 40).sign()
    y = x[:, :1] * x[:, 1:2] * x[:, 2:3]
    xt = torch.randn(600, 40).sign()
    yt = xt[:, :1] * xt[:, 1:2] * xt[:, 2:3]
    m = Lit(
        Net(),
        lambda o, t: F.mse_loss(o, t) / 300.0**2,
        lambda p: torch.optim.SGD([q for q in p if q.requires_grad], 0.02),
    )
    w0 = [p.detach().clone() for p in m.net.f.parameters()]

    def truth():
        with torch.no_grad():
            fit = float((m(x).sign() == y).float().mean())
            acc = float((m(xt).sign() == yt).float().mean())
        moved = max(
            (float((p - q).norm() / q.norm()) for p, q in zip(m.net.f.parameters(), w0, strict=False))
        )
        return ({"train": fit, "test": acc, "moved": moved}, fit > 0.8 and acc < 0.65 and (moved < 0.05))

    return Run([(m, loader(x, y, batch=100), 500)], truth)


@case("mlp_edge_full_batch", "edge_of_stability", "divergence")
def _(seed):
    """Full-batch descent with a rate far past the line: the loss jumps and does not come down."""
    x = torch.linspace(-3, 3, 64)[:, None]
    y = torch.sin(2 * x)
    m = Lit(mlp(1, 60, 60, 1, act=nn.Tanh), F.mse_loss, lambda p: torch.optim.SGD(p, 0.9))

    def truth():
        with torch.no_grad():
            r2 = float(1 - F.mse_loss(m(x), y) / y.var())
        return ({"r2": r2}, not r2 > 0.3)

    return Run([(m, loader(x, y, batch=64), 400)], truth)
