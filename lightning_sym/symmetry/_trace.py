"""One forward pass, written down operation by operation.

Three ways to see a network's structure were weighed:

- ``torch.fx`` symbolic tracing runs the code on proxies: control flow that looks at values, ``*args``
  and C++ code stop it, and with them the whole model; ``nn.LSTM`` and attention stay opaque leaves.
- ``torch.export`` gives a clean functional graph, or nothing: one data-dependent branch or one
  unsupported call and no graph comes back. It also costs a compilation.
- A dispatch trace runs the model once on the real input and sees every ATen operation below
  ``torch.nn.functional``, ``einsum``, ``matmul``, LSTMs and attention layers, whatever Python stands
  around them. Nothing can fail to trace; an operation without a rule costs only the units that pass
  through it. The control flow is that of the example. The one more price, float64 arithmetic, is
  shared: the trace is also the reference output of the proof.

The last one is what this module does. (Dependency graphs for pruning, as Torch-Pruning builds them from
autograd graphs, know groups of channels to remove, but neither signs, factors nor rotations.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_sym.symmetry._copies import Copied
from lightning_sym.symmetry._example import Example, tensors_of
from lightning_sym.symmetry._precision import run_in_double


@dataclass(frozen=True)
class Ref:
    """A tensor of the trace: a number that no other tensor has, and its shape."""

    number: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One operation: its overload name, arguments with tensors replaced by refs, and where it ran."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    where: str

    @property
    def refs(self) -> list[Ref]:
        """Every tensor that goes in."""
        return [leaf for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, Ref)]

    @property
    def outs(self) -> list[Ref]:
        """Every tensor that comes out."""
        return [leaf for leaf in tree_flatten(self.out)[0] if isinstance(leaf, Ref)]


@dataclass(frozen=True)
class Constant:
    """What a tensor that was there before the forward pass looks like, one flag a dimension.

    Args:
        same: whether all its slices along the dimension are equal.
        zero: whether the tensor is zero all over.
        most: its largest absolute entry.
    """

    same: tuple[bool, ...]
    zero: bool
    most: float = math.inf


@dataclass
class Trace:
    """A forward pass.

    Args:
        steps: the operations in order.
        named: refs of parameters, and of buffers, by name.
        outputs: refs of what it returned.
        constants: what tensors that depend on neither parameters nor inputs look like, by number.
        live: numbers of the tensors that depend on a parameter.
        missed: what could not be followed, in words.
    """

    steps: list[Step]
    named: dict[str, Ref]
    outputs: list[Ref]
    constants: dict[int, Constant]
    live: set[int]
    missed: tuple[str, ...] = ()


class Captured(Exception):  # noqa: N818 - it is caught, never shown
    """The copy of a module came upon a tensor of the module that it is a copy of."""


class _Recorder(TorchDispatchMode):
    def __init__(self, copied: Copied) -> None:
        super().__init__()
        self.copied = copied
        self.missed: dict[str, None] = {}
        self.refs = WeakTensorKeyDictionary()
        self.steps: list[Step] = []
        self.constants: dict[int, Constant] = {}
        self.live: set[int] = set()
        self.data: set[int] = set()
        self.count = 0

    def fresh(self, tensor: Tensor) -> Ref:
        ref = Ref(self.count, tuple(tensor.shape))
        self.count += 1
        self.refs[tensor] = ref
        return ref

    def ref(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        known = self.refs.get(leaf)
        if known is None or known.shape != tuple(leaf.shape):
            if id(leaf) in self.copied.foreign:
                raise Captured
            known = self.fresh(leaf)
            if isinstance(leaf, nn.Parameter):  # it may be trained, whatever it looks like now
                self.data.add(known.number)
                self.missed[
                    f"a parameter{self.place} is not registered in the module: it is held in place"
                ] = None
            else:
                self.constants[known.number] = _constant(leaf)
        return known

    @property
    def place(self) -> str:
        """Where the forward pass is, in words."""
        return f" in {self.copied.where[-1]}" if self.copied.where and self.copied.where[-1] else ""

    def made(self, tensor: Tensor, live: bool, data: bool) -> Ref:
        ref = self.fresh(tensor)
        if live:
            self.live.add(ref.number)
        elif data:
            self.data.add(ref.number)
        else:
            self.constants[ref.number] = _constant(tensor)
        return ref

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        seen = tree_map(self.ref, (args, kwargs))
        out, lower = run_in_double(func, args, kwargs)
        if lower is not None:
            name = str(func).split(".")[1]
            kind = str(lower).removeprefix("torch.")
            self.missed[f"{name}{self.place}: computed in {kind}, it can't be in float64"] = None
        # What is written in place is a new tensor of the trace, under the old object.
        before = {leaf.number for leaf in tree_flatten(seen)[0] if isinstance(leaf, Ref)}
        live, data = bool(before & self.live), bool(before & self.data)
        made = tree_map(lambda leaf: self.made(leaf, live, data) if isinstance(leaf, Tensor) else leaf, out)
        where = self.copied.where[-1] if self.copied.where else ""
        self.steps.append(Step(str(func), seen[0], seen[1], made, where))
        return out


def _constant(tensor: Tensor) -> Constant:
    if tensor.numel() == 0 or tensor.is_complex():
        return Constant((False,) * tensor.ndim, False)
    same = tuple(bool((tensor == tensor.narrow(dim, 0, 1)).all()) for dim in range(tensor.ndim))
    return Constant(same, bool((tensor == 0).all()), float(tensor.double().abs().max()))


def trace(copied: Copied, example: Example) -> Trace:
    """Run the copy of a module once without gradients and write down what happened.

    Raises:
        Captured: if it comes upon a tensor of the module that it is a copy of.
    """
    recorder = _Recorder(copied)
    module, example = copied.module, example.fresh()
    named: dict[str, Ref] = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        named[name] = recorder.fresh(tensor)
        if isinstance(tensor, nn.Parameter):
            recorder.live.add(named[name].number)
        else:
            recorder.constants[named[name].number] = _constant(tensor)
    given = [recorder.fresh(tensor) for tensor in example.tensors]
    recorder.data.update(ref.number for ref in given)
    with torch.no_grad(), recorder:
        result = tensors_of(module(*example.args, **example.kwargs))
    outputs = [recorder.ref(tensor) for tensor in result]
    return Trace(recorder.steps, named, outputs, recorder.constants, recorder.live, tuple(recorder.missed))
