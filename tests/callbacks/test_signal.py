"""Readings of the signal against slow twins, and that the run never notices."""

import contextlib
import copy
import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import SignalMonitor, monitors
from lightning_sym.engine.loop import watch

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Net(LightningModule):
    """A network, a loss of it and a batch, and plain SGD unless told otherwise."""

    def __init__(self, net, loss=None, make=None):
        super().__init__()
        self.net = net.double()
        self.loss_function = loss or (lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]))
        self.make = make or (lambda parameters: torch.optim.SGD(parameters, lr=0.05))

    def training_step(self, batch, batch_idx):
        return self.loss_function(self.net, batch)

    def configure_optimizers(self):
        return self.make(self.net.parameters())


def data(n=16, width=6, classes=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, classes, (n,), generator=generator)


def read(net, *, loss=None, x=None, y=None, steps=1, make=None, monitor=None, batch=None):
    """Fit and return the rows of a signal monitor."""
    given_x, given_y = data()
    x, y = given_x if x is None else x, given_y if y is None else y
    monitor = monitor or SignalMonitor(every_n_steps=1, strict=True)
    loader = DataLoader(TensorDataset(x, y), batch_size=batch or len(x))
    Trainer(max_steps=steps, max_epochs=-1, callbacks=[monitor], **QUIET).fit(Net(net, loss, make), loader)
    return monitor.history


def mlp(*between, width=12):
    torch.manual_seed(0)
    parts = between or (nn.ReLU(),)
    return nn.Sequential(nn.Linear(6, width), *parts, nn.Linear(width, 3)).double()


def test_loss_gradients_shares_and_movement_equal_a_slow_twin():
    net = mlp()
    twin, (x, y) = copy.deepcopy(net), data()
    (row,) = read(net)
    hidden = twin[0](x)
    hidden.retain_grad()
    out = twin[2](twin[1](hidden))
    out.retain_grad()
    loss = F.cross_entropy(out, y)
    loss.backward()
    assert row["signal/loss"] == pytest.approx(loss.item())
    for name, h in (("0", hidden), ("2", out)):
        squares = [float(v) ** 2 for sample in (h.grad * len(x)).detach() for v in sample]
        assert row[f"signal/net.{name}/gradient"] == pytest.approx(math.sqrt(sum(squares) / len(squares)))
        weight = twin[int(name)].weight
        norm = math.sqrt(sum(float(v) ** 2 for v in (*weight.grad.flatten(),)))
        assert row[f"signal/net.{name}/weight_gradient"] == pytest.approx(norm)
        flat = weight.detach().flatten()
        moved = [0.05 * float(g) for g in weight.grad.flatten()]
        distance = math.sqrt(sum(m * m for m in moved)) / float(flat.norm())
        assert row[f"signal/net.{name}/distance"] == pytest.approx(distance)
        h = h.detach()
        mean = h.mean(0)
        share = float(((h - mean) ** 2).sum() / (h**2).sum())
        assert row[f"signal/net.{name}/output_share"] == pytest.approx(share)
        assert row[f"signal/net.{name}/trained"] == row[f"signal/net.{name}/moved"] == 1.0
    assert "signal/net.0/directions" in row
    assert "signal/net.2/directions" not in row  # 3 outputs


def test_what_does_not_move_is_told_and_why():
    net = mlp(nn.ReLU(), nn.Linear(12, 12), nn.ReLU())
    net[2].requires_grad_(False)
    (row,) = read(net, make=lambda parameters: torch.optim.SGD(list(parameters)[2:], lr=0.1))
    assert (row["signal/net.2/trained"], row["signal/net.2/moved"]) == (0.0, 0.0)
    assert (row["signal/net.0/trained"], row["signal/net.0/moved"]) == (1.0, 0.0)
    assert row["signal/net.0/left_out"] == 1.0
    assert row["signal/net.4/moved"] == 1.0
    assert "signal/net.4/left_out" not in row


def test_unwatched_layers_are_told_only_where_they_stay():
    net = mlp(nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU())
    monitor = SignalMonitor(every_n_steps=1, layers="net.0", strict=True)

    def left_out(parameters):
        return torch.optim.SGD([p for i, p in enumerate(parameters) if i not in (2, 3)], lr=0.1)

    (row,) = read(net, make=left_out, monitor=monitor)
    assert row["signal/net.2/moved"] == 0.0
    assert row["signal/net.2/left_out"] == 1.0
    assert "signal/net.4/moved" not in row
    assert row["signal/net.0/moved"] == 1.0


@pytest.mark.parametrize("kind", [nn.Tanh, nn.Sigmoid])
def test_saturated_share_of_modules_and_functions(kind):
    net = mlp(kind(), width=8)
    net[0].weight.data.mul_(12)
    values = net[:2](data()[0]).detach()
    low = -1.0 if kind is nn.Tanh else 0.0
    near = [abs(float(v) - end) < 0.01 for v in values.flatten() for end in (low, 1.0)]
    expected = sum(near) / values.numel()
    assert 0.1 < expected < 0.9
    (row,) = read(net)
    assert row["signal/net.0/saturated"] == pytest.approx(expected)


class Residual(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.first, self.block, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.scale = scale

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.scale * self.block(x))


@pytest.mark.parametrize("scale", [0.5, 1e-9])
def test_what_a_block_adds_equals_a_slow_twin(scale):
    torch.manual_seed(0)
    net = Residual(scale).double()
    stream = net.first(data()[0])
    added = scale * net.block(stream)
    sizes = [math.sqrt(float(((t - t.mean(0)) ** 2).sum())) for t in (added.detach(), stream.detach())]
    (row,) = read(net)
    assert row["signal/net.block/added"] == pytest.approx(min(sizes) / max(sizes), rel=1e-4, abs=2e-8)


class Attention(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.head, self.how = nn.Linear(6, 3), how
        if how != "module":
            self.q, self.k = nn.Linear(6, 8), nn.Linear(6, 8)
        self.mha = nn.MultiheadAttention(6, 2, batch_first=True) if how == "module" else None

    def weights(self, x):
        if self.mha is not None:
            q, k, _ = F.linear(x, self.mha.in_proj_weight, self.mha.in_proj_bias).chunk(3, -1)
            q, k = (t.unflatten(-1, (2, 3)).transpose(1, 2) for t in (q, k))
            return (q @ k.mT / math.sqrt(3)).softmax(-1)
        q, k = (each(x).unflatten(-1, (2, 4)).transpose(1, 2) for each in (self.q, self.k))
        scores = q @ k.mT / 2
        if self.how == "causal":
            scores = scores.masked_fill(torch.ones(5, 5).bool().triu(1), -math.inf)
        return scores.softmax(-1)

    def forward(self, x):
        x = x.reshape(len(x) // 5, 5, 6)
        if self.how == "module":
            return self.head(self.mha(x, x, x)[0]).flatten(0, 1)
        value = x.unsqueeze(1).expand(-1, 2, -1, -1)
        if self.how == "fused":
            q, k = (each(x).unflatten(-1, (2, 4)).transpose(1, 2) for each in (self.q, self.k))
            return self.head(F.scaled_dot_product_attention(q, k, value).mean(1)).flatten(0, 1)
        return self.head((self.weights(x) @ value).mean(1)).flatten(0, 1)


@pytest.mark.parametrize("how", ["plain", "causal", "fused", "module"])
def test_entropy_of_attention_equals_a_slow_twin(how):
    torch.manual_seed(0)
    net = Attention(how).double()
    x, y = data(n=20)
    weights = net.weights(x.reshape(4, 5, 6)).detach()
    heads = []
    for head in range(2):
        shares = []
        for sample in range(4):
            for place in range(5):
                seen = place + 1 if how == "causal" else 5
                if seen > 1:
                    p = [float(v) for v in weights[sample, head, place, :seen]]
                    shares.append(-sum(v * math.log(v) for v in p if v > 0) / math.log(seen))
        heads.append(sum(shares) / len(shares))
    (row,) = read(net, x=x, y=y)
    place = "net.mha.out_proj" if how == "module" else "net.k"
    assert row[f"signal/{place}/attention_least"] == pytest.approx(min(heads), rel=1e-5)
    assert row[f"signal/{place}/attention_most"] == pytest.approx(max(heads), rel=1e-5)
    off = weights - weights.mean(0)
    varies = float(off.square().sum() / weights.square().sum())
    if how == "causal":  # the first place, which looks at itself alone, is left out
        varies = float(off[..., 1:, :].square().sum() / weights[..., 1:, :].square().sum())
    assert row[f"signal/{place}/attention_varies"] == pytest.approx(varies, rel=1e-5)


def test_softmax_over_classes_is_no_attention():
    (row,) = read(nn.Sequential(mlp(), nn.Softmax(-1)))
    assert not any("attention" in key for key in row)


class Coder(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.log, self.back = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        mean = self.mean(x)
        return self.back(mean + self.log(x).exp() * torch.randn_like(mean))


def test_variance_of_a_code_equals_a_slow_twin():
    torch.manual_seed(0)
    net = Coder().double()
    mean = net.mean(data()[0]).detach()
    variances = [float(((mean[:, k] - mean[:, k].mean()) ** 2).mean()) for k in range(4)]
    (row,) = read(net)
    (value,) = [value for key, value in row.items() if key.endswith("/code")]
    assert value == pytest.approx(max(variances))
    assert not any(key.endswith("/added") for key in row)


def test_spread_of_a_generator_over_that_of_data():
    torch.manual_seed(0)
    make, judge = nn.Linear(2, 6), nn.Linear(6, 1)
    net = nn.ModuleDict({"make": make, "judge": judge}).double()
    seen = []

    def loss(net, batch):
        made = net["make"](torch.randn(len(batch[0]), 2, dtype=torch.float64))
        seen.append(made.detach())
        return net["judge"](made).mean() - net["judge"](batch[0]).mean()

    (row,) = read(net, loss=loss)
    sizes = [float(((t - t.mean(0)) ** 2).sum()) for t in (seen[0], data()[0])]
    assert row["signal/net.judge/spread"] == pytest.approx(math.sqrt(sizes[0] / sizes[1]))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.memory, self.head = kind(6, 7, batch_first=True), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.memory(x.reshape(len(x) // 5, 5, 6))[0]).flatten(0, 1)


def test_gates_and_reach_of_a_recurrent_module_equal_a_slow_twin():
    torch.manual_seed(0)
    net = Recurrent(nn.LSTM).double()
    net.memory.weight_ih_l0.data.mul_(8)
    x, y = data(n=20)
    cell = nn.LSTMCell(6, 7).double()
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in net.memory.state_dict().items()})
    inputs = [x.reshape(4, 5, 6)[:, t].clone().requires_grad_() for t in range(5)]
    h = c = torch.zeros(4, 7, dtype=torch.float64)
    near = total = 0
    for each in inputs:
        into = each @ cell.weight_ih.T + cell.bias_ih + h @ cell.weight_hh.T + cell.bias_hh
        for number, part in enumerate(into.chunk(4, 1)):
            values = part.tanh() if number == 2 else part.sigmoid()
            low = -1.0 if number == 2 else 0.0
            near += sum(abs(float(v) - end) < 0.01 for v in values.detach().flatten() for end in (low, 1.0))
            total += values.numel()
        h, c = cell(each, (h, c))
    (h * torch.arange(7).cos()).sum().backward()
    h = h.detach()
    (row,) = read(net, x=x, y=y)
    assert 0.1 < near / total < 0.9
    assert row["signal/net.memory/saturated"] == pytest.approx(near / total)
    reach = float(inputs[0].grad.norm() / inputs[-1].grad.norm())
    assert row["signal/net.memory/reach"] == pytest.approx(reach, rel=1e-6)


def test_turn_and_sharpness_equal_a_slow_twin():
    net = mlp(nn.Tanh())
    twin, (x, y) = copy.deepcopy(net), data()
    found = []
    for _ in range(2):
        loss = F.cross_entropy(twin(x), y)
        g = torch.autograd.grad(loss, list(twin.parameters()))
        found.append(torch.cat([part.flatten() for part in g]))
        with torch.no_grad():
            for p, part in zip(twin.parameters(), g, strict=True):
                p.sub_(part, alpha=0.05)
    rows = read(net, steps=4, monitor=SignalMonitor(every_n_steps=2, strict=True))
    a, b = found
    assert rows[1]["signal/turn"] == pytest.approx(float(a @ b / a.norm() / b.norm()))
    assert rows[1]["signal/sharpness"] == pytest.approx(float(1 - a @ b / (a @ a)))
    adam = read(mlp(), steps=4, make=lambda parameters: torch.optim.Adam(parameters))
    assert not any("turn" in key for row in adam for key in row)


class Counting(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x)


@pytest.mark.parametrize("inner", ["mlp", "attention", "coder", "recurrent", "encoder"])
def test_a_run_with_it_is_bitwise_the_run_without(inner):
    def fitted(callbacks):
        torch.manual_seed(0)
        nets = {
            "mlp": lambda: mlp(nn.Dropout(0.3), nn.Tanh()),
            "attention": lambda: Attention("module"),
            "coder": Coder,
            "recurrent": lambda: Recurrent(nn.GRU),
            "encoder": lambda: nn.Sequential(
                nn.Unflatten(0, (-1, 5)),
                nn.TransformerEncoderLayer(6, 2, 8, batch_first=True),
                nn.Flatten(0, 1),
                nn.Linear(6, 3),
            ),
        }
        module = Net(Counting(nets[inner]()), make=lambda parameters: torch.optim.AdamW(parameters, 1e-2))
        x, y = data(n=20)
        torch.manual_seed(3)
        Trainer(max_steps=3, max_epochs=-1, callbacks=callbacks, **QUIET).fit(
            module, DataLoader(TensorDataset(x, y), batch_size=20)
        )
        grads = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
        return module.state_dict(), grads, module.net.calls, torch.get_rng_state()

    alone, watched = fitted([]), fitted([monitors("standard", every_n_steps=2, strict=True)])
    assert all(torch.equal(alone[0][key], watched[0][key]) for key in alone[0])
    assert all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(alone[1], watched[1], strict=True)
    )
    assert alone[2] == watched[2]
    assert torch.equal(alone[3], watched[3])


def test_a_plain_loop_reads_the_same():
    net = mlp(nn.Tanh())
    twin, (x, y) = copy.deepcopy(net), data()
    expected = read(net, steps=3)
    monitor = SignalMonitor(every_n_steps=1, strict=True)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    with watch(twin, optimizer, monitor) as watching:
        for _ in range(3):
            watching.batch((x, y))
            loss = F.cross_entropy(twin(x), y)
            watching.loss(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for mine, theirs in zip(monitor.history, expected, strict=True):
        renamed = {key.replace("/net.", "/"): value for key, value in theirs.items()}
        assert mine == pytest.approx(renamed, rel=1e-9)


class FastEncoder(nn.Module):
    """A frozen part that takes torch's fused path, which a function mode that is on shuts."""

    def __init__(self):
        super().__init__()
        self.body = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).requires_grad_(False)
        self.head = nn.Linear(32, 3)

    def train(self, mode=True):
        super().train(mode)
        self.body.eval()
        return self

    def forward(self, x):
        with torch.no_grad():
            h = self.body(x)
        return self.head(h).mean(1)


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 10, 32, generator=generator).double(), torch.arange(8) % 3


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
@pytest.mark.parametrize("plain", [True, False], ids=["loop", "Trainer"])
def test_torchs_fast_paths_stay_open(plain):
    def trained(monitors):
        torch.manual_seed(0)
        net, (x, y) = FastEncoder().double().train(), inputs()
        outputs = []

        def step(net):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            outputs.append(net(x).detach())

        if plain:
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            with watch(net, optimizer, monitors) if monitors else contextlib.nullcontext():
                for _ in range(5):
                    step(net)
        else:
            module = Net(net, make=lambda parameters: torch.optim.SGD(parameters, 0.1))
            loader = DataLoader(TensorDataset(x, y), batch_size=8)
            Trainer(max_steps=5, max_epochs=-1, callbacks=monitors, **QUIET).fit(module, loader)
        return [*outputs, net.head.weight.detach()]

    watched = trained([SignalMonitor(every_n_steps=3, strict=True, layers="*head")])
    assert all(torch.equal(a, b) for a, b in zip(trained([]), watched, strict=True))


def test_a_mode_of_the_users_may_begin_and_end_anywhere():
    net, (x, y) = mlp(nn.Tanh()), data()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    monitor = SignalMonitor(every_n_steps=2, strict=True)
    modes = torch.overrides._get_current_function_mode_stack
    with watch(net, optimizer, monitor):
        assert len(modes()) == 1  # step 1 is due
        for _ in range(5):
            with torch.device("cpu"):
                F.cross_entropy(net(x), y).backward()
                mine = modes()[-1]
                optimizer.step()  # here a watched step ends, or one begins
                assert modes()[-1] is mine
                optimizer.zero_grad()
            assert mine not in modes()
    assert modes() == []
    assert [row["step"] for row in monitor.history] == [1, 2, 4]
    assert all("signal/0/saturated" in row for row in monitor.history)


def test_nobody_looks_at_the_functions_of_a_step_that_is_not_due():
    net, (x, y) = mlp(nn.Tanh()), data()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    on = []
    with watch(net, optimizer, SignalMonitor(every_n_steps=3, strict=True)):
        for _ in range(4):
            on.append(len(torch.overrides._get_current_function_mode_stack()))
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    assert on == [1, 0, 1, 0]


def test_a_step_made_inside_of_backward_leaves_no_mode_behind():
    net, (x, y) = mlp(nn.Tanh()), data()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    first = next(net.parameters())
    first.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    with watch(net, optimizer, SignalMonitor(every_n_steps=2, strict=True)):
        for _ in range(3):
            F.cross_entropy(net(x), y).backward()
            optimizer.zero_grad()
    assert torch.overrides._get_current_function_mode_stack() == []


def test_a_fault_in_the_looking_ends_no_fit(monkeypatch):
    def broken(*_):
        raise RuntimeError("spoiled")

    monkeypatch.setattr("lightning_sym.observe.functions.FunctionWatch._see", broken)
    monitor = SignalMonitor(every_n_steps=1)
    with pytest.warns(UserWarning, match="SignalMonitor failed.*spoiled"):
        assert read(mlp(), monitor=monitor) == []
