"""The graph of one forward pass: where a layer's output goes, and which zero parameters get a gradient."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_sym._names import clean_name
from lightning_sym.symmetry._copies import Copied, unnoticed
from lightning_sym.symmetry._example import Example, tensors_of
from lightning_sym.symmetry._trace import Captured, Ref, Step, trace
from lightning_sym.symmetry.rules.registry import argument, operation
from lightning_sym.symmetry.symmetry import uncompiled

#: Operations that move entries about and change none.
_SHAPES = {"view", "_unsafe_view", "reshape", "t", "transpose", "permute", "alias", "detach", "clone"}
_SHAPES |= {"expand", "unsqueeze", "squeeze", "contiguous", "_to_copy", "dropout", "native_dropout"}
_TURNS = ("t", "transpose")
_NORMS = {"native_batch_norm": (1, 2), "native_layer_norm": (2, 3), "native_group_norm": (1, 2)}
_NORMS |= {"_native_batch_norm_legit": (1, 2), "_native_batch_norm_legit_no_training": (1, 2)}
#: Matrix products, with the place of a bias (None: there is none) and of the weight.
_PRODUCTS = {"convolution": (2, 1), "linear": (2, 1), "addmm": (0, 2), "mm": (None, 1), "bmm": (None, 1)}
_PRODUCTS |= {"matmul": (None, 1)}


@dataclass(frozen=True)
class Affine:
    """What is done to a layer's output, unit by unit: a bias or a normalisation.

    Args:
        bias: name of the bias, if any.
        gain: name of the normalisation's gain, if any.
        mean: name of its running mean, if any.
        variance: name of its running variance, if any.
        eps: added to the variance.
        normalises: whether it is a normalisation.
    """

    bias: str | None = None
    gain: str | None = None
    mean: str | None = None
    variance: str | None = None
    eps: float = 0.0
    normalises: bool = False


class Graph:
    """What one forward pass did, on a float64 copy of a module in evaluation mode.

    Args:
        module: the network; it is left as it is.
        *example_inputs: what its forward takes.
        example_kwargs: keyword arguments, likewise.
        seed: of the random numbers that the forward pass and :meth:`stuck_at_zero` draw.

    Raises:
        ValueError: if the copy reaches the module itself by a captured variable, or has lazy parameters.
        TypeError: if the module can't be copied.
        Exception: what the module's forward raises on the example.
    """

    def __init__(
        self,
        module: nn.Module,
        *example_inputs: Any,
        example_kwargs: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self._seed = seed
        self._example = Example.in_double(example_inputs, example_kwargs or {})
        self._copied = Copied(uncompiled(module))
        try:
            with unnoticed(seed):
                self._trace = trace(self._copied, self._example)
        except Captured:
            self._copied.close()
            raise ValueError(
                "module must not be reached by a captured variable of its own forward pass: "
                "nothing can be tried out on a copy"
            ) from None
        except BaseException:
            self._copied.close()
            raise
        self._names = {ref.number: clean_name(name) for name, ref in self._trace.named.items()}
        self._readers: dict[int, list[Step]] = defaultdict(list)
        for step in self._trace.steps:
            for number in {ref.number for ref in step.refs}:
                self._readers[number].append(step)
        self._outputs = {ref.number for ref in self._trace.outputs}

    def close(self) -> None:
        """Free the copy."""
        self._copied.close()

    def rectified(self, name: str) -> list[tuple[Affine, ...]] | None:
        """Return the ways from a layer's product, or from a normalisation, to ReLUs.

        Args:
            name: of a linear layer's or convolution's weight (outputs along dimension 0), or of a
                normalisation's gain.

        Returns:
            For each place where the output goes, what is added or normalised on the way, the layer's own
            bias or normalisation first; ``None`` unless *every* reader of it is a ReLU (ReLU6 likewise).
        """
        starts = self._starts(name)
        if not starts:
            return None
        ways: list[tuple[Affine, ...]] = []
        for first, out in starts:
            rest = self._to_relu(out)
            if rest is None:
                return None
            ways += [(first, *way) for way in rest]
        return ways

    def ends_branch(self, name: str) -> bool:
        """Return whether all a layer's output does is to be added to another signal, or be the output.

        Normalisations, factors and shape changes may stand between. A layer at the end of a residual
        branch, or a head, may start at (nearly) zero without stopping any other signal.

        Args:
            name: see :meth:`rectified`.
        """
        starts = self._starts(name)
        return bool(starts) and all(self._is_added(out) for _, out in starts)

    def stuck_at_zero(self, names: Iterable[str]) -> set[str]:
        """Return which of the parameters are zero, used, and never get a gradient.

        A zero-initialised head, residual gain or low-rank factor gets one at once, or as soon as another
        zero parameter has left zero. Which do is found by trying: a random direction at the outputs is
        sent back, what gets a gradient is put to random numbers, until nothing new does. What is left
        lies on a mirror for good: nothing that gradient descent does to the others moves it.

        Args:
            names: of parameters; those that are not zero all over are passed over.
        """
        own = {clean_name(name): p for name, p in self._copied.module.named_parameters()}
        left = {name: own[name] for name in names if name in own and not own[name].any()}
        generator = torch.Generator().manual_seed(self._seed)
        used: set[str] = set()
        with unnoticed(self._seed):
            while left:
                moved = self._moved(left, generator)
                used |= {name for name, got in moved.items() if got is not None}
                freed = [name for name, got in moved.items() if got]
                if not freed:
                    break
                for name in freed:
                    parameter = left.pop(name)
                    draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.data.copy_(0.01 * draw)
        return used & set(left)

    def _moved(
        self, wanted: Mapping[str, nn.Parameter], generator: torch.Generator
    ) -> dict[str, bool | None]:
        """Return whether each parameter gets a gradient; None: it is not used."""
        example = self._example.fresh()
        for parameter in wanted.values():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            found = tensors_of(self._copied.module(*example.args, **example.kwargs))
            outputs = [out for out in found if out.is_floating_point() and out.requires_grad]
            if not outputs:
                return dict.fromkeys(wanted)
            cotangents = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
            gradients = torch.autograd.grad(outputs, list(wanted.values()), cotangents, allow_unused=True)
        return {
            name: None if gradient is None else bool(gradient.ne(0).any())
            for name, gradient in zip(wanted, gradients, strict=True)
        }

    # Following the graph.

    def _name(self, leaf: Any) -> str | None:
        return self._names.get(leaf.number) if isinstance(leaf, Ref) else None

    def _starts(self, name: str) -> list[tuple[Affine, Ref]]:
        """Return what a weight or gain makes: its bias or normalisation, and the output; [] if unclear."""
        refs = [ref for number, ref in self._by_name().items() if self._names[number] == name]
        starts: list[tuple[Affine, Ref]] = []
        todo = [(ref, 0) for ref in refs]
        while todo:
            ref, turns = todo.pop()
            for step in self._readers[ref.number]:
                kind = operation(step)
                if kind in _SHAPES:
                    todo += [(out, turns + (kind in _TURNS)) for out in step.outs]
                    continue
                start = self._normalised(step, ref) or self._product(step, ref, turns)
                if start is None:
                    return []
                starts.append((start, step.outs[0]))
        return starts

    def _by_name(self) -> dict[int, Ref]:
        return {ref.number: ref for ref in self._trace.named.values()}

    def _normalised(self, step: Step, ref: Ref | None = None) -> Affine | None:
        kind = operation(step)
        places = _NORMS.get(kind)
        if places is None or (ref is not None and argument(step, places[0]) is not ref):
            return None
        gain, bias = (self._name(argument(step, place)) for place in places)
        if kind.startswith(("native_batch_norm", "_native_batch_norm")):
            mean, variance = self._name(argument(step, 3)), self._name(argument(step, 4))
            return Affine(bias, gain, mean, variance, float(step.args[-1]), normalises=True)
        return Affine(bias, gain, normalises=True)

    def _product(self, step: Step, weight: Ref, turns: int) -> Affine | None:
        kind = operation(step)
        if kind not in _PRODUCTS or step.kwargs:
            return None
        bias_at, weight_at = _PRODUCTS[kind]
        if argument(step, weight_at) is not weight:
            return None
        if kind == "convolution" and argument(step, 6):  # transposed: outputs are not along dimension 0
            return None
        if turns % 2 != (kind not in ("convolution", "linear")):
            return None
        bias = None if bias_at is None else argument(step, bias_at)
        if bias is not None and self._name(bias) is None:
            return None
        return Affine(bias=self._name(bias))

    def _to_relu(self, ref: Ref) -> list[tuple[Affine, ...]] | None:
        ways: list[tuple[Affine, ...]] = []
        if ref.number in self._outputs or not self._readers[ref.number]:
            return None
        for step in self._readers[ref.number]:
            kind = operation(step)
            if _is_relu(step, kind) and argument(step, 0) is ref:
                ways.append(())
                continue
            passed = Affine() if kind in _SHAPES else self._normalised(step)
            if passed is None and kind == "add" and not step.kwargs:
                names = [self._name(arg) for arg in step.args if arg is not ref]
                passed = Affine(bias=names[0]) if len(names) == 1 and names[0] is not None else None
            elif kind not in _SHAPES and argument(step, 0) is not ref:
                return None
            rest = None if passed is None else self._to_relu(step.outs[0])
            if passed is None or rest is None:
                return None
            ways += rest if kind in _SHAPES else [(passed, *way) for way in rest]
        return ways

    def _is_added(self, ref: Ref) -> bool:
        if ref.number in self._outputs:
            return True
        steps = self._readers[ref.number]
        return bool(steps) and all(self._adds(step, ref) for step in steps)

    def _adds(self, step: Step, ref: Ref) -> bool:
        kind = operation(step)
        others = [r for r in step.refs if r is not ref]
        if kind == "add" and any(r.number not in self._names for r in others):
            return True
        passes = kind in _SHAPES or self._normalised(step) is not None
        passes |= kind in ("add", "mul") and all(r.number in self._names for r in others)
        return passes and self._is_added(step.outs[0])


def _is_relu(step: Step, kind: str) -> bool:
    if kind == "relu":
        return True
    if kind in ("clamp_min", "clamp", "hardtanh"):
        return argument(step, 1) == 0
    return kind == "threshold" and argument(step, 1) == 0 and argument(step, 2) == 0
