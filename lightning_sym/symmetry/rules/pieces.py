"""Operations that take tensors to pieces and put them together, and look rows up."""

from __future__ import annotations

import math

from lightning_sym.symmetry._legs import Dim, Leg, expand, size_of
from lightning_sym.symmetry._trace import Ref, Step
from lightning_sym.symmetry.rules.equations import Equations, fresh
from lightning_sym.symmetry.rules.registry import NoRule, argument, axis_of, rule, tensor


@rule("select")
def select(equations: Equations, step: Step) -> None:
    """One position of an axis, or one piece of a tensor that is taken apart along it."""
    source, out = tensor(step, 0), step.outs[0]
    axis, index = axis_of(step, 1, len(source.shape)), step.args[2]
    if source.number in equations.stacks:
        picked = equations.stacks[source.number][index]
        if picked[axis] is None:
            equations.dims[out.number] = [dim for dim in picked if dim is not None]
            equations.same_factor(source, out)
            return
    dims = equations.of(source)
    equations.pin(dims[axis])
    equations.assign(out, [*dims[:axis], *dims[axis + 1 :]], source)


@rule("unbind")
def unbind(equations: Equations, step: Step) -> None:
    """Every position of an axis, or every piece."""
    source = tensor(step, 0)
    axis = axis_of(step, 1, len(source.shape))
    if source.number in equations.stacks and equations.stacks[source.number][0][axis] is None:
        for out, picked in zip(step.outs, equations.stacks[source.number], strict=True):
            equations.dims[out.number] = [dim for dim in picked if dim is not None]
            equations.same_factor(source, out)
        return
    dims = equations.of(source)
    equations.pin(dims[axis])
    for out in step.outs:
        equations.assign(out, [*dims[:axis], *dims[axis + 1 :]], source)


@rule("slice")
def slice_(equations: Equations, step: Step) -> None:
    """A segment of a leg; with a step between positions there is no rule."""
    source, out = tensor(step, 0), step.outs[0]
    axis = axis_of(step, 1, len(source.shape))
    start = argument(step, 2) or 0
    size, kept = source.shape[axis], out.shape[axis]
    if not math.prod(out.shape):
        equations.freeze_outputs([out])  # nothing of the source is in it
        return
    dims = list(equations.of(source))
    if kept != size:
        start = max(0, start + size if start < 0 else start)
        if argument(step, 4, 1) != 1:
            raise NoRule
        dims[axis] = _cut(dims[axis], [start, kept, size - start - kept])[1]
    equations.assign(out, dims, source)


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def split(equations: Equations, step: Step) -> None:
    """All segments of a leg."""
    source = tensor(step, 0)
    axis = axis_of(step, 2, len(source.shape))
    dims = equations.of(source)
    pieces = _cut(dims[axis], [out.shape[axis] for out in step.outs])
    for out, piece in zip(step.outs, pieces, strict=True):
        equations.assign(out, [*dims[:axis], piece, *dims[axis + 1 :]], source)


def _cut(dim: Dim, sizes: list[int]) -> list[Dim]:
    dim = expand(dim)
    leg = dim[0] if len(dim) == 1 else Leg(size_of(dim), factors=dim)
    pieces = iter(leg.cut([size for size in sizes if size]))
    return [expand((next(pieces),)) if size else () for size in sizes]


@rule("cat")
def cat(equations: Equations, step: Step) -> None:
    """A leg of several segments; other axes move alike."""
    out = step.outs[0]
    axis = axis_of(step, 1, len(out.shape))
    refs = [ref for ref in step.args[0] if math.prod(ref.shape)]  # empty parts add nothing
    if not refs:
        raise NoRule
    all_dims = [equations.of(ref) for ref in refs]
    new = list(all_dims[0])
    parts = tuple(
        d[axis][0] if len(d[axis]) == 1 else Leg(ref.shape[axis], factors=expand(d[axis]))
        for ref, d in zip(refs, all_dims, strict=True)
    )
    new[axis] = (Leg(out.shape[axis], segments=parts),) if len(parts) > 1 else parts
    _tie_others(equations, all_dims, axis)
    equations.assign(out, new)
    equations.alike(*refs, out)


@rule("stack")
def stack(equations: Equations, step: Step) -> None:
    """A new axis whose positions stay where they are."""
    refs, out = step.args[0], step.outs[0]
    axis = axis_of(step, 1, len(out.shape))
    all_dims = [equations.of(ref) for ref in refs]
    _tie_others(equations, all_dims, None)
    new = fresh(len(refs))
    equations.pin(new)
    equations.assign(out, [*all_dims[0][:axis], new, *all_dims[0][axis:]])
    equations.alike(*refs, out)


def _tie_others(equations: Equations, all_dims: list[list[Dim]], axis: int | None) -> None:
    for other in range(len(all_dims[0])):
        if other != axis:
            equations.tie(*(dims[other] for dims in all_dims))


@rule("constant_pad_nd")
def pad(equations: Equations, step: Step) -> None:
    """Positions at the ends of an axis; a value other than 0 is an offset for all."""
    source, out = tensor(step, 0), step.outs[0]
    plain = argument(step, 2, 0) == 0
    dims = list(equations.of(source))
    for axis, dim in enumerate(dims):
        if source.shape[axis] != out.shape[axis]:
            equations.pin(dim)
            dims[axis] = fresh(out.shape[axis])
            equations.pin(dims[axis])
        elif not plain:
            equations.pin(dim, perm=True)
    equations.assign(out, dims, source)
    if not plain:
        equations.hold(out)


@rule("roll")
def roll(equations: Equations, step: Step) -> None:
    """Positions that move on hold their axis in place."""
    source, out = tensor(step, 0), step.outs[0]
    dims = equations.of(source)
    for axis in argument(step, 2) or range(len(dims)):
        equations.pin(dims[axis])
    equations.assign(out, dims, source)


@rule("embedding")
def embedding(equations: Equations, step: Step) -> None:
    """Rows are looked up by number and stay; columns are units."""
    weight, index, out = tensor(step, 0), tensor(step, 1), step.outs[0]
    rows, columns = equations.of(weight)
    equations.pin(rows)
    equations.assign(out, [*equations.frozen(index), columns], weight)


@rule("index")
def index(equations: Equations, step: Step) -> None:
    """Rows looked up by one tensor of numbers."""
    source, indices, out = tensor(step, 0), step.args[1], step.outs[0]
    if len(indices) != 1 or not isinstance(indices[0], Ref):
        raise NoRule
    first, *rest = equations.of(source)
    equations.pin(first)
    equations.assign(out, [*equations.frozen(indices[0]), *rest], source)


@rule("copy")
def copy(equations: Equations, step: Step) -> None:
    """What is written into a tensor takes its place."""
    source, out = tensor(step, 1), step.outs[0]
    equations.assign(out, equations.of(source), source)
