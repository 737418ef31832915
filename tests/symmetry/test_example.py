"""Whatever forward takes: keywords, objects with tensors in attributes, and what can't be copied."""

from __future__ import annotations

import threading
from collections import UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sym.symmetry import find_symmetries


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def described(found) -> list[tuple]:
    return [(s.kind, s.path, s.parameters) for s in found]


class Keywords(nn.Module):
    """As language models take a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, features: Tensor, *, scale: Tensor | None = None) -> Tensor:
        return self.net(features) * (1 if scale is None else scale[:, None])


def test_keywords_are_passed_on():
    model, x = seeded(Keywords), draw(5, 6)
    plain = find_symmetries(model, x)
    assert {s.kind for s in plain} == {"permutation", "rescaling"}
    scale = draw(5).abs()
    for args, kwargs in (
        ((), {"features": x}),
        ((), {"features": x, "scale": scale}),
        ((x,), {"scale": scale}),
    ):
        found = find_symmetries(model, *args, example_kwargs=kwargs)
        assert described(found) == described(plain)
        assert found.untraced == ()
    assert scale.dtype == x.dtype == torch.float32


@pytest.mark.parametrize(
    ("kwargs", "kind", "match"),
    [
        (None, ValueError, "example_inputs must hold"),
        ({}, ValueError, "example_inputs must hold"),
        ([("features", 1)], TypeError, "example_kwargs must be a mapping from names, got list"),
        ({0: 1}, TypeError, "example_kwargs must be a mapping from names, got dict"),
    ],
)
def test_what_is_no_example(kwargs, kind, match):
    with pytest.raises(kind, match=match):
        find_symmetries(seeded(Keywords), example_kwargs=kwargs)


class Plain:
    def __init__(self, x: Tensor, adjacency: Tensor) -> None:
        self.x, self.adjacency = x, adjacency


class Slots:
    __slots__ = ("adjacency", "x")

    def __init__(self, x: Tensor, adjacency: Tensor) -> None:
        self.x, self.adjacency = x, adjacency


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    adjacency: Tensor


class Locked(Plain):
    """Holds something that can't be copied."""

    def __init__(self, x: Tensor, adjacency: Tensor) -> None:
        super().__init__(x, adjacency)
        self.lock = threading.Lock()


class Selfish(Plain):
    """Gives itself for its deep copy."""

    def __deepcopy__(self, memo: Any) -> Selfish:
        return self


class Round(Plain):
    """Is reached from itself."""

    def __init__(self, x: Tensor, adjacency: Tensor) -> None:
        super().__init__(x, adjacency)
        self.me = self


class LockedRound(Locked, Round):
    pass


class Store(UserDict):
    """A mapping that is no dict, as tokenizers return."""

    def __init__(self, x: Tensor, adjacency: Tensor) -> None:
        super().__init__(x=x, adjacency=adjacency)

    x = property(lambda self: self["x"])
    adjacency = property(lambda self: self["adjacency"])


class Nested:
    """Objects inside of objects, and both behind properties."""

    def __init__(self, x: Tensor, adjacency: Tensor) -> None:
        self._store = {"inner": Plain(x, adjacency), "lock": threading.Lock()}

    x = property(lambda self: self._store["inner"].x)
    adjacency = property(lambda self: self._store["inner"].adjacency)


class Graphs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, graph: Any) -> Tensor:
        x, adjacency = graph if isinstance(graph, tuple) else (graph.x, graph.adjacency)
        x.mul_(2.0)  # writes into what it is given
        return self.second((adjacency @ self.first(x)).relu())


OBJECTS = [Plain, Slots, Frozen, Locked, Selfish, Round, LockedRound, Store, Nested]


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_with_tensors_in_attributes(kind):
    model, x, adjacency = seeded(Graphs), draw(5, 6), draw(5, 5)
    plain = find_symmetries(model, (x, adjacency))
    assert {s.kind for s in plain} == {"permutation", "rescaling"}
    graph, before = kind(x, adjacency), x.clone()
    found = find_symmetries(model, graph)
    assert described(found) == described(plain)
    assert found.untraced == found.refuted == ()
    assert graph.x is x
    assert graph.adjacency is adjacency
    assert torch.equal(x, before)
    assert x.dtype == torch.float32
    assert described(find_symmetries(model, example_kwargs={"graph": graph})) == described(plain)


class Sealed(Plain):
    """Refuses every copy."""

    def __copy__(self) -> Sealed:
        raise RuntimeError("one of a kind")

    def __deepcopy__(self, memo: Any) -> Sealed:
        raise RuntimeError("one of a kind")


def test_an_object_that_refuses_is_said_and_used():
    class Reads(Graphs):
        def forward(self, graph: Any) -> Tensor:
            return self.second((graph.adjacency @ self.first(graph.x)).relu())

    graph = Sealed(draw(5, 6), draw(5, 5))
    with pytest.warns(UserWarning, match="Sealed among the inputs can't be copied"):
        found = find_symmetries(seeded(Reads), graph)
    assert {s.kind for s in found} == {"permutation", "rescaling"}
    assert graph.x.dtype == torch.float32


class Masked(nn.Module):
    """Multiplies hidden units by a mask of the input's, which happens to be all ones."""

    def __init__(self, read) -> None:
        super().__init__()
        self.a, self.b, self.read = nn.Linear(6, 8), nn.Linear(8, 3), read

    def forward(self, batch: Any) -> Tensor:
        x, mask = self.read(batch)
        return self.b(self.a(x).relu() * mask)


class Hides:
    """Keeps a tensor where no attribute shows it."""

    def __init__(self, x: Tensor, mask: Tensor) -> None:
        self.x, self.kept = x, {mask}


@pytest.mark.parametrize(
    ("wrap", "read"),
    [
        (lambda x, mask: (x, mask), lambda batch: batch),
        (Plain, lambda batch: (batch.x, batch.adjacency)),
        (Slots, lambda batch: (batch.x, batch.adjacency)),
        (Store, lambda batch: (batch.x, batch.adjacency)),
        (Nested, lambda batch: (batch.x, batch.adjacency)),
        (Hides, lambda batch: (batch.x, next(iter(batch.kept)))),
    ],
)
def test_an_inputs_values_prove_nothing(wrap, read):
    """A mask of ones looks like a constant that treats all units alike; another batch's does not."""
    model = seeded(lambda: Masked(read))
    found = find_symmetries(model, wrap(draw(5, 6), torch.ones(8)))
    assert [s for s in found if s.kind == "permutation"] == []
    assert found.refuted == ()


def test_arrays_are_said_to_be_constants():
    import numpy as np

    model = seeded(lambda: Masked(lambda batch: (batch.x, torch.from_numpy(batch.adjacency))))
    with pytest.warns(UserWarning, match="NumPy arrays among the inputs are taken for constants"):
        find_symmetries(model, Plain(draw(5, 6), np.ones(8, dtype=np.float32)))


def test_complex_inputs_and_weights_are_doubled():
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
            self.filter = nn.Parameter(torch.randn(6, 6, dtype=torch.complex64))
            self.out = nn.Parameter(torch.randn(3, 3, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            h = self.b(self.a((x @ self.filter).real).relu())
            return (torch.complex(h, h) @ self.out).abs()

    model = seeded(Spectral)
    with pytest.warns(UserWarning, match="some symmetries may be missing"):
        found = find_symmetries(model, draw(5, 6).to(torch.complex64))
    assert {s.kind for s in found} == {"permutation", "rescaling", "signflip"}  # columns of out under abs


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped_mm")
def test_what_double_precision_can_not_do_is_said():
    class Experts(nn.Module):
        """Two experts in one grouped product, between ordinary layers."""

        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)
            self.experts = nn.Parameter(torch.randn(2, 8, 8))
            self.register_buffer("ends", torch.tensor([4, 8], dtype=torch.int32))

        def forward(self, x: Tensor) -> Tensor:
            h = torch._grouped_mm(self.into(x), self.experts, offs=self.ends)
            return self.out(h) + self.out(self.b(self.a(x).relu()))

    model = seeded(Experts)
    with pytest.warns(UserWarning, match=r"_grouped_mm: computed in float32, it can't be in float64"):
        found = find_symmetries(model, draw(8, 6))
    assert {s.path for s in found} == {"a"}
    assert {s.kind for s in found} == {"permutation", "rescaling"}
    assert any("no rule" in line for line in found.untraced)


def test_an_operation_that_fails_in_every_precision_keeps_its_error():
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.ones(3, 3)

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        find_symmetries(nn.Sequential(nn.Linear(6, 8), Wrong()), draw(5, 6))
