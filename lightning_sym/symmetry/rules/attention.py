"""Softmax, and attention as one operation."""

from __future__ import annotations

from lightning_sym.symmetry._trace import Step
from lightning_sym.symmetry.rules.equations import Equations, Event, fresh
from lightning_sym.symmetry.rules.registry import NoRule, argument, rule, tensor


@rule("_softmax", "_log_softmax", "_safe_softmax")
def softmax(equations: Equations, step: Step) -> None:
    """Entries may change places, and nothing else."""
    source, out = tensor(step, 0), step.outs[0]
    for dim in equations.of(source):
        equations.pin(dim, perm=True)
    equations.hold(source)
    equations.hold(out)
    equations.assign(out, equations.of(source))


@rule("_scaled_dot_product_flash_attention_for_cpu")
def fused_attention(equations: Equations, step: Step) -> None:
    """Queries move against keys, values into the output, heads together."""
    q, k, v = (tensor(step, place) for place in range(3))
    out = step.outs[0]
    mask = step.kwargs.get("attn_mask")
    if q.shape[:2] != k.shape[:2]:
        raise NoRule
    (qb, qh, qn, qd), (kb, kh, kn, kd), (vb, vh, vn, vd) = (equations.of(ref) for ref in (q, k, v))
    equations.tie(qb, kb, vb, scale=False, sign=False, mix=False)
    heads = fresh(q.shape[1])
    against = ((1, 1, 0, 0), (0, 0, 1, -1))
    equations.events.append(Event((qh, kh, vh, heads), True, against, ((1, 1, 0, 0), (0, 0, 1, 1)), None))
    equations.contract(qd, kd)
    ordered = mask is not None or bool(argument(step, 4, False))
    for dim in (qn, kn, vn):
        equations.pin(dim, perm=not ordered)
    equations.tie(kn, vn)
    if mask is not None:
        equations.freeze(mask)
    equations.assign(out, [qb, heads, qn, vd], v)
    equations.whole.append({q.number: 1, k.number: 1})
    equations.freeze_outputs(step.outs[1:])
