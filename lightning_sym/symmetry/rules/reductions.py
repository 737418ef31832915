"""Sums, means and maxima over axes, and pooling over places."""

from __future__ import annotations

from typing import Any

from lightning_sym.symmetry._legs import Dim
from lightning_sym.symmetry._trace import Ref, Step
from lightning_sym.symmetry.rules.equations import Equations, fresh
from lightning_sym.symmetry.rules.registry import argument, rule, tensor


def reduce(equations: Equations, source: Ref, out: Ref, asked: Any, *, linear: bool) -> None:
    """Reduce over some axes (None: all), whose positions may change places."""
    dims = equations.of(source)
    asked = [asked] if isinstance(asked, int) else asked
    gone = {axis % len(dims) for axis in asked} if asked else set(range(len(dims)))
    keep = len(out.shape) == len(dims) and len(dims) > 0
    new: list[Dim] = []
    for axis, dim in enumerate(dims):
        if axis not in gone:
            if not linear:
                equations.pin(dim, perm=True, scale=True)
            new.append(dim)
            continue
        equations.pin(dim, perm=True)
        if keep:
            new.append(fresh(1))
            equations.pin(new[-1])
    equations.assign(out, new, source)


@rule("mean", "sum")
def average(equations: Equations, step: Step) -> None:
    """Linear: what is not summed over moves as it did."""
    reduce(equations, tensor(step, 0), step.outs[0], argument(step, 1), linear=True)


@rule("amax", "amin")
def extreme(equations: Equations, step: Step) -> None:
    """Positively homogeneous."""
    reduce(equations, tensor(step, 0), step.outs[0], argument(step, 1), linear=False)


@rule(
    *("avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d"),
    *("upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"),
)
def average_pool(equations: Equations, step: Step) -> None:
    """Linear in each channel; places stay."""
    _pool(equations, step, linear=True)


@rule(
    *("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices"),
    *("max_pool1d_with_indices", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
)
def max_pool(equations: Equations, step: Step) -> None:
    """Positively homogeneous in each channel."""
    _pool(equations, step, linear=False)


def _pool(equations: Equations, step: Step, *, linear: bool) -> None:
    source, out = tensor(step, 0), step.outs[0]
    dims = list(equations.of(source))
    for axis in range(len(dims)):
        if axis >= 2:
            equations.pin(dims[axis])
            dims[axis] = fresh(out.shape[axis])
            equations.pin(dims[axis])
        elif not linear:
            equations.pin(dims[axis], perm=True, scale=True)
    equations.assign(out, dims, source)
    equations.freeze_outputs(step.outs[1:])
