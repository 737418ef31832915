"""What each traced operation allows to move: equations between the legs of its tensors.

Four groups are followed side by side. For every leg: *perm*, may its positions change places;
*scale*, a vector of logarithms of factors; *sign*, a vector of bits; *mix*, a matrix (or its inverse
transpose). And for every tensor one number more, the logarithm of a factor for all of it, which is what
layer normalisation divides out. An operation writes equations; what nothing forbids is a candidate.
Nothing here needs to be complete or even right: every candidate is tried before it is returned.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_sym.symmetry._legs import Dim, Leg, Mismatch, expand, take
from lightning_sym.symmetry._trace import Constant, Ref, Step, Trace

EPS = 1e-4  # a constant that is added and is no larger is a normalisation's guard, not a bias

ODD = {"tanh", "sin", "tan", "atan", "asinh", "sinh", "erf", "softshrink", "hardshrink", "asin", "atanh"}
HOMOGENEOUS = {"relu", "leaky_relu", "maximum", "minimum"}
ELEMENTWISE = {
    *("gelu", "silu", "sigmoid", "hardswish", "hardsigmoid", "mish", "elu", "celu", "selu", "softplus"),
    *(
        "log_sigmoid_forward",
        "exp",
        "exp2",
        "log",
        "log2",
        "log1p",
        "expm1",
        "clamp",
        "clamp_max",
        "threshold",
    ),
    *("where", "masked_fill", "hardtanh", "clamp_min", "logical_and", "logical_not", "rsub", "lerp", "erfc"),
    *("eq", "ne", "lt", "le", "gt", "ge", "isnan", "nan_to_num", "floor", "round", "sign", "addcmul"),
}
COPIES = {
    "clone",
    "contiguous",
    "detach",
    "alias",
    "_to_copy",
    "lift_fresh",
    "neg",
    "positive",
    "native_dropout",
}
VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
LINEAR_POOLS = {"avg_pool", "_adaptive_avg_pool", "upsample", "adaptive_avg_pool"}


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


def _units(count: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(i == j) for j in range(count)) for i in range(count))


def _equal(count: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(1 if j == 0 else -1 if j == i else 0 for j in range(count)) for i in range(1, count))


class Rules:
    """Walks through a trace and collects equations.

    Attributes:
        dims: dimensions of each tensor, by number.
        events: equations between legs.
        whole: equations between whole tensors' factors, ``{number: coefficient}`` summing to zero.
        normed: numbers of the tensors whose overall factor a normalisation divides out.
        untraced: what had no rule, in words.
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

    def run(self) -> None:
        """Apply the rules in order, to what depends on a parameter and reaches the output."""
        needed = {ref.number for ref in self.trace.outputs}
        for step in reversed(self.trace.steps):
            if any(out.number in needed for out in step.outs):
                needed.update(ref.number for ref in step.refs)
        live = self.trace.live & needed
        for step in self.trace.steps:
            if any(out.number in live for out in step.outs):
                self._apply(step)
        for ref in self.trace.outputs:
            self.freeze(ref)

    def _apply(self, step: Step) -> None:
        name = step.op.split(".")[1]
        name = name.rstrip("_") if not name.startswith("__") else name
        rule = self._rule(name)
        before = len(self.events), len(self.whole), len(self.normed)
        try:
            if rule is None:
                raise Mismatch
            rule(step)
        except (Mismatch, IndexError, TypeError, ValueError, AttributeError, KeyError):
            del self.events[before[0] :], self.whole[before[1] :], self.normed[before[2] :]
            self._give_up(step, name)

    def _rule(self, name: str) -> Callable[[Step], None] | None:
        if name in VIEWS:
            return self._view
        if name in COPIES:
            return self._copy
        if name in ELEMENTWISE:
            return self._elementwise
        if name in HOMOGENEOUS:
            return self._homogeneous
        if name in ODD:
            return self._odd
        if any(name.startswith(pool) for pool in LINEAR_POOLS):
            return self._pool
        if name.startswith(("max_pool", "adaptive_max_pool")):
            return self._max_pool
        return getattr(self, f"_op_{name}", None)

    def _give_up(self, step: Step, name: str) -> None:
        if any(ref.number in self.trace.live for ref in step.refs):
            where = f" in {step.where}" if step.where else ""
            self.untraced[f"{name}{where}: no rule, units that pass through it are held in place"] = None
        for ref in step.refs:
            self.freeze(ref)
        for out in step.outs:
            self.dims[out.number] = self._frozen(out)
            self.hold(out)

    # Tensors.

    def of(self, ref: Ref) -> list[Dim]:
        """Return a tensor's dimensions, made on the first look."""
        if ref.number in self.stacks:
            stacked = self.stacks.pop(ref.number)
            for dims in stacked:
                for dim in dims:
                    if dim is not None:
                        self.pin(dim)
            self.dims[ref.number] = self._frozen(ref)
        if ref.number not in self.dims:
            constant = self.trace.constants.get(ref.number)
            if ref.number in self.movable:
                self.dims[ref.number] = [(Leg(size),) for size in ref.shape]
            elif constant is not None:
                self.dims[ref.number] = [(Leg(size),) for size in ref.shape]
                for dim, same in zip(self.dims[ref.number], constant.same, strict=True):
                    if not same:
                        self.pin(dim)
                    elif not constant.zero:
                        self.pin(dim, perm=True)
                if not constant.zero:
                    self.hold(ref)
            else:
                self.dims[ref.number] = self._frozen(ref)
                self.hold(ref)
        return self.dims[ref.number]

    def _frozen(self, ref: Ref) -> list[Dim]:
        dims: list[Dim] = [(Leg(size),) for size in ref.shape]
        for dim in dims:
            self.pin(dim)
        return dims

    def freeze(self, ref: Ref) -> None:
        """Let nothing of a tensor move."""
        for dim in self.of(ref):
            self.pin(dim)
        self.hold(ref)

    # Equations.

    def pin(
        self, dim: Dim, *, perm: bool = False, scale: bool = False, sign: bool = False, mix: bool = False
    ) -> None:
        """Forbid a dimension every motion but those named."""
        one = _units(1)
        self.events.append(
            Event((dim,), perm, () if scale else one, () if sign else one, (1,) if mix else None)
        )

    def tie(self, *dims: Dim, scale: bool = True, sign: bool = True, mix: bool = True) -> None:
        """Let dimensions move alike, or, where a flag is off, not at all."""
        if len(dims) > 1 or not (scale and sign and mix):
            n = len(dims)
            eqs, pins = _equal(n), _units(n)
            self.events.append(
                Event(dims, True, eqs if scale else pins, eqs if sign else pins, (1,) * n if mix else None)
            )

    def contract(self, a: Dim, b: Dim) -> None:
        """Sum over a dimension that two tensors share: one moves against the other."""
        self.events.append(Event((a, b), True, ((1, 1),), ((1, 1),), (1, -1)))

    def multiply(self, out: Dim, a: Dim, b: Dim) -> None:
        """Multiply along a dimension that three tensors share: factors add up."""
        self.events.append(Event((out, a, b), True, ((1, -1, -1),), ((1, 1, 1),), None, 2))

    def hold(self, ref: Ref) -> None:
        """Forbid a tensor an overall factor."""
        self.whole.append({ref.number: 1})

    def alike(self, *refs: Ref) -> None:
        """Give tensors one overall factor; a zero constant has any."""
        kept = [r for r in refs if not self._zero(r)]
        for ref in kept:
            self.of(ref)  # an output must have its dimensions by now, or it is taken for an unknown tensor
        self.whole += [{kept[0].number: 1, other.number: -1} for other in kept[1:]]

    def _one(self, source: Ref, out: Ref) -> None:
        self.whole.append({source.number: 1, out.number: -1})

    def factors(self, out: Ref, **powers: tuple[Ref, float]) -> None:
        """Let the overall factor of ``out`` be a product of powers of others'."""
        equation = defaultdict(float, {out.number: -1.0})
        for ref, power in powers.values():
            self.of(ref)
            equation[ref.number] += power
        self.whole.append(dict(equation))

    def _zero(self, ref: Ref) -> bool:
        constant = self.trace.constants.get(ref.number)
        return constant is not None and constant.zero

    def _tiny(self, bound: Any) -> bool:
        """Whether a number or constant is no larger than a normalisation's guard."""
        if isinstance(bound, Ref):
            constant = self.trace.constants.get(bound.number)
            return constant is not None and constant.most <= EPS
        return bool(abs(bound) <= EPS)

    def _same(self, ref: Ref, dim: int) -> bool:
        constant = self.trace.constants.get(ref.number)
        return ref.number not in self.movable and constant is not None and constant.same[dim]

    # Operations: shapes.

    def _set(self, out: Ref, dims: Sequence[Dim], source: Ref | None = None) -> None:
        if tuple(math.prod(leg.size for leg in dim) for dim in dims) != out.shape:
            raise Mismatch
        self.dims[out.number] = list(dims)
        if source is not None:
            self.alike(source, out)

    def _copy(self, step: Step) -> None:
        source, out = step.args[0], step.outs[0]
        if source.number in self.stacks:
            self.stacks[out.number] = self.stacks[source.number]
            self._one(source, out)
            return
        self._set(out, self.of(source), source)

    def _op_as_strided(self, step: Step) -> None:
        if step.args[0].shape != step.outs[0].shape:
            raise Mismatch
        self._copy(step)

    def _view(self, step: Step) -> None:
        source, out = step.args[0], step.outs[0]
        legs = [leg for dim in self.of(source) for leg in expand(dim)]
        for axis, size in enumerate(out.shape):
            if size > 1 and self._picked_apart(out, axis):
                stacked = self._stacked(legs, out, axis)
                if stacked is not None:
                    self.stacks[out.number] = stacked
                    self._one(source, out)
                    return
        self._set(out, take(legs, out.shape), source)

    def _picked_apart(self, ref: Ref, axis: int) -> bool:
        """Whether a later step takes a tensor to pieces along an axis (queries, keys and values)."""
        for step in self.users[ref.number]:
            name = step.op.split(".")[1]
            if name in ("unbind", "select"):
                dim = step.args[1] if len(step.args) > 1 else 0
                if dim % len(ref.shape) == axis:
                    return True
            moved = self._axis_after(step, name, axis)
            if moved is not None and self._picked_apart(step.outs[0], moved):
                return True
        return False

    def _axis_after(self, step: Step, name: str, axis: int) -> int | None:
        if name in ("clone", "contiguous", "detach", "alias"):
            return axis
        if name in ("transpose", "permute", "unsqueeze", "squeeze"):
            return self._order(step, name).index(axis)
        return None

    def _order(self, step: Step, name: str) -> list[int]:
        """Return where each output axis comes from, -1 for a new one."""
        ref: Ref = step.args[0]
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
        asked = step.args[1] if len(step.args) > 1 else axes
        gone = {axis % len(axes) for axis in (asked if isinstance(asked, list | tuple) else [asked])}
        return [axis for axis in axes if axis not in gone or ref.shape[axis] != 1]

    def _stacked(self, legs: list[Leg], out: Ref, axis: int) -> list[list[Dim | None]] | None:
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

    def _reorder(self, step: Step) -> None:
        source, out = step.args[0], step.outs[0]
        order = self._order(step, step.op.split(".")[1].rstrip("_"))
        if source.number in self.stacks:
            new: list[list[Dim | None]] = [
                [dims[axis] if axis >= 0 else (Leg(1),) for axis in order]
                for dims in self.stacks[source.number]
            ]
            self.stacks[out.number] = new
            self._one(source, out)
            return
        dims = self.of(source)
        self._set(out, [dims[axis] if axis >= 0 else (Leg(1),) for axis in order], source)

    _op_t = _op_transpose = _op_permute = _op_unsqueeze = _op_squeeze = _reorder

    def _op_expand(self, step: Step) -> None:
        source, out = step.args[0], step.outs[0]
        dims = self.of(source)
        new: list[Dim] = []
        for axis, size in enumerate(out.shape):
            old = axis - (len(out.shape) - len(dims))
            if old >= 0 and source.shape[old] == size:
                new.append(dims[old])
                continue
            if old >= 0:
                self.pin(dims[old], perm=True)
            new.append((Leg(size),))
            self.pin(new[-1], perm=True)
        self._set(out, new, source)

    def _op_select(self, step: Step) -> None:
        source, out = step.args[0], step.outs[0]
        axis, index = step.args[1] % len(source.shape), step.args[2]
        if source.number in self.stacks:
            picked = self.stacks[source.number][index]
            if picked[axis] is None:
                self.dims[out.number] = [dim for dim in picked if dim is not None]
                self._one(source, out)
                return
        dims = self.of(source)
        self.pin(dims[axis])
        self._set(out, [*dims[:axis], *dims[axis + 1 :]], source)

    def _op_unbind(self, step: Step) -> None:
        source = step.args[0]
        axis = (step.args[1] if len(step.args) > 1 else 0) % len(source.shape)
        if source.number in self.stacks and self.stacks[source.number][0][axis] is None:
            for out, picked in zip(step.outs, self.stacks[source.number], strict=True):
                self.dims[out.number] = [dim for dim in picked if dim is not None]
                self._one(source, out)
            return
        dims = self.of(source)
        self.pin(dims[axis])
        for out in step.outs:
            self._set(out, [*dims[:axis], *dims[axis + 1 :]], source)

    def _op_slice(self, step: Step) -> None:
        source, out = step.args[0], step.outs[0]
        axis = (step.args[1] if len(step.args) > 1 else 0) % len(source.shape)
        start = step.args[2] if len(step.args) > 2 and step.args[2] is not None else 0
        every = step.args[4] if len(step.args) > 4 else 1
        size, kept = source.shape[axis], out.shape[axis]
        dims = list(self.of(source))
        if kept != size:
            start = max(0, start + size if start < 0 else start)
            if every != 1:
                raise Mismatch
            dims[axis] = self._cut(dims[axis], [start, kept, size - start - kept])[1]
        self._set(out, dims, source)

    def _cut(self, dim: Dim, sizes: list[int]) -> list[Dim]:
        dim = expand(dim)
        leg = dim[0] if len(dim) == 1 else Leg(math.prod(part.size for part in dim), factors=dim)
        pieces = iter(leg.cut([size for size in sizes if size]))
        return [expand((next(pieces),)) if size else () for size in sizes]

    def _op_split(self, step: Step) -> None:
        source = step.args[0]
        axis = (step.args[2] if len(step.args) > 2 else 0) % len(source.shape)
        dims = self.of(source)
        pieces = self._cut(dims[axis], [out.shape[axis] for out in step.outs])
        for out, piece in zip(step.outs, pieces, strict=True):
            self._set(out, [*dims[:axis], piece, *dims[axis + 1 :]], source)

    _op_split_with_sizes = _op_unsafe_split = _op_unsafe_split_with_sizes = _op_split

    def _op_cat(self, step: Step) -> None:
        refs, out = [ref for ref in step.args[0] if ref.shape != (0,)], step.outs[0]
        axis = (step.args[1] if len(step.args) > 1 else 0) % len(out.shape)
        all_dims = [self.of(ref) for ref in refs]
        new = list(all_dims[0])
        parts = tuple(
            d[axis][0] if len(d[axis]) == 1 else Leg(ref.shape[axis], factors=expand(d[axis]))
            for ref, d in zip(refs, all_dims, strict=True)
        )
        new[axis] = (Leg(out.shape[axis], segments=parts),) if len(parts) > 1 else parts
        for other in range(len(new)):
            if other != axis:
                self.tie(*(dims[other] for dims in all_dims))
        self._set(out, new)
        self.alike(*refs, out)

    def _op_stack(self, step: Step) -> None:
        refs, out = step.args[0], step.outs[0]
        axis = (step.args[1] if len(step.args) > 1 else 0) % len(out.shape)
        all_dims = [self.of(ref) for ref in refs]
        for other in range(len(all_dims[0])):
            self.tie(*(dims[other] for dims in all_dims))
        new: Dim = (Leg(len(refs)),)
        self.pin(new)
        self._set(out, [*all_dims[0][:axis], new, *all_dims[0][axis:]])
        self.alike(*refs, out)

    def _op_constant_pad_nd(self, step: Step) -> None:
        source, out = step.args[0], step.outs[0]
        plain = len(step.args) < 3 or step.args[2] == 0
        dims = list(self.of(source))
        for axis, dim in enumerate(dims):
            if source.shape[axis] != out.shape[axis]:
                self.pin(dim)
                dims[axis] = (Leg(out.shape[axis]),)
                self.pin(dims[axis])
            elif not plain:
                self.pin(dim, perm=True)
        self._set(out, dims, source)
        if not plain:
            self.hold(out)

    def _op_roll(self, step: Step) -> None:
        source, out = step.args[0], step.outs[0]
        dims = self.of(source)
        for axis in step.args[2] if len(step.args) > 2 and step.args[2] else range(len(dims)):
            self.pin(dims[axis])
        self._set(out, dims, source)

    def _op_embedding(self, step: Step) -> None:
        weight, index, out = step.args[0], step.args[1], step.outs[0]
        rows, columns = self.of(weight)
        self.pin(rows)
        self._set(out, [*self._frozen(index), columns], weight)

    def _op_index(self, step: Step) -> None:
        source, indices, out = step.args[0], step.args[1], step.outs[0]
        if len(indices) != 1 or indices[0] is None:
            raise Mismatch
        first, *rest = self.of(source)
        self.pin(first)
        self._set(out, [*self._frozen(indices[0]), *rest], source)

    def _op_copy(self, step: Step) -> None:
        source, out = step.args[1], step.outs[0]
        self._set(out, self.of(source), source)

    # Operations: element by element.

    def _operands(self, step: Step) -> list[Ref]:
        return [arg for arg in [*step.args, *step.kwargs.values()] if isinstance(arg, Ref)]

    def _carriers(self, refs: Sequence[Ref], out: Ref) -> list[list[Dim | None]]:
        """Return, for each axis of ``out``, each operand's dimension, or None where it is spread."""
        found: list[list[Dim | None]] = []
        for axis, size in enumerate(out.shape):
            row: list[Dim | None] = []
            for ref in refs:
                own = axis - (len(out.shape) - len(ref.shape))
                spread = own < 0 or ref.shape[own] != size
                row.append(None if spread or self._same(ref, own) else self.of(ref)[own])
            found.append(row)
        return found

    def _fresh(self, size: int) -> Dim:
        return (Leg(size),)

    def _elementwise(self, step: Step) -> None:
        """Any function, element by element: order is kept and nothing else."""
        refs, out = self._operands(step), step.outs[0]
        if step.op.startswith("aten.hardtanh") and [*step.args[1:], -1, 1][0] == -([*step.args[1:], 1, 1][1]):
            self._odd(step)
            return
        if step.op.startswith("aten.clamp_min") and self._tiny(step.args[1]):
            self._homogeneous(Step(step.op, step.args[:1], {}, step.out, step.where))
            return
        self._pointwise(refs, out, scale=False, sign=False, mix=False)
        for ref in [*refs, out]:
            self.hold(ref)

    def _pointwise(self, refs: Sequence[Ref], out: Ref, *, scale: bool, sign: bool, mix: bool) -> None:
        dims: list[Dim] = []
        for size, row in zip(out.shape, self._carriers(refs, out), strict=True):
            kept = [dim for dim in row if dim is not None]
            if not kept:
                dims.append(self._fresh(size))
                self.pin(dims[-1], perm=True)
                continue
            self.tie(*kept, scale=scale, sign=sign, mix=mix)
            dims.append(kept[0])
        self._set(out, dims)

    def _homogeneous(self, step: Step) -> None:
        refs, out = self._operands(step), step.outs[0]
        self._pointwise(refs, out, scale=True, sign=False, mix=False)
        self.alike(*refs, out)

    def _odd(self, step: Step) -> None:
        refs, out = self._operands(step), step.outs[0]
        self._pointwise(refs, out, scale=False, sign=True, mix=False)
        for ref in [*refs, out]:
            self.hold(ref)

    def _power(self, step: Step, power: float, *, parity: int | None) -> None:
        """Raise to a power; ``parity`` of the function is 1 (odd), 0 (even) or None (neither)."""
        source, out = step.args[0], step.outs[0]
        dims: list[Dim] = []
        sign: dict[int | None, tuple[tuple[int, ...], ...]] = {
            1: ((1, 1),),
            0: ((0, 1),),
            None: _units(2),
        }
        for size, dim in zip(source.shape, self.of(source), strict=True):
            dims.append(self._fresh(size))
            self.events.append(Event((dim, dims[-1]), True, ((power, -1),), sign[parity], None))
        self._set(out, dims)
        self.factors(out, a=(source, power))

    def _op_abs(self, step: Step) -> None:
        self._power(step, 1, parity=0)

    def _op_sqrt(self, step: Step) -> None:
        self._power(step, 0.5, parity=None)

    def _op_rsqrt(self, step: Step) -> None:
        self.normed.append(step.args[0].number)
        self._power(step, -0.5, parity=None)

    def _op_reciprocal(self, step: Step) -> None:
        self._power(step, -1, parity=1)

    def _op_pow(self, step: Step) -> None:
        power = step.args[1]
        if not isinstance(power, int | float):
            raise Mismatch
        self._power(step, float(power), parity=int(power) % 2 if float(power).is_integer() else None)

    def _op_cos(self, step: Step) -> None:
        source, out = step.args[0], step.outs[0]
        dims: list[Dim] = []
        for size, dim in zip(source.shape, self.of(source), strict=True):
            dims.append(self._fresh(size))
            self.events.append(Event((dim, dims[-1]), True, _units(2), ((0, 1),), None))
        self._set(out, dims)
        self.hold(source)
        self.hold(out)

    _op_cosh = _op_cos

    def _op_add(self, step: Step) -> None:
        refs, out = self._operands(step), step.outs[0]
        if len(refs) == 1:
            number = next((a for a in step.args[1:] if isinstance(a, int | float)), 0)
            loose = abs(number) <= EPS
            self._pointwise(refs, out, scale=loose, sign=loose, mix=loose)
            self.alike(refs[0], out)
            if not loose:
                self.hold(out)
            return
        self._sum(refs, out)

    _op_sub = _op_add

    def _sum(self, refs: Sequence[Ref], out: Ref) -> None:
        dims: list[Dim] = []
        for axis, size in enumerate(out.shape):
            kept: list[Dim] = []
            everywhere = True
            for ref in refs:
                own = axis - (len(out.shape) - len(ref.shape))
                if own >= 0 and ref.shape[own] == size:
                    kept.append(self.of(ref)[own])
                elif not self._zero(ref):
                    everywhere = False
            self.tie(*kept, scale=everywhere, sign=everywhere, mix=everywhere)
            dims.append(kept[0] if kept else self._fresh(size))
        self._set(out, dims)
        self.alike(*refs, out)

    def _op_mul(self, step: Step) -> None:
        self._product(step, 1)

    def _op_div(self, step: Step) -> None:
        self._product(step, -1)

    def _product(self, step: Step, power: int) -> None:
        refs, out = self._operands(step), step.outs[0]
        if len(refs) == 1:
            if refs[0] is not step.args[0] and power < 0:
                raise Mismatch
            self._pointwise(refs, out, scale=True, sign=True, mix=True)
            self.alike(refs[0], out)
            return
        dims: list[Dim] = []
        if any(self._zero(ref) for ref in refs):  # an LSTM's first state: zero, and it stays so
            self.trace.constants[out.number] = Constant((True,) * len(out.shape), True)
            self._set(out, [self._fresh(size) for size in out.shape])
            return
        for size, (a, b) in zip(out.shape, self._carriers(refs, out), strict=True):
            if a is None and b is None:
                dims.append(self._fresh(size))
                self.pin(dims[-1], perm=True)
            elif b is None and a is not None:
                dims.append(a)
            else:
                dims.append(self._fresh(size))
                both = (dims[-1], a, b) if a is not None else (dims[-1], b)
                row = (1, -1, -power) if a is not None else (1, -power)
                kept = tuple(dim for dim in both if dim is not None)
                mix = None if a is not None or power < 0 else (1, 1)
                weight = 1 if a is not None and refs[0].number in self.movable else len(kept) - 1
                sign = tuple(abs(c) for c in row)
                self.events.append(Event(kept, True, (row,), (sign,), mix, weight))
        self._set(out, dims)
        self.factors(out, a=(refs[0], 1), b=(refs[1], power))

    def _op__prelu_kernel(self, step: Step) -> None:
        source, weight, out = step.args[0], step.args[1], step.outs[0]
        for dim, other in self._carriers([source, weight], out):
            if dim is not None and other is not None:
                one = _units(2)
                self.events.append(Event((dim, other), True, ((0, 1),), one, None))
            elif dim is not None:
                self.pin(dim, perm=True, scale=True)
        for dim in self.of(weight):
            self.pin(dim, perm=True)
        self.hold(weight)
        self._set(out, self.of(source), source)

    # Operations: sums and norms.

    def _op_mm(self, step: Step) -> None:
        a, b, out = step.args[0], step.args[1], step.outs[0]
        (rows, inner), (other, columns) = self.of(a), self.of(b)
        self.contract(inner, other)
        self._set(out, [rows, columns])
        self.factors(out, a=(a, 1), b=(b, 1))

    def _op_addmm(self, step: Step) -> None:
        bias, a, b = step.args[:3]
        out = step.outs[0]
        (rows, inner), (other, columns) = self.of(a), self.of(b)
        self.contract(inner, other)
        self._set(out, [rows, columns])
        self.factors(out, a=(a, 1), b=(b, 1))
        if not self._zero(bias):
            own = self.of(bias)
            self.tie(own[-1], columns)
            if len(own) > 1 and bias.shape[0] == out.shape[0]:
                self.tie(own[0], rows)
            else:
                self.pin(rows, perm=True)
            self.alike(bias, out)

    def _op_mv(self, step: Step) -> None:
        a, b, out = step.args[0], step.args[1], step.outs[0]
        self.contract(self.of(a)[1], self.of(b)[0])
        self._set(out, [self.of(a)[0]])
        self.factors(out, a=(a, 1), b=(b, 1))

    def _op_dot(self, step: Step) -> None:
        a, b, out = step.args[0], step.args[1], step.outs[0]
        self.contract(self.of(a)[0], self.of(b)[0])
        self._set(out, [])
        self.factors(out, a=(a, 1), b=(b, 1))

    def _op_bmm(self, step: Step) -> None:
        self._batched(step.args[0], step.args[1], step.outs[0])

    def _batched(self, a: Ref, b: Ref, out: Ref) -> None:
        (batch, rows, inner), (also, other, columns) = self.of(a), self.of(b)
        self.contract(inner, other)
        new = self._fresh(out.shape[0])
        self.multiply(new, batch, also)
        self._set(out, [new, rows, columns])
        self.factors(out, a=(a, 1), b=(b, 1))

    def _op_baddbmm(self, step: Step) -> None:
        bias, a, b = step.args[:3]
        out = step.outs[0]
        self._batched(a, b, out)
        if not self._zero(bias):
            for dim in self.dims[out.number]:
                self.pin(dim, perm=True)
            for size, dim, own in zip(
                bias.shape[::-1], self.of(bias)[::-1], self.dims[out.number][::-1], strict=False
            ):
                if size == math.prod(leg.size for leg in own):
                    self.tie(dim, own)
            self.alike(bias, out)

    def _op_convolution(self, step: Step) -> None:
        x, w, bias, *_, turned, _pad, groups = step.args
        out = step.outs[0]
        batch, channels, *space = self.of(x)
        first, second, *kernel = self.of(w)
        for dim in [*space, *kernel]:
            self.pin(dim)
        into, made = (first, second) if turned else (second, first)
        if groups == 1:
            self.contract(channels, into)
            new = made
        else:
            if turned:
                raise Mismatch
            [group], within = take(list(expand(channels)), [groups, x.shape[1] // groups])
            within = tuple(leg for leg in within if leg.size > 1)
            [rows], own = take(list(expand(first)), [groups, w.shape[0] // groups])
            fresh = Leg(groups)
            self.multiply((fresh,), (group,), (rows,))
            if within:
                self.contract(within, second)
            else:
                self.pin(second)
            new = (fresh, *(leg for leg in own if leg.size > 1))
        if bias is not None:
            self.tie(self.of(bias)[0], new)
        spots = [self._fresh(size) for size in out.shape[2:]]
        for dim in spots:
            self.pin(dim)
        self._set(out, [batch, new, *spots])
        self.factors(out, a=(x, 1), b=(w, 1))
        if bias is not None:
            self.alike(bias, out)

    def _op_native_batch_norm(self, step: Step) -> None:
        x, weight, bias, mean, var = step.args[:5]
        out = step.outs[0]
        batch, channels, *space = self.of(x)
        for dim in (batch, *space):
            self.pin(dim, perm=True)
        new = self._fresh(out.shape[1])
        tensors = [ref for ref in (weight, bias, mean, var) if ref is not None]
        order = [
            "x",
            "out",
            *(n for n, ref in zip("wbmv", (weight, bias, mean, var), strict=True) if ref is not None),
        ]
        scale = [{"m": 1, "x": -1}, {"v": 1, "x": -2}, {"b": 1, "out": -1}]
        scale.append({"w": 1, "out": -1} if weight is not None else {"out": 1})
        sign = [{"m": 1, "x": 1}, {"v": 1}, {"b": 1, "out": 1}]
        sign.append({"w": 1, "x": 1, "out": 1} if weight is not None else {"x": 1, "out": 1})
        self.events.append(
            Event(
                (channels, new, *(self.of(ref)[0] for ref in tensors)),
                True,
                tuple(tuple(eq.get(n, 0) for n in order) for eq in scale if eq.keys() <= set(order)),
                tuple(tuple(eq.get(n, 0) for n in order) for eq in sign if eq.keys() <= set(order)),
                None,
                2 if weight is not None else None,
            )
        )
        if mean is not None:
            self.alike(x, mean)
        if var is not None:
            self.factors(var, a=(x, 2))
        self._set(out, [batch, new, *space])
        self._affine(out, weight, bias)
        for other in step.outs[1:]:
            self.dims[other.number] = self._frozen(other)

    _op__native_batch_norm_legit = _op_native_batch_norm

    def _affine(self, out: Ref, weight: Ref | None, bias: Ref | None) -> None:
        if weight is None:
            self.hold(out)
        self.alike(*(ref for ref in (out, weight, bias) if ref is not None))

    def _op__native_batch_norm_legit_no_training(self, step: Step) -> None:
        self._op_native_batch_norm(step)

    def _op_native_layer_norm(self, step: Step) -> None:
        x, shape, weight, bias = step.args[:4]
        out = step.outs[0]
        self._normalise(x, out, weight, bias, last=len(shape))

    def _normalise(self, x: Ref, out: Ref, weight: Ref | None, bias: Ref | None, *, last: int) -> None:
        dims = self.of(x)
        for dim in dims:
            self.pin(dim, perm=True)
        new: list[Dim] = list(dims[: len(dims) - last])
        for axis in range(last):
            size = x.shape[len(dims) - last + axis]
            fresh = self._fresh(size)
            affine = [self.of(ref)[axis] for ref in (weight, bias) if ref is not None]
            self.tie(fresh, *affine, mix=False, scale=weight is not None, sign=weight is not None)
            self.events.append(Event((dims[len(dims) - last + axis], fresh), True, (), (), None))
            new.append(fresh)
        self.normed.append(x.number)
        self._set(out, new)
        self._affine(out, weight, bias)

    def _op_native_group_norm(self, step: Step) -> None:
        x, weight, bias, _n, channels, _s, groups = step.args[:7]
        out = step.outs[0]
        batch, dim, *space = self.of(x)
        for other in (batch, *space):
            self.pin(other, perm=True)
        group, within = take(list(expand(dim)), [groups, channels // groups])
        self.pin(group, perm=True, scale=True)
        self.pin(within, perm=True)
        fresh = self._fresh(channels)
        affine = [self.of(ref)[0] for ref in (weight, bias) if ref is not None]
        self.tie(fresh, *affine, mix=False, scale=weight is not None, sign=weight is not None)
        self.events.append(Event((fresh, (*group, *within)), True, (), (), None))
        self.normed.append(x.number)
        self._set(out, [batch, fresh, *space])
        self._affine(out, weight, bias)

    def _op__weight_norm_interface(self, step: Step) -> None:
        """Weight normalisation: a direction, whose length is divided out, times a gain a unit."""
        v, g, *rest = step.args
        out = step.outs[0]
        unit = rest[0] if rest else 0
        new = [self._fresh(size) for size in out.shape]
        for axis, (own, made) in enumerate(zip(self.of(v), new, strict=True)):
            if axis == unit:
                gain = self.of(g)[axis]
                self.events.append(Event((own, gain, made), True, ((0, 1, -1),), ((1, 1, 1),), None))
            else:
                self.events.append(Event((own, made), True, _units(2), ((1, 1),), None))
        self._set(out, new)
        self.normed.append(v.number)
        self.factors(out, a=(g, 1))
        for other in step.outs[1:]:
            self.dims[other.number] = self._frozen(other)

    def _op__softmax(self, step: Step) -> None:
        source, out = step.args[0], step.outs[0]
        for dim in self.of(source):
            self.pin(dim, perm=True)
        self.hold(source)
        self.hold(out)
        self._set(out, self.of(source))

    _op__log_softmax = _op__safe_softmax = _op__softmax

    def _op__scaled_dot_product_flash_attention_for_cpu(self, step: Step) -> None:
        q, k, v = step.args[:3]
        out = step.outs[0]
        mask = step.kwargs.get("attn_mask")
        if q.shape[:2] != k.shape[:2]:
            raise Mismatch
        (qb, qh, qn, qd), (kb, kh, kn, kd), (vb, vh, vn, vd) = self.of(q), self.of(k), self.of(v)
        self.tie(qb, kb, vb, scale=False, sign=False, mix=False)
        heads = self._fresh(q.shape[1])
        against = ((1, 1, 0, 0), (0, 0, 1, -1))
        self.events.append(Event((qh, kh, vh, heads), True, against, ((1, 1, 0, 0), (0, 0, 1, 1)), None))
        self.contract(qd, kd)
        ordered = mask is not None or (step.args[4] if len(step.args) > 4 else False)
        for dim in (qn, kn, vn):
            self.pin(dim, perm=not ordered)
        self.tie(kn, vn)
        if mask is not None:
            self.freeze(mask)
        self._set(out, [qb, heads, qn, vd], v)
        self.whole.append({q.number: 1, k.number: 1})
        for other in step.outs[1:]:
            self.dims[other.number] = self._frozen(other)

    def _reduce(self, step: Step, *, linear: bool) -> None:
        source, out = step.args[0], step.outs[0]
        dims = self.of(source)
        asked = step.args[1] if len(step.args) > 1 else None
        asked = [asked] if isinstance(asked, int) else asked
        gone = {axis % len(dims) for axis in asked} if asked else set(range(len(dims)))
        keep = len(out.shape) == len(dims) and len(dims) > 0
        new: list[Dim] = []
        for axis, dim in enumerate(dims):
            if axis in gone:
                self.pin(dim, perm=True)
                if keep:
                    new.append(self._fresh(1))
                    self.pin(new[-1])
            else:
                if not linear:
                    self.pin(dim, perm=True, scale=True)
                new.append(dim)
        self._set(out, new, source)

    def _op_mean(self, step: Step) -> None:
        self._reduce(step, linear=True)

    _op_sum = _op_mean

    def _op_amax(self, step: Step) -> None:
        self._reduce(step, linear=False)

    _op_amin = _op_amax

    def _op_linalg_vector_norm(self, step: Step) -> None:
        asked = step.args[2] if len(step.args) > 2 else None
        self.normed.append(step.args[0].number)
        self._reduce(Step(step.op, (step.args[0], asked), {}, step.out, step.where), linear=False)
        for axis, dim in enumerate(self.of(step.args[0])):
            if not asked or axis in {a % len(step.args[0].shape) for a in asked}:
                self.pin(dim, perm=True)

    def _pool(self, step: Step, *, linear: bool = True) -> None:
        source, out = step.args[0], step.outs[0]
        dims = list(self.of(source))
        for axis in range(len(dims)):
            if axis >= 2:
                self.pin(dims[axis])
                dims[axis] = self._fresh(out.shape[axis])
                self.pin(dims[axis])
            elif not linear:
                self.pin(dims[axis], perm=True, scale=True)
        self._set(out, dims, source)
        for other in step.outs[1:]:
            self.dims[other.number] = self._frozen(other)

    def _max_pool(self, step: Step) -> None:
        self._pool(step, linear=False)
