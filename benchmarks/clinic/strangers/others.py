"""Streams, reinforcement, phases and the rest."""

import copy

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F

from .base import Lit, Run, accuracy, case, dead_share, digits, loader
from .perceptrons import mlp


def stream(net, tasks, steps, optim, low=None, high=None, pixels=False, random_labels=False, one_fit=False):
    (a, b), _t = digits()
    n = 250 if random_labels else 600
    a, b = (a[:n], b[:n])
    g = torch.Generator().manual_seed(3)
    accs = []

    class S(Lit):
        def __init__(self, k):
            super().__init__(net, F.cross_entropy, optim)
            self.k = k

        def on_train_end(self):
            accs.append(accuracy(self, *sets[self.k]))
            self.train()

    sets = []
    for _i in range(tasks):
        x = a[:, torch.randperm(64, generator=g)] if pixels else a
        y = (
            torch.randint(0, 10, b.shape, generator=g)
            if random_labels
            else torch.randperm(10, generator=g)[b]
        )
        sets.append((x, y))
    fits = [(S(k), loader(*sets[k], batch=50), steps) for k in range(tasks)]

    def truth():
        first, last = (sum(accs[:2]) / 2, sum(accs[-2:]) / 2)
        n = {"first": first, "last": last}
        return (n, last < first - low if low is not None else not last > first - high)

    return Run(fits, truth, targets=1)


@case("stream_random_labels_adam", "plasticity_loss", "dead_units")
def _(seed):
    return stream(
        mlp(64, 80, 80, 10), 8, 200, lambda p: torch.optim.Adam(p, 0.008), low=0.25, random_labels=True
    )


@case("stream_permuted_pixels_sgd_hot", "plasticity_loss", "dead_units", "rank_collapse")
def _(seed):
    return stream(
        mlp(64, 60, 60, 60, 10),
        10,
        100,
        lambda p: torch.optim.SGD(p, 0.12, momentum=0.9),
        low=0.25,
        pixels=True,
    )


@case("stream_label_permutations_one_fit", "plasticity_loss", "dead_units", "rank_collapse")
def _(seed):
    """One fit; every 80 steps the labels are dealt anew."""
    (a, b), _t = digits()
    g = torch.Generator().manual_seed(5)
    perms = [torch.randperm(10, generator=g) for _ in range(8)]
    net = mlp(64, 64, 64, 10)
    accs = []

    class S(Lit):
        def training_step(self, batch, i):
            k = min(self.global_step // 80, 7)
            x, y = batch
            y = perms[k][y]
            o = self(x)
            if self.global_step % 80 >= 70:
                accs.append((k, float((o.argmax(1) == y).float().mean())))
            return F.cross_entropy(o, y)

    m = S(net, None, lambda p: torch.optim.Adam(p, 0.02))

    def truth():
        by = [sum((v for q, v in accs if q == k)) / 10 for k in range(8)]
        n = {"first": by[0], "last": sum(by[-2:]) / 2, **dead_share(m, a)}
        return (n, n["last"] < by[0] - 0.25)

    return Run([(m, loader(a, b, batch=64), 640)], truth, targets=1)


@case("stream_learns_on")
def _(seed):
    return stream(
        mlp(64, 120, 60, 10), 6, 120, lambda p: torch.optim.AdamW(p, 0.001, weight_decay=0.05), high=0.1
    )


@case("stream_pixels_leaky")
def _(seed):
    return stream(
        mlp(64, 100, 10, act=lambda: nn.LeakyReLU(0.1)),
        6,
        120,
        lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.001),
        high=0.15,
        pixels=True,
    )


@case("dqn_chain")
def _(seed):

    class DQN(LightningModule):
        def __init__(self):
            super().__init__()
            self.q = mlp(10, 48, 48, 2)
            self.target = copy.deepcopy(self.q).requires_grad_(False)

        def forward(self, s):
            return self.q(s)

        def training_step(self, b, i):
            s, a, r, t, done = b
            if self.global_step % 50 == 0:
                self.target.load_state_dict(self.q.state_dict())
            with torch.no_grad():
                y = r + 0.9 * (1 - done) * self.target(t).max(1).values
            return F.smooth_l1_loss(self.q(s).gather(1, a[:, None])[:, 0], y)

        def configure_optimizers(self):
            return torch.optim.Adam(self.q.parameters(), 0.001)

    i = torch.randint(0, 10, (3000,))
    a = torch.randint(0, 2, (3000,))
    j = (i + 2 * a - 1).clamp(0, 9)
    r = (j == 9).float()
    e = torch.eye(10)
    m = DQN()

    def truth():
        with torch.no_grad():
            right = float((m(e)[:9].argmax(1) == 1).float().mean())
        return ({"right_moves": right}, not right >= 0.8)

    return Run([(m, loader(e[i], a, r, e[j], r.clone(), batch=64), 600)], truth)


@case("distillation_teacher_inside")
def _(seed):
    (a, b), (c, d) = digits()
    teacher = mlp(64, 256, 10)
    opt = torch.optim.Adam(teacher.parameters(), 0.002)
    for _i in range(250):
        k = torch.randint(0, 1300, (64,))
        opt.zero_grad()
        F.cross_entropy(teacher(a[k]), b[k]).backward()
        opt.step()

    class D(LightningModule):
        def __init__(self):
            super().__init__()
            self.teacher = teacher.requires_grad_(False)
            self.student = mlp(64, 24, 10)

        def forward(self, x):
            return self.student(x)

        def training_step(self, batch, i):
            x, _y = batch
            with torch.no_grad():
                t = self.teacher(x)
            return 4 * F.kl_div(
                F.log_softmax(self.student(x) / 2, 1), F.softmax(t / 2, 1), reduction="batchmean"
            )

        def configure_optimizers(self):
            return torch.optim.Adam(self.student.parameters(), 0.003)

    m = D()
    return Run(
        [(m, loader(a, b, batch=64), 350)],
        lambda: ({"accuracy": accuracy(m, c, d)}, not accuracy(m, c, d) > 0.88),
        targets=1,
    )


@case("moe_soft_routing")
def _(seed):
    (a, b), (c, d) = digits()

    class MoE(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(64, 4)
            self.experts = nn.ModuleList([mlp(64, 32, 10) for _ in range(4)])

        def forward(self, x):
            g = self.gate(x).softmax(-1)
            return sum((g[:, i : i + 1] * e(x) for i, e in enumerate(self.experts)))

    m = Lit(MoE(), F.cross_entropy, lambda p: torch.optim.Adam(p, 0.003))
    return Run(
        [(m, loader(a, b), 300)],
        lambda: ({"accuracy": accuracy(m, c, d)}, not accuracy(m, c, d) > 0.9),
        targets=1,
    )


@case("multi_task_second_head_late")
def _(seed):
    (a, b), (c, d) = digits()

    class Two(LightningModule):
        def __init__(self):
            super().__init__()
            self.trunk = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU())
            self.digit, self.odd = (nn.Linear(50, 10), nn.Linear(50, 1))

        def forward(self, x):
            return self.digit(self.trunk(x))

        def training_step(self, batch, i):
            x, y = batch
            h = self.trunk(x)
            loss = F.cross_entropy(self.digit(h), y)
            if self.global_step >= 150:
                loss = loss + F.binary_cross_entropy_with_logits(self.odd(h)[:, 0], (y % 2).float())
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.002)

    m = Two()
    return Run(
        [(m, loader(a, b), 400)],
        lambda: ({"accuracy": accuracy(m, c, d)}, not accuracy(m, c, d) > 0.9),
        targets=1,
    )


@case("pinn_residual_only")
def _(seed):

    class P(LightningModule):
        def __init__(self):
            super().__init__()
            self.u = mlp(1, 32, 32, 1, act=nn.Tanh)

        def forward(self, x):
            return self.u(x)

        def training_step(self, batch, i):
            x = batch[0].requires_grad_()
            u = self(x)
            (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            return (du + 2 * u).square().mean() + 10 * (self(torch.zeros(1, 1)) - 1).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.003)

    m = P()
    x = torch.rand(800, 1) * 2
    t = torch.linspace(0, 2, 50)[:, None]

    def truth():
        with torch.no_grad():
            e = float((m(t) - (-2 * t).exp()).abs().max())
        return ({"error": e}, not e < 0.1)

    return Run([(m, loader(x, batch=100), 500)], truth)


@case("metric_learning_triplet")
def _(seed):
    (a, b), (c, d) = digits()
    net = mlp(64, 100, 16)

    class T(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return F.normalize(self.net(x), dim=1)

        def training_step(self, batch, i):
            x, y = batch
            z = self(x)
            dist = torch.cdist(z, z)
            same = y[:, None] == y[None]
            pos = (dist * same).max(1).values
            neg = dist.masked_fill(same, 9.0).min(1).values
            return F.relu(pos - neg + 0.3).mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.001)

    m = T()

    def truth():
        with torch.no_grad():
            z, w = (m(a), m(c))
        knn = float((b[(w @ z.T).argmax(1)] == d).float().mean())
        return ({"knn": knn}, not knn > 0.9)

    return Run([(m, loader(a, b, batch=80), 350)], truth, targets=1)


@case(
    "triplet_collapses_to_margin",
    "embedding_collapse_complete",
    "rank_collapse",
    "dead_units",
    "weights_vanish",
)
def _(seed):
    """Hardest negatives at once, embeddings not normalised, a hot rate: all goes to one point."""
    (a, b), (c, _d) = digits()
    net = mlp(64, 100, 16)

    class T(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, i):
            x, y = batch
            z = self(x)
            dist = (z[:, None] - z[None]).square().sum(-1)
            same = y[:, None] == y[None]
            pos = (dist * same).max(1).values
            neg = dist.masked_fill(same, 1000000000.0).min(1).values
            return F.relu(pos - neg + 1.0).mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.02)

    m = T()

    def truth():
        with torch.no_grad():
            z = m(c)
        share = float(z.var(0).sum() / z.square().mean(0).sum())
        return (
            {"variance_share": share, "variance": float(z.var(0).sum())},
            share < 0.02 or z.var(0).sum() < 0.001,
        )

    return Run([(m, loader(a, b, batch=80), 350)], truth, targets=1)


@case("plateau_then_learns")
def _(seed):
    """Small initial weights: a long plateau, and then it falls."""
    net = mlp(64, 100, 100, 10)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.25)
    (a, b), (c, d) = digits()
    m = Lit(net, F.cross_entropy, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9))
    return Run(
        [(m, loader(a, b), 500)],
        lambda: ({"accuracy": accuracy(m, c, d)}, not accuracy(m, c, d) > 0.85),
        targets=1,
    )


@case("linear_probe_on_frozen_random_features")
def _(seed):
    (a, b), (c, d) = digits()
    net = nn.Sequential(nn.Linear(64, 500), nn.ReLU(), nn.Linear(500, 10))
    net[0].requires_grad_(False)
    m = Lit(net, F.cross_entropy, lambda p: torch.optim.Adam([q for q in p if q.requires_grad], 0.002))
    return Run(
        [(m, loader(a, b), 350)],
        lambda: ({"accuracy": accuracy(m, c, d)}, not accuracy(m, c, d) > 0.88),
        targets=1,
    )


@case("logistic_regression")
def _(seed):
    (a, b), (c, d) = digits()
    m = Lit(nn.Linear(64, 10), F.cross_entropy, lambda p: torch.optim.SGD(p, 0.5))
    return Run(
        [(m, loader(a, b, batch=100), 300)],
        lambda: ({"accuracy": accuracy(m, c, d)}, not accuracy(m, c, d) > 0.88),
        targets=1,
    )
