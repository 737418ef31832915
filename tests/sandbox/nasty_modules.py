"""Modules that keep, count, capture, draw and say things: what a copy has to keep apart."""

import functools
import random
import threading
import warnings
import weakref
from dataclasses import dataclass

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.ao import quantization
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x)

    def loss(self, x):
        return self(x).square().mean()


class Counts(Base):
    def __init__(self):
        super().__init__()
        self.calls, self.seen, self.rows = 0, [], {"n": [0]}

    def forward(self, x):
        self.calls += 1
        self.seen.append(x.mean())
        self.rows["n"][0] += 1
        return super().forward(x)


class CountsInItsClass(Base):
    calls = 0
    seen = []  # noqa: RUF012

    def forward(self, x):
        type(self).calls += 1
        self.seen.append(x.mean().item())
        return super().forward(x)


class Lambda(Base):
    def __init__(self):
        super().__init__()
        self.calls = []
        self.run = lambda x: (self.calls.append(1), self.net(x))[1]

    def forward(self, x):
        return self.run(x)


class WrappedMethod(Base):
    def __init__(self):
        super().__init__()
        bound = self.net.forward
        self.net.forward = functools.wraps(bound)(lambda x: bound(x))


class InstanceForward(Base):
    def __init__(self):
        super().__init__()

        def forward(x, *, layers=self.net):
            return layers(x)

        self.forward = forward


class Partial(Base):
    def __init__(self):
        super().__init__()
        self.run = functools.partial(lambda first, x: self.net[2](first(x).relu()), self.net[0])

    def forward(self, x):
        return self.run(x)


class FunctionOfLeaf(Base):
    """Captures parameters, not modules, in a tuple inside of a closure inside of a dict."""

    def __init__(self):
        super().__init__()
        weights = (self.net[0].weight, self.net[2].weight)
        self.steps = {"first": (lambda x: F.linear(x, weights[0]),), "second": [lambda x: x @ weights[1].T]}

    def forward(self, x):
        return self.steps["second"][0](self.steps["first"][0](x).relu())


class Counter(Base):
    """Counts with a nonlocal, and appends by a method of a list."""

    def __init__(self):
        super().__init__()
        calls, kept = 0, []

        def count():
            nonlocal calls
            calls += 1
            return calls

        self.count, self.keep, self.peek = count, kept.append, lambda: (calls, len(kept))

    def forward(self, x):
        self.keep(self.count())
        return self.net(x)


class BoundMethod(Base):
    def __init__(self):
        super().__init__()
        self.run = self.net.forward

    def forward(self, x):
        return self.run(x)


class WeakParent(Base):
    """A child that reaches its parent by a weak reference and a proxy, as nobody registers them."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.net[1].parent = weakref.ref(self)
        self.net[1].proxies = [weakref.proxy(self)]

    def forward(self, x):
        parent = self.net[1].parent()
        parent.count += 1
        self.net[1].proxies[0].count += 1
        return parent.net(x)


class Cached(Base):
    def __init__(self):
        super().__init__()
        self.table = functools.lru_cache(maxsize=4)(lambda n: self.net[0].weight[:n].sum())

    def forward(self, x):
        return self.net(x) * self.table(2)


@dataclass
class Kept:
    loss: torch.Tensor
    pair: tuple


class KeepsGraphs(Base):
    def __init__(self):
        super().__init__()
        loss = self.net(torch.ones(2, 4)).mean()
        self.losses, self.kept, self.by_name = [loss], Kept(loss, (loss, 1)), {"a": {"b": (loss,)}}
        self.last = loss

    def forward(self, x):
        self.losses.append(self.net(x).mean())
        return self.net(x) + self.last


class Unregistered(Base):
    """A teacher in a list, which is no submodule."""

    def __init__(self):
        super().__init__()
        self.teachers = [nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))]

    def forward(self, x):
        return self.net(x) + self.teachers[0](x)


class Statistics(Base):
    def __init__(self):
        super().__init__()
        self.net.append(nn.BatchNorm1d(3))
        self.net.append(nn.Dropout(0.5))
        self.register_buffer("n", torch.zeros(()))
        self.metric = MeanMetric()
        self.metric.update(2.0)

    def forward(self, x):
        self.n += 1
        self.metric.update(x.mean())
        self.metric.compute()
        return self.net(x)


class Draws(Base):
    def __init__(self):
        super().__init__()
        self.own, self.numpys = torch.Generator().manual_seed(1), np.random.default_rng(1)

    def forward(self, x):
        noise = torch.randn(x.shape, generator=self.own).mean() + self.numpys.normal()
        return self.net(x) * torch.rand(()) + np.random.rand() + random.random() + noise  # noqa: NPY002


class Locked(Base):
    """Holds what can't be copied: a lock, which is made anew, and an iterator that forward leaves alone."""

    def __init__(self):
        super().__init__()
        self.lock, self.stream = threading.Lock(), (i for i in range(3))

    def forward(self, x):
        with self.lock:
            return self.net(x)


class SpeaksOut(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.inner = net(), InnerModule()

    def forward(self, x):
        self.log("size", x.mean())
        self.log_dict({"a": 1.0})
        self.print("spoken")
        return self.inner(self.net(x))

    def loss(self, x):
        return self(x).square().mean()


class InnerModule(pl.LightningModule):
    def forward(self, x):
        self.log("inner", x.mean())
        return x


def old_norm(norm):
    def make():
        module = Base()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            norm(module.net[0])
        module(torch.ones(2, 4))
        return module

    return make


def parametrized(norm):
    def make():
        module = Base()
        norm(module.net[0])
        return module

    return make


def lazy():
    module = Base()
    module.net = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Linear(5, 3))
    return module


def recurrent():
    class Recurrent(Base):
        def __init__(self):
            super().__init__()
            self.net = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x):
            return self.net(x[:, None])[0][:, 0]

    return Recurrent()


def compiled(part):
    def make():
        module = Base()
        if part == "method":
            module.run = torch.compile(module.net.forward, backend="eager")
            module.forward = lambda x: module.run(x)
        elif part == "child":
            module.net = torch.compile(module.net, backend="eager")
        else:
            module.net.compile(backend="eager")
        return module

    return make


def shared_weight():
    module = Base()
    module.tied = nn.Linear(4, 5)
    module.tied.weight = module.net[0].weight
    module.net[0].weight.tag = "kept"
    return module


class PlainLeaf(Base):
    """A tensor that is trained and registered nowhere."""

    def __init__(self):
        super().__init__()
        self.table = [torch.ones(3, requires_grad=True)]
        self.table[0].grad = torch.ones(3)

    def forward(self, x):
        return self.net(x) * self.table[0]


class ParametrizedParent(Base):
    """A class that parametrization made, with a child that knows it and a function that captured it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))
        self.net[1].parents = [self]
        self.calls = []
        self.run = lambda x: (self.calls.append(1), self.net(x) @ self.weight)[1]
        parametrizations.weight_norm(self)

    def forward(self, x):
        return self.net[1].parents[0].run(x)


class Checkpoints(Base):
    def forward(self, x):
        return checkpoint(lambda y: self.net(y), x, use_reentrant=False)


class Maps(Base):
    def __init__(self):
        super().__init__()
        self.each = torch.vmap(lambda row: self.net(row))

    def forward(self, x):
        return self.each(x)


def traced():
    module = Base()
    module.net = torch.fx.symbolic_trace(module.net)
    return module


def scripted():
    module = Base()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated
        module.net = torch.jit.script(module.net)
    return module


def quantised():
    module = Base()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eager quantisation is deprecated
        module.net.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        quantization.prepare_qat(module.train(), inplace=True)
        module(torch.linspace(-1, 1, 8).reshape(2, 4))  # observers have seen something
    return module


NASTY = {
    "plain leaf": PlainLeaf,
    "parametrized parent": ParametrizedParent,
    "checkpoint": Checkpoints,
    "vmap": Maps,
    "traced": traced,
    "scripted": scripted,
    "quantised": quantised,
    "plain": Base,
    "counts": Counts,
    "class attributes": CountsInItsClass,
    "lambda": Lambda,
    "wrapped method": WrappedMethod,
    "instance forward": InstanceForward,
    "partial": Partial,
    "function of parameters": FunctionOfLeaf,
    "nonlocal counter": Counter,
    "bound method": BoundMethod,
    "weak parent": WeakParent,
    "cache": Cached,
    "graphs kept": KeepsGraphs,
    "unregistered": Unregistered,
    "statistics": Statistics,
    "draws": Draws,
    "lock": Locked,
    "lightning": SpeaksOut,
    "old weight norm": old_norm(nn.utils.weight_norm),
    "old spectral norm": old_norm(nn.utils.spectral_norm),
    "pruned": old_norm(lambda layer: prune.l1_unstructured(layer, "weight", 3)),
    "weight norm": parametrized(parametrizations.weight_norm),
    "spectral norm": parametrized(parametrizations.spectral_norm),
    "lazy": lazy,
    "recurrent": recurrent,
    "compiled method": compiled("method"),
    "compiled child": compiled("child"),
    "compiled in place": compiled("in place"),
    "tied": shared_weight,
}
