"""What of a batch a call takes, how many samples it holds, and how it is cut."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lightning_sym.engine.batch import (
    Arguments,
    cut,
    find_targets,
    first_samples,
    locate,
    rows_of,
    sample_count,
)

X, Y, Z = torch.arange(12.0).reshape(4, 3), torch.arange(4) % 2, torch.ones(4)


class Graph:
    def __init__(self):
        self.x, self.adjacency, self.y = torch.ones(12, 6), torch.eye(12), torch.arange(12) % 3


@dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


Named = namedtuple("Named", "x y")


def one(x): ...
def batch_only(batch): ...
def two(x, y): ...
def one_or_two(x, y=None): ...
def features_and_scale(*, features, scale): ...
def any_number(*args): ...
def any_name(**kwargs): ...
def whole_with_mask(batch, mask=None): ...
def model_output(input_ids=None, attention_mask=None, labels=None): ...


GRAPH = Graph()
DICT = {"features": X, "scale": Z, "labels": Y}
CASES = {
    # batch, inputs, function: args, kwargs
    "a tensor": (X, None, one, (X,), {}),
    "a tensor is its entry 0": (X, 0, one, (X,), {}),
    "the first of a tuple": ((X, Y), None, one, (X,), {}),
    "the first of a list": ([X, Y], None, one, (X,), {}),
    "a pair of inputs": (((X, Z), Y), None, two, (X, Z), {}),
    "a collated pair of inputs": ([[X, Z], Y], None, two, (X, Z), {}),
    "views stay together": ([[X, X], Y], None, one, ([X, X],), {}),
    "views stay together before an option": ([[X, X], Y], None, one_or_two, ([X, X],), {}),
    "a tuple of two for an optional second": (((X, Z), Y), None, one_or_two, (X, Z), {}),
    "a tuple for one parameter": (((X, Z), Y), None, one, ((X, Z),), {}),
    "a tuple of one for one parameter": (((X,), Y), None, one, ((X,),), {}),
    "a tuple for any number": (((X, Z), Y), None, any_number, (X, Z), {}),
    "a named tuple is one thing": ((Named(X, Y), Z), None, two, None, None),
    "a dict by the signature": (DICT, None, features_and_scale, (), {"features": X, "scale": Z}),
    "a dict as one argument": (DICT, None, batch_only, (DICT,), {}),
    "a dict beside a mask": ({"x": X, "mask": Y}, None, whole_with_mask, ({"x": X, "mask": Y},), {}),
    "a dict for any name": (DICT, None, any_name, (), DICT),
    "a dict for options": ({"input_ids": X, "idx": Z}, None, model_output, (), {"input_ids": X}),
    "a dict first": ((DICT, Y), None, features_and_scale, (), {"features": X, "scale": Z}),
    "a dict that lacks one": ({"features": X}, None, features_and_scale, None, None),
    "a dict of other names": ({"a": X}, None, two, None, None),
    "an object": (GRAPH, None, one, (GRAPH,), {}),
    "an attribute": (GRAPH, "x", one, (GRAPH.x,), {}),
    "a field": (Pair(X, Y), "x", one, (X,), {}),
    "a key": (DICT, "features", one, (X,), {}),
    "an index": ((Y, X), 1, one, (X,), {}),
    "an index from the end": ((Y, X), -1, one, (X,), {}),
    "a key to a dict": ({"inputs": {"x": X, "y": Z}}, "inputs", two, (), {"x": X, "y": Z}),
    "a key to another dict": ({"inputs": {"a": X}}, "inputs", one, ({"a": X},), {}),
    "a function": (DICT, lambda b: b["features"], one, (X,), {}),
    "a function to a tuple": (GRAPH, lambda b: (b.x, b.y), one, ((GRAPH.x, GRAPH.y),), {}),
    "a function to args": (GRAPH, lambda b: (b.x, b.y), two, (GRAPH.x, GRAPH.y), {}),
    "a function to kwargs": (DICT, lambda b: {"x": b["scale"], "y": b["labels"]}, two, (), {"x": Z, "y": Y}),
    "a function to a dict": (DICT, lambda b: {"a": X}, batch_only, ({"a": X},), {}),
    "a function to both": (DICT, lambda b: ((b["scale"],), {"y": Y}), two, (Z,), {"y": Y}),
    "a function to Arguments": (DICT, lambda b: Arguments((X,), {"y": Y}), two, (X,), {"y": Y}),
    "too few": ((X, Y), 0, two, None, None),
    "too many": (((X, Y, Z), Y), lambda b: b[0], two, None, None),
    "no such index": ((X, Y), 2, one, None, None),
    "no such key": (DICT, "image", one, None, None),
    "no such attribute": (GRAPH, "image", one, None, None),
    "an index into a dict": (DICT, 0, one, None, None),
    "another entry of a tensor": (X, 1, one, None, None),
    "a key of a tensor": (X, "x", one, None, None),
    "no locator": (DICT, 2.5, one, None, None),
    "an empty batch": ([], None, one, None, None),
}  # fmt: skip


def same(a, b):
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return a is b


@pytest.mark.parametrize("case", CASES)
def test_locate(case):
    batch, inputs, function, args, kwargs = CASES[case]
    if args is None:
        with pytest.raises(ValueError, match="inputs"):
            locate(batch, inputs, function)
        return
    found = locate(batch, inputs, function)
    assert isinstance(found, Arguments)
    assert same(found.args, args)
    assert same(found.kwargs, kwargs)


def test_a_wrong_place_is_said_with_what_is_there():
    with pytest.raises(ValueError, match=r"inputs='image'.*dict of keys \['features', 'scale', 'labels'\]"):
        locate(DICT, "image", one)
    with pytest.raises(ValueError, match=r"inputs=3.*tuple of 2 entries \(Tensor, Tensor\)"):
        locate((X, Y), 3, one)
    with pytest.raises(ValueError, match=r"inputs='z'.*Graph of attributes \['x', 'adjacency', 'y'\]"):
        locate(GRAPH, "z", one)
    with pytest.raises(ValueError, match=r"lacks \['scale'\]"):
        locate({"features": X}, None, features_and_scale)


def test_modules_and_functions_without_a_signature():
    class Net(nn.Module):
        def forward(self, features, scale): ...

    assert list(locate(DICT, None, Net()).kwargs) == ["features", "scale"]
    assert list(locate(DICT, None, Net().forward).kwargs) == ["features", "scale"]
    assert locate((X, Y), None, torch.relu).args[0] is X


@pytest.mark.parametrize(
    ("batch", "targets"), [((X, Y), 1), (DICT, "labels"), (GRAPH, "y"), (DICT, lambda b: b["labels"])]
)
def test_find_targets(batch, targets):
    assert not find_targets(batch, targets).is_floating_point()


def test_targets_that_are_none():
    assert find_targets((X, Y), None) is None
    for batch, targets in (
        ((X, Y), 0),
        ((X, Y), 2),
        (DICT, "y"),
        (GRAPH, 1),
        ((X, "a"), 1),
        (X, lambda b: None),
    ):
        with pytest.raises(ValueError, match="targets="):
            find_targets(batch, targets)


class Said:
    def __init__(self, **said):
        vars(self).update(said, x=torch.ones(99, 2))


SAMPLES = {"x": torch.randn(32, 8), "y": torch.arange(32) % 3}
COUNTS = {
    "a tensor": (torch.ones(5, 2), 5),
    "a pair": ((X, Y), 4),
    "a dict": (SAMPLES, 32),
    "a scalar first": ({"temperature": torch.tensor(1.0), **SAMPLES}, 32),
    "class weights first": ({"weights": torch.ones(3), **SAMPLES}, 32),
    "class weights and samples alone": ((torch.ones(3), torch.ones(32, 8)), 32),
    "an edge list first": ({"edges": torch.zeros(2, 50), **SAMPLES}, 32),
    "views and labels": ([[X, X + 1], Y], 4),
    "a graph": (GRAPH, 12),
    "graphs that are counted": (Said(num_graphs=7), 7),
    "a batch size": (Said(batch_size=6), 6),
    "a shape": (Said(batch_size=torch.Size([5, 2])), 5),
    "a field": (Pair(X, Y), 4),
    "text beside": ((["a"] * 9, X), 4),
    "a scalar alone": (torch.tensor(1.0), None),
    "nothing": (["a", None, 3], None),
    "no samples": ((torch.ones(0, 3), torch.ones(0)), 0),
}


@pytest.mark.parametrize("case", COUNTS)
def test_sample_count(case):
    batch, count = COUNTS[case]
    assert sample_count(batch) == count


def test_a_batch_that_holds_itself():
    batch = {"x": X}
    batch["self"] = batch
    assert sample_count(batch) == 4


@pytest.mark.parametrize(
    ("tree", "rows"),
    [
        (X, 4), ([X, {"y": Y}], 4), ((X, torch.tensor(2.0), None, "a", 3), 4), ((X, torch.ones(3)), 0),
        ((X, GRAPH), 0), ((), 0), (None, 0), (torch.tensor(1.0), 0),
    ],
)  # fmt: skip
def test_rows_of(tree, rows):
    assert rows_of(tree) == rows


def test_cut():
    scale = torch.tensor(2.0)
    [x, named], flag = cut(([X, {"y": Y, "scale": scale}], True), slice(1, 3))
    assert torch.equal(x, X[1:3])
    assert torch.equal(named["y"], Y[1:3])
    assert named["scale"] is scale
    assert flag is True


def test_first_samples():
    few = first_samples(Arguments((X,), {"y": Y, "mode": "a"}), 3)
    assert torch.equal(few.args[0], X[:3])
    assert torch.equal(few.kwargs["y"], Y[:3])
    assert few.kwargs["mode"] == "a"
    for whole in (Arguments((X,)), Arguments((GRAPH,)), Arguments((X, torch.ones(7)))):
        assert first_samples(whole, 4) is whole
    with pytest.raises(ValueError, match="n must"):
        first_samples(few, 0)
