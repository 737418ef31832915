"""Sums and products of two tensors, entry by entry."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_sym.symmetry._legs import Dim
from lightning_sym.symmetry._trace import Ref, Step
from lightning_sym.symmetry.rules.activations import operands, pointwise
from lightning_sym.symmetry.rules.equations import EPS, Equations, Event, fresh
from lightning_sym.symmetry.rules.registry import NoRule, rule


@rule("add", "sub")
def add(equations: Equations, step: Step) -> None:
    """Terms move alike; a number that is added holds factors, signs and mixtures in place."""
    refs, out = operands(step), step.outs[0]
    if len(refs) > 1:
        _sum(equations, refs, out)
        return
    number = next((a for a in step.args[1:] if isinstance(a, int | float)), 0)
    loose = abs(number) <= EPS
    pointwise(equations, refs, out, scale=loose, sign=loose, mix=loose)
    equations.alike(refs[0], out)
    if not loose:
        equations.hold(out)


def _sum(equations: Equations, refs: Sequence[Ref], out: Ref) -> None:
    dims: list[Dim] = []
    for axis, size in enumerate(out.shape):
        kept: list[Dim] = []
        everywhere = True
        for ref in refs:
            own = axis - (len(out.shape) - len(ref.shape))
            if own >= 0 and ref.shape[own] == size:
                kept.append(equations.of(ref)[own])
            elif not equations.is_zero(ref):
                everywhere = False
        equations.tie(*kept, scale=everywhere, sign=everywhere, mix=everywhere)
        dims.append(kept[0] if kept else fresh(size))
    equations.assign(out, dims)
    equations.alike(*refs, out)


@rule("mul")
def mul(equations: Equations, step: Step) -> None:
    """Factors and signs of both add up."""
    _product(equations, step, 1)


@rule("div")
def div(equations: Equations, step: Step) -> None:
    """Those of the divisor count against."""
    _product(equations, step, -1)


def _product(equations: Equations, step: Step, power: int) -> None:
    refs, out = operands(step), step.outs[0]
    if len(refs) == 1:
        if refs[0] is not step.args[0] and power < 0:
            raise NoRule  # a number over a tensor
        pointwise(equations, refs, out, scale=True, sign=True, mix=True)
        equations.alike(refs[0], out)
        return
    if any(equations.is_zero(ref) for ref in refs):  # an LSTM's first state: zero, and it stays so
        equations.stays_zero(out)
        equations.assign(out, [fresh(size) for size in out.shape])
        return
    dims: list[Dim] = []
    for size, (a, b) in zip(out.shape, equations.carriers(refs, out), strict=True):
        if b is None:
            if a is None:
                dims.append(fresh(size))
                equations.pin(dims[-1], perm=True)
            else:
                dims.append(a)
            continue
        new = fresh(size)
        kept = (new, b) if a is None else (new, a, b)
        row = (1, -power) if a is None else (1, -1, -power)
        mix = (1, 1) if a is None and power > 0 else None
        weight = 1 if a is not None and refs[0].number in equations.movable else len(kept) - 1
        equations.events.append(Event(kept, True, (row,), (tuple(abs(c) for c in row),), mix, weight))
        dims.append(new)
    equations.assign(out, dims)
    equations.factors(out, a=(refs[0], 1), b=(refs[1], power))
