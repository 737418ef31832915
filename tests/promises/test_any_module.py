"""Modules that go odd ways: the fit stays bitwise the bare one, and what is not read is said."""

from __future__ import annotations

import importlib
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import BalanceMonitor, HierarchyMonitor, monitors
from tests.models import Classifier, Witness, mlp, trainer


def points() -> DataLoader:
    """Return three batches of eight points with labels."""
    generator = torch.Generator().manual_seed(3)
    return DataLoader(TensorDataset(torch.randn(24, 8, generator=generator), torch.arange(24) % 3), 8)


def words() -> DataLoader:
    """Return three batches of sequences of words with labels."""
    generator = torch.Generator().manual_seed(3)
    return DataLoader(
        TensorDataset(torch.randint(0, 20, (24, 5), generator=generator), torch.arange(24) % 3), 8
    )


class Odd(Classifier):
    """A small classifier; what is odd is in the subclasses."""

    loader = staticmethod(points)

    def __init__(self) -> None:
        super().__init__(self.build(), lr=0.05)

    def build(self) -> nn.Module:
        """Return the network."""
        return mlp(8, 7, 6, 3, act=nn.ReLU)


class GradientPenalty(Odd):
    """Derivatives of derivatives in the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].clone().requires_grad_()
        y = self(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return F.cross_entropy(y, batch[1]) + slope.square().mean()


class OneStepAhead(Odd):
    """The network is run with other parameters than its own, as meta-learning does."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        own = dict(self.net.named_parameters())
        slopes = torch.autograd.grad(
            F.cross_entropy(self(batch[0]), batch[1]), list(own.values()), create_graph=True
        )
        ahead = {name: p - 0.1 * g for (name, p), g in zip(own.items(), slopes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(self.net, ahead, (batch[0],)), batch[1])


class PerSampleGradients(Odd):
    """Gradients of single samples by ``torch.func`` beside the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(self.net, parameters, (x[None],)), y[None])

        own = {name: p.detach() for name, p in self.net.named_parameters()}
        slopes = torch.vmap(torch.func.grad(loss), (None, 0, 0))(own, *batch[:2])
        return super().training_step(batch, batch_idx) + 0 * sum(g.sum() for g in slopes.values())


class Mapped(Odd):
    """Every pass of the step is one of ``torch.vmap``."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(torch.vmap(self.net)(batch[0]), batch[1])


class ReturnsTwo(Odd):
    """A linear layer returns its output and its bias, as tensor-parallel libraries do."""

    def build(self) -> nn.Module:
        class Both(nn.Linear):
            def forward(self, x: Tensor) -> Any:
                return super().forward(x), self.bias

        return nn.ModuleDict({"first": Both(8, 6), "last": nn.Linear(6, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.net["last"](self.net["first"](x)[0].relu())


class NoTensor(Odd):
    """A linear layer returns a dict."""

    def build(self) -> nn.Module:
        class Named(nn.Linear):
            def forward(self, x: Tensor) -> Any:
                return {"out": super().forward(x)}

        return nn.ModuleDict({"first": Named(8, 6), "last": nn.Linear(6, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.net["last"](self.net["first"](x)["out"].relu())


class Packed(Odd):
    """A projected LSTM of two layers and directions over sequences of several lengths."""

    def build(self) -> nn.Module:
        recurrent = nn.LSTM(4, 6, num_layers=2, bidirectional=True, proj_size=5, batch_first=True)
        return nn.ModuleDict({"recurrent": recurrent, "last": nn.Linear(10, 3)})

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([2] * (len(x) - 1) + [1])
        packed = nn.utils.rnn.pack_padded_sequence(
            x.view(-1, 2, 4), lengths, batch_first=True, enforce_sorted=False
        )
        padded, _ = nn.utils.rnn.pad_packed_sequence(self.net["recurrent"](packed)[0], batch_first=True)
        return self.net["last"](padded[:, -1])


class NoInputs(Odd):
    """A layer without inputs, as a configuration may leave behind."""

    def build(self) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of weights without entries
            return nn.ModuleDict({"none": nn.Linear(0, 4), "first": nn.Linear(8, 5), "last": nn.Linear(5, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.net["last"](self.net["first"](x).relu()) + self.net["none"](x[:, :0]).mean()


class SparseGradients(Odd):
    """An embedding whose gradients are sparse."""

    loader = staticmethod(words)

    def build(self) -> nn.Module:
        return nn.ModuleDict({"table": nn.Embedding(20, 8, sparse=True), "last": nn.Linear(8, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.net["last"](self.net["table"](x).mean(1))


#: What is said of each beside nothing, and a reading that it must have.
SAID: dict[type[Odd], tuple[list[str], str]] = {
    GradientPenalty: ([], "alignment/net.2/in/rga"),
    OneStepAhead: ([], "collapse/net.2/effective_rank"),
    PerSampleGradients: ([], "alignment/net.2/in/rga"),
    Mapped: (["layers that only torch.func's transforms ran have no readings: net.0, net.2, net.4"], ""),
    ReturnsTwo: ([], "alignment/net.first/out/rwa"),
    NoTensor: (["layer net.first has no readings of .*: its output is of type dict, not a tensor"], ""),
    Packed: ([], "signal/net.last/gradient"),
    NoInputs: (
        # The second is torch's, where the trainability probe draws the twin's weights.
        [r"layer net.none has no readings of .*: its weight has shape \(4, 0\)", "zero-element tensors"],
        "balance/imbalance",
    ),
    SparseGradients: ([], "plasticity/trainability"),
}


def fitted(kind: type[Odd], *, watched: bool) -> tuple[list[Any], list[str], set[str]]:
    """Fit for two epochs; return the run, the warnings and the keys that were read."""
    torch.manual_seed(0)
    module, witness = kind(), Witness()
    watch: list[Any] = []
    if watched:
        watch = [*monitors("full", every_n_steps=1), HierarchyMonitor(every_n_steps=2, picture=False)]
        watch.append(BalanceMonitor(every_n_steps=2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callbacks=[*watch, witness], max_epochs=2).fit(module, kind.loader())
    witness.seen.append([p.grad for p in module.parameters()])
    keys = {key for monitor in watch for row in monitor.history for key in row}
    return witness.seen, [str(each.message) for each in caught], keys


def alike(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(*(t.to_dense() if t.is_sparse else t for t in (one, other)))


@pytest.mark.parametrize("kind", SAID, ids=lambda kind: kind.__name__)
def test_a_fit_that_goes_odd_ways(kind):
    bare, loud, _ = fitted(kind, watched=False)
    watched, louder, keys = fitted(kind, watched=True)
    assert len(bare) == len(watched) > 6
    for one, other in zip(bare, watched, strict=True):
        assert all(alike(a, b) for a, b in zip(one, other, strict=True))
    patterns, key = SAID[kind]
    more = [said for said in louder if said not in loud]
    for pattern in patterns:
        assert [said for said in more if re.search(pattern, said)], more
    unexplained = [said for said in more if not any(re.search(p, said) for p in patterns)]
    assert not unexplained
    assert not key or key in keys


def test_passes_of_transforms_are_not_taken_for_the_step():
    """Per-sample gradients beside the loss change no reading."""
    rows = []
    for kind in (Odd, PerSampleGradients):
        torch.manual_seed(0)
        watch = monitors("standard", every_n_steps=1, targets=1, strict=True)
        trainer(callbacks=watch, max_epochs=1).fit(kind(), points())
        rows.append([{**row} for monitor in watch for row in monitor.history])
    assert rows[0] == rows[1]


class Unrolled(Odd):
    """A cell called position by position, and a recurrent module after it."""

    def build(self) -> nn.Module:
        parts = {"cell": nn.RNNCell(1, 5), "recurrent": nn.GRU(5, 4, batch_first=True)}
        return nn.ModuleDict({**parts, "last": nn.Linear(4, 3)})

    def forward(self, x: Tensor) -> Tensor:
        h, found = torch.zeros(len(x), 5), []
        for position in range(x.shape[1]):
            h = self.net["cell"](x[:, position, None], h)
            found.append(h)
        return self.net["last"](self.net["recurrent"](torch.stack(found, 1))[0][:, -1])


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("loops.LoopGradients", "_take"),
        ("loops.FirstUses", "_take"),
        ("kinds.recurrent.Replays", "_enter"),
        ("kinds.recurrent.Replays", "_leave"),
        ("kinds.recurrent._Replay", "gradients"),
        ("hooks.LayerWatch", "see"),
        ("hooks.LayerWatch", "_gradient"),
    ],
)
def test_nothing_of_ours_that_fails_on_the_way_ends_a_step(place, name, monkeypatch):
    """In the forward pass and in the backward pass: the fit is the bare one, and one sentence says it."""
    bare, loud, _ = fitted(Unrolled, watched=False)
    module, _, kind = place.rpartition(".")
    owner = getattr(importlib.import_module(f"lightning_sym.observe.{module}"), kind)
    called = []

    def fails(*args: Any, **kwargs: Any) -> None:
        called.append(1)
        raise ArithmeticError("ours")

    monkeypatch.setattr(owner, name, fails)
    watched, louder, _ = fitted(Unrolled, watched=True)
    assert called
    for one, other in zip(bare, watched, strict=True):
        assert all(alike(a, b) for a, b in zip(one, other, strict=True))
    assert any("ArithmeticError: ours" in said for said in set(louder) - set(loud))
