"""From a trace to equations: each operation's rule, in order."""

from __future__ import annotations

from lightning_sym.symmetry._legs import Mismatch
from lightning_sym.symmetry._trace import Step, Trace
from lightning_sym.symmetry.rules import (  # noqa: F401 - importing a family registers its rules
    activations,
    arithmetic,
    attention,
    normalisation,
    pieces,
    products,
    reductions,
    shapes,
)
from lightning_sym.symmetry.rules.equations import Equations
from lightning_sym.symmetry.rules.registry import RULES, NoRule, operation


def write_equations(trace: Trace, *, fixed: frozenset[str]) -> Equations:
    """Apply the rules to what depends on a parameter and reaches the output.

    An error in a rule that is not its "no rule" (:class:`NoRule`, or dimensions without a common
    refinement) is raised: it is a fault of the rule.

    Args:
        trace: the forward pass.
        fixed: names of the parameters and buffers that may not move.
    """
    equations = Equations(trace, fixed=fixed)
    needed = {ref.number for ref in trace.outputs}
    for step in reversed(trace.steps):
        if any(out.number in needed for out in step.outs):
            needed.update(ref.number for ref in step.refs)
    live = trace.live & needed
    for step in trace.steps:
        if any(out.number in live for out in step.outs):
            _apply(equations, step)
    for ref in trace.outputs:
        equations.freeze(ref)
    return equations


def _apply(equations: Equations, step: Step) -> None:
    before = len(equations.events), len(equations.whole), len(equations.normed)
    try:
        found = RULES.get(operation(step))
        if found is None:
            raise NoRule
        found(equations, step)
    except (NoRule, Mismatch):
        del equations.events[before[0] :], equations.whole[before[1] :], equations.normed[before[2] :]
        _give_up(equations, step)


def _give_up(equations: Equations, step: Step) -> None:
    """Hold everything in place that goes through an operation, and say so."""
    if any(ref.number in equations.trace.live for ref in step.refs):
        where = f" in {step.where}" if step.where else ""
        name = operation(step) or ".".join(step.op.split(".")[:2])
        line = f"{name}{where}: no rule, units that pass through it are held in place"
        equations.untraced[line] = None
    for ref in step.refs:
        equations.freeze(ref)
    for out in step.outs:
        equations.dims[out.number] = equations.frozen(out)
        equations.hold(out)
