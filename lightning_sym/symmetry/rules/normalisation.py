"""Normalisations: what they divide out may have any size."""

from __future__ import annotations

from lightning_sym.symmetry._legs import Dim, expand, take
from lightning_sym.symmetry._trace import Ref, Step
from lightning_sym.symmetry.rules.equations import Equations, Event, each, fresh
from lightning_sym.symmetry.rules.reductions import reduce
from lightning_sym.symmetry.rules.registry import NoRule, argument, rule, tensor


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
def batch_norm(equations: Equations, step: Step) -> None:
    """One factor a channel, which running statistics follow."""
    x, weight, bias, mean, var = step.args[:5]
    if isinstance(mean, bool):  # the overload without running statistics
        raise NoRule
    out = step.outs[0]
    batch, channels, *space = equations.of(x)
    for dim in (batch, *space):
        equations.pin(dim, perm=True)
    new = fresh(out.shape[1])
    named = {"w": weight, "b": bias, "m": mean, "v": var}
    there = {name: ref for name, ref in named.items() if ref is not None}
    order = ["x", "out", *there]
    scale = [{"m": 1, "x": -1}, {"v": 1, "x": -2}, {"b": 1, "out": -1}]
    scale.append({"w": 1, "out": -1} if weight is not None else {"out": 1})
    sign = [{"m": 1, "x": 1}, {"v": 1}, {"b": 1, "out": 1}]
    sign.append({"w": 1, "x": 1, "out": 1} if weight is not None else {"x": 1, "out": 1})
    equations.events.append(
        Event(
            (channels, new, *(equations.of(ref)[0] for ref in there.values())),
            True,
            tuple(tuple(eq.get(n, 0) for n in order) for eq in scale if eq.keys() <= set(order)),
            tuple(tuple(eq.get(n, 0) for n in order) for eq in sign if eq.keys() <= set(order)),
            None,
            2 if weight is not None else None,
        )
    )
    if mean is not None:
        equations.alike(x, mean)
    if var is not None:
        equations.factors(var, a=(x, 2))
    equations.assign(out, [batch, new, *space])
    _affine(equations, out, weight, bias)
    equations.freeze_outputs(step.outs[1:])


def _affine(equations: Equations, out: Ref, weight: Ref | None, bias: Ref | None) -> None:
    if weight is None:
        equations.hold(out)
    equations.alike(*(ref for ref in (out, weight, bias) if ref is not None))


@rule("native_layer_norm")
def layer_norm(equations: Equations, step: Step) -> None:
    """One factor for all that is normalised together; units may change places with their gains."""
    x, shape, weight, bias = step.args[:4]
    out, last = step.outs[0], len(shape)
    dims = equations.of(x)
    for dim in dims:
        equations.pin(dim, perm=True)
    new: list[Dim] = list(dims[: len(dims) - last])
    for axis in range(last):
        size = x.shape[len(dims) - last + axis]
        made = fresh(size)
        affine = [equations.of(ref)[axis] for ref in (weight, bias) if ref is not None]
        equations.tie(made, *affine, mix=False, scale=weight is not None, sign=weight is not None)
        equations.events.append(Event((dims[len(dims) - last + axis], made), True, (), (), None))
        new.append(made)
    equations.normed.append(x.number)
    equations.assign(out, new)
    _affine(equations, out, weight, bias)


@rule("native_group_norm")
def group_norm(equations: Equations, step: Step) -> None:
    """One factor a group of channels."""
    x, weight, bias, _n, channels, _s, groups = step.args[:7]
    out = step.outs[0]
    batch, dim, *space = equations.of(x)
    for other in (batch, *space):
        equations.pin(other, perm=True)
    group, within = take(list(expand(dim)), [groups, channels // groups])
    equations.pin(group, perm=True, scale=True)
    equations.pin(within, perm=True)
    made = fresh(channels)
    affine = [equations.of(ref)[0] for ref in (weight, bias) if ref is not None]
    equations.tie(made, *affine, mix=False, scale=weight is not None, sign=weight is not None)
    equations.events.append(Event((made, (*group, *within)), True, (), (), None))
    equations.normed.append(x.number)
    equations.assign(out, [batch, made, *space])
    _affine(equations, out, weight, bias)


@rule("_weight_norm_interface")
def weight_norm(equations: Equations, step: Step) -> None:
    """A direction, whose length is divided out, times a gain a unit."""
    v, g = tensor(step, 0), tensor(step, 1)
    out, unit = step.outs[0], argument(step, 2, 0)
    new = [fresh(size) for size in out.shape]
    for axis, (own, made) in enumerate(zip(equations.of(v), new, strict=True)):
        if axis == unit:
            gain = equations.of(g)[axis]
            equations.events.append(Event((own, gain, made), True, ((0, 1, -1),), ((1, 1, 1),), None))
        else:
            equations.events.append(Event((own, made), True, each(2), ((1, 1),), None))
    equations.assign(out, new)
    equations.normed.append(v.number)
    equations.factors(out, a=(g, 1))
    equations.freeze_outputs(step.outs[1:])


@rule("linalg_vector_norm")
def vector_norm(equations: Equations, step: Step) -> None:
    """The length that a cosine divides by."""
    source, asked = tensor(step, 0), argument(step, 2)
    equations.normed.append(source.number)
    reduce(equations, source, step.outs[0], asked, linear=False)
    for axis, dim in enumerate(equations.of(source)):
        if not asked or axis in {a % len(source.shape) for a in asked}:
            equations.pin(dim, perm=True)
