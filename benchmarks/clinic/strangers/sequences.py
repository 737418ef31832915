"""Sequences and transformers, graphs."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .base import Lit, Run, accuracy, case, images, loader


class Attention(nn.Module):
    def __init__(self, d, heads, causal=False, scale=None, skip=True):
        super().__init__()
        self.h, self.causal = (heads, causal)
        self.scale = scale if scale is not None else (d // heads) ** (-0.5)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.last = None

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = (l(x).view(B, T, self.h, D // self.h).transpose(1, 2) for l in (self.q, self.k, self.v))
        a = q @ k.transpose(-1, -2) * self.scale
        if self.causal:
            a = a.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
        a = a.softmax(-1)
        self.last = a.detach()
        return self.o((a @ v).transpose(1, 2).reshape(B, T, D))


class Layer(nn.Module):
    def __init__(self, d, heads, causal=False, scale=None, skip=True, torch_attention=False):
        super().__init__()
        self.skip, self.causal = (skip, causal)
        self.n1, self.n2 = (nn.LayerNorm(d), nn.LayerNorm(d))
        self.att = (
            nn.MultiheadAttention(d, heads, batch_first=True)
            if torch_attention
            else Attention(d, heads, causal, scale)
        )
        self.mlp = nn.Sequential(nn.Linear(d, 3 * d), nn.GELU(), nn.Linear(3 * d, d))

    def forward(self, x):
        y = self.n1(x)
        if isinstance(self.att, nn.MultiheadAttention):
            mask = torch.ones(x.shape[1], x.shape[1]).triu(1).bool() if self.causal else None
            y = self.att(y, y, y, attn_mask=mask, need_weights=False)[0]
        else:
            y = self.att(y)
        x = x + y if self.skip else y
        return x + self.mlp(self.n2(x)) if self.skip else self.mlp(self.n2(x))


class ViT(nn.Module):
    def __init__(self, d=32, heads=4, depth=3, **more):
        super().__init__()
        self.patch = nn.Linear(4, d)
        self.pos = nn.Parameter(0.02 * torch.randn(1, 16, d))
        self.blocks = nn.Sequential(*[Layer(d, heads, **more) for _ in range(depth)])
        self.norm, self.head = (nn.LayerNorm(d), nn.Linear(d, 10))

    def forward(self, x):
        x = x.unfold(2, 2, 2).unfold(3, 2, 2).reshape(len(x), 16, 4)
        return self.head(self.norm(self.blocks(self.patch(x) + self.pos)).mean(1))


class GPT(nn.Module):
    def __init__(self, vocab, d=48, heads=4, depth=2, T=24, tied=False, **more):
        super().__init__()
        self.tok, self.pos = (nn.Embedding(vocab, d), nn.Embedding(T, d))
        self.blocks = nn.Sequential(*[Layer(d, heads, causal=True, **more) for _ in range(depth)])
        self.norm, self.head = (nn.LayerNorm(d), nn.Linear(d, vocab, bias=False))
        nn.init.normal_(self.tok.weight, 0, 0.02)
        nn.init.normal_(self.pos.weight, 0, 0.02)
        if tied:
            self.head.weight = self.tok.weight

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.tok(x) + self.pos(torch.arange(x.shape[1])))))


def tokens(n=800, T=25, vocab=20, seed=0):
    """Repeated random motifs: the second half copies the first, which takes attention to see."""
    g = torch.Generator().manual_seed(seed)
    half = torch.randint(0, vocab, (n, T // 2 + 1), generator=g)
    return torch.cat([half, half], 1)[:, :T]


def language(
    net,
    steps,
    *,
    optim=None,
    vocab=20,
    low=None,
    high=None,
    batch=32,
    trainer=None,
    extra=None,
    schedule=None,
    order=False,
):
    if order:
        torch.Generator().manual_seed(1)
        P = torch.distributions.Dirichlet(torch.full((vocab, vocab), 0.1)).sample()
        s = [torch.randint(0, vocab, (1000,))]
        for _i in range(24):
            s.append(torch.multinomial(P[s[-1]], 1)[:, 0])
        s = torch.stack(s, 1)
    else:
        s = tokens(1000, vocab=vocab)
    m = Lit(
        net,
        lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten()),
        optim or (lambda p: torch.optim.AdamW(p, 0.002)),
        schedule,
    )

    def truth():
        m.eval()
        with torch.no_grad():
            loss = float(m.loss(m(s[900:, :-1]), s[900:, 1:]))
        n = {"held_out_loss": loss, "chance": math.log(vocab)}
        if extra:
            n.update(extra(m, s[900:, :-1]))
        return (n, not loss < low if low is not None else not loss < high)

    return Run(
        [(m, loader(s[:900, :-1].contiguous(), s[:900, 1:].contiguous(), batch=batch), steps)],
        truth,
        trainer=trainer or {},
    )


def vit(net, steps, *, optim=None, low=None, high=None, extra=None, batch=64, trainer=None, schedule=None):
    (a, b), (c, d) = images()
    m = Lit(net, F.cross_entropy, optim or (lambda p: torch.optim.AdamW(p, 0.002)), schedule)

    def truth():
        n = {"accuracy": accuracy(m, c, d)}
        if extra:
            n.update(extra(m, c))
        return (n, n["accuracy"] < low if low is not None else not n["accuracy"] > high)

    return Run([(m, loader(a, b, batch=batch), steps)], truth, targets=1, trainer=trainer or {})


def entropies(m, x):
    m.eval()
    with torch.no_grad():
        m(x)
    e = [torch.special.entr(l.att.last).sum(-1).mean() / math.log(l.att.last.shape[-1]) for l in m.net.blocks]
    return {"entropy_least": float(min(e)), "entropy_most": float(max(e))}


class Recurrent(nn.Module):
    def __init__(self, cell, d_in, d, out, act=None, **more):
        super().__init__()
        self.rnn = cell(d_in, d, batch_first=True, **more)
        self.head = nn.Linear(d * (1 + more.get("bidirectional", False)), out)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def rows(net, steps, *, optim=None, low=None, high=None, extra=None, batch=64, trainer=None):
    """Digits read row by row."""
    (a, b), (c, d) = images()
    a, c = (a[:, 0], c[:, 0])
    m = Lit(net, F.cross_entropy, optim or (lambda p: torch.optim.Adam(p, 0.005)))

    def truth():
        n = {"accuracy": accuracy(m, c, d)}
        if extra:
            n.update(extra(m, c))
        return (n, n["accuracy"] < low if low is not None else not n["accuracy"] > high)

    return Run([(m, loader(a, b, batch=batch), steps)], truth, targets=1, trainer=trainer or {})


@case("gpt_rate_far_too_high", "divergence", "attention_collapse", "rank_collapse")
def _(seed):
    return language(GPT(20), 250, optim=lambda p: torch.optim.AdamW(p, 0.3), low=2.9)


@case("vit_without_skips", "rank_collapse", "vanishing_gradients", "attention_collapse")
def _(seed):
    return vit(ViT(depth=5, skip=False), 200, optim=lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), low=0.5)


@case("vit_logits_not_scaled", "attention_collapse")
def _(seed):
    net = ViT(d=48, heads=2, depth=3, scale=1.0)
    for l in net.blocks:
        nn.init.normal_(l.att.q.weight, 0, 0.8)
        nn.init.normal_(l.att.k.weight, 0, 0.8)
    return _sharp(net)


def _sharp(net):
    r = vit(net, 200, low=0.9, extra=entropies, optim=lambda p: torch.optim.SGD(p, 0.01, momentum=0.9))
    t = r.truth

    def truth():
        n, s = t()
        return (n, s and n["entropy_most"] < 0.15)

    r.truth = truth
    return r


@case("gpt_attention_stays_uniform", "attention_collapse")
def _(seed):
    """The scale was divided by once too often: no head ever looks anywhere."""
    r = language(
        GPT(20, scale=1e-08),
        300,
        low=1.9,
        extra=lambda m, x: entropies(m, x),
        optim=lambda p: torch.optim.AdamW(p, 0.003),
    )
    return r


@case("gpt_decay_on_attention", "attention_collapse", "weights_vanish")
def _(seed):
    net = GPT(20)
    qk = [p for l in net.blocks for p in (*l.att.q.parameters(), *l.att.k.parameters())]
    ids = {id(p) for p in qk}

    def optim(p):
        return torch.optim.AdamW(
            [
                {"params": qk, "weight_decay": 40.0},
                {"params": [q for q in p if id(q) not in ids], "weight_decay": 0.01},
            ],
            0.003,
        )

    return language(net, 400, low=1.9, optim=optim, extra=entropies)


@case("rnn_relu_explodes", "exploding_gradients", "divergence")
def _(seed):
    net = Recurrent(nn.RNN, 3, 64, 2, nonlinearity="relu")
    nn.init.orthogonal_(net.rnn.weight_hh_l0, 1.0)
    with torch.no_grad():
        net.rnn.weight_hh_l0 *= 1.8
    x = torch.randn(800, 30, 3)
    y = (x.sum((1, 2)) > 0).long()
    m = Lit(net, F.cross_entropy, lambda p: torch.optim.SGD(p, 0.01))
    return Run(
        [(m, loader(x, y, batch=40), 200)],
        lambda: ({"accuracy": accuracy(m, x, y)}, accuracy(m, x, y) < 0.75),
        targets=1,
    )


@case("rnn_tanh_long_lag", "vanishing_gradients")
def _(seed):
    net = Recurrent(nn.RNN, 4, 32, 2)
    x = torch.randn(800, 80, 4)
    y = (x[:, 0, 0] > 0).long()
    m = Lit(net, F.cross_entropy, lambda p: torch.optim.SGD(p, 0.05, momentum=0.9))

    def truth():
        z = x[:32].clone().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(m(z), y[:32]), z)
        n = {"accuracy": accuracy(m, x, y), "first_over_last": float(g[:, 0].norm() / g[:, -1].norm())}
        return (n, n["first_over_last"] < 1e-06)

    return Run([(m, loader(x, y, batch=40), 200)], truth, targets=1)


@case("lstm_gates_saturated", "saturation", "vanishing_gradients")
def _(seed):
    net = Recurrent(nn.LSTM, 8, 48, 10)
    for _n, p in net.rnn.named_parameters():
        nn.init.normal_(p, 0, 4.0)

    def extra(m, x):
        with torch.no_grad():
            h = m.net.rnn(x)[0]
        return {"outputs_at_ends": float(((h.abs() > 0.9) | (h.abs() < 0.02)).float().mean())}

    return rows(net, 300, low=0.85, extra=extra, optim=lambda p: torch.optim.SGD(p, 0.02))


@case("lstm_constant_init", "equal_units")
def _(seed):
    net = Recurrent(nn.LSTM, 8, 40, 10)
    for p in net.rnn.parameters():
        nn.init.constant_(p, 0.1)
    nn.init.constant_(net.head.weight, 0.05)

    def extra(m, x):
        with torch.no_grad():
            h = m.net.rnn(x)[0][:, -1]
        return {"spread_over_units": float(h.std(1).mean())}

    return rows(net, 250, low=0.4, extra=extra)


@case("gru_encoder_under_no_grad", "frozen")
def _(seed):

    class Net(Recurrent):
        def forward(self, x):
            with torch.no_grad():
                h = self.rnn(x)[0][:, -1]
            return self.head(h)

    net = Net(nn.GRU, 8, 24, 10)
    w0 = net.rnn.weight_hh_l0.detach().clone()
    return rows(
        net, 250, low=2.0, extra=lambda m, x: {"moved": float((net.rnn.weight_hh_l0 - w0).abs().max())}
    )


@case("transformer_mlp_dead", "dead_block", "dead_units")
def _(seed):
    net = ViT(d=40, heads=4, depth=4)
    for l in net.blocks:
        l.mlp[1] = nn.ReLU()
    nn.init.constant_(net.blocks[2].mlp[0].bias, -15.0)

    def extra(m, x):
        seen = []
        h = (
            net.blocks[2]
            .mlp[1]
            .register_forward_hook(lambda mod, i, o: seen.append(float((o > 0).float().mean())))
        )
        with torch.no_grad():
            m(x)
        h.remove()
        return {"fires": seen[0]}

    r = vit(net, 250, low=2.0, extra=extra)
    t = r.truth

    def truth():
        n, _s = t()
        return (n, n["fires"] == 0)

    r.truth = truth
    return r


@case("gcn_oversmoothed", "rank_collapse", "vanishing_gradients")
def _(seed):
    return graph(depth=14, act=F.relu, steps=200, low=0.55, residual=False)


class GCN(nn.Module):
    def __init__(self, A, d_in, d, out, depth, act, residual):
        super().__init__()
        self.register_buffer("A", A)
        self.act, self.residual = (act, residual)
        self.layers = nn.ModuleList([nn.Linear(d_in if i == 0 else d, d) for i in range(depth)])
        self.head = nn.Linear(d, out)

    def forward(self, x):
        for i, l in enumerate(self.layers):
            h = self.act(self.A @ l(x))
            x = x + h if self.residual and i else h
        return self.head(x)


def graph(depth, act, steps, residual, low=None, high=None):
    n, k = (300, 4)
    lab = torch.randint(0, k, (n,))
    p = torch.where(lab[:, None] == lab[None], 0.08, 0.01)
    A = (torch.rand(n, n) < p).float().triu(1)
    A = A + A.T + torch.eye(n)
    A = A / A.sum(1, keepdim=True)
    x = torch.randn(n, 16) + 0.6 * F.one_hot(lab, 16)
    train = torch.rand(n) < 0.4

    class G(Lit):
        def training_step(self, batch, i):
            o = self(batch[0][0])
            return F.cross_entropy(o[train], batch[1][0][train])

    m = G(
        GCN(A, 16, 32, k, depth, act, residual),
        None,
        lambda p: torch.optim.Adam(p, 0.005, weight_decay=0.0005),
    )

    def truth():
        with torch.no_grad():
            acc = float((m(x).argmax(1) == lab)[~train].float().mean())
        return ({"accuracy": acc}, acc < low if low is not None else not acc > high)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[None], lab[None]), batch_size=1)
    return Run([(m, data, steps)], truth)
