"""Convolutional networks, residual ones, U-Net, mixers."""

import torch
from torch import nn
from torch.nn import functional as F

from .base import Lit, Run, accuracy, case, dead_share, images, loader


def classify(
    net,
    steps,
    *,
    optim=None,
    batch=64,
    low=None,
    high=None,
    extra=None,
    loss=F.cross_entropy,
    schedule=None,
    train=None,
    **more,
):
    (a, b), (c, d) = images()
    if train is not None:
        a, b = train
    m = Lit(net, loss, optim or (lambda p: torch.optim.Adam(p, 0.002)), schedule)

    def truth():
        numbers = {"accuracy": accuracy(m, c, d)}
        if extra:
            numbers.update(extra(m, c))
        return (numbers, numbers["accuracy"] < low if low is not None else not numbers["accuracy"] > high)

    return Run([(m, loader(a, b, batch=batch), steps)], truth, targets=1, **more)


def cnn(width=16, bn=False, act=nn.ReLU):
    n = (lambda w: nn.BatchNorm2d(w)) if bn else lambda w: nn.Identity()
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        n(width),
        act(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        n(2 * width),
        act(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        n(2 * width),
        act(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


class Block(nn.Module):
    def __init__(self, w, zero=False):
        super().__init__()
        self.conv1, self.bn1 = (nn.Conv2d(w, w, 3, padding=1, bias=False), nn.BatchNorm2d(w))
        self.conv2, self.bn2 = (nn.Conv2d(w, w, 3, padding=1, bias=False), nn.BatchNorm2d(w))
        if zero:
            nn.init.zeros_(self.bn2.weight)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def resnet(w=16, n=3, zero=False):
    return nn.Sequential(
        nn.Conv2d(1, w, 3, padding=1, bias=False),
        nn.BatchNorm2d(w),
        nn.ReLU(),
        *[Block(w, zero) for _ in range(n)],
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * w, 10),
    )


class MixerBlock(nn.Module):
    def __init__(self, n, d):
        super().__init__()
        self.n1, self.n2 = (nn.LayerNorm(d), nn.LayerNorm(d))
        self.tok = nn.Sequential(nn.Linear(n, 2 * n), nn.GELU(), nn.Linear(2 * n, n))
        self.chan = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x):
        x = x + self.tok(self.n1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.chan(self.n2(x))


class Mixer(nn.Module):
    def __init__(self, d=40, n=3):
        super().__init__()
        self.patch = nn.Conv2d(1, d, 2, 2)
        self.blocks = nn.Sequential(*[MixerBlock(16, d) for _ in range(n)])
        self.norm, self.head = (nn.LayerNorm(d), nn.Linear(d, 10))

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


class UNet(nn.Module):
    def __init__(self, w=12):
        super().__init__()
        self.d1, self.d2 = (nn.Conv2d(1, w, 3, padding=1), nn.Conv2d(w, 2 * w, 3, stride=2, padding=1))
        self.mid = nn.Conv2d(2 * w, 2 * w, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * w, w, 2, 2)
        self.out = nn.Conv2d(2 * w, 1, 3, padding=1)

    def forward(self, x):
        a = F.leaky_relu(self.d1(x), 0.1)
        b = F.leaky_relu(self.mid(F.leaky_relu(self.d2(a), 0.1)), 0.1)
        return self.out(torch.cat([a, self.up(b)], 1))


@case("cnn_rate_far_too_high", "dead_units", "divergence")
def _(seed):
    return classify(
        cnn(24),
        300,
        optim=lambda p: torch.optim.SGD(p, 1.2, momentum=0.9),
        low=0.3,
        batch=32,
        extra=dead_share,
    )


@case("cnn_adam_kills_channels", "dead_units", "rank_collapse")
def _(seed):
    return classify(
        cnn(20), 300, optim=lambda p: torch.optim.Adam(p, 0.06), low=0.6, batch=80, extra=dead_share
    )


@case("cnn_bn_decay_on_everything", "weights_vanish", "rank_collapse")
def _(seed):
    """Decay on the norms' gains too, fifty times what was meant."""
    net = cnn(16, bn=True)
    net[1].weight.norm().item()
    return classify(
        net,
        400,
        optim=lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.15),
        low=0.4,
        extra=lambda m, x: {"gain": float(m.net[7].weight.norm()), "last": float(m.net[-1].weight.norm())},
    )


@case("resnet_block_scaled_by_zero", "dead_block")
def _(seed):
    net = resnet(20, 4)
    b = net[4]
    nn.init.zeros_(b.bn2.weight)
    nn.init.zeros_(b.conv2.weight)
    nn.init.zeros_(b.conv1.weight)
    nn.init.zeros_(b.bn1.weight)

    def truth_extra(m, x):
        h = m.net[:4](x)
        return {"branch": float(b.bn2(b.conv2(F.relu(b.bn1(b.conv1(h))))).std(0).max())}

    r = classify(net, 250, low=2.0, extra=truth_extra)
    t = r.truth

    def truth():
        n, _s = t()
        return (n, n["branch"] == 0)

    r.truth = truth
    return r


@case("resnet_dead_branch_bias", "dead_block", "dead_units")
def _(seed):

    class Plain(nn.Module):
        def __init__(self, w):
            super().__init__()
            self.conv1 = nn.Conv2d(w, w, 3, padding=1)
            self.conv2 = nn.Conv2d(w, w, 3, padding=1)

        def forward(self, x):
            return x + self.conv2(F.relu(self.conv1(x)))

    w = 24
    net = nn.Sequential(
        nn.Conv2d(1, w, 3, stride=2, padding=1),
        nn.ReLU(),
        *[Plain(w) for _ in range(5)],
        nn.Flatten(),
        nn.Linear(w * 16, 10),
    )
    nn.init.constant_(net[4].conv1.bias, -20.0)
    r = classify(
        net,
        250,
        low=2.0,
        extra=lambda m, x: {"fires": float((m.net[4].conv1(m.net[:4](x)) > 0).float().mean())},
        optim=lambda p: torch.optim.Adam(p, 0.0005),
    )
    t = r.truth

    def truth():
        n, _s = t()
        return (n, n["fires"] == 0)

    r.truth = truth
    return r


@case("cnn_backbone_not_in_optimizer", "frozen")
def _(seed):
    net = cnn(16)
    w0 = net[0].weight.detach().clone()
    r = classify(
        net,
        300,
        low=0.75,
        optim=lambda p: torch.optim.Adam(net[-1].parameters(), 0.002),
        extra=lambda m, x: {"moved": float((net[0].weight - w0).abs().max())},
    )
    return r


@case("cnn_equal_filters", "equal_units")
def _(seed):
    net = cnn(12)
    for l in net:
        if isinstance(l, nn.Conv2d):
            nn.init.constant_(l.weight, 0.05)
            nn.init.zeros_(l.bias)
    return classify(
        net,
        300,
        low=0.5,
        extra=lambda m, x: {
            "spread": float((net[3].weight - net[3].weight.mean(0)).norm() / net[3].weight.norm())
        },
        optim=lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    )


@case("cnn_deep_sigmoid", "vanishing_gradients")
def _(seed):
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.Sigmoid()]
    for _i in range(7):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.Sigmoid()]
    return classify(
        nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)),
        250,
        low=0.4,
        optim=lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    )


@case("mixer_diverges", "divergence", "rank_collapse", "dead_units")
def _(seed):
    return classify(Mixer(), 250, low=0.4, optim=lambda p: torch.optim.SGD(p, 3.0, momentum=0.95), batch=32)


@case("unet_sees_detached_encoder", "frozen")
def _(seed):

    class Bad(UNet):
        def forward(self, x):
            a = F.leaky_relu(self.d1(x), 0.1)
            b = F.leaky_relu(self.mid(F.leaky_relu(self.d2(a), 0.1)), 0.1)
            return self.out(torch.cat([a.detach(), self.up(b.detach())], 1))

    (a, _b), (_c, _d) = images()
    net = Bad()
    w0 = net.d2.weight.detach().clone()
    m = Lit(net, F.mse_loss, lambda p: torch.optim.Adam(p, 0.003))

    def noisy(x):
        return x + 0.4 * torch.randn(x.shape)

    def truth():
        moved = float((net.d2.weight - w0).abs().max())
        return ({"moved": moved}, moved == 0)

    return Run([(m, loader(noisy(a), a), 250)], truth)


@case("cnn_group_rate_zero", "frozen")
def _(seed):
    """Integer division in the schedule of the first group: its rate is zero for good."""
    net = cnn(16, bn=True)
    w0 = net[3].weight.detach().clone()

    def optim(p):
        return torch.optim.SGD(
            [{"params": net[:6].parameters()}, {"params": net[6:].parameters()}], 0.05, momentum=0.9
        )

    return classify(
        net,
        250,
        low=2.0,
        optim=optim,
        schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, [lambda s: 1 // 10, lambda s: 1.0]),
        extra=lambda m, x: {"moved": float((net[3].weight - w0).abs().max())},
    )


@case("cnn_exploding_no_norm", "exploding_gradients", "divergence", "dead_units")
def _(seed):
    layers = [nn.Conv2d(1, 24, 3, padding=1), nn.ReLU()]
    for _i in range(8):
        layers += [nn.Conv2d(24, 24, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))
    for l in net:
        if isinstance(l, nn.Conv2d):
            nn.init.normal_(l.weight, 0, 0.35)
    return classify(net, 200, low=0.6, optim=lambda p: torch.optim.Adam(p, 0.0001))


@case("cnn_plain")
def _(seed):
    return classify(cnn(20), 400, batch=50, high=0.85, optim=lambda p: torch.optim.RMSprop(p, 0.001))


@case("cnn_bn_mixup_smoothing")
def _(seed):

    class Mix(Lit):
        def training_step(self, batch, i):
            x, y = batch
            lam = float(torch.distributions.Beta(0.4, 0.4).sample())
            j = torch.randperm(len(x))
            o = self(lam * x + (1 - lam) * x[j])
            return lam * F.cross_entropy(o, y, label_smoothing=0.1) + (1 - lam) * F.cross_entropy(
                o, y[j], label_smoothing=0.1
            )

    r = classify(cnn(16, bn=True), 350, high=0.92)
    m = r.fits[0][0]
    m.__class__ = Mix
    return r


@case("resnet_zero_init_residual")
def _(seed):
    return classify(
        resnet(16, 4, zero=True),
        250,
        high=0.93,
        optim=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.001, nesterov=True),
        batch=100,
    )


@case("resnet_onecycle_late")
def _(seed):
    return classify(
        resnet(12, 2),
        400,
        high=0.95,
        batch=128,
        optim=lambda p: torch.optim.AdamW(p, 0.001, weight_decay=0.05),
        schedule=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.02, total_steps=402),
    )


@case("cnn_frozen_backbone_on_purpose")
def _(seed):
    net = cnn(24, bn=True)
    (a, b), _t = images()
    opt = torch.optim.Adam(net.parameters(), 0.003)
    for _i in range(150):
        k = torch.randint(0, 1300, (64,))
        opt.zero_grad()
        F.cross_entropy(net(a[k]), b[k] // 5).backward()
        opt.step()
    for p in net.parameters():
        p.requires_grad = False
    net[-1] = nn.Linear(48, 10)
    return classify(
        net, 300, high=0.6, optim=lambda p: torch.optim.Adam([q for q in p if q.requires_grad], 0.01)
    )


@case("mixer_small")
def _(seed):
    return classify(Mixer(), 300, high=0.9, optim=lambda p: torch.optim.AdamW(p, 0.002, weight_decay=0.1))


@case("unet_denoiser")
def _(seed):
    (a, _b), (c, _d) = images()
    m = Lit(UNet(), F.l1_loss, lambda p: torch.optim.Adam(p, 0.003))

    def noisy(x):
        return x + 0.4 * torch.randn(x.shape)

    cn = noisy(c)

    def truth():
        with torch.no_grad():
            ratio = float(F.mse_loss(m(cn), c) / F.mse_loss(cn, c))
        return ({"error_ratio": ratio}, not ratio < 0.5)

    return Run([(m, loader(noisy(a), a), 300)], truth)


@case("cnn_depthwise_gelu_large_batch")
def _(seed):
    w = 32
    net = nn.Sequential(
        nn.Conv2d(1, w, 2, 2),
        nn.GroupNorm(4, w),
        *[
            l
            for _i in range(2)
            for l in (
                nn.Conv2d(w, w, 3, padding=1, groups=w),
                nn.GELU(),
                nn.GroupNorm(4, w),
                nn.Conv2d(w, w, 1),
                nn.GELU(),
            )
        ],
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(w, 10),
    )
    return classify(net, 250, high=0.85, batch=512, optim=lambda p: torch.optim.AdamW(p, 0.008))


@case("conv1d_binary_series")
def _(seed):
    n = 1600
    t = torch.arange(64).float()
    lab = torch.randint(0, 2, (n,))
    x = torch.sin(t[None] * (0.3 + 0.2 * lab[:, None]) + 6.28 * torch.rand(n, 1)) + 0.5 * torch.randn(n, 64)
    x = x[:, None]
    net = nn.Sequential(
        nn.Conv1d(1, 16, 7, padding=3),
        nn.ELU(),
        nn.MaxPool1d(4),
        nn.Conv1d(16, 32, 5, padding=2),
        nn.ELU(),
        nn.AdaptiveMaxPool1d(1),
        nn.Flatten(),
        nn.Linear(32, 1),
    )
    m = Lit(
        net,
        lambda o, y: F.binary_cross_entropy_with_logits(o[:, 0], y.float()),
        lambda p: torch.optim.NAdam(p, 0.002),
    )

    def truth():
        with torch.no_grad():
            acc = float(((m(x[1200:])[:, 0] > 0) == lab[1200:]).float().mean())
        return ({"accuracy": acc}, not acc > 0.85)

    return Run([(m, loader(x[:1200], lab[:1200], batch=40), 300)], truth, targets=1)


@case("conv_autoencoder")
def _(seed):
    (a, _b), (c, _d) = images()
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 12),
        nn.Linear(12, 128),
        nn.ReLU(),
        nn.Unflatten(1, (32, 2, 2)),
        nn.ConvTranspose2d(32, 16, 2, 2),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 1, 2, 2),
        nn.Sigmoid(),
    )
    m = Lit(net, F.mse_loss, lambda p: torch.optim.Adam(p, 0.003))

    def truth():
        with torch.no_grad():
            r2 = float(1 - F.mse_loss(m(c), c) / (c - a.mean(0)).square().mean())
        return ({"r2": r2}, not r2 > 0.5)

    return Run([(m, loader(a, a, batch=100), 400)], truth)
