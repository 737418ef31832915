"""Generators: variational autoencoders and adversarial ones."""

import math

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F

from .base import Run, case, digits, loader


class VAE(LightningModule):
    def __init__(self, d_in=64, z=8, h=128, beta=1.0, lr=0.002, warm=0, act=nn.ReLU, bce=True):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(d_in, h), act(), nn.Linear(h, 2 * z))
        self.decoder = nn.Sequential(nn.Linear(z, h), act(), nn.Linear(h, d_in))
        self.beta, self.lr, self.warm, self.bce = (beta, lr, warm, bce)

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, -1)
        z = mu + torch.randn_like(mu) * (logvar / 2).exp()
        return (self.decoder(z), mu, logvar)

    def training_step(self, batch, i):
        x = batch[0]
        o, mu, logvar = self(x)
        rec = (
            (F.binary_cross_entropy_with_logits(o, x, reduction="none") if self.bce else 8 * (o - x).square())
            .sum(1)
            .mean()
        )
        kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1).mean()
        beta = self.beta * (min(1.0, self.global_step / self.warm) if self.warm else 1.0)
        return rec + beta * kl

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.lr)


def active(m, x):
    with torch.no_grad():
        mu, logvar = m.encoder(x).chunk(2, -1)
        o = m.decoder(mu)
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp())
    p = o.sigmoid() if m.bce else o
    return {
        "active": float((mu.var(0) > 0.01).sum()),
        "kl": float(kl.sum(1).mean()),
        "r2": float(1 - F.mse_loss(p, x) / (x - x.mean(0)).square().mean()),
    }


def vae(m, steps, need=None, collapsed=False, data=None, batch=64):
    (a, _b), (c, _d) = digits()
    if data is not None:
        a, c = data

    def truth():
        n = active(m, c)
        return (n, n["active"] == 0 if collapsed else not n["active"] >= need or not n["r2"] > 0.2)

    return Run([(m, loader(a, batch=batch), steps)], truth)


@case("vae_beta_far_too_large", "posterior_collapse")
def _(seed):
    return vae(VAE(beta=60.0), 350, collapsed=True)


@case("vae_mean_where_sum_was_meant", "posterior_collapse")
def _(seed):

    class Mean(VAE):
        def training_step(self, batch, i):
            x = batch[0]
            o, mu, logvar = self(x)
            return F.mse_loss(o, x) - 0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1).mean()

    return vae(Mean(z=16, h=96, bce=False, act=nn.SiLU), 350, collapsed=True)


@case("vae_autoregressive_decoder", "posterior_collapse")
def _(seed):

    class Text(LightningModule):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(12, 24)
            self.enc = nn.GRU(24, 48, batch_first=True)
            self.code = nn.Linear(48, 16)
            self.dec = nn.GRU(24 + 8, 64, batch_first=True)
            self.out = nn.Linear(64, 12)

        def encode(self, x):
            return self.code(self.enc(self.emb(x))[1][0]).chunk(2, -1)

        def training_step(self, batch, i):
            x = batch[0]
            mu, logvar = self.encode(x)
            z = mu + torch.randn_like(mu) * (logvar / 2).exp()
            h = torch.cat([self.emb(x[:, :-1]), z[:, None].expand(-1, x.shape[1] - 1, -1)], -1)
            rec = F.cross_entropy(
                self.out(self.dec(h)[0]).flatten(0, 1), x[:, 1:].flatten(), reduction="sum"
            ) / len(x)
            return rec - 0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1).mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.003)

    P = torch.distributions.Dirichlet(torch.full((12, 12), 0.15)).sample()
    s = [torch.randint(0, 12, (1000,))]
    for _i in range(14):
        s.append(torch.multinomial(P[s[-1]], 1)[:, 0])
    s = torch.stack(s, 1)
    m = Text()

    def truth():
        with torch.no_grad():
            mu, lv = m.encode(s)
        n = {
            "active": float((mu.var(0) > 0.01).sum()),
            "kl": float(-0.5 * (1 + lv - mu.square() - lv.exp()).sum(1).mean()),
        }
        return (n, n["active"] == 0)

    return Run([(m, loader(s, batch=50), 350)], truth)


@case("vae_digits")
def _(seed):
    return vae(VAE(z=10, h=200, lr=0.001), 500, need=4)


@case("vae_two_factors_ten_codes")
def _(seed):
    f = torch.rand(1500, 2) * 2 - 1
    net = torch.randn(2, 30)
    x = torch.tanh(f @ net) + 0.02 * torch.randn(1500, 30)
    return vae(
        VAE(d_in=30, z=10, h=64, bce=False, act=nn.Tanh, lr=0.003), 500, need=1, data=(x[:1200], x[1200:])
    )


@case("vae_kl_warm_up")
def _(seed):
    return vae(VAE(z=6, h=100, warm=300, beta=2.0), 450, need=2, batch=100)


class GAN(LightningModule):
    """Eight Gaussians on a ring."""

    def __init__(self, lr_g=0.001, lr_d=0.001, steps_g=1, steps_d=1, h=64, betas=(0.5, 0.9), z=8, noise=True):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(z, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, 2)
        )
        self.discriminator = nn.Sequential(
            nn.Linear(2, h), nn.LeakyReLU(0.2), nn.Linear(h, h), nn.LeakyReLU(0.2), nn.Linear(h, 1)
        )
        self.lr_g, self.lr_d, self.steps_g, self.steps_d, self.betas, self.z = (
            lr_g,
            lr_d,
            steps_g,
            steps_d,
            betas,
            z,
        )

    def forward(self, z):
        return self.generator(z)

    def training_step(self, batch, i):
        x = batch[0]
        og, od = self.optimizers()
        for _ in range(self.steps_d):
            fake = self(torch.randn(len(x), self.z)).detach()
            loss = F.softplus(-self.discriminator(x)).mean() + F.softplus(self.discriminator(fake)).mean()
            od.zero_grad()
            self.manual_backward(loss)
            od.step()
        for _ in range(self.steps_g):
            loss = F.softplus(-self.discriminator(self(torch.randn(len(x), self.z)))).mean()
            og.zero_grad()
            self.manual_backward(loss)
            og.step()

    def configure_optimizers(self):
        return (
            torch.optim.Adam(self.generator.parameters(), self.lr_g, self.betas),
            torch.optim.Adam(self.discriminator.parameters(), self.lr_d, self.betas),
        )


def ring(n=2000, std=0.1):
    k = torch.randint(0, 8, (n,))
    t = k * math.pi / 4
    return 2 * torch.stack([t.cos(), t.sin()], 1) + std * torch.randn(n, 2)


def modes(m, std=0.1):
    with torch.no_grad():
        s = m(torch.randn(2000, m.z))
    t = torch.arange(8) * math.pi / 4
    c = 2 * torch.stack([t.cos(), t.sin()], 1)
    d = torch.cdist(s, c)
    near = d.min(1).values < 5 * std
    counts = torch.bincount(d.argmin(1)[near], minlength=8)
    return {
        "modes": float((counts > 30).sum()),
        "spread": float(s.var(0).sum()),
        "near": float(near.float().mean()),
    }


def gan(m, steps, collapsed, std=0.1, batch=128):

    def truth():
        n = modes(m, std)
        return (
            n,
            n["modes"] <= 2 and n["spread"] < 2.0
            if collapsed
            else not (n["modes"] >= 5 or n["spread"] > 2.0),
        )

    return Run([(m, loader(ring(std=std), batch=batch), steps)], truth)


@case("gan_generator_runs_away", "mode_collapse")
def _(seed):
    return gan(GAN(lr_g=0.005, lr_d=0.0001, steps_g=3), 1200, True)


@case("gan_generator_five_steps", "mode_collapse")
def _(seed):
    return gan(GAN(lr_g=0.002, lr_d=0.0005, steps_g=5, h=48, betas=(0.9, 0.999)), 1500, True)


@case("gan_digits_mode_collapse", "mode_collapse")
def _(seed):

    class D(GAN):
        def __init__(self):
            super().__init__(lr_g=0.004, lr_d=0.0002, steps_g=2)
            self.generator = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())
            self.discriminator = nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))

    (a, _b), _t = digits()
    m = D()

    def truth():
        with torch.no_grad():
            s = m(torch.randn(500, 8))
        r = float(s.var(0).sum() / a.var(0).sum())
        return ({"variance_ratio": r}, r < 0.05)

    return Run([(m, loader(a, batch=64), 600)], truth)


@case("gan_balanced")
def _(seed):
    return gan(GAN(lr_g=0.001, lr_d=0.001, h=128), 1600, False, std=0.2)


@case("gan_digits_balanced")
def _(seed):

    class D(GAN):
        def __init__(self):
            super().__init__(lr_g=0.0005, lr_d=0.0005, z=16)
            self.generator = nn.Sequential(
                nn.Linear(16, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid()
            )
            self.discriminator = nn.Sequential(
                nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(128, 1)
            )

    (a, _b), _t = digits()
    m = D()

    def truth():
        with torch.no_grad():
            s = m(torch.randn(500, 16))
        r = float(s.var(0).sum() / a.var(0).sum())
        return ({"variance_ratio": r}, not r > 0.35)

    return Run([(m, loader(a, batch=64), 1000)], truth)


@case("denoising_diffusion_tiny")
def _(seed):

    class Diff(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)
            )

        def forward(self, x, t):
            return self.net(torch.cat([x, t], 1))

        def loss(self, x):
            t = torch.rand(len(x), 1)
            e = torch.randn_like(x)
            a = (1.57 * t).cos()
            return F.mse_loss(self(a * x + (1.57 * t).sin() * e, t), e)

        def training_step(self, b, i):
            return self.loss(b[0])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 0.002)

    m, x = (Diff(), ring())

    def truth():
        with torch.no_grad():
            l = float(m.loss(x))
        return ({"loss": l}, not l < 0.6)

    return Run([(m, loader(x, batch=200), 500)], truth)
