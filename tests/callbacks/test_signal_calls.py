"""What the signal monitor reads off calls: dead units, loops, early positions, generators, frozen layers."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import SignalMonitor
from lightning_sym.observe.clouds import chosen
from lightning_sym.observe.loops import LoopGradients


class Fit(LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def read(net, x, y, *, steps=1):
    monitor = SignalMonitor(every_n_steps=1, strict=True)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[monitor],
    )
    trainer.fit(Fit(net), DataLoader(TensorDataset(x, y), len(x)))
    return monitor.history


class Loop(nn.Module):
    def __init__(self, positions):
        super().__init__()
        self.positions = positions
        self.again, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        self.made = []
        for _ in range(self.positions):
            out = self.again(x)
            self.made.append(out)
            x = torch.tanh(out)
        return self.head(x)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    x = torch.randn(12, 6, dtype=torch.float64)
    return x, x[:, :3].argmax(1)


def test_reach_through_a_loop_equals_a_slow_twin(batch):
    net = Loop(9).double()
    net(batch[0])
    made = list(net.made)
    loss = F.cross_entropy(net.head(torch.tanh(made[-1])), batch[1])
    first, last = (torch.autograd.grad(loss, made[i], retain_graph=True)[0] for i in (0, -1))
    (row,) = read(net, *batch)
    assert row["signal/net.again/reach"] == pytest.approx(float(first.norm() / last.norm()), rel=1e-9)
    assert not any("net.head/reach" in key for key in row)


def test_a_layer_that_is_called_a_few_times_is_no_loop(batch):
    (row,) = read(Loop(7).double(), *batch)
    assert not any(key.endswith("reach") for key in row)


def test_a_loop_is_followed_through_each_backward_pass_by_itself():
    loop, weight = LoopGradients(lambda hook: hook), torch.ones(3, requires_grad=True)
    for scale in (1.0, 2.0):
        x = torch.ones(2, 3)
        for _ in range(8):
            x = x * weight * 0.5
            loop.follow(x)
        (scale * x).sum().backward()
    # each of two passes: 6 entries, half the gradient for each call further back
    assert loop.ends().tolist() == pytest.approx([6 * (0.5**7) ** 2 * 5, 6.0 * 5])


def test_dead_units_are_counted_wherever_there_is_a_relu(batch):
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    net[0].bias.data[:5] = -50.0
    twin = torch.relu(net[0](batch[0]))
    dead = [float((twin == 0).all(0).double().mean())]
    dead.append(float((torch.relu(net[2](twin)) == 0).all(0).double().mean()))
    (row,) = read(net, *batch)
    assert [row["signal/net.0/dead"], row["signal/net.2/dead"]] == dead
    assert dead[0] >= 5 / 8


def test_units_of_a_convolution_are_its_channels():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    net[0].bias.data[1] = -50.0
    x = torch.randn(10, 1, 4, 4)
    twin = torch.relu(net[0](x))
    (row,) = read(net, x, torch.arange(10) % 3)
    assert row["signal/net.0/dead"] == float((twin.sum((0, 2, 3)) == 0).double().mean()) == 0.25


@pytest.mark.parametrize(("kind", "batch_first"), [(nn.LSTM, True), (nn.GRU, False), (nn.RNN, True)])
@pytest.mark.parametrize("every", [True, False])
def test_early_positions_that_are_used_by_themselves_are_told(kind, batch_first, every):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory, self.head = kind(5, 7, batch_first=batch_first), nn.Linear(7, 3)

        def forward(self, x):
            out = self.memory(x if batch_first else x.transpose(0, 1))[0]
            out = out if batch_first else out.transpose(0, 1)
            return self.head(out.mean(1) if every else out[:, -1])

    torch.manual_seed(0)
    (row,) = read(Net(), torch.randn(8, 6, 5), torch.arange(8) % 3)
    assert row["signal/net.memory/early"] == float(every)


def test_stretches_of_layers_that_are_off(batch):
    net = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(6, 6), nn.Tanh()))).double()
    for at in (2, 4, 8):
        net[at].requires_grad_(False)
    (row,) = read(net, *batch)
    assert row["signal/off"] == pytest.approx(3 / 6)
    assert row["signal/off_runs"] == 2.0


def test_a_layer_that_rested_in_this_step_alone_has_moved(batch):
    class InTurn(Fit):
        def __init__(self, net):
            super().__init__(net)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            one = self.optimizers()[batch_idx % 2]
            one.zero_grad()
            self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
            one.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[at].parameters(), lr=0.1) for at in (0, 2)]

    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    monitor = SignalMonitor(every_n_steps=2, strict=True)
    trainer = Trainer(max_steps=6, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, callbacks=[monitor])  # fmt: skip
    trainer.fit(InTurn(net), DataLoader(TensorDataset(*batch), 2))
    moved = [row["signal/net.0/moved"] for row in monitor.history[1:]]  # at steps 2, 4 and 6
    assert moved == [0.0, 1.0, 1.0]


def test_chosen_samples_equal_a_slow_twin():
    torch.manual_seed(0)
    made, data = torch.randn(9, 4), torch.randn(12, 4)
    near = {min(range(12), key=lambda j: float((made[i] - data[j]).norm())) for i in range(9)}
    among = {
        min((j for j in range(12) if j != i), key=lambda j: float((data[i] - data[j]).norm()))
        for i in range(9)
    }
    assert chosen(made, data).tolist() == [len(near), len(among)]
    assert chosen(made[:1].expand(9, 4), data)[0] == 1
