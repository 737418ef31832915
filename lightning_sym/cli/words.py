"""What ``diagnose`` prints: the verdict first, and no table without rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning_sym.diagnosis import Finding, WeightsReport
from lightning_sym.diagnosis.weight_facts import LONG_SIDE, SHORT_SIDE, WeightFacts

#: Rows that the table of ranks has unless all are asked for, and findings that are told in full.
ROWS, TOLD = 12, 20


def verdict(findings: Sequence[Finding]) -> str:
    """Return the verdict in one line.

    Args:
        findings: of a network.

    Example:
        >>> verdict([])
        'no alarm, no warning'
    """
    parts = []
    for level in ("alarm", "warning"):
        of = [finding for finding in findings if finding.level == level]
        if not of:
            parts.append(f"no {level}")
            continue
        kinds = list(dict.fromkeys(finding.kind for finding in of))
        layers = list(dict.fromkeys(finding.layer for finding in of if finding.layer))
        where = f" in {', '.join(layers[:3])}" + (", ..." if len(layers) > 3 else "") if layers else ""
        parts.append(f"{len(of)} {level}{'s' if len(of) > 1 else ''} ({', '.join(kinds)}{where})")
    return ", ".join(parts)


def lines(report: WeightsReport, *, graph: bool, all_layers: bool = False) -> Iterator[str]:
    """Yield the lines after the verdict's.

    Args:
        report: what was found.
        graph: whether there was a network whose graph could be asked.
        all_layers: tell every layer's rank.
    """
    yield from _mirrors(report)
    asked = graph and not any("graph was not asked" in note for note in report.notes)
    yield _certified(report, graph=asked)
    yield from _ranks(report.layers, all_layers=all_layers)
    yield from _syre(report)
    if report.initial_zeros:
        some = ", ".join(report.initial_zeros[:3]) + (", ..." if len(report.initial_zeros) > 3 else "")
        what = "and a gradient reaches them: zero initialisations" if graph else "which may be as initialised"
        yield f"Zero all over, {what}: {len(report.initial_zeros)} ({some})"
    if report.findings:
        yield "Findings:"
        for finding in report.findings[:TOLD]:
            yield f"  {finding}"
        if len(report.findings) > TOLD:
            yield f"  and {len(report.findings) - TOLD} more; --json writes all of them"


def _mirrors(report: WeightsReport) -> Iterator[str]:
    mirrors = report.mirrors
    if mirrors.symmetries is None:
        yield f"Units on a mirror: symmetries not looked for ({mirrors.why})"
        return
    held = (
        f"; {len(mirrors.symmetries.untraced)} operations not followed" if mirrors.symmetries.untraced else ""
    )
    occupied = list(mirrors.occupied())
    if not occupied:
        yield f"Units on a mirror: none, of {len(mirrors.symmetries)} symmetries found{held}"
        return
    yield f"Units on a mirror (of {len(mirrors.symmetries)} symmetries found{held}):"
    for on in occupied:
        yield f"  {on.units} of {on.of} on a {on.kind} mirror in {on.path or 'the network'}"


def _certified(report: WeightsReport, *, graph: bool) -> str:
    if report.certified:
        each = ", ".join(f"{number} in {layer}" for layer, number in report.certified.items())
        return f"Certified dead units: {each}"
    if not graph:
        return "Certified dead units: not known without the graph of a forward pass"
    return "Certified dead units: none"


def _ranks(layers: Sequence[WeightFacts], *, all_layers: bool) -> Iterator[str]:
    told = [facts for facts in layers if facts.random_rank]
    if not told:
        yield "Rank by layer: no weight is a matrix whose rank could fall"
        return
    order = sorted(told, key=lambda facts: (facts.rank / facts.random_rank, _ratio(facts)))
    shown = told if all_layers else order[:ROWS]
    which = "" if all_layers or len(told) <= ROWS else f", the lowest {ROWS} of {len(told)} layers"
    part = any(min(f.shape[1:]) > SHORT_SIDE or max(f.shape[1:]) > LONG_SIDE for f in shown)
    part_of = f" (of at most {SHORT_SIDE} x {LONG_SIDE} random rows and columns)" if part else ""
    yield f"Rank against a random matrix of the shape{which}{part_of}:"
    width = min(max(len(facts.name) for facts in shown), 48)
    yield f"  {'layer':<{width}}  {'units x inputs':>14}  {'rank':>11}  {'effective':>15}  {'size':>8}"
    for facts in shown:
        shape = f"{facts.units} x {facts.shape[2]}"
        rank = f"{facts.rank} of {facts.random_rank}"
        effective = f"{facts.effective_rank:.1f} of {facts.random_effective_rank:.1f}"
        name = facts.name if len(facts.name) <= width else "..." + facts.name[3 - width :]
        yield f"  {name:<{width}}  {shape:>14}  {rank:>11}  {effective:>15}  {facts.size:>8.2g}"


def _ratio(facts: WeightFacts) -> float:
    return facts.effective_rank / facts.random_effective_rank if facts.random_effective_rank else 1.0


def _syre(report: WeightsReport) -> Iterator[str]:
    mirrors = report.mirrors
    if mirrors.symmetries is None:
        yield "What Syre would push on: not known, symmetries not looked for"
        return
    occupied = [on for on in mirrors.occupied() if on.push > 0]
    if not occupied:
        units, number = sum(s.size for s in mirrors.symmetries), len(mirrors.symmetries)
        yield (
            "What Syre would push on: no unit is on a mirror now; its offset would keep the "
            f"{units} units of {number} symmetries off theirs"
            if number
            else "What Syre would push on: nothing, no symmetry was found"
        )
        return
    yield "What Syre would push on:"
    for on in occupied:
        yield (
            f"  {on.units} units of {on.path or 'the network'} off their {on.kind} mirror, with at least "
            f"{on.push:.2g} x weight decay x its offset's standard deviation"
        )
