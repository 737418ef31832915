"""Every reading of the three monitors against a naive twin: single samples, float64, loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import AlignmentMonitor, CollapseMonitor, PlasticityMonitor
from lightning_sym.observe import Reading, SecondMoments
from tests.models import Classifier, Flatten, SelfAttention, mlp, trainer

N, CLASSES, LR = 7, 3, 0.1


def sequence_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), Flatten(), nn.Linear(5, CLASSES))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, groups=2, padding=(1, 2)),
        nn.ReLU(),
        nn.Conv2d(6, 6, 2, groups=6, dilation=1, bias=False),
        nn.Flatten(),
        nn.Linear(6 * 3, CLASSES),
    )


def attention_net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), SelfAttention(8, 2), Flatten(), nn.Linear(8, CLASSES))


def split_attention_net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), SplitAttention(), Flatten(), nn.Linear(8, CLASSES))


class SplitAttention(nn.Module):
    """Queries, keys and values from three widths: three separate weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=5, vdim=3, batch_first=True)
        self.k, self.v = nn.Linear(8, 5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, self.k(x), self.v(x), need_weights=False)[0]


def twice_net() -> nn.Module:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(torch.tanh(self.shared(x)))

    return nn.Sequential(nn.Linear(4, 5), Twice(), nn.Linear(5, CLASSES))


CASES = {
    "mlp": (lambda: mlp(4, 8, 6, CLASSES, act=nn.ReLU), (4,)),
    "sequence": (sequence_net, (5, 4)),
    "convolution": (conv_net, (2, 4, 5)),
    "attention": (attention_net, (4, 3)),
    "split attention": (split_attention_net, (4, 3)),
    "twice": (twice_net, (4,)),
}


class Twin:
    """Rows of all four streams of every layer, one sample at a time."""

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor) -> None:
        self.net = net
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor | None] = {}
        self.units: dict[str, list[Tensor]] = {}  # rows of the units that feed a layer
        self.rows: dict[str, dict[str, list[Tensor]]] = {}
        self.channels_last: dict[str, Tensor] = {}
        self.data_fed: set[str] = set()
        # In these nets only the multi-layer perceptron has a reader that is plain.
        self.outgoing: list[tuple[str, Tensor]] = []
        modules = list(net.named_children())
        for (name, layer), (_, act), (_, reader) in zip(modules, modules[1:], modules[2:], strict=False):
            linear = (nn.Linear, nn.Conv2d)
            plain = getattr(layer, "groups", 1) == getattr(reader, "groups", 1) == 1
            joined = isinstance(layer, linear) and isinstance(reader, linear) and plain
            if joined and isinstance(act, nn.ReLU | nn.Tanh):
                self.outgoing.append((name, reader.weight.detach().clone().transpose(0, 1).flatten(1).T))
        for n in range(len(x)):
            self.one(x[n : n + 1], y[n : n + 1])

    def one(self, x: Tensor, y: Tensor) -> None:
        calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []
        handles = []
        for name, module in self.net.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and ".attention." not in f".{name}.":
                handles.append(module.register_forward_hook(self._keep(calls, name)))
            if isinstance(module, nn.MultiheadAttention):
                handles.append(module.register_forward_hook(self._keep(calls, name), with_kwargs=False))
        # Attention is written out by hand: its projections are then plain products.
        loss = nn.functional.cross_entropy(self._forward(x, calls), y)
        for handle in handles:
            handle.remove()
        gradients = torch.autograd.grad(loss, [call[3] for call in calls])
        for (name, module, a, b), g in zip(calls, gradients, strict=True):
            self._take(name, module, a.detach(), b.detach(), g, fed_by_data=not a.requires_grad)

    @staticmethod
    def _keep(calls, name):
        def hook(module, args, output):
            if not isinstance(module, nn.MultiheadAttention):
                calls.append((name, module, args[0], output))

        return hook

    def _forward(self, x: Tensor, calls) -> Tensor:
        originals = {}
        for name, module in self.net.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                originals[module] = module.forward
                module.forward = self._attention(module, name, calls)
        try:
            return self.net(x)
        finally:
            for module in originals:
                del module.forward

    def _attention(self, module: nn.MultiheadAttention, name: str, calls):
        def forward(q, k, v, need_weights=False):
            d, h = module.embed_dim, module.num_heads
            if module.in_proj_weight is not None:
                weights = module.in_proj_weight.split(d)
            else:
                weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
            outs = []
            for part, source, w, b in zip(
                "qkv", (q, k, v), weights, module.in_proj_bias.split(d), strict=True
            ):
                out = source @ w.T + b
                calls.append((f"{name}.{part}_proj", (w, b), source, out))
                outs.append(out.reshape(*out.shape[:2], h, d // h).transpose(1, 2))
            scores = outs[0] @ outs[1].transpose(-1, -2) / math.sqrt(d // h)
            mixed = (scores.softmax(-1) @ outs[2]).transpose(1, 2).flatten(2)
            w, b = module.out_proj.weight, module.out_proj.bias
            out = mixed @ w.T + b
            calls.append((f"{name}.out_proj", (w, b), mixed, out))
            return out, None

        return forward

    def _take(self, name, module, a, b, g, *, fed_by_data) -> None:
        rows = self.rows.setdefault(name, {"h_a": [], "h_b": [], "g_b": [], "g_a": []})
        if isinstance(module, nn.Conv2d):
            weight = torch.zeros(module.out_channels, module.in_channels * module.weight[0, 0].numel())
            weight = weight.double()
            per_group_in = module.in_channels // module.groups
            per_group_out = module.out_channels // module.groups
            k = module.weight[0, 0].numel()
            for o in range(module.out_channels):
                start = (o // per_group_out) * per_group_in * k
                weight[o, start : start + per_group_in * k] = module.weight[o].detach().flatten()
            (ph, pw), (sh, sw), (kh, kw) = module.padding, module.stride, module.kernel_size
            padded = torch.zeros(a.shape[1], a.shape[2] + 2 * ph, a.shape[3] + 2 * pw).double()
            padded[:, ph : ph + a.shape[2], pw : pw + a.shape[3]] = a[0]
            places = [(i, j) for i in range(b.shape[2]) for j in range(b.shape[3])]
            if len(places) > 16:  # the stated sub-sampling: evenly spread positions
                places = [places[(2 * m + 1) * len(places) // 32] for m in range(16)]
            for i, j in places:
                patch = padded[:, i * sh : i * sh + kh, j * sw : j * sw + kw]
                rows["h_a"].append(patch.flatten())
                rows["h_b"].append(b[0, :, i, j])
                rows["g_b"].append(g[0, :, i, j])
                rows["g_a"].append(weight.T @ g[0, :, i, j])
            self.units.setdefault(name, []).extend(
                a[0, :, i, j] for i in range(a.shape[2]) for j in range(a.shape[3])
            )
            bias = module.bias
        else:
            w, bias = module if isinstance(module, tuple) else (module.weight, module.bias)
            weight = w.detach().clone()
            for u, v, d in zip(
                a.reshape(-1, a.shape[-1]),
                b.reshape(-1, b.shape[-1]),
                g.reshape(-1, g.shape[-1]),
                strict=True,
            ):
                rows["h_a"].append(u)
                rows["h_b"].append(v)
                rows["g_b"].append(d)
                rows["g_a"].append(weight.T @ d)
                self.units.setdefault(name, []).append(u)
        self.weights[name] = weight.clone()
        self.biases[name] = None if bias is None else bias.detach()
        if fed_by_data:
            self.data_fed.add(name)


def moments(rows: list[Tensor], form: str) -> list[Tensor]:
    """Moments of the samples with even and of those with odd numbers, all positions of a sample in one."""
    positions = len(rows) // N
    found = []
    for half in (0, 1):
        mine = [r for i, r in enumerate(rows) if (i // positions) % 2 == half]
        total = torch.zeros(len(rows[0]), len(rows[0])).double()
        if form == "raw":
            for r in mine:
                total += torch.outer(r, r) / len(mine)
        else:
            if form == "normalized":
                mine = [r / math.sqrt(float((r * r).sum())) if float((r * r).sum()) > 0 else r for r in mine]
            mean = sum(mine) / len(mine)
            for r in mine:
                total += torch.outer(r - mean, r - mean) / (len(mine) - 1)
        found.append(total)
    return found


def inner(a: Tensor, b: Tensor) -> float:
    """Inner product of the entries about their means."""
    x, y = a.flatten().tolist(), b.flatten().tolist()
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((u - mx) * (v - my) for u, v in zip(x, y, strict=True))


def split_correlation(a: list[Tensor], b: list[Tensor]) -> float | None:
    within = inner(a[0], a[1]), inner(b[0], b[1])
    if min(within) <= 0:
        return None
    return (inner(a[0], b[1]) + inner(a[1], b[0])) / 2 / math.sqrt(within[0] * within[1])


def entropy_rank(values: list[float]) -> float:
    p = [v / sum(values) for v in values if v / sum(values) > 1e-12]
    return math.exp(-sum(q * math.log(q) for q in p))


def distinct(twin: Twin, name: str) -> float:
    """Share of units left when those whose weights and biases have a cosine of 0.99 are joined."""
    groups = getattr(twin.net.get_submodule(name), "groups", 1) if "attention" not in name else 1
    w, bias = twin.weights[name], twin.biases[name]
    units = (
        [torch.cat([u, b.reshape(1)]) for u, b in zip(w, bias, strict=True)] if bias is not None else list(w)
    )
    size = len(units) // groups
    outgoing = dict(twin.outgoing).get(name)
    label = list(range(len(units)))
    for i in range(len(units)):
        for j in range(i):
            same = i // size == j // size and cosine(units[i], units[j]) >= 0.99
            if same and outgoing is not None:
                same = cosine(outgoing[:, i], outgoing[:, j]) >= 0.99
            if same:
                label = [label[j] if k == label[i] else k for k in label]
    return len(set(label)) / len(units)


def cosine(u: Tensor, v: Tensor) -> float:
    return float((u * v).sum() / math.sqrt(float((u * u).sum()) * float((v * v).sum())))


def singular_values(rows: list[Tensor]) -> list[float]:
    x = torch.stack(rows)
    return torch.linalg.svdvals(x - x.mean(0)).tolist()


def fit(case: str, callbacks: list) -> tuple[Twin, dict[str, float], Classifier]:
    build, shape = CASES[case]
    torch.manual_seed(3)
    net = build().double()
    x = torch.randn(N, *shape, dtype=torch.float64)
    y = torch.randint(0, CLASSES, (N,))
    twin = Twin(net, x, y)
    model = Classifier(net, lr=LR)
    run = trainer(max_steps=1, callbacks=callbacks)
    run.fit(model, DataLoader(TensorDataset(x, y), batch_size=N))
    return twin, callbacks[0].history[0], model


@pytest.mark.parametrize("form", ["normalized", "raw"])
@pytest.mark.parametrize("case", CASES)
def test_alignment_equals_single_sample_autograd(case, form):
    monitor = AlignmentMonitor(moments=form, null=False, strict=True)
    twin, got, _ = fit(case, [monitor])
    expected = {}
    for name, rows in twin.rows.items():
        w = twin.weights[name]
        for side, c, z in (("in", "a", w.T @ w), ("out", "b", w @ w.T)):
            h, g = moments(rows[f"h_{c}"], form), moments(rows[f"g_{c}"], form)
            for relation, pair in (("rga", (h, g)), ("rwa", (h, [z, z])), ("gwa", (g, [z, z]))):
                if (value := split_correlation(*pair)) is not None:
                    expected[f"alignment/net.{name}/{side}/{relation}"] = value
    expected["alignment/mean"] = sum(expected.values()) / len(expected)
    expected["alignment/samples"] = min(len(rows["h_a"]) for rows in twin.rows.values())
    del got["step"], got["fit"]
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_collapse_equals_naive_twin(case):
    monitor = CollapseMonitor(strict=True)
    twin, got, _ = fit(case, [monitor])
    expected = {}
    for name, rows in twin.rows.items():
        prefix, w = f"collapse/net.{name}", twin.weights[name]
        sigma = singular_values(rows["h_b"])
        expected[f"{prefix}/effective_rank"] = entropy_rank([s for s in sigma if s > 1e-9 * sigma[0]])
        one, other = moments(rows["h_b"], "centred")
        if (shared := float((one * other).sum())) > 0:
            expected[f"{prefix}/participation_ratio"] = float(one.trace() * other.trace()) / shared
        expected[f"{prefix}/numerical_rank"] = sum(s > 1e-3 * sigma[0] for s in sigma)
        if name not in twin.data_fed:
            units = torch.stack(twin.units[name])
            dead = sum(all(v == 0 for v in units[:, u].tolist()) for u in range(units.shape[1]))
            expected[f"{prefix}/dead_units"] = dead / units.shape[1]
        spectrum = torch.linalg.svdvals(w).tolist()
        expected[f"{prefix}/weight_effective_rank"] = entropy_rank(spectrum)
        expected[f"{prefix}/weight_stable_rank"] = sum(s * s for s in spectrum) / spectrum[0] ** 2
        expected[f"{prefix}/distinct_units"] = distinct(twin, name)
        expected[f"{prefix}/zero_units"] = 0.0
    assert got.pop("collapse/samples") == min(len(rows["h_b"]) for rows in twin.rows.values())
    del got["step"], got["fit"], got["collapse/score"]
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_plasticity_equals_naive_twin(case):
    monitor = PlasticityMonitor(strict=True, threshold=0.5)
    twin, got, model = fit(case, [monitor])
    after = Twin(model.net, torch.zeros(1, *CASES[case][1]).double(), torch.zeros(1).long()).weights
    expected = {}
    for name, rows in twin.rows.items():
        prefix, w = f"plasticity/net.{name}", twin.weights[name]
        if name not in twin.data_fed:
            units = torch.stack(twin.units[name])
            mean = [sum(abs(v) for v in units[:, u].tolist()) / len(units) for u in range(units.shape[1])]
            average = sum(mean) / len(mean)
            expected[f"{prefix}/dormant_units"] = sum(m <= 0.5 * average for m in mean) / len(mean)
            dead = sum(all(v == 0 for v in units[:, u].tolist()) for u in range(units.shape[1]))
            expected[f"{prefix}/dead_units"] = dead / units.shape[1]
        expected[f"{prefix}/weight_norm"] = math.sqrt(sum(v * v for v in w.flatten().tolist()))
        change = (after[name] - w).flatten().tolist()
        expected[f"{prefix}/relative_update"] = (
            math.sqrt(sum(v * v for v in change)) / expected[f"{prefix}/weight_norm"]
        )
        sigma = singular_values(rows["h_a"])
        expected[f"{prefix}/feature_rank"] = entropy_rank([s for s in sigma if s > 1e-9 * sigma[0]])
        gradient = torch.stack([torch.outer(g, h) for g, h in zip(rows["g_b"], rows["h_a"], strict=True)])
        zero = gradient.abs().amax(0) < 1e-300
        zero = zero[w != 0]  # a grouped convolution's weight holds its blocks only
        expected[f"{prefix}/zero_gradients"] = float(zero.double().mean())
    for what in ("dormant_units", "feature_rank"):
        values = [v for k, v in expected.items() if k.endswith(what)]
        expected[f"plasticity/{what}"] = sum(values) / len(values)
    del got["step"], got["fit"]
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_gradients_are_those_of_per_sample_losses():
    """The batch mean and the accumulation's division are undone, in magnitude too."""
    magnitudes = {}
    for accumulate, batch_size in ((1, 8), (2, 4), (4, 2), (8, 1)):
        monitor = Magnitude(every_n_steps=1, strict=True)
        torch.manual_seed(0)
        model = Classifier(mlp(4, 6, CLASSES).double())
        data = torch.Generator().manual_seed(1)
        x = torch.randn(8, 4, dtype=torch.float64, generator=data)
        y = torch.randint(0, CLASSES, (8,), generator=data)
        run = trainer(max_steps=1, accumulate_grad_batches=accumulate, callbacks=[monitor])
        run.fit(model, DataLoader(TensorDataset(x, y), batch_size=batch_size))
        magnitudes[accumulate] = monitor.history[0]
    for accumulate in (2, 4, 8):
        assert magnitudes[accumulate] == pytest.approx(magnitudes[1], rel=1e-9)


class Magnitude(AlignmentMonitor):
    """Traces of the gradients' second moments."""

    sides = tuple(SecondMoments(side) for side in ("output_gradients", "input_gradients", "inputs"))

    def __init__(self, **settings):
        super().__init__(moments="raw", **settings)
        self.needs = self.sides

    def read(self, seen):
        for layer in seen.layers:
            for side in self.sides:
                yield Reading(layer.name, side.side, layer[side].second.trace())
