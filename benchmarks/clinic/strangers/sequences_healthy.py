"""Sequences and transformers, graphs: the healthy ones."""

import torch
from torch import nn
from torch.nn import functional as F

from .base import Lit, Run, accuracy, case, loader
from .sequences import GPT, Recurrent, ViT, graph, language, rows, vit


@case("gpt_tied_weights")
def _(seed):
    return language(GPT(20, tied=True), 500, high=2.4, order=True)


@case("gpt_copy_task")
def _(seed):
    return language(
        GPT(16, d=64, torch_attention=True),
        600,
        vocab=16,
        high=2.2,
        optim=lambda p: torch.optim.AdamW(p, 0.003, weight_decay=0.1),
    )


@case("gpt_unused_vocabulary")
def _(seed):
    return language(GPT(1000), 300, high=2.6, order=True, optim=lambda p: torch.optim.Adam(p, 0.003))


@case("vit_gradient_clipping_warm_up")
def _(seed):
    return vit(
        ViT(),
        350,
        high=0.85,
        trainer={"gradient_clip_val": 0.1},
        optim=lambda p: torch.optim.AdamW(p, 0.003, weight_decay=0.05),
        schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: min(1.0, (s + 1) / 100)),
    )


@case("vit_torch_encoder")
def _(seed):

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Linear(4, 32)
            self.pos = nn.Parameter(0.02 * torch.randn(1, 16, 32))
            self.enc = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True), 2, enable_nested_tensor=False
            )
            self.head = nn.Linear(32, 10)

        def forward(self, x):
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).reshape(len(x), 16, 4)
            return self.head(self.enc(self.patch(x) + self.pos).mean(1))

    return vit(Net(), 350, high=0.85)


@case("lstm_digit_rows")
def _(seed):
    return rows(Recurrent(nn.LSTM, 8, 64, 10), 400, high=0.9)


@case("gru_bidirectional_two_layers")
def _(seed):
    return rows(
        Recurrent(nn.GRU, 8, 32, 10, num_layers=2, bidirectional=True),
        300,
        high=0.9,
        optim=lambda p: torch.optim.RMSprop(p, 0.002),
    )


@case("gru_words_unused_vocabulary")
def _(seed):

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(4000, 24, padding_idx=0)
            self.rnn = nn.GRU(24, 32, batch_first=True)
            self.head = nn.Linear(32, 2)

        def forward(self, x):
            return self.head(self.rnn(self.emb(x))[0].mean(1))

    x = torch.randint(1, 60, (1200, 12))
    x[:, 9:] = 0
    y = ((x < 20) & (x > 0)).sum(1).gt(3).long()
    m = Lit(Net(), F.cross_entropy, lambda p: torch.optim.Adam(p, 0.005))
    return Run(
        [(m, loader(x[:900], y[:900], batch=36), 350)],
        lambda: ({"accuracy": accuracy(m, x[900:], y[900:])}, not accuracy(m, x[900:], y[900:]) > 0.85),
        targets=1,
    )


@case("gcn_two_layers")
def _(seed):
    return graph(2, F.relu, 200, False, high=0.75)


@case("deepsets_regression")
def _(seed):

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.phi = nn.Sequential(nn.Linear(3, 48), nn.ReLU(), nn.Linear(48, 48))
            self.rho = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 1))

        def forward(self, x):
            return self.rho(self.phi(x).mean(1))

    x = torch.randn(1200, 10, 3)

    def f(x):
        return x.norm(dim=-1).mean(1, keepdim=True) + x[..., :1].mean(1)

    m = Lit(Net(), F.mse_loss, lambda p: torch.optim.Adam(p, 0.003))
    xt = torch.randn(400, 10, 3)

    def truth():
        with torch.no_grad():
            r2 = float(1 - F.mse_loss(m(xt), f(xt)) / f(xt).var())
        return ({"r2": r2}, not r2 > 0.6)

    return Run([(m, loader(x, f(x), batch=60), 400)], truth)
