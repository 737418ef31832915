"""Readings are of the step's own batch and loss, with several optimizers and passes beside it too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import AlignmentMonitor, CollapseMonitor, Monitor, SignalMonitor
from lightning_sym.observe import SecondMoments
from tests.models import mlp, trainer

N = 16


class Moments(Monitor):
    """Keeps second moments and numbers of samples of every layer, by step."""

    sides = tuple(SecondMoments(side, max_width=None) for side in ("inputs", "output_gradients"))
    needs = sides

    def read(self, seen: Any) -> Any:
        self.seen = getattr(self, "seen", {})
        for layer in seen.layers:
            x, g = (layer[side] for side in self.sides)
            self.seen[seen.step, layer.name] = x.n, x.second.clone(), g.n, g.second.clone()
        return ()


class GAN(LightningModule):
    """Steps the judge, on real and made samples, then the generator, whose loss goes through the judge."""

    def __init__(self, *, both: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization, self.both = False, both
        self.generator, self.judge = mlp(4, 8, 6).double(), mlp(6, 9, 7, 1).double()

    def fooling(self, noise: Tensor) -> Tensor:
        """Return the generator's loss of each sample."""
        return F.softplus(-self.judge(self.generator(noise)))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, noise = batch
        fool, catch = self.optimizers()

        def step(optimizer: Any, loss: Tensor) -> None:
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

        made = self.judge(self.generator(noise).detach())
        step(catch, F.softplus(-self.judge(real)).mean() + F.softplus(made).mean())
        if self.both:
            step(fool, self.fooling(noise).mean())

    def configure_optimizers(self) -> Any:
        nets = self.generator, self.judge
        return [torch.optim.SGD(net.parameters(), 0.1) for net in nets]


def pairs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(N, width, generator=generator).double() for width in (6, 4))  # type: ignore[return-value]


def played(module: GAN, *watching: Monitor) -> GAN:
    run = trainer(callbacks=list(watching), max_epochs=1)
    run.fit(module, DataLoader(TensorDataset(*pairs()), N))
    return module


def test_a_judge_is_read_in_its_own_step_alone():
    """The generator's step runs it too: nothing of that is in its readings."""
    rows = []
    for both in (False, True):
        watching = [
            AlignmentMonitor(every_n_steps=1, layers="judge.*", strict=True),
            CollapseMonitor(every_n_steps=1, layers="judge.*", strict=True),
        ]
        played(GAN(both=both), *watching)
        rows.append({k: v for m in watching for k, v in m.history[0].items() if k not in ("step", "fit")})
    assert rows[0] == rows[1]
    assert any("judge.2/in/rga" in key for key in rows[0])


def test_each_network_of_a_gan_is_read_with_the_gradients_of_its_own_loss():
    """Against one sample after the other, by autograd: the judge before its step, the generator after it."""
    monitor, twin = Moments(every_n_steps=1, layers="*", strict=True), GAN()
    played(GAN(), monitor)
    (step,) = {step for step, _ in monitor.seen}
    real, noise = pairs()

    def moments(net: nn.Sequential, place: int, samples: Tensor, loss: Any) -> tuple[Tensor, Tensor]:
        inputs, gradients = [], []
        for sample in samples:
            h = net[:place](sample[None]).detach()
            y = net[place](h)
            (g,) = torch.autograd.grad(loss(net[place + 1 :](y)).sum(), y)
            inputs.append(torch.outer(h[0], h[0]))
            gradients.append(torch.outer(g[0], g[0]))
        return sum(inputs) / len(samples), sum(gradients) / len(samples)  # type: ignore[return-value]

    judge = copy.deepcopy(twin.judge)
    made = twin.generator(noise).detach()
    for place in (0, 2, 4):
        n, x, n_g, g = monitor.seen[step, f"judge.{place}"]
        assert n == n_g == 2 * N
        parts = [
            moments(judge, place, real, lambda y: F.softplus(-y)),
            moments(judge, place, made, lambda y: F.softplus(y)),
        ]
        torch.testing.assert_close(x, sum(p[0] for p in parts) / 2)
        torch.testing.assert_close(g, sum(p[1] for p in parts) / 2)
    optimizer = torch.optim.SGD(twin.judge.parameters(), 0.1)
    (F.softplus(-twin.judge(real)).mean() + F.softplus(twin.judge(made)).mean()).backward()
    optimizer.step()
    for place in (0, 2):
        n, x, n_g, g = monitor.seen[step, f"generator.{place}"]
        inputs, gradients = moments(twin.generator, place, noise, lambda y: F.softplus(-twin.judge(y)))
        assert n == n_g == N  # what it made for the judge is not among them
        torch.testing.assert_close(x, inputs)
        torch.testing.assert_close(g, gradients)


class DQN(LightningModule):
    """Double Q-learning: the trained network also chooses actions of the next states, without gradients."""

    def __init__(self, *, double: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.double_q = mlp(4, 8, 3).double(), double
        self.target = copy.deepcopy(self.net).requires_grad_(False)

    def act(self, state: Tensor) -> Tensor:
        """Return actions."""
        with torch.no_grad():
            return self.net(state).argmax(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        state, action, reward, after = batch
        if self.double_q:
            self.act(state[:3])  # in the environment
            with torch.no_grad():
                best = self.net(after).argmax(1)
                value = self.target(after)[torch.arange(len(best)), best]
        else:
            value = self.target(after).max(1).values
        found = self.net(state)[torch.arange(len(action)), action]
        return F.mse_loss(found, reward + 0.9 * (value if self.double_q else value.detach()))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.1)


def transitions() -> DataLoader:
    generator = torch.Generator().manual_seed(2)
    state, after = (torch.randn(N, 4, generator=generator).double() for _ in range(2))
    reward = torch.randn(N, generator=generator).double()
    return DataLoader(TensorDataset(state, torch.arange(N) % 3, reward, after), N)


def test_passes_without_gradient_are_not_pooled_into_a_q_networks_readings():
    monitor, module = Moments(every_n_steps=1, strict=True), DQN()
    net = copy.deepcopy(module.net)
    loader = transitions()
    trainer(callbacks=[monitor], max_epochs=1).fit(module, loader)
    assert {name for _, name in monitor.seen} == {"net.0", "net.2"}  # the target is frozen
    (state, *_), *_ = loader
    inputs = {0: state, 2: net[:2](state).detach()}
    for place, h in inputs.items():
        n, x, n_g, _ = monitor.seen[1, f"net.{place}"]
        assert n == n_g == N
        torch.testing.assert_close(x, h.T @ h / N)


OF_TARGET = ("signal/target.", "signal/off")


@pytest.mark.parametrize("kind", [AlignmentMonitor, CollapseMonitor, SignalMonitor])
def test_what_acts_beside_a_step_changes_no_reading_of_it(kind):
    """The same step without acting and without the second pass: a target that chooses for itself."""

    class Same(DQN):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            state, action, reward, after = batch
            self.passes(state, after)
            found = self.net(state)[torch.arange(len(action)), action]
            return F.mse_loss(found, reward)

        def passes(self, state: Tensor, after: Tensor) -> None:
            """Run nothing else."""

    class Acts(Same):
        def passes(self, state: Tensor, after: Tensor) -> None:
            self.act(after)
            self.target(after)

    rows = []
    for module in (Same(), Acts()):
        monitor = kind(every_n_steps=1, layers="net.*", strict=True)
        trainer(callbacks=[monitor], max_epochs=1).fit(module, transitions())
        # That a network ran which is not trained is a reading of that network.
        rows.append(
            [{k: v for k, v in row.items() if not k.startswith(OF_TARGET)} for row in monitor.history]
        )
    assert rows[0] == rows[1]
    assert len(rows[0][0]) > 4
