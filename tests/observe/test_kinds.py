"""Every kind of layer against a twin in plain loops: single samples, float64, autograd on each output."""

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import Monitor
from lightning_sym.observe import (
    Activity,
    Adapter,
    GradientNoise,
    SecondMoments,
    Weight,
    WeightUpdate,
    ZeroGradients,
    register_layer,
)
from tests.models import Classifier, Flatten, trainer

N, CLASSES, LR = 6, 3, 0.1
SIDES = ("inputs", "outputs", "input_gradients", "output_gradients")


class Keep(Monitor):
    """Keeps what was observed of all layers."""

    sides = tuple(
        SecondMoments(side, max_positions=None, max_width=None, max_patch_width=None) for side in SIDES
    )
    needs = (*sides, Activity(), Weight(), WeightUpdate(), ZeroGradients(), GradientNoise())

    def __init__(self, **options):
        super().__init__(**{"every_n_steps": 1, "max_layers": 999, "strict": True, **options})

    def read(self, seen):
        self.seen = {}
        for layer in seen.layers:
            found = {need: layer.get(need) for need in self.needs}
            self.seen[layer.name.removeprefix("net.")] = (layer.layer, found)
        self.silent = seen.silent
        return iter(())


class Maps:
    """The maps of one sample, and what came to their outputs."""

    def __init__(self):
        self.calls = []

    def __call__(self, name, w, h, bias=None, fed=True):
        """Return ``w h + bias`` of rows ``h``, whose gradient is kept."""
        y = h @ w.T + (0 if bias is None else bias)
        zero = torch.zeros_like(y, requires_grad=True)
        y = y + zero
        self.calls.append((name, w, h, y, zero))
        return y


def twin(forward, net, x, y):
    """Return each map's rows over all samples: by name ``[(sample, h_a, h_b, g_b)]``, and its matrix."""
    rows, weights = {}, {}
    for n in range(len(x)):
        maps = Maps()
        loss = F.cross_entropy(forward(maps, net, x[n], n), y[n])
        gradients = torch.autograd.grad(loss, [zero for *_, zero in maps.calls], allow_unused=True)
        for (name, w, h, b, _), g in zip(maps.calls, gradients, strict=True):
            g = torch.zeros_like(b) if g is None else g
            rows.setdefault(name, [])
            rows[name] += [(n, *row) for row in zip(h.detach(), b.detach(), g, strict=True)]
            weights[name] = w.detach().clone()
    return rows, weights


def moments(vectors):
    return sum((torch.outer(v, v) for v in vectors), torch.zeros(len(vectors[0]), len(vectors[0])).double())


class Recurrent(nn.Module):
    """Uses all that a recurrent layer puts out."""

    def __init__(self, kind, lengths=None, **options):
        super().__init__()
        self.rnn = kind(3, 4, **options)
        self.first, self.lengths = options.get("batch_first", False), lengths
        width = options.get("proj_size", 0) or 4
        width = width * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width + self.rnn.num_layers * 2 * 4, CLASSES)

    def forward(self, x):
        given = x if self.first else x.transpose(0, 1)
        if self.lengths is not None:
            given = pack_padded_sequence(given, self.lengths, batch_first=self.first, enforce_sorted=False)
        y, states = self.rnn(given)
        if self.lengths is not None:
            y, _ = nn.utils.rnn.pad_packed_sequence(y, batch_first=self.first)
        y = y.sum(1 if self.first else 0)
        states = states if isinstance(states, tuple) else (states,)
        states = torch.cat([s.transpose(0, 1).flatten(1) for s in states], 1)
        full = self.head.in_features - y.shape[1]
        return self.head(torch.cat([y, F.pad(states, (0, full - states.shape[1]))], 1))


def cell(maps, name, suffix, m, x, h, c):
    """One step of a recurrent cell, by its equations; returns the output and the new states."""
    mode = getattr(m, "mode", None) or type(m).__name__.removesuffix("Cell")
    w = {k: getattr(m, f"weight_{k}{suffix}") for k in ("ih", "hh")}
    b = {k: getattr(m, f"bias_{k}{suffix}", None) for k in ("ih", "hh")}
    b = {k: v if isinstance(v, torch.Tensor) else None for k, v in b.items()}
    i, r = (maps(f"{name}.{k}{suffix}", w[k], v[None], b[k])[0] for k, v in (("ih", x), ("hh", h)))
    if mode == "LSTM":
        gate, forget, new, out = (i + r).chunk(4)
        c = torch.sigmoid(forget) * c + torch.sigmoid(gate) * torch.tanh(new)
        h = torch.sigmoid(out) * torch.tanh(c)
        if getattr(m, "proj_size", 0):
            h = maps(f"{name}.hr{suffix}", getattr(m, f"weight_hr{suffix}"), h[None])[0]
        return h, c
    if mode == "GRU":
        (ri, zi, ni), (rr, zr, nr) = i.chunk(3), r.chunk(3)
        reset, keep = torch.sigmoid(ri + rr), torch.sigmoid(zi + zr)
        return (1 - keep) * torch.tanh(ni + reset * nr) + keep * h, c
    relu = "RELU" in mode or getattr(m, "nonlinearity", "") == "relu"
    return ((i + r).clamp_min(0) if relu else torch.tanh(i + r)), c


def recurrent(maps, net, x, n):
    rnn, ends = net.rnn, []
    steps = list(x if net.lengths is None else x[: net.lengths[n]])
    width = getattr(rnn, "proj_size", 0) or rnn.hidden_size
    for layer in range(rnn.num_layers):
        sides = []
        for suffix in ("", "_reverse")[: 1 + rnn.bidirectional]:
            h, c = torch.zeros(width).double(), torch.zeros(rnn.hidden_size).double()
            outs = []
            for step in reversed(steps) if suffix else steps:
                h, c = cell(maps, "rnn", f"_l{layer}{suffix}", rnn, step, h, c)
                outs.append(h)
            sides.append(outs[::-1] if suffix else outs)
            ends.append((h, c))
        steps = [torch.cat(both) for both in zip(*sides, strict=True)]
    states = [h for h, _ in ends] + ([c for _, c in ends] if rnn.mode == "LSTM" else [])
    y = torch.cat([sum(steps), *states])
    y = F.pad(y, (0, net.head.in_features - len(y)))
    return maps("head", net.head.weight, y[None], net.head.bias)[0]


class Cells(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(3, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


def cells(maps, net, x, n):
    h, c = torch.zeros(4).double(), torch.zeros(4).double()
    for step in x:
        h, c = cell(maps, "cell", "", net.cell, step, h, c)
    return maps("head", net.head.weight, h[None], net.head.bias)[0]


def transposed(maps, net, x, n):
    """Entry by entry: which inputs, through which entries of the kernel, an output is made of."""
    conv = net[0]
    size = len(conv.kernel_size)
    inputs, groups = conv.in_channels, conv.groups
    shape = [
        (x.shape[1 + i] - 1) * conv.stride[i] - 2 * conv.padding[i]
        + conv.dilation[i] * (conv.kernel_size[i] - 1) + conv.output_padding[i] + 1
        for i in range(size)
    ]  # fmt: skip
    kernel = list(itertools.product(*[range(k) for k in conv.kernel_size]))
    per, outs = inputs // groups, conv.weight.shape[1]
    dense = torch.zeros(groups * outs, inputs, len(kernel)).double()
    for c, o in itertools.product(range(inputs), range(outs)):
        for j, k in enumerate(kernel):
            flipped = tuple(conv.kernel_size[i] - 1 - k[i] for i in range(size))
            dense[c // per * outs + o, c, j] = conv.weight.detach()[(c, o, *flipped)]
    rows = []
    for site in itertools.product(*[range(s) for s in shape]):
        row = torch.zeros(inputs, len(kernel)).double()
        for j, k in enumerate(kernel):
            from_ = [
                site[i] + conv.padding[i] - (conv.kernel_size[i] - 1 - k[i]) * conv.dilation[i]
                for i in range(size)
            ]
            if all(
                f % conv.stride[i] == 0 and 0 <= f // conv.stride[i] < x.shape[1 + i]
                for i, f in enumerate(from_)
            ):
                row[:, j] = x[(slice(None), *[f // conv.stride[i] for i, f in enumerate(from_)])]
        rows.append(row.flatten())
    y = maps("0", dense.flatten(1), torch.stack(rows), conv.bias)
    y = F.relu(y).T.flatten()
    return maps("3", net[3].weight, y[None], net[3].bias)[0]


def transposing(kind, *args, out, **options):
    return lambda: nn.Sequential(kind(*args, **options), nn.ReLU(), nn.Flatten(), nn.Linear(out, CLASSES))


class Conv1D(nn.Module):
    """Weight [inputs, outputs], applied to the last dimension."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.nf = outputs
        self.weight, self.bias = (
            nn.Parameter(torch.randn(inputs, outputs)),
            nn.Parameter(torch.randn(outputs)),
        )

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


class Channels(nn.Module):
    """Called as graph networks' linear layers are: widths are channels."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.in_channels, self.out_channels = inputs, outputs
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.register_parameter("bias", None)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Queries, keys and values from one layer."""

    def __init__(self, width, make=nn.Linear):
        super().__init__()
        self.qkv, self.out = make(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.mT).softmax(-1) @ v)


def look_alikes(maps, net, x, n):
    x = torch.tanh(maps("0", net[0].weight.T, x, net[0].bias))
    x = torch.tanh(maps("2", net[2].weight, x))
    for i, transposed in ((4, False), (5, True)):
        block = net[i]
        w = block.qkv.weight.T if transposed else block.qkv.weight
        q, k, v = (
            maps(f"{i}.qkv.{part}_proj", w[4 * j : 4 * j + 4], x, block.qkv.bias[4 * j : 4 * j + 4])
            for j, part in enumerate("qkv")
        )
        x = maps(f"{i}.out", block.out.weight, (q @ k.T).softmax(-1) @ v, block.out.bias)
    return maps("7", net[7].weight, x.mean(0)[None], net[7].bias)[0]


def like_transformers():
    return nn.Sequential(
        Conv1D(5, 3), nn.Tanh(), Channels(5, 4), nn.Tanh(), Attention(4),
        Attention(4, lambda inputs, outputs: Conv1D(outputs, inputs)), Flatten(), nn.Linear(4, CLASSES),
    )  # fmt: skip


class Experts(nn.Module):
    """Three experts of two products each; the fourth never gets a token."""

    def __init__(self, how, transposed=False, told=True):
        super().__init__()
        self.how, self.inputs_first = how, transposed
        if told:
            self.is_transposed = transposed
        up, down = torch.randn(4, 5, 3), torch.randn(4, 3, 5)
        if transposed:
            up, down = up.mT.contiguous(), down.mT.contiguous()
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)
        self.head = nn.Linear(3, CLASSES)

    def route(self, x):
        return (x[:, 0] > 0.5).long() + (x[:, 1] > 0.3).long()

    def forward(self, x):
        flat = x.flatten(0, 1)
        chosen, out = self.route(flat), torch.zeros_like(flat)
        up, down = (self.up, self.down) if self.inputs_first else (self.up.mT, self.down.mT)
        if self.how == "linear":
            for e in range(4):
                mine = (chosen == e).nonzero()[:, 0]
                hidden = F.linear(flat[mine], self.up[torch.tensor(e)]).tanh()
                out = out.index_add(0, mine, F.linear(hidden, self.down[e]))
        elif self.how == "grouped":
            order = chosen.argsort(stable=True)
            for e in range(4):
                mine = order[chosen[order] == e]
                out = out.index_add(0, mine, (flat[mine] @ up[e]).tanh() @ down[e])
        else:  # every expert sees all tokens, what is not its own is dropped
            mask = F.one_hot(chosen, 4).to(x.dtype).T[:, :, None]
            if self.how == "bmm":
                every = torch.bmm(torch.bmm(flat.expand(4, -1, -1), up).tanh(), down)
            else:
                hidden = torch.einsum("ni,eoi->eno", flat, self.up).tanh()
                every = torch.einsum("eoi,eni->eno", self.down, hidden)
            out = (every * mask).sum(0)
        return self.head(out.unflatten(0, x.shape[:2]).mean(1))


def experts(maps, net, x, n):
    chosen, out = net.route(x), []
    every = net.how in ("bmm", "einsum")
    up, down = (w.mT if net.inputs_first else w for w in (net.up, net.down))
    for t in range(len(x)):
        for e in range(4) if every else [int(chosen[t])]:
            hidden = maps(f"up.{e}", up[e], x[t][None]).tanh()
            y = maps(f"down.{e}", down[e], hidden)[0]
            if e == int(chosen[t]):
                out.append(y)
    return maps("head", net.head.weight, torch.stack(out).mean(0)[None], net.head.bias)[0]


class Pairing(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 2)
        self.both, self.head = nn.Bilinear(4, 2, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(self.both(self.a(x).tanh(), input2=self.b(x).tanh()).mean(1))


def pairing(maps, net, x, n):
    a = maps("a", net.a.weight, x, net.a.bias).tanh()
    b = maps("b", net.b.weight, x, net.b.bias).tanh()
    products = torch.stack([torch.outer(u, v).flatten() for u, v in zip(a, b, strict=True)])
    y = maps("both", net.both.weight.flatten(1), products, net.both.bias)
    return maps("head", net.head.weight, y.mean(0)[None], net.head.bias)[0]


class LoRA(nn.Module):
    """As peft's: a frozen layer, and two thin ones by the adapter's name."""

    def __init__(self, inputs, outputs, r=2):
        super().__init__()
        self.base_layer = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, r, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(r, outputs, bias=False)})
        self.lora_dropout = nn.ModuleDict({"default": nn.Identity()})
        self.scaling = {"default": 2.0}

    def forward(self, x):
        x_d = self.lora_dropout["default"](x)
        return (
            self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x_d)) * self.scaling["default"]
        )


def lora(maps, net, x, n):
    layer = net[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    inner = maps("0.lora_A.default", a, x[None])
    outer = maps("0.lora_B.default", b, inner)
    zero = torch.zeros_like(outer, requires_grad=True)
    maps.calls.append(("0.lora.default", b @ a, x[None], outer, zero))
    y = (layer.base_layer(x)[None] + 2.0 * (outer + zero)).tanh()
    return maps("2", net[2].weight, y, net[2].bias)[0]


class Projector(nn.Module):
    """What only its author knows: where the input is, and what comes out."""

    def __init__(self):
        super().__init__()
        self.matrix, self.offset = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))

    def forward(self, step, *, signal):
        return {"step": step + 1, "features": signal @ self.matrix + self.offset}


class Registered(nn.Module):
    def __init__(self):
        super().__init__()
        self.projector, self.head = Projector(), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.projector(1, signal=x)["features"].tanh())


def registered(maps, net, x, n):
    p = net.projector
    y = maps("projector", p.matrix.T, x[None], p.offset).tanh()
    return maps("head", net.head.weight, y, net.head.bias)[0]


FIRST = {"batch_first": True}
LENGTHS = [3, 5, 1, 4, 5, 2]
CASES = {
    "transposed 1d": (
        transposing(nn.ConvTranspose1d, 2, 4, 3, stride=2, padding=1, output_padding=1, out=32), (2, 4),
        transposed,
    ),
    "transposed 2d": (
        transposing(
            nn.ConvTranspose2d, 4, 6, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), groups=2,
            dilation=(1, 2), out=6 * 4 * 8,
        ), (4, 2, 2), transposed,
    ),
    "transposed 3d": (
        transposing(nn.ConvTranspose3d, 2, 2, 2, stride=1, padding=1, bias=False, out=16), (2, 3, 3, 3),
        transposed,
    ),
    "cropped": (transposing(nn.ConvTranspose1d, 2, 3, 2, stride=2, padding=2, out=6), (2, 3), transposed),
    "lstm": (lambda: Recurrent(nn.LSTM, batch_first=True), (5, 3), recurrent),
    "lstm, both ways": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), (5, 3), recurrent),
    "lstm, projected": (lambda: Recurrent(nn.LSTM, **FIRST, proj_size=2, num_layers=2), (4, 3), recurrent),
    "lstm, packed": (lambda: Recurrent(nn.LSTM, LENGTHS, **FIRST, bidirectional=True), (5, 3), recurrent),
    "gru": (lambda: Recurrent(nn.GRU, batch_first=True, num_layers=2), (5, 3), recurrent),
    "gru, packed": (lambda: Recurrent(nn.GRU, LENGTHS, bias=False), (5, 3), recurrent),
    "rnn": (lambda: Recurrent(nn.RNN, batch_first=True, nonlinearity="relu"), (5, 3), recurrent),
    "lstm cell": (lambda: Cells(nn.LSTMCell), (4, 3), cells),
    "gru cell": (lambda: Cells(nn.GRUCell), (4, 3), cells),
    "rnn cell": (lambda: Cells(nn.RNNCell), (4, 3), cells),
    "experts, one by one": (lambda: Experts("linear"), (4, 3), experts),
    "experts, matmul": (lambda: Experts("grouped", transposed=True), (4, 3), experts),
    "experts, other order": (lambda: Experts("grouped", transposed=True, told=False), (4, 3), experts),
    "experts, bmm": (lambda: Experts("bmm", transposed=True), (4, 3), experts),
    "experts, einsum": (lambda: Experts("einsum"), (4, 3), experts),
    "transformer": (like_transformers, (4, 3), look_alikes),
    "bilinear": (Pairing, (3, 3), pairing),
    "lora": (lambda: nn.Sequential(LoRA(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)), (4,), lora),
    "registered": (Registered, (3,), registered),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _registered():
    given, made = (lambda args, kwargs: kwargs["signal"]), (lambda returned: returned["features"])
    register_layer(Projector, Adapter("matrix", transposed=True, bias="offset", input=given, output=made))
    yield
    register_layer(Projector, None)


def fit(net, x, monitor, y=None, **options):
    module = Classifier(net, lr=LR)
    y = torch.arange(len(x)) % CLASSES if y is None else y
    run = trainer(max_steps=1, callbacks=[monitor], **options)
    run.fit(module, DataLoader(TensorDataset(x, y), batch_size=len(x)))
    return module


def half(rows, number, *, by_row):
    return [v for i, (n, v) in enumerate(rows) if (i if by_row else n) % 2 == number]


@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_read_as_in_loops_over_single_samples(name):
    make, shape, forward = CASES[name]
    torch.manual_seed(0)
    net = make().double()
    x, y = torch.randn(N, *shape).double(), torch.arange(N) % CLASSES
    rows, before = twin(forward, net, x, y)
    monitor = Keep()
    fit(net, x, monitor, y)
    _, after = twin(forward, net, x, y)
    assert set(monitor.seen) == set(rows)
    for layer_name, calls in rows.items():
        layer, found = monitor.seen[layer_name]
        w = before[layer_name]
        streams = [[(n, h) for n, h, _, _ in calls], [(n, b) for n, _, b, _ in calls]]
        streams += [[(n, w.T @ g) for n, _, _, g in calls], [(n, g) for n, _, _, g in calls]]
        for side, stream in zip(Keep.sides, streams, strict=True):
            for number in (0, 1):
                mine = half(stream, number, by_row=type(layer).__name__ == "Expert")
                expected = (
                    moments([v for _, v in stream][:1]) * torch.nan if not mine else moments(mine) / len(mine)
                )
                got = found[side].second_halves[number]
                torch.testing.assert_close(
                    got, expected, rtol=1e-8, atol=1e-12, equal_nan=True, msg=f"{layer_name} {side.side}"
                )
            assert found[side].n == len(stream)
            assert found[side].nonfinite == 0
        dense = torch.block_diag(*found[Keep.needs[5]].blocks)
        torch.testing.assert_close(dense, w)
        change = float((after[layer_name] - w).norm() / w.norm())
        assert found[Keep.needs[6]] == pytest.approx(change, rel=1e-6)
        if type(layer).__name__ != "BilinearLayer":  # its units are those of both inputs
            units = torch.stack([h for _, h, _, _ in calls]).unflatten(1, (layer.in_units, -1))
            if not layer.is_convolution:  # a convolution's inputs are seen as they are, not as patches
                torch.testing.assert_close(found[Keep.needs[4]].mean, units.abs().mean((0, 2)))
        check_noise(layer, found[Keep.needs[8]], calls)


def check_noise(layer, noise, calls):
    if noise is None:
        assert layer.no_noise or layer.name.startswith("net.cell"), layer.name
        return
    gradients = torch.stack([sum(torch.outer(g, h) for m, h, _, g in calls if m == n) for n in range(N)])
    off = gradients - gradients.mean(0)
    torch.testing.assert_close(noise.covariance("weight"), torch.einsum("noi,npi->op", off, off) / (N - 1))


def test_an_expert_without_tokens_has_no_reading_and_nothing_is_said():
    torch.manual_seed(0)
    net, monitor = Experts("linear").double(), Keep()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(net, torch.randn(N, 4, 3).double(), monitor)
    assert not [w for w in caught if "layer" in str(w.message)]
    assert monitor.silent == ["net.up.3", "net.down.3"]
    assert not any(name.endswith(".3") for name in monitor.seen)


def test_dropout_between_recurrent_layers_is_drawn_again():
    """The second layer's inputs are the first one's outputs, some of them zero and the others doubled."""
    torch.manual_seed(0)
    net, monitor = Recurrent(nn.LSTM, num_layers=2, dropout=0.5, batch_first=True).double(), Keep()
    fit(net, torch.randn(N, 5, 3).double(), monitor)
    live = monitor.seen["rnn.ih_l1"][1][Keep.needs[4]].live
    assert 0.2 < float(live.mean()) < 0.8
    assert monitor.seen["rnn.ih_l0"][1][Keep.sides[3]] is not None


@pytest.mark.parametrize("packed", [False, True])
def test_a_replayed_layer_leaves_the_run_as_it_was(packed):
    """Dropout masks, states and gradients of a fit with and without a monitor are bitwise equal."""
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        net = Recurrent(nn.GRU, LENGTHS if packed else None, num_layers=2, dropout=0.3, batch_first=True)
        run = trainer(max_epochs=3, callbacks=[Keep()] if watched else [])
        run.fit(
            Classifier(net),
            DataLoader(TensorDataset(torch.randn(N, 5, 3), torch.arange(N) % 3), batch_size=N),
        )
        ends.append([*net.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
