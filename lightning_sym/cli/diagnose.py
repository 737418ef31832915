"""``lightning-sym diagnose``: what is wrong with a network, from its weights."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sym.cli import Refused
from lightning_sym.cli.page import findings_page
from lightning_sym.cli.sources import Source, open_source
from lightning_sym.cli.words import lines, verdict
from lightning_sym.diagnosis import WeightsReport, inspect_tensors, inspect_weights
from lightning_sym.diagnosis.finding import LEVELS
from lightning_sym.observe import coverage

#: Networks up to this many parameters are searched for symmetries by --symmetries auto.
AUTO_SEARCH = 30_000_000
#: From so many on it takes some time, which is said beforehand.
SLOW_SEARCH = 2_000_000
#: Seconds between two lines that tell how far the reading of a file is.
PATIENCE = 5.0
_DESCRIPTION = """\
Tell from weights alone what is wrong with a network: equal, dead and zero units, lost rank, weights that
vanished or are not finite, and which symmetry's mirror the units lie on. Nothing is trained, and no
code of a file is run: safetensors and torch files of plain tensors are read, other pickles refused."""


class Counted(Mapping[str, Tensor]):
    """Tensors that tell how many of them have been asked for, while it goes on for long.

    Args:
        tensors: by name.
        tell: called with a sentence.
    """

    def __init__(self, tensors: Mapping[str, Tensor], tell: Callable[[str], None]) -> None:
        self._tensors, self._tell = tensors, tell
        self._asked: set[str] = set()
        self._told = time.monotonic()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        self._asked.add(name)
        if time.monotonic() - self._told > PATIENCE:
            self._told = time.monotonic()
            self._tell(f"{len(self._asked)} of {len(self)} tensors")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors


def run(argv: Sequence[str]) -> int:
    """Run the verb; return the exit code.

    Args:
        argv: arguments after the verb.

    Raises:
        Refused: if something can't or must not be read.
    """
    options = _parser().parse_args(list(argv))
    example = None if options.example is None else _example(options.example)
    source = _open(options.checkpoint, options)
    report = look(source, example, symmetries=options.symmetries, tell=_tell)
    _print(f"lightning-sym diagnose: {source.said}{_size(source)}")
    for note in [*source.notes, *report.notes]:
        _print(f"  note: {note}")
    _print(f"Verdict: {verdict(report.findings)}")
    for line in lines(report, graph=source.module is not None, all_layers=options.all_layers):
        _print(line)
    if source.module is not None:
        _print(f"Coverage: {coverage(source.module)}")
    changes = None
    if options.against is not None:
        other = _open(options.against, options)
        changes = compare(source.tensors, other.tensors)
        for line in _compared(changes, options.against):
            _print(line)
    if options.json is not None:
        text = json.dumps(as_dict(source, report, changes), indent=1, allow_nan=False)
        _write(Path(options.json), text + "\n")
    if options.html is not None:
        _write(Path(options.html), findings_page(source.said, verdict(report.findings), report))
    return int(_fails(report, options.fail_on))


def look(
    source: Source,
    example: tuple[Tensor, ...] | None = None,
    *,
    symmetries: str = "auto",
    tell: Callable[[str], None] = lambda line: None,
) -> WeightsReport:
    """Return what a source's weights tell.

    Args:
        source: a network or tensors.
        example: what its forward takes.
        symmetries: ``"auto"``, ``"always"`` or ``"never"``: whether to search for them.
        tell: called with a sentence where the work is long.

    Raises:
        Refused: if the forward pass fails on the example.
    """
    if source.module is None:
        return inspect_tensors(Counted(source.tensors, tell=tell))
    size = sum(p.numel() for p in source.module.parameters())
    if symmetries == "always" or (symmetries == "auto" and SLOW_SEARCH <= size <= AUTO_SEARCH):
        tell(f"symmetries of {size:,} parameters are looked for; --symmetries never leaves that out")
    search = {"always": True, "never": False}.get(symmetries, True if size <= AUTO_SEARCH else None)
    try:
        return inspect_weights(source.module, example, search=search)
    except Exception as error:
        if example is None:
            raise
        shape = ",".join(map(str, example[0].shape[1:]))
        raise Refused(f"the network's forward fails on --example {shape}: {error}") from error


def compare(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return how far each tensor that both have is from the other's.

    Args:
        new: by name.
        old: by name; tensors are read one by one.

    Returns:
        By name ``change``, the Frobenius norm of the difference over the old one's, and ``size``, the new
        norm over the old one's; those with an old norm of 0 are left out.

    Raises:
        Refused: if they have no floating-point tensor of one shape in common.
    """
    found: dict[str, dict[str, float]] = {}
    for name in new:
        if name not in old:
            continue
        a, b = new[name].detach(), old[name].detach()
        if a.shape != b.shape or not a.is_floating_point() or a.ndim < 2:
            continue
        moved = squares = total = 0.0
        for x, y in zip(a.flatten().split(2**22), b.flatten().split(2**22), strict=True):
            moved += float((x.double() - y.double()).square().sum())
            squares += float(y.double().square().sum())
            total += float(x.double().square().sum())
        if squares > 0:
            found[name] = {"change": (moved / squares) ** 0.5, "size": (total / squares) ** 0.5}
    if not found:
        raise Refused("--against must have weights of the same names and shapes, and has none")
    return found


def as_dict(
    source: Source, report: WeightsReport, changes: Mapping[str, Mapping[str, float]] | None = None
) -> dict[str, Any]:
    """Return everything that was found as plain values, for JSON; NaN and infinity as ``None``.

    Args:
        source: what was looked at.
        report: what was found.
        changes: what :func:`compare` returned.
    """
    mirrors = report.mirrors
    layers = [
        {
            "name": facts.name,
            "shape": list(facts.shape),
            "size": facts.size,
            "rank": facts.rank,
            "random_rank": facts.random_rank,
            "effective_rank": facts.effective_rank,
            "random_effective_rank": facts.random_effective_rank,
            "equal_units": int(facts.equal.sum()),
            "zero_units": int(facts.zero.sum()),
            "not_finite": facts.not_finite,
        }
        for facts in report.layers
    ]
    searched = mirrors.symmetries is not None
    plain = {
        "source": source.said,
        "verdict": verdict(report.findings),
        "findings": [finding.as_dict() for finding in report.findings],
        "mirrors": [vars(on) for on in mirrors.occupied()] if searched else None,
        "symmetries": [repr(s) for s in mirrors.symmetries or ()] if searched else mirrors.why,
        "certified_dead": report.certified,
        "initial_zeros": report.initial_zeros,
        "layers": layers,
        "against": changes,
        "notes": [*source.notes, *report.notes],
    }
    return _finite(plain)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def _parser() -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="lightning-sym diagnose", description=_DESCRIPTION)
    add = parser.add_argument
    add("checkpoint", type=str, metavar="CHECKPOINT|timm:NAME", help="a file, or an untrained timm model")
    add("--class", dest="class_path", type=str, default=None, metavar="pkg.Class|timm:NAME",
        help="the network that the weights belong to; importing it runs its code")  # fmt: skip
    add("--init", type=str, default=None, metavar="JSON", help="keyword arguments of the class")
    add("--example", type=str, default=None, metavar="3,224,224",
        help="shape of one input, without the batch; guessed where it is left out")  # fmt: skip
    add("--against", type=str, default=None, metavar="OTHER",
        help="another checkpoint of the network, or timm:NAME: how far each weight is from it")  # fmt: skip
    add("--symmetries", choices=("auto", "always", "never"), default="auto",
        help="search for symmetries; auto: up to 30 million parameters, or where units are lost")  # fmt: skip
    add("--all-layers", action="store_true", help="tell every layer's rank, not the twelve lowest")
    add("--json", type=str, default=None, metavar="FILE", help="write everything that was found")
    add("--html", type=str, default=None, metavar="FILE", help="write a page of it, without scripts")
    add("--fail-on", choices=LEVELS, default=None, help="exit with 1 if a finding is at least at this level")
    add("--max-gb", type=float, default=64.0, help="refuse larger files")
    return parser


def _open(name: str, options: Any) -> Source:
    return open_source(
        name,
        class_path=options.class_path,
        init=options.init,
        max_gb=options.max_gb,
        tell=_tell,
    )


def _tell(line: str) -> None:
    print(f"lightning-sym diagnose: {line}", file=sys.stderr, flush=True)  # noqa: T201


def _example(text: str) -> tuple[Tensor, ...]:
    try:
        shape = [int(part) for part in text.split(",")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1:
        raise Refused(f"--example must be sizes above 0, such as 3,224,224, got {text!r}")
    return (torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)),)


def _size(source: Source) -> str:
    if source.module is None:
        return f" ({len(source.tensors)} tensors)"
    return f" ({sum(p.numel() for p in source.module.parameters()):,} parameters)"


def _compared(changes: Mapping[str, Mapping[str, float]], other: str) -> list[str]:
    still = [name for name, change in changes.items() if change["change"] == 0]
    moved = sorted((c["change"], name) for name, c in changes.items() if c["change"] > 0)
    said = [f"Against {other}: {len(moved)} of {len(changes)} weights differ"]
    for change, name in moved[::-1][:5]:
        said.append(f"  {name}: moved by {change:.2g} of its norm, now {changes[name]['size']:.2g} of it")
    if still and moved:
        said.append(f"  the same to the bit: {', '.join(still[:5])}" + (", ..." if len(still) > 5 else ""))
    return said


def _fails(report: WeightsReport, level: str | None) -> bool:
    if level is None:
        return False
    least = LEVELS.index(level)  # type: ignore[arg-type]
    return any(LEVELS.index(finding.level) >= least for finding in report.findings)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Refused(f"{path} can't be written: {error}") from error


def _print(line: str) -> None:
    print(line)  # noqa: T201
