"""Equations between the legs of a trace's tensors: what an operation lets move, and how.

Four groups are followed side by side. For every leg: *perm*, may its positions change places;
*scale*, a vector of logarithms of factors; *sign*, a vector of bits; *mix*, a matrix (or its inverse
transpose). And for every tensor one number more, the logarithm of a factor for all of it, which is what
layer normalisation divides out. An operation writes equations; what nothing forbids is a candidate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_sym.symmetry._legs import Dim, Leg, size_of
from lightning_sym.symmetry._trace import Constant, Ref, Step, Trace
from lightning_sym.symmetry.rules.registry import NoRule

EPS = 1e-4  # a constant that is added and is no larger is a normalisation's guard, not a bias


@dataclass(frozen=True)
class Event:
    """An equation between dimensions of the same size.

    Args:
        dims: the dimensions; corresponding atoms are tied.
        perm: whether they may be permuted together (else none of them may).
        scale: linear equations, one coefficient a dimension.
        sign: the same modulo 2.
        mix: +1 or -1 a dimension (the matrix or its inverse transpose), or None: no mixing.
        makes_up: which dimension belongs to a weight that makes up for the others; solving for it keeps
            solutions local.
    """

    dims: tuple[Dim, ...]
    perm: bool
    scale: tuple[tuple[float, ...], ...]
    sign: tuple[tuple[int, ...], ...]
    mix: tuple[int, ...] | None
    makes_up: int | None = None


def each(count: int) -> tuple[tuple[int, ...], ...]:
    """Return coefficients that set each of ``count`` unknowns to zero."""
    return tuple(tuple(int(i == j) for j in range(count)) for i in range(count))


def equal(count: int) -> tuple[tuple[int, ...], ...]:
    """Return coefficients that make ``count`` unknowns equal."""
    return tuple(tuple(1 if j == 0 else -1 if j == i else 0 for j in range(count)) for i in range(1, count))


def fresh(size: int) -> Dim:
    """Return a new dimension that nothing is known of yet."""
    return (Leg(size),)


class Equations:
    """Tensors' dimensions and the equations between them.

    Args:
        trace: the forward pass.
        fixed: names of the parameters and buffers that may not move.

    Attributes:
        dims: dimensions of each tensor, by number.
        stacks: for tensors that are taken apart along an axis later on, the dimensions of each piece, None
            for the axis itself.
        events: equations between legs.
        whole: equations between whole tensors' factors, ``{number: coefficient}`` summing to zero.
        normed: numbers of the tensors whose overall factor a normalisation divides out.
        untraced: what had no rule, in words.
        users: the operations that take each tensor, by number.
        movable: numbers of the tensors that may move.
    """

    def __init__(self, trace: Trace, *, fixed: frozenset[str]) -> None:
        self.trace = trace
        self.dims: dict[int, list[Dim]] = {}
        self.stacks: dict[int, list[list[Dim | None]]] = {}
        self.events: list[Event] = []
        self.whole: list[dict[int, float]] = []
        self.normed: list[int] = []
        self.untraced: dict[str, None] = {}
        self.users: dict[int, list[Step]] = defaultdict(list)
        self.movable = {ref.number for name, ref in trace.named.items() if name not in fixed}
        for step in trace.steps:
            for ref in step.refs:
                self.users[ref.number].append(step)

    # Tensors.

    def of(self, ref: Ref) -> list[Dim]:
        """Return a tensor's dimensions, made on the first look."""
        if ref.number in self.stacks:
            stacked = self.stacks.pop(ref.number)
            for dims in stacked:
                for dim in dims:
                    if dim is not None:
                        self.pin(dim)
            self.dims[ref.number] = self.frozen(ref)
        if ref.number not in self.dims:
            constant = self.trace.constants.get(ref.number)
            if ref.number in self.movable:
                self.dims[ref.number] = [fresh(size) for size in ref.shape]
            elif constant is not None:
                self.dims[ref.number] = [fresh(size) for size in ref.shape]
                for dim, same in zip(self.dims[ref.number], constant.same, strict=True):
                    if not same:
                        self.pin(dim)
                    elif not constant.zero:
                        self.pin(dim, perm=True)
                if not constant.zero:
                    self.hold(ref)
            else:
                self.dims[ref.number] = self.frozen(ref)
                self.hold(ref)
        return self.dims[ref.number]

    def assign(self, out: Ref, dims: Sequence[Dim], source: Ref | None = None) -> None:
        """Give an output its dimensions, and the overall factor of ``source``.

        Raises:
            NoRule: if their sizes are not the output's.
        """
        if tuple(map(size_of, dims)) != out.shape:
            raise NoRule
        self.dims[out.number] = list(dims)
        if source is not None:
            self.alike(source, out)

    def frozen(self, ref: Ref) -> list[Dim]:
        """Return new dimensions of a tensor's sizes that may not move."""
        dims = [fresh(size) for size in ref.shape]
        for dim in dims:
            self.pin(dim)
        return dims

    def freeze(self, ref: Ref) -> None:
        """Let nothing of a tensor move."""
        for dim in self.of(ref):
            self.pin(dim)
        self.hold(ref)

    def freeze_outputs(self, outs: Sequence[Ref]) -> None:
        """Let nothing of further outputs (saved statistics, logarithms of sums) move."""
        for out in outs:
            self.dims[out.number] = self.frozen(out)

    def is_zero(self, ref: Ref) -> bool:
        """Whether a tensor is a constant that is zero all over."""
        constant = self.trace.constants.get(ref.number)
        return constant is not None and constant.zero

    def stays_zero(self, out: Ref) -> None:
        """Note that an output is zero whatever the parameters are."""
        self.trace.constants[out.number] = Constant((True,) * len(out.shape), True)

    def is_tiny(self, bound: Any) -> bool:
        """Whether a number or constant is no larger than a normalisation's guard."""
        if isinstance(bound, Ref):
            constant = self.trace.constants.get(bound.number)
            return constant is not None and constant.most <= EPS
        return bool(abs(bound) <= EPS)

    def is_same(self, ref: Ref, axis: int) -> bool:
        """Whether a constant has one value along an axis."""
        constant = self.trace.constants.get(ref.number)
        return ref.number not in self.movable and constant is not None and constant.same[axis]

    def carriers(self, refs: Sequence[Ref], out: Ref) -> list[list[Dim | None]]:
        """Return, for each axis of ``out``, each operand's dimension, or None where it is spread."""
        found: list[list[Dim | None]] = []
        for axis, size in enumerate(out.shape):
            row: list[Dim | None] = []
            for ref in refs:
                own = axis - (len(out.shape) - len(ref.shape))
                spread = own < 0 or ref.shape[own] != size
                row.append(None if spread or self.is_same(ref, own) else self.of(ref)[own])
            found.append(row)
        return found

    # Equations between dimensions.

    def pin(
        self, dim: Dim, *, perm: bool = False, scale: bool = False, sign: bool = False, mix: bool = False
    ) -> None:
        """Forbid a dimension every motion but those named."""
        one = each(1)
        self.events.append(
            Event((dim,), perm, () if scale else one, () if sign else one, (1,) if mix else None)
        )

    def tie(self, *dims: Dim, scale: bool = True, sign: bool = True, mix: bool = True) -> None:
        """Let dimensions move alike, or, where a flag is off, not at all."""
        if len(dims) > 1 or not (scale and sign and mix):
            n = len(dims)
            alike, pinned = equal(n), each(n)
            self.events.append(
                Event(
                    dims,
                    True,
                    alike if scale else pinned,
                    alike if sign else pinned,
                    (1,) * n if mix else None,
                )
            )

    def contract(self, a: Dim, b: Dim) -> None:
        """Sum over a dimension that two tensors share: one moves against the other."""
        self.events.append(Event((a, b), True, ((1, 1),), ((1, 1),), (1, -1)))

    def multiply(self, out: Dim, a: Dim, b: Dim) -> None:
        """Multiply along a dimension that three tensors share: factors add up."""
        self.events.append(Event((out, a, b), True, ((1, -1, -1),), ((1, 1, 1),), None, 2))

    # Equations between whole tensors' factors.

    def hold(self, ref: Ref) -> None:
        """Forbid a tensor an overall factor."""
        self.whole.append({ref.number: 1})

    def alike(self, *refs: Ref) -> None:
        """Give tensors one overall factor; a zero constant has any."""
        kept = [ref for ref in refs if not self.is_zero(ref)]
        for ref in kept:
            self.of(ref)  # an output must have its dimensions by now, or it is taken for an unknown tensor
        self.whole += [{kept[0].number: 1, other.number: -1} for other in kept[1:]]

    def same_factor(self, source: Ref, out: Ref) -> None:
        """Give an output that has no dimensions of its own (a stack) the factor of its source."""
        self.whole.append({source.number: 1, out.number: -1})

    def factors(self, out: Ref, **powers: tuple[Ref, float]) -> None:
        """Let the overall factor of ``out`` be a product of powers of others'."""
        equation = defaultdict(float, {out.number: -1.0})
        for ref, power in powers.values():
            self.of(ref)
            equation[ref.number] += power
        self.whole.append(dict(equation))
