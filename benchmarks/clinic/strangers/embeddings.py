"""Joint embeddings."""

import copy

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F

from lightning_sym.losses import BarlowTwinsLoss, SimCLRLoss, VICRegLoss

from .base import Run, case, digits


class Views(torch.utils.data.Dataset):
    def __init__(self, x, y, strength=0.15, drop=0.2):
        self.x, self.y, self.s, self.d = (x, y, strength, drop)

    def __len__(self):
        return len(self.x)

    def view(self, x):
        return (x + self.s * torch.randn_like(x)) * (torch.rand_like(x) > self.d)

    def __getitem__(self, i):
        return ([self.view(self.x[i]), self.view(self.x[i])], self.y[i])


class SSL(LightningModule):
    def __init__(self, loss, d=64, out=32, lr=0.001, bn=True, optim="adam", wd=0.0, conv=False):
        super().__init__()
        n = (lambda w: nn.BatchNorm1d(w)) if bn else lambda w: nn.Identity()
        if conv:
            self.backbone = nn.Sequential(
                nn.Unflatten(1, (1, 8, 8)),
                nn.Conv2d(1, 16, 3, 2, 1),
                nn.BatchNorm2d(16),
                nn.ReLU(),
                nn.Conv2d(16, d // 4, 3, 2, 1),
                nn.BatchNorm2d(d // 4),
                nn.ReLU(),
                nn.Flatten(),
            )
        else:
            self.backbone = nn.Sequential(nn.Linear(64, 128), n(128), nn.ReLU(), nn.Linear(128, d), nn.ReLU())
        self.projector = nn.Sequential(nn.Linear(d, 64), n(64), nn.ReLU(), nn.Linear(64, out))
        self.loss, self.lr, self.kind, self.wd = (loss, lr, optim, wd)

    def embed(self, x):
        h = self.backbone(x)
        return (h, self.projector(h))

    def forward(self, x):
        return self.embed(x)[1]

    def training_step(self, batch, i):
        (a, b), _y = batch
        return self.loss(self(a), self(b))

    def configure_optimizers(self):
        if self.kind == "sgd":
            return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=self.wd)
        return torch.optim.AdamW(self.parameters(), self.lr, weight_decay=self.wd)


def spread(m, x, y):
    m.eval()
    with torch.no_grad():
        h, z = m.embed(x)
    var = float(z.var(0).sum() / z.square().mean(0).sum().clamp_min(1e-12))
    norm = float(z.var(0).sum())
    s = torch.linalg.svdvals(z - z.mean(0)).square()
    p = s / s.sum().clamp_min(1e-12)
    F.normalize(z - z.mean(0), dim=1)
    cos = float(F.normalize(z, dim=1).mean(0).square().sum())
    rank = float(torch.special.entr(p).sum().exp())
    hn = F.normalize(h, dim=1)
    sim = hn[400:] @ hn[:400].T
    knn = float((y[:400][sim.argmax(1)] == y[400:]).float().mean())
    return {"variance_share": var, "variance": norm, "rank": rank, "mean_cosine": cos, "knn": knn}


def ssl(m, steps, sick=None, batch=128, strength=0.15, drop=0.2):
    (a, b), (c, d) = digits()

    def truth():
        n = spread(m, c, d)
        if sick == "complete":
            return (n, n["variance_share"] < 0.02 or n["variance"] < 0.001 or n["mean_cosine"] > 0.95)
        if sick == "dimensional":
            return (n, n["rank"] < 3.5)
        return (n, not (n["knn"] > 0.75 and n["rank"] > 4))

    data = torch.utils.data.DataLoader(
        Views(a, b, strength, drop), batch_size=batch, shuffle=True, drop_last=True
    )
    return Run([(m, data, steps)], truth, views=True)


class SimSiam(SSL):
    """With ``stop`` as it should be."""

    def __init__(self, stop=True, predictor=True, **more):
        super().__init__(None, **more)
        self.stop = stop
        self.predictor = (
            nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 32))
            if predictor
            else nn.Identity()
        )

    def training_step(self, batch, i):
        (a, b), _y = batch
        za, zb = (self(a), self(b))
        d = (lambda z: z.detach()) if self.stop else lambda z: z
        return -0.5 * (
            F.cosine_similarity(self.predictor(za), d(zb)).mean()
            + F.cosine_similarity(self.predictor(zb), d(za)).mean()
        )


class BYOL(SSL):
    def __init__(self, tau=0.98, predictor=True, **more):
        super().__init__(None, **more)
        self.tau = tau
        self.target = nn.Sequential(
            copy.deepcopy(self.backbone), copy.deepcopy(self.projector)
        ).requires_grad_(False)
        self.predictor = (
            nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32))
            if predictor
            else nn.Identity()
        )

    def training_step(self, batch, i):
        (a, b), _y = batch
        with torch.no_grad():
            ta, tb = (self.target(a), self.target(b))
        return 4 - 2 * (
            F.cosine_similarity(self.predictor(self(a)), tb).mean()
            + F.cosine_similarity(self.predictor(self(b)), ta).mean()
        )

    def on_train_batch_end(self, *args):
        online = [*self.backbone.parameters(), *self.projector.parameters()]
        with torch.no_grad():
            for p, q in zip(online, self.target.parameters(), strict=False):
                q.lerp_(p, 1 - self.tau)


@case("simsiam_without_stop_gradient", "embedding_collapse_complete")
def _(seed):
    return ssl(SimSiam(stop=False, predictor=False, bn=False, lr=0.003), 300, "complete")


@case("mse_between_views", "embedding_collapse_complete")
def _(seed):
    return ssl(SSL(lambda a, b: F.mse_loss(a, b), bn=False, lr=0.002), 300, "complete", batch=64)


@case("vicreg_no_variance_term", "embedding_collapse_complete")
def _(seed):
    return ssl(SSL(VICRegLoss(variance=0.0), lr=0.002, out=48), 300, "complete", batch=100)


@case("simclr_negatives_forgotten", "embedding_collapse_complete")
def _(seed):
    return ssl(
        SSL(lambda a, b: 1 - F.cosine_similarity(a, b).mean(), bn=False, lr=0.003, conv=True), 300, "complete"
    )


@case("byol_no_predictor_no_momentum", "embedding_collapse_complete")
def _(seed):
    return ssl(BYOL(tau=0.0, predictor=False, bn=False, lr=0.005), 350, "complete")


@case("vicreg_no_covariance_term", "embedding_collapse_dimensional")
def _(seed):
    return ssl(SSL(VICRegLoss(covariance=0.0), lr=0.002, out=64), 350, "dimensional")


@case("barlow_diagonal_alone", "embedding_collapse_dimensional")
def _(seed):
    return ssl(SSL(BarlowTwinsLoss(off_diagonal=0.0), lr=0.003, out=40), 350, "dimensional", batch=100)


@case("simclr_projector_through_two", "embedding_collapse_dimensional")
def _(seed):
    m = SSL(SimCLRLoss(temperature=0.2), lr=0.002)
    m.projector = nn.Sequential(nn.Linear(64, 2), nn.Linear(2, 32))
    return ssl(m, 300, "dimensional")


@case("simclr_digits")
def _(seed):
    return ssl(SSL(SimCLRLoss(temperature=0.3), lr=0.002), 350)


@case("simclr_conv_cold")
def _(seed):
    return ssl(SSL(SimCLRLoss(temperature=0.1), lr=0.002, conv=True, out=16), 350, batch=200)


@case("vicreg_digits")
def _(seed):
    return ssl(SSL(VICRegLoss(), lr=0.002, out=48), 350)


@case("vicreg_small_start_sgd")
def _(seed):
    m = SSL(
        VICRegLoss(invariance=10.0, variance=25.0, covariance=2.0), lr=0.02, optim="sgd", wd=0.0001, bn=True
    )
    with torch.no_grad():
        m.projector[-1].weight.mul_(0.05)
    return ssl(m, 400, batch=100)


@case("barlow_digits")
def _(seed):
    return ssl(SSL(BarlowTwinsLoss(off_diagonal=0.02), lr=0.002, out=32), 350)


@case("byol_momentum_target")
def _(seed):
    return ssl(BYOL(lr=0.002), 400)
