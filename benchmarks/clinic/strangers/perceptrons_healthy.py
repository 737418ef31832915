"""Multi-layer perceptrons: the healthy ones."""

import torch
from torch import nn
from torch.nn import functional as F

from .base import Lit, Run, case, dead_share, digits, loader
from .perceptrons import classify, mlp


@case("mlp_neural_collapse")
def _(seed):
    return classify(
        mlp(64, 256, 128, 10),
        900,
        batch=128,
        high=0.95,
        loss=lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1),
        optim=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.0005),
    )


@case("mlp_two_dimensional_inputs")
def _(seed):
    t = torch.rand(1500) * 6.28
    lab = torch.randint(0, 3, (1500,))
    flat = torch.stack([(lab + 1) * t.cos(), (lab + 1) * t.sin()], 1) + 0.1 * torch.randn(1500, 2)
    x = flat @ torch.randn(2, 50)
    return classify(
        mlp(50, 100, 60, 3), 500, train=(x[:1000], lab[:1000]), test=(x[1000:], lab[1000:]), high=0.9
    )


@case("mlp_strong_adamw_decay")
def _(seed):
    return classify(
        mlp(64, 128, 128, 10), 500, high=0.92, optim=lambda p: torch.optim.AdamW(p, 0.002, weight_decay=0.5)
    )


@case("mlp_forty_samples")
def _(seed):
    (a, b), _t = digits()
    return classify(mlp(64, 64, 10), 200, train=(a[:40], b[:40]), batch=20, high=0.55)


@case("mlp_stopped_early")
def _(seed):
    return classify(mlp(64, 300, 10), 60, batch=32, high=0.8)


@case("mlp_long_warm_up")
def _(seed):
    return classify(
        mlp(64, 128, 64, 10),
        500,
        high=0.85,
        optim=lambda p: torch.optim.Adam(p, 0.001),
        schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: min(1.0, 0.0001 + (s / 300) ** 2)),
    )


@case("mlp_lora")
def _(seed):
    (a, b), (c, d) = digits()
    base = mlp(64, 128, 128, 10)
    opt = torch.optim.Adam(base.parameters(), 0.002)
    for _i in range(200):
        i = torch.randint(0, 1300, (64,))
        opt.zero_grad()
        F.cross_entropy(base(a[i]), b[i]).backward()
        opt.step()

    class Lora(nn.Module):
        def __init__(self, lin, r=4):
            super().__init__()
            self.lin = lin
            for p in lin.parameters():
                p.requires_grad = False
            self.down = nn.Linear(lin.in_features, r, bias=False)
            self.up = nn.Linear(r, lin.out_features, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x):
            return self.lin(x) + 2 * self.up(self.down(x))

    net = nn.Sequential(*[Lora(l) if isinstance(l, nn.Linear) else l for l in base])
    torch.randperm(64)

    def roll(x):
        return x.view(-1, 8, 8).roll(1, -1).flatten(1)

    return classify(
        net,
        300,
        train=(roll(a), b),
        test=(roll(c), d),
        high=0.75,
        optim=lambda p: torch.optim.AdamW([q for q in p if q.requires_grad], 0.003),
    )


@case("mlp_fine_tuning_tiny_rate")
def _(seed):
    (a, b), (_c, _d) = digits()
    net = mlp(64, 128, 128, 10)
    opt = torch.optim.Adam(net.parameters(), 0.002)
    for _i in range(300):
        i = torch.randint(0, 1300, (64,))
        opt.zero_grad()
        F.cross_entropy(net(a[i]), b[i]).backward()
        opt.step()
    return classify(net, 200, high=0.9, optim=lambda p: torch.optim.Adam(p, 1e-05))


@case("bag_of_words_sparse")
def _(seed):
    topics = torch.distributions.Dirichlet(torch.full((5, 300), 0.05)).sample()
    lab = torch.randint(0, 5, (1500,))
    x = torch.distributions.Multinomial(30, probs=topics[lab] + 1e-06).sample()
    x[:, 250:] = 0
    return classify(
        mlp(300, 64, 5),
        300,
        train=(x[:1100], lab[:1100]),
        test=(x[1100:], lab[1100:]),
        high=0.9,
        optim=lambda p: torch.optim.Adagrad(p, 0.03),
    )


@case("mlp_some_dead_units")
def _(seed):
    net = mlp(64, 400, 100, 10)
    with torch.no_grad():
        net[0].bias[:100] = -6.0
    return classify(net, 300, high=0.92, extra=dead_share)


@case("autoencoder_bottleneck_two")
def _(seed):
    (a, _b), (c, _d) = digits()
    net = nn.Sequential(mlp(64, 100, 2), mlp(2, 100, 64))
    m = Lit(net, F.mse_loss, lambda p: torch.optim.Adam(p, 0.003))

    def truth():
        with torch.no_grad():
            r2 = float(1 - F.mse_loss(m(c), c) / (c - a.mean(0)).square().mean())
        return ({"r2": r2}, not r2 > 0.25)

    return Run([(m, loader(a, a), 500)], truth)


@case("regression_one_output_linear")
def _(seed):
    x = torch.randn(1000, 30)
    w = torch.randn(30, 1)
    y = x @ w + 0.1 * torch.randn(1000, 1)
    m = Lit(mlp(30, 64, 64, 1), F.mse_loss, lambda p: torch.optim.Adam(p, 0.002))
    xt = torch.randn(500, 30)

    def truth():
        with torch.no_grad():
            r2 = float(1 - F.mse_loss(m(xt), xt @ w) / (xt @ w).var())
        return ({"r2": r2}, not r2 > 0.8)

    return Run([(m, loader(x, y, batch=50), 500)], truth)


@case("regression_heavy_tails_huber")
def _(seed):
    x = torch.rand(1500, 5) * 2 - 1

    def f(x):
        return 3 * torch.sin(3 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]

    y = f(x) + torch.distributions.StudentT(1.5).sample((1500, 1))
    m = Lit(mlp(5, 80, 80, 1, act=nn.SiLU), F.huber_loss, lambda p: torch.optim.AdamW(p, 0.003))
    xt = torch.rand(500, 5) * 2 - 1

    def truth():
        with torch.no_grad():
            r2 = float(1 - F.mse_loss(m(xt), f(xt)) / f(xt).var())
        return ({"r2": r2}, not r2 > 0.6)

    return Run([(m, loader(x, y, batch=128), 500)], truth)


@case("mlp_noisy_labels")
def _(seed):
    (a, b), _t = digits()
    b = b.clone()
    i = torch.rand(1300) < 0.4
    b[i] = torch.randint(0, 10, (int(i.sum()),))
    return classify(
        mlp(64, 100, 10), 300, train=(a, b), high=0.8, optim=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)
    )


@case("mlp_loss_spike_recovers")
def _(seed):
    """At twelve times the rate nine of ten units died: the spike is milder since."""
    r = classify(
        mlp(64, 128, 64, 10),
        500,
        high=0.9,
        optim=lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
        schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: 6.0 if 200 <= s < 206 else 1.0),
        extra=dead_share,
    )
    t = r.truth

    def truth():
        n, sick = t()
        return (n, sick or n["dead_most"] > 0.8)

    r.truth = truth
    return r


@case("mlp_cyclic_rate")
def _(seed):
    return classify(
        mlp(64, 128, 64, 10),
        500,
        high=0.93,
        optim=lambda p: torch.optim.SGD(p, 0.02, momentum=0.9),
        schedule=lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.001, 0.3, step_size_up=60),
    )


@case("mlp_swa")
def _(seed):
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    return classify(
        mlp(64, 100, 50, 10),
        400,
        high=0.93,
        optim=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        callbacks=[StochasticWeightAveraging(swa_lrs=0.03, swa_epoch_start=10, annealing_epochs=3)],
        trainer={"max_epochs": 20, "max_steps": -1},
    )


@case("mlp_constant_features")
def _(seed):
    (a, b), (c, d) = digits()
    a, c = (torch.cat([a, torch.ones(len(a), 64)], 1), torch.cat([c, torch.ones(len(c), 64)], 1))
    return classify(mlp(128, 64, 64, 10), 350, train=(a, b), test=(c, d), high=0.9)


@case("mlp_heavy_dropout")
def _(seed):
    net = nn.Sequential(
        nn.Linear(64, 256),
        nn.ReLU(),
        nn.Dropout(0.7),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Dropout(0.7),
        nn.Linear(256, 10),
    )
    return classify(net, 500, high=0.9)


@case("mlp_class_imbalance")
def _(seed):
    x = torch.randn(2000, 20)
    y = (x[:, 0] + 0.5 * x[:, 1] > 2.0).long()
    xt = torch.randn(3000, 20)
    yt = (xt[:, 0] + 0.5 * xt[:, 1] > 2.0).long()
    m = Lit(mlp(20, 64, 64, 2), F.cross_entropy, lambda p: torch.optim.Adam(p, 0.002))

    def truth():
        with torch.no_grad():
            p = m(xt).argmax(1)
        bal = float(((p[yt == 1] == 1).float().mean() + (p[yt == 0] == 0).float().mean()) / 2)
        return ({"balanced": bal}, not bal > 0.75)

    return Run([(m, loader(x, y, batch=100), 400)], truth, targets=1)


@case("mlp_tanh_deep_orthogonal")
def _(seed):
    net = mlp(64, *[64] * 10, 10, act=nn.Tanh)
    for l in net:
        if isinstance(l, nn.Linear):
            nn.init.orthogonal_(l.weight, 1.1)
    return classify(net, 400, high=0.9, optim=lambda p: torch.optim.SGD(p, 0.03, momentum=0.9))


@case("siren_image_fit")
def _(seed):
    g = torch.linspace(-1, 1, 32)
    xy = torch.stack(torch.meshgrid(g, g, indexing="ij"), -1).view(-1, 2)
    y = torch.sin(9 * xy[:, :1]) * torch.cos(7 * xy[:, 1:])

    class Sine(nn.Module):
        def __init__(self, a, b, w=12.0, first=False):
            super().__init__()
            self.l = nn.Linear(a, b)
            self.w = w
            nn.init.uniform_(
                self.l.weight,
                -1 / a if first else -((6 / a) ** 0.5) / w,
                1 / a if first else (6 / a) ** 0.5 / w,
            )

        def forward(self, x):
            return torch.sin(self.w * self.l(x))

    m = Lit(
        nn.Sequential(Sine(2, 64, first=True), Sine(64, 64), nn.Linear(64, 1)),
        F.mse_loss,
        lambda p: torch.optim.Adam(p, 0.001),
    )

    def truth():
        with torch.no_grad():
            r2 = float(1 - F.mse_loss(m(xy), y) / y.var())
        return ({"r2": r2}, not r2 > 0.9)

    return Run([(m, loader(xy, y, batch=256), 500)], truth)


@case("gd_at_the_edge_improves")
def _(seed):
    x = torch.linspace(-2, 2, 80)[:, None]
    y = x.sin() + 0.3 * x
    m = Lit(mlp(1, 50, 50, 1, act=nn.Tanh), F.mse_loss, lambda p: torch.optim.SGD(p, 0.15))

    def truth():
        with torch.no_grad():
            r2 = float(1 - F.mse_loss(m(x), y) / y.var())
        return ({"r2": r2}, not r2 > 0.9)

    return Run([(m, loader(x, y, batch=80), 500)], truth)
