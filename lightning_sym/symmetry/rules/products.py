"""Matrix products and convolutions."""

from __future__ import annotations

from lightning_sym.symmetry._legs import Dim, Leg, expand, size_of, take
from lightning_sym.symmetry._trace import Ref, Step
from lightning_sym.symmetry.rules.equations import Equations, fresh
from lightning_sym.symmetry.rules.registry import NoRule, rule, tensor


@rule("mm")
def mm(equations: Equations, step: Step) -> None:
    """``[N, K] @ [K, M]``."""
    _matrices(equations, tensor(step, 0), tensor(step, 1), step.outs[0])


def _matrices(equations: Equations, a: Ref, b: Ref, out: Ref) -> Dim:
    (rows, inner), (other, columns) = equations.of(a), equations.of(b)
    equations.contract(inner, other)
    equations.assign(out, [rows, columns])
    equations.factors(out, a=(a, 1), b=(b, 1))
    return rows


@rule("addmm")
def addmm(equations: Equations, step: Step) -> None:
    """A linear layer: the bias moves with the outputs."""
    bias, a, b = (tensor(step, place) for place in range(3))
    out = step.outs[0]
    rows = _matrices(equations, a, b, out)
    if equations.is_zero(bias):
        return
    own = equations.of(bias)
    if not own:
        raise NoRule
    equations.tie(own[-1], equations.of(out)[1])
    if len(own) > 1 and bias.shape[0] == out.shape[0]:
        equations.tie(own[0], rows)
    else:
        equations.pin(rows, perm=True)
    equations.alike(bias, out)


@rule("mv")
def mv(equations: Equations, step: Step) -> None:
    """``[N, K] @ [K]``."""
    a, b, out = tensor(step, 0), tensor(step, 1), step.outs[0]
    equations.contract(equations.of(a)[1], equations.of(b)[0])
    equations.assign(out, [equations.of(a)[0]])
    equations.factors(out, a=(a, 1), b=(b, 1))


@rule("dot")
def dot(equations: Equations, step: Step) -> None:
    """``[K] @ [K]``."""
    a, b, out = tensor(step, 0), tensor(step, 1), step.outs[0]
    equations.contract(equations.of(a)[0], equations.of(b)[0])
    equations.assign(out, [])
    equations.factors(out, a=(a, 1), b=(b, 1))


@rule("bmm")
def bmm(equations: Equations, step: Step) -> None:
    """``[B, N, K] @ [B, K, M]``."""
    _batched(equations, tensor(step, 0), tensor(step, 1), step.outs[0])


def _batched(equations: Equations, a: Ref, b: Ref, out: Ref) -> None:
    (batch, rows, inner), (also, other, columns) = equations.of(a), equations.of(b)
    equations.contract(inner, other)
    new = fresh(out.shape[0])
    equations.multiply(new, batch, also)
    equations.assign(out, [new, rows, columns])
    equations.factors(out, a=(a, 1), b=(b, 1))


@rule("baddbmm")
def baddbmm(equations: Equations, step: Step) -> None:
    """A batch of products and what is added to it."""
    bias, a, b = (tensor(step, place) for place in range(3))
    out = step.outs[0]
    _batched(equations, a, b, out)
    if equations.is_zero(bias):
        return
    dims = equations.of(out)
    for dim in dims:
        equations.pin(dim, perm=True)
    for size, dim, own in zip(bias.shape[::-1], equations.of(bias)[::-1], dims[::-1], strict=False):
        if size == size_of(own):
            equations.tie(dim, own)
    equations.alike(bias, out)


@rule("convolution")
def convolution(equations: Equations, step: Step) -> None:
    """Channels are units, in groups each to its own; places and taps stay."""
    x, w, bias, *_, turned, _pad, groups = step.args
    out = step.outs[0]
    batch, channels, *space = equations.of(x)
    first, second, *kernel = equations.of(w)
    for dim in [*space, *kernel]:
        equations.pin(dim)
    into, made = (first, second) if turned else (second, first)
    if groups == 1:
        equations.contract(channels, into)
        new = made
    elif turned:
        raise NoRule
    else:
        group, within = _in_groups(channels, groups)
        rows, own = _in_groups(first, groups)
        fresh_group = Leg(groups)
        equations.multiply((fresh_group,), (group,), (rows,))
        if within:
            equations.contract(within, second)
        else:
            equations.pin(second)
        new = (fresh_group, *own)
    if bias is not None:
        equations.tie(equations.of(bias)[0], new)
    spots = [fresh(size) for size in out.shape[2:]]
    for dim in spots:
        equations.pin(dim)
    equations.assign(out, [batch, new, *spots])
    equations.factors(out, a=(x, 1), b=(w, 1))
    if bias is not None:
        equations.alike(bias, out)


def _in_groups(dim: Dim, groups: int) -> tuple[Leg, Dim]:
    """Return the leg that counts groups, and what is left of the dimension within one."""
    size = size_of(dim)
    outer, within = take(list(expand(dim)), [groups, size // groups])
    if len(outer) != 1:
        raise NoRule  # the groups run over several legs
    return outer[0], tuple(leg for leg in within if leg.size > 1)
