"""Aligning two networks of one architecture through their symmetries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_sym.sandbox.restore import reseed
from lightning_sym.symmetry._align import Alignment, Known
from lightning_sym.symmetry._copies import Copied, unnoticed
from lightning_sym.symmetry._example import Example, tensors_of
from lightning_sym.symmetry._features import gains_of, is_told, outputs_of
from lightning_sym.symmetry._gauge import Tensors, approach, balance, distance
from lightning_sym.symmetry._precision import InDouble
from lightning_sym.symmetry.find import find_symmetries
from lightning_sym.symmetry.kinds import Rescaling
from lightning_sym.symmetry.symmetry import Symmetry, named_tensors, uncompiled

MATCHED = ("permutation", "signflip", "rescaling")
TOLERANCE = 1e-6

Steps = list[tuple[Symmetry, Tensor]]


@dataclass(frozen=True)
class Match:
    """What :func:`match` returns.

    Attributes:
        tensors: b's parameters and buffers after the alignment, by clean names, as b has them.
        elements: the group elements that were applied to b, in order, with their symmetries bound to b.
        before: Euclidean distance of the parameters of a and b before the alignment.
        after: the same after it.
        error: largest change of b's output on the example, relative to its largest entry.
    """

    tensors: dict[str, Tensor] = field(repr=False)
    elements: Steps = field(repr=False)
    before: float
    after: float
    error: float

    @torch.no_grad()
    def load_into(self, module: nn.Module) -> None:
        """Copy the aligned tensors into a module of the architecture, b itself or a copy of it.

        Raises:
            ValueError: if it lacks a tensor or has it in another shape.
        """
        own = named_tensors(module)
        _check_shapes(self.tensors, own, "module")
        for name, tensor in self.tensors.items():
            own[name].copy_(tensor)


def match(
    model_a: nn.Module,
    model_b: nn.Module,
    *example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    by: Literal["weights", "activations"] = "weights",
    kinds: Sequence[str] = MATCHED,
    symmetries: Sequence[Symmetry] | None = None,
    sweeps: int = 100,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Match:
    r"""Bring a network as near to another one as its symmetries allow; its function stays.

    Permutations (of units, channels, attention heads, groups, whole residual streams), sign flips and
    positive rescalings that :func:`~lightning_sym.symmetry.find_symmetries` proves of the architecture are
    searched for those that minimise :math:`\lVert\theta_a - g\,\theta_b\rVert`. For the search, factors are
    put to their point of least norm in both networks; afterwards b takes a's. Orders are linear assignments,
    solved exactly one after another, so that a network that is a after some such element is found exactly
    (but for units that are alike); of networks trained apart a local optimum is found. Rotations and scales
    are left alone.

    Args:
        model_a: the network to come near to; left as it is.
        model_b: the network to move; left as it is (see :meth:`Match.load_into`).
        *example_inputs: what the networks take, as for ``find_symmetries``; by activations, also the
            samples whose activations are compared: a few hundred.
        example_kwargs: keyword arguments, likewise.
        by: ``"weights"``: coordinate ascent of the weights' inner product (Ainsworth et al., 2023,
            arXiv 2209.04836) from two starts; ``"activations"``: units that act alike on the example
            (Li et al., 2016, arXiv 1511.07543), by weights where no layer puts the units out.
        kinds: which kinds of symmetry may be used.
        symmetries: what ``find_symmetries`` found on ``model_a`` or another network of the architecture,
            if it is known already.
        sweeps: at most so many passes over all symmetries.
        tolerance: largest change of b's output on the example, relative to its largest entry.
        seed: for the symmetry search; global random states are left alone.

    Returns:
        The aligned tensors, the elements that were applied, and the distances. By weights, ``after`` is at
        most ``before``.

    Raises:
        ValueError: if ``by`` or a kind is unknown, ``sweeps`` or ``tolerance`` is not positive, or the
            networks differ in names or shapes, or the symmetries are of other networks; and what
            ``find_symmetries`` raises.
        TypeError: if a network is no module.
        RuntimeError: if b's function changed by more than ``tolerance``.

    Example:
        >>> import copy
        >>> a = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> b, x = copy.deepcopy(a), torch.randn(8, 4)
        >>> for symmetry in find_symmetries(b, x):
        ...     symmetry.transform(symmetry.random_element(0))
        >>> round(match(a, b, x).after, 4)
        0.0
    """
    _check(model_a, model_b, by=by, kinds=kinds, sweeps=sweeps, tolerance=tolerance)
    if symmetries is None:
        symmetries = find_symmetries(
            model_a, *example_inputs, example_kwargs=example_kwargs, kinds=list(kinds), seed=seed
        )
    chosen = [symmetry for symmetry in symmetries if symmetry.kind in kinds]
    names = named_tensors(model_a)
    for symmetry in chosen:
        if missing := [action.name for action in symmetry.actions if action.name not in names]:
            raise ValueError(f"symmetries must be of model_a, got {symmetry!r}: there is no {missing[0]!r}")
    example = Example.in_double(example_inputs, example_kwargs or {})
    copies = Copied(uncompiled(model_a)), Copied(uncompiled(model_b))
    try:
        with unnoticed(seed), torch.no_grad(), InDouble():
            search = _Search(*copies, example, chosen)
            steps = search.run(by=by, sweeps=sweeps)
            error = search.change(steps, seed=seed)
        if not error <= tolerance:
            raise RuntimeError(
                f"the alignment moved model_b's output by {error:.2g} of its largest entry, more than "
                f"tolerance={tolerance:g}"
            )
        own = named_tensors(model_b)
        moved = {name: search.b[name].detach().to(tensor).clone() for name, tensor in own.items()}
        before, after = (
            math.sqrt(distance(search.start_a, t, search.names)) for t in (search.start_b, search.b)
        )
    finally:
        for copied in copies:
            copied.close()
    elements = [(symmetry.bind(model_b), element) for symmetry, element in steps]
    return Match(moved, elements, before, after, error)


class _Search:
    """Two copies in double precision, and the way from b to a."""

    def __init__(self, a: Copied, b: Copied, example: Example, symmetries: list[Symmetry]) -> None:
        self.copied_a, self.copied_b, self.example = a, b, example
        self.rescalings = [s for s in symmetries if isinstance(s, Rescaling)]
        self.others = [s for s in symmetries if not isinstance(s, Rescaling)]
        self.a, self.b = named_tensors(a.module), named_tensors(b.module)
        self.start_a, self.start_b = _clones(self.a), _clones(self.b)
        # Each parameter once, a tied one under its first name.
        once = {id(tensor): name for name, tensor in reversed(self.a.items())}
        parameters = {id(p) for p in a.module.parameters()}
        self.names = [
            name for name, tensor in self.a.items() if once[id(tensor)] == name and id(tensor) in parameters
        ]

    def run(self, *, by: str, sweeps: int) -> Steps:
        """Return the steps that bring b nearest to a, and leave b there."""
        factors_a, factors_b = balance(self.a, self.rescalings), balance(self.b, self.rescalings)
        orders = self._orders(by=by, sweeps=sweeps)
        _put(self.a, self.start_a)
        balanced = [*zip(self.rescalings, factors_b, strict=True), *orders]
        balanced += [(r, 1 / factor) for r, factor in zip(self.rescalings, factors_a, strict=True)]
        ways = [self._finished(steps) for steps in ([balanced, orders] if self.rescalings else [orders])]
        best, least = min(ways, key=lambda way: way[1])
        if by == "weights" and least >= distance(self.start_a, self.start_b, self.names):
            best = []
        self._apply(best)
        return best

    def _finished(self, steps: Steps) -> tuple[Steps, float]:
        """Return steps with the factors that bring b nearest at their end, and how near that is."""
        self._apply(steps)
        factors = approach(self.b, self.a, self.rescalings)
        more: Steps = [(r, f) for r, f in zip(self.rescalings, factors, strict=True) if bool((f != 1).any())]
        return [*steps, *more], distance(self.a, self.b, self.names)

    def _apply(self, steps: Steps) -> None:
        _put(self.b, self.start_b)
        for symmetry, element in steps:
            symmetry.move_(self.b, element)

    def _orders(self, *, by: str, sweeps: int) -> Steps:
        """Return the permutations and signs, found with factors at their point of least norm."""
        alignment = Alignment(self.a, self.b, self.others)
        if by == "activations":
            alignment.begin(self._activations(), lambda flip: is_told(flip, self.copied_a.module))
            alignment.turn(
                [f for f in alignment.flips if not is_told(f, self.copied_a.module)], sweeps=sweeps
            )
            return alignment.steps
        alignment.ascend(sweeps=sweeps)
        near, steps = distance(self.a, self.b, self.names), list(alignment.steps)
        alignment.undo(0)
        alignment.begin(lambda group: None, lambda flip: True)
        alignment.ascend(sweeps=sweeps)
        return alignment.steps if distance(self.a, self.b, self.names) < near else steps

    def _activations(self) -> Known:
        goal = outputs_of(self.copied_a, self.example)
        # Units within heads are compared once the heads stand in their order: b is run anew for each.
        return lambda group: gains_of(
            group, self.copied_a.module, goal, outputs_of(self.copied_b, self.example)
        )

    def change(self, steps: Steps, *, seed: int) -> float:
        """Return how much the steps move b's output, relative to its largest entry; b ends moved."""
        outputs = []
        for done in ([], steps):
            self._apply(done)
            reseed(seed)
            given = self.example.fresh()
            out = tensors_of(self.copied_b.module(*given.args, **given.kwargs))
            outputs.append([t.detach().clone() for t in out if t.is_floating_point()])
        largest = max(
            (float((a - b).abs().max()) for a, b in zip(*outputs, strict=True) if a.numel()), default=0
        )
        size = max((float(a.abs().max()) for a in outputs[0] if a.numel()), default=0)
        return largest / size if largest else 0.0


def _clones(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _put(tensors: Tensors, values: Tensors) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


def _check(a: Any, b: Any, *, by: str, kinds: Sequence[str], sweeps: int, tolerance: float) -> None:
    for name, module in (("model_a", a), ("model_b", b)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
    if by not in ("weights", "activations"):
        raise ValueError(f"by must be 'weights' or 'activations', got {by!r}")
    if isinstance(kinds, str) or not set(kinds) <= set(MATCHED):
        raise ValueError(f"kinds must be some of {MATCHED}, got {kinds!r}")
    if not sweeps >= 1:
        raise ValueError(f"sweeps must be at least 1, got {sweeps}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    _check_shapes(named_tensors(a), named_tensors(b), "model_b")


def _check_shapes(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], who: str) -> None:
    for name, tensor in wanted.items():
        if name not in found:
            raise ValueError(f"{who} must have the same tensors, got none named {name!r}")
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{who} must have {name!r} of shape {tuple(tensor.shape)}, got {tuple(found[name].shape)}"
            )
