"""Functions of one number at a time: activations, powers, comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_sym.symmetry._legs import Dim
from lightning_sym.symmetry._trace import Ref, Step
from lightning_sym.symmetry.rules.equations import Equations, Event, each, fresh
from lightning_sym.symmetry.rules.registry import NoRule, argument, rule, tensor


def operands(step: Step) -> list[Ref]:
    """Return the tensors that an operation takes one by one."""
    return [arg for arg in [*step.args, *step.kwargs.values()] if isinstance(arg, Ref)]


def pointwise(
    equations: Equations, refs: Sequence[Ref], out: Ref, *, scale: bool, sign: bool, mix: bool
) -> None:
    """Let what the operands carry move alike, in the ways that are named."""
    dims: list[Dim] = []
    for size, row in zip(out.shape, equations.carriers(refs, out), strict=True):
        kept = [dim for dim in row if dim is not None]
        if not kept:
            dims.append(fresh(size))
            equations.pin(dims[-1], perm=True)
            continue
        equations.tie(*kept, scale=scale, sign=sign, mix=mix)
        dims.append(kept[0])
    equations.assign(out, dims)


@rule(
    *("gelu", "silu", "sigmoid", "hardswish", "hardsigmoid", "mish", "elu", "celu", "selu", "softplus"),
    *("log_sigmoid_forward", "exp", "exp2", "log", "log2", "log1p", "expm1", "erfc"),
    *("clamp", "clamp_max", "threshold", "where", "masked_fill", "nan_to_num", "floor", "round", "sign"),
    *("logical_and", "logical_not", "eq", "ne", "lt", "le", "gt", "ge", "isnan"),
    *("rsub", "lerp", "addcmul"),
)
def any_function(equations: Equations, step: Step) -> None:
    """Any function, element by element: order is kept and nothing else."""
    refs, out = operands(step), step.outs[0]
    pointwise(equations, refs, out, scale=False, sign=False, mix=False)
    for ref in [*refs, out]:
        equations.hold(ref)


@rule("tanh", "sin", "tan", "atan", "asinh", "sinh", "erf", "softshrink", "hardshrink", "asin", "atanh")
def odd(equations: Equations, step: Step) -> None:
    """f(-x) = -f(x): signs pass."""
    refs, out = operands(step), step.outs[0]
    pointwise(equations, refs, out, scale=False, sign=True, mix=False)
    for ref in [*refs, out]:
        equations.hold(ref)


@rule("hardtanh")
def hardtanh(equations: Equations, step: Step) -> None:
    """Odd where its bounds are opposite."""
    low, high = argument(step, 1, -1), argument(step, 2, 1)
    (odd if low == -high else any_function)(equations, step)


@rule("relu", "leaky_relu", "maximum", "minimum")
def homogeneous(equations: Equations, step: Step) -> None:
    """f(ax) = a f(x) for a > 0: factors pass."""
    _homogeneous(equations, operands(step), step.outs[0])


def _homogeneous(equations: Equations, refs: Sequence[Ref], out: Ref) -> None:
    pointwise(equations, refs, out, scale=True, sign=False, mix=False)
    equations.alike(*refs, out)


@rule("clamp_min")
def clamp_min(equations: Equations, step: Step) -> None:
    """A bound of (nearly) zero is a ReLU, or the guard of a norm."""
    if equations.is_tiny(argument(step, 1)):
        _homogeneous(equations, [tensor(step, 0)], step.outs[0])
    else:
        any_function(equations, step)


@rule("_prelu_kernel")
def prelu(equations: Equations, step: Step) -> None:
    """A slope for each unit, which moves with it and is not multiplied."""
    source, weight, out = tensor(step, 0), tensor(step, 1), step.outs[0]
    for dim, other in equations.carriers([source, weight], out):
        if dim is not None and other is not None:
            equations.events.append(Event((dim, other), True, ((0, 1),), each(2), None))
        elif dim is not None:
            equations.pin(dim, perm=True, scale=True)
    for dim in equations.of(weight):
        equations.pin(dim, perm=True)
    equations.hold(weight)
    equations.assign(out, equations.of(source), source)


def _power(equations: Equations, step: Step, power: float, *, parity: int | None) -> None:
    """Raise to a power; ``parity`` of the function is 1 (odd), 0 (even) or None (neither)."""
    source, out = tensor(step, 0), step.outs[0]
    dims: list[Dim] = []
    sign: dict[int | None, tuple[tuple[int, ...], ...]] = {1: ((1, 1),), 0: ((0, 1),), None: each(2)}
    for size, dim in zip(source.shape, equations.of(source), strict=True):
        dims.append(fresh(size))
        equations.events.append(Event((dim, dims[-1]), True, ((power, -1),), sign[parity], None))
    equations.assign(out, dims)
    equations.factors(out, a=(source, power))


@rule("abs")
def absolute(equations: Equations, step: Step) -> None:
    """Even, of degree 1."""
    _power(equations, step, 1, parity=0)


@rule("sqrt")
def sqrt(equations: Equations, step: Step) -> None:
    """Degree 1/2, of positive numbers."""
    _power(equations, step, 0.5, parity=None)


@rule("rsqrt")
def rsqrt(equations: Equations, step: Step) -> None:
    """What a written-out normalisation divides by."""
    equations.normed.append(tensor(step, 0).number)
    _power(equations, step, -0.5, parity=None)


@rule("reciprocal")
def reciprocal(equations: Equations, step: Step) -> None:
    """Odd, of degree -1."""
    _power(equations, step, -1, parity=1)


@rule("pow")
def power(equations: Equations, step: Step) -> None:
    """A number as exponent; an exponent that is a tensor has no rule."""
    exponent = argument(step, 1)
    if not isinstance(exponent, int | float) or not math.isfinite(exponent):
        raise NoRule
    parity = int(exponent) % 2 if float(exponent).is_integer() else None
    _power(equations, step, float(exponent), parity=parity)


@rule("cos", "cosh")
def even(equations: Equations, step: Step) -> None:
    """f(-x) = f(x): a sign is lost."""
    source, out = tensor(step, 0), step.outs[0]
    dims: list[Dim] = []
    for size, dim in zip(source.shape, equations.of(source), strict=True):
        dims.append(fresh(size))
        equations.events.append(Event((dim, dims[-1]), True, each(2), ((0, 1),), None))
    equations.assign(out, dims)
    equations.hold(source)
    equations.hold(out)
