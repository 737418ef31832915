"""What a state dict tells without the module it belongs to: :func:`diagnose_tensors`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from lightning_sym.diagnosis import unit_rules as rules
from lightning_sym.diagnosis.finding import LEVELS, Finding
from lightning_sym.diagnosis.mirrors import Mirrors
from lightning_sym.diagnosis.weight_facts import WeightFacts, weight_facts
from lightning_sym.diagnosis.weights import WeightsReport

#: A matrix with this many rows, and this many times more than columns, is taken for a table of embeddings.
TABLE_ROWS, TABLE_RATIO = 1024, 4
NO_MODULE = "no module was given"


def diagnose_tensors(tensors: Mapping[str, Tensor]) -> list[Finding]:
    """Return what the tensors of a state dict tell one by one, without the network that they belong to.

    Of each floating-point tensor with two dimensions or more, dimension 0 is taken for its units. Without
    the graph nothing is certified dead, and what may be a zero-initialised branch or head is no finding; the
    symmetries are not looked for, which a note says.

    Args:
        tensors: by name. Each is asked for once (and its bias with it), in order: a mapping that reads
            from disk keeps one in memory at a time.

    Returns:
        Findings, alarms first; the last is the note that symmetries were not looked for.

    Raises:
        TypeError: if ``tensors`` is no mapping.

    Example:
        >>> import torch
        >>> found = diagnose_tensors({"fc.weight": torch.ones(8, 16)})
        >>> [(finding.kind, finding.layer) for finding in found]
        [('equal_units', 'fc'), ('symmetries_not_looked_for', '')]
    """
    return inspect_tensors(tensors).findings


def inspect_tensors(tensors: Mapping[str, Tensor]) -> WeightsReport:
    """Return :func:`diagnose_tensors`'s findings with the facts that they come from.

    Args:
        tensors: see there.

    Raises:
        TypeError: if ``tensors`` is no mapping.
    """
    if not isinstance(tensors, Mapping):
        raise TypeError(f"tensors must be a mapping from names to tensors, got {type(tensors).__name__}")
    report = WeightsReport(mirrors=Mirrors(why=NO_MODULE))
    found: list[Finding] = []
    for name in tensors:
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not tensor.numel():
            continue
        if tensor.ndim < 2:
            wrong = int((~tensor.isfinite()).sum())
            owner = WeightFacts(name, (1, 1, tensor.numel()), not_finite=wrong)
            found += rules.not_finite(owner)
            continue
        facts = _facts(name, tensor, tensors)
        report.layers.append(facts)
        found += _found(facts)
        if facts.size == 0:
            report.initial_zeros.append(name)
    found = [
        f if f.kind in ("divergence", "weights_vanish") else _uncaused(f)
        for f in sorted(found, key=lambda f: -LEVELS.index(f.level))
    ]
    report.findings = [*found, _note()]
    return report


def _facts(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> WeightFacts:
    """Return a tensor's facts; a table of embeddings is read by columns."""
    layer = name.removesuffix(".weight")
    rows, width = tensor.shape[0], math.prod(tensor.shape[1:])
    if tensor.ndim == 2 and rows >= TABLE_ROWS and rows >= TABLE_RATIO * width:
        return weight_facts(layer, tensor.detach().mT[None])
    beside = f"{layer}.bias"
    bias = tensors[beside] if layer != name and beside in tensors else None
    if bias is not None and (bias.shape != (rows,) or not bias.isfinite().all()):
        bias = None  # one that is not finite is reported by its own name
    if tensor.ndim > 2 and tensor.shape[1] == 1:  # each unit reads a channel of its own
        return weight_facts(layer, tensor.detach().reshape(rows, 1, width), bias)
    return weight_facts(layer, tensor.detach().reshape(1, rows, width), bias)


def _found(facts: WeightFacts) -> list[Finding]:
    found = [*rules.not_finite(facts)]
    if found or not facts.size:
        return found
    found += [*rules.equal_units(facts), *rules.lost_rank(facts)]
    if facts.units > 1:  # tokens and positions, of one row, may be as small as they like
        found += rules.vanished(facts, known=False)
    why = "Without the graph it is not known whether they are dead."
    found += rules.zero_units(facts, int(facts.zero.sum()), excused=why)
    return found


def _uncaused(finding: Finding) -> Finding:
    return Finding(**(finding.as_dict() | {"cause": f"not known: symmetries not looked for ({NO_MODULE})"}))


def _note() -> Finding:
    return Finding(
        kind="symmetries_not_looked_for",
        level="note",
        layer="",
        step=0,
        value=0.0,
        limit=0.0,
        message="Symmetries not looked for: tensors alone don't tell how they are used.",
        cause=NO_MODULE,
        remedy="Give the module (or --class at the command line), to learn which mirror units lie on.",
    )
