"""Operations that show the same numbers in another shape: copies, views, transpositions."""

from __future__ import annotations

import math

from lightning_sym.symmetry._legs import Dim, Leg, expand, take
from lightning_sym.symmetry._trace import Ref, Step
from lightning_sym.symmetry.rules.equations import Equations, fresh
from lightning_sym.symmetry.rules.registry import NoRule, argument, axis_of, operation, rule, tensor


@rule("clone", "contiguous", "detach", "alias", "_to_copy", "lift_fresh", "neg", "positive", "native_dropout")
def copied(equations: Equations, step: Step) -> None:
    """The same tensor, or its negative."""
    source, out = tensor(step, 0), step.outs[0]
    if source.number in equations.stacks:
        equations.stacks[out.number] = equations.stacks[source.number]
        equations.same_factor(source, out)
        return
    equations.assign(out, equations.of(source), source)


@rule("as_strided")
def as_strided(equations: Equations, step: Step) -> None:
    """Only where the shape stays: other strides could show anything."""
    if tensor(step, 0).shape != step.outs[0].shape:
        raise NoRule
    copied(equations, step)


@rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def view(equations: Equations, step: Step) -> None:
    """Legs are split into factors and put together, in row-major order."""
    source, out = tensor(step, 0), step.outs[0]
    legs = [leg for dim in equations.of(source) for leg in expand(dim)]
    for axis, size in enumerate(out.shape):
        if size > 1 and _is_taken_apart(equations, out, axis):
            stacked = _stacked(legs, out, axis)
            if stacked is not None:
                equations.stacks[out.number] = stacked
                equations.same_factor(source, out)
                return
    equations.assign(out, take(legs, out.shape), source)


def _is_taken_apart(equations: Equations, ref: Ref, axis: int) -> bool:
    """Whether a later step takes a tensor to pieces along an axis (queries, keys and values)."""
    for step in equations.users[ref.number]:
        name = step.op.split(".")[1]
        if name in ("unbind", "select") and axis_of(step, 1, len(ref.shape)) == axis:
            return True
        moved = _axis_after(step, name, axis)
        if moved is not None and _is_taken_apart(equations, step.outs[0], moved):
            return True
    return False


def _axis_after(step: Step, name: str, axis: int) -> int | None:
    """Return where an axis of more than one position is after a copy or transposition."""
    if name in ("clone", "contiguous", "detach", "alias"):
        return axis
    if name in ("transpose", "permute", "unsqueeze", "squeeze"):
        return _order(step, name).index(axis)
    return None


def _order(step: Step, name: str) -> list[int]:
    """Return where each output axis comes from, -1 for a new one."""
    ref = tensor(step, 0)
    axes = list(range(len(ref.shape)))
    if name == "permute":
        return [axis % len(axes) for axis in step.args[1]]
    if name == "t":
        return axes[::-1]
    if name == "transpose":
        i, j = (axis % len(axes) for axis in step.args[1:3])
        axes[i], axes[j] = axes[j], axes[i]
        return axes
    if name == "unsqueeze":
        axes.insert(step.args[1] % (len(axes) + 1), -1)
        return axes
    asked = argument(step, 1, axes)
    gone = {axis % len(axes) for axis in (asked if isinstance(asked, list | tuple) else [asked])}
    return [axis for axis in axes if axis not in gone or ref.shape[axis] != 1]


def _stacked(legs: list[Leg], out: Ref, axis: int) -> list[list[Dim | None]] | None:
    """Return the pieces' dimensions where ``axis`` is the outermost factor of a leg."""
    before = math.prod(out.shape[:axis])
    place, total = 0, 1
    legs = [leg for leg in legs if leg.size != 1]
    while place < len(legs) and total < before:
        total *= legs[place].size
        place += 1
    size = out.shape[axis]
    if total != before or place == len(legs) or legs[place].size % size:
        return None
    if legs[place].size == size:
        return None  # not split off: an axis of its own
    pieces = legs[place].cut([legs[place].size // size] * size)
    rest = [*out.shape[:axis], *out.shape[axis + 1 :]]
    stacked: list[list[Dim | None]] = []
    for piece in pieces:
        dims: list[Dim | None] = list(take([*legs[:place], *expand((piece,)), *legs[place + 1 :]], rest))
        dims.insert(axis, None)
        stacked.append(dims)
    return stacked


@rule("t", "transpose", "permute", "unsqueeze", "squeeze")
def reordered(equations: Equations, step: Step) -> None:
    """Axes in another order, new ones and lost ones of one position."""
    source, out = tensor(step, 0), step.outs[0]
    order = _order(step, operation(step))
    if source.number in equations.stacks:
        equations.stacks[out.number] = [
            [dims[axis] if axis >= 0 else fresh(1) for axis in order]
            for dims in equations.stacks[source.number]
        ]
        equations.same_factor(source, out)
        return
    dims = equations.of(source)
    equations.assign(out, [dims[axis] if axis >= 0 else fresh(1) for axis in order], source)


@rule("expand")
def expanded(equations: Equations, step: Step) -> None:
    """A new axis repeats the same numbers: its order does not matter, its entries do."""
    source, out = tensor(step, 0), step.outs[0]
    dims = equations.of(source)
    new: list[Dim] = []
    for axis, size in enumerate(out.shape):
        old = axis - (len(out.shape) - len(dims))
        if old >= 0 and source.shape[old] == size:
            new.append(dims[old])
            continue
        if old >= 0:
            equations.pin(dims[old], perm=True)
        new.append(fresh(size))
        equations.pin(new[-1], perm=True)
    equations.assign(out, new, source)
