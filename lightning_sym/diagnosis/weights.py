"""What the weights of a network alone tell: :func:`diagnose_weights`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_sym._names import clean_name
from lightning_sym.diagnosis import unit_rules as rules
from lightning_sym.diagnosis.certified import certified_dead
from lightning_sym.diagnosis.finding import LEVELS, Finding
from lightning_sym.diagnosis.guess import guess_example
from lightning_sym.diagnosis.mirrors import Mirrors, with_cause
from lightning_sym.diagnosis.weight_facts import WeightFacts, weight_facts
from lightning_sym.observe.layers import Layer, watchable_layers
from lightning_sym.symmetry import Graph, Symmetries
from lightning_sym.symmetry.symmetry import named_tensors

_GAINS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)
#: Most parameters of a network whose symmetries are searched for unasked: a trial is two float64 passes.
LARGEST_SEARCH = 60_000_000


@dataclass
class WeightsReport:
    """What :func:`inspect_weights` found.

    Args:
        findings: alarms first.
        layers: facts of each layer's weight, in the network's order.
        mirrors: what is known of the network's symmetries.
        certified: number of units certified dead, by layer (or normalisation).
        initial_zeros: parameters that are zero all over and get a gradient: zero initialisations.
        notes: what could not be looked at, in words.
    """

    findings: list[Finding] = field(default_factory=list)
    layers: list[WeightFacts] = field(default_factory=list)
    mirrors: Mirrors = field(default_factory=Mirrors)
    certified: dict[str, int] = field(default_factory=dict)
    initial_zeros: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def diagnose_weights(
    module: nn.Module,
    example_inputs: Any = None,
    *,
    symmetries: Symmetries | None = None,
    search: bool | None = None,
) -> list[Finding]:
    """Return what is wrong with a network, from its weights alone.

    Looked for are entries that are not finite (``divergence``), units that are copies of one another
    (``equal_units``), dead by proof (``dead_units``) or constant (``zero_units``), fewer directions than a
    random matrix of the shape has (``rank_collapse``), and weights far below any initialisation
    (``weights_vanish``). Zero-initialised residual branches, heads and low-rank factors are no finding: the
    graph of a forward pass tells that a gradient reaches them. Where units are lost, the network's symmetries
    are searched for, and the cause names the mirror that the units lie on.

    Not seen is what only data shows: a ReLU that never fires though its weights are in order, an output that
    does not depend on the input. Only the layers of :func:`~lightning_sym.observe.watchable_layers` and the
    gains of normalisations are looked into; of other parameters, whether they are finite.

    Args:
        module: the network; it is left as it is, and runs on a copy.
        example_inputs: what its forward takes: a tensor, or a tuple of positional arguments; ``None``:
            guessed from the network, and if no guess is right the graph is not asked.
        symmetries: those of the module, if they are known already.
        search: search for symmetries always (True), never (False), or where units are lost and the network
            has at most 60 million parameters (None).

    Returns:
        Findings, alarms first; empty for a sound network.

    Raises:
        TypeError: if ``module`` is none.
        Exception: what its forward raises on the given ``example_inputs``.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> diagnose_weights(net)
        []
        >>> _ = net[0].weight.data[:8].zero_(), net[0].bias.data[:8].fill_(-1.0)
        >>> [(finding.kind, finding.layer, finding.value) for finding in diagnose_weights(net)]
        [('dead_units', '0', 0.5)]
    """
    return inspect_weights(module, example_inputs, symmetries=symmetries, search=search).findings


def inspect_weights(
    module: nn.Module,
    example_inputs: Any = None,
    *,
    symmetries: Symmetries | None = None,
    search: bool | None = None,
) -> WeightsReport:
    """Return :func:`diagnose_weights`'s findings with the facts that they come from.

    Args:
        module: see there.
        example_inputs: see there.
        symmetries: see there.
        search: see there.

    Raises:
        TypeError: if ``module`` is none.
        Exception: what its forward raises on the given ``example_inputs``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "some symmetries may be missing")  # said in the report
        return _Inspection(module, example_inputs, symmetries, search).report


class _Inspection:
    """One look at a network's weights."""

    def __init__(
        self, module: nn.Module, example: Any, symmetries: Symmetries | None, search: bool | None
    ) -> None:
        self.module, self.report = module, WeightsReport()
        self.example: tuple[Any, ...] | None = None
        if example is not None:
            self.example = tuple(example) if isinstance(example, tuple | list) else (example,)
        self.graph: Graph | None = None
        self.asked = False
        self.tensors = named_tensors(module)
        try:
            self._look(symmetries, search)
        finally:
            if self.graph is not None:
                self.graph.close()

    def _look(self, symmetries: Symmetries | None, search: bool | None) -> None:
        report = self.report
        layers = watchable_layers(self.module)
        report.layers = [facts for facts in map(self._facts, layers) if facts is not None]
        looked = {facts.name: facts for facts in report.layers}
        found: list[Finding] = list(self._not_finite(looked))
        sick = bool(found)  # a graph of NaN tells nothing
        for layer in layers:
            facts = looked.get(layer.name)
            if facts is None or facts.not_finite:
                continue
            found += rules.equal_units(facts)
            found += rules.lost_rank(facts)
            if not sick:
                found += self._vanished(layer, facts)
            found += self._lost(layer, facts, sick=sick)
        if not sick:
            found += self._gains()
            found += self._zeros(layers)
        units = {"equal_units", "dead_units", "zero_units", "rank_collapse"}
        if symmetries is not None:
            report.mirrors = Mirrors(symmetries)
        elif search or (search is None and any(finding.kind in units for finding in found)):
            report.mirrors = self._search(search)
        found = [with_cause(finding, report.mirrors) for finding in found]
        report.findings = sorted(found, key=lambda finding: -LEVELS.index(finding.level))

    def _facts(self, layer: Layer) -> WeightFacts | None:
        if layer.has_input and layer.largest_rank < min(layer.in_features, layer.out_features):
            return None  # a product of two layers, which are looked into themselves
        try:
            blocks = layer.blocks()
        except ValueError as error:
            self.report.notes.append(f"{layer.name} was not looked into: {error}")
            return None
        if not layer.has_input:  # an embedding's units are its columns: a row may well be unused
            return weight_facts(layer.name, blocks.mT)
        return weight_facts(layer.name, blocks, layer.bias())

    def _not_finite(self, looked: dict[str, WeightFacts]) -> Iterator[Finding]:
        """Yield layers, other parameters and running statistics that are not finite."""
        inside: set[str] = set()
        for facts in looked.values():
            inside |= {f"{facts.name}.weight", f"{facts.name}.bias"}
            yield from rules.not_finite(facts)
        statistics = {
            clean_name(f"{name}.{buffer}" if name else buffer)
            for name, child in self.module.named_modules()
            if isinstance(child, _BatchNorm)
            for buffer in ("running_mean", "running_var")
        }
        for name, tensor in self.tensors.items():
            wanted = isinstance(tensor, nn.Parameter) or name in statistics
            if name in inside or not wanted or not tensor.is_floating_point():
                continue
            wrong = int((~tensor.isfinite()).sum())
            yield from rules.not_finite(WeightFacts(name, (1, 1, tensor.numel()), not_finite=wrong))

    def _ask(self) -> Graph | None:
        """Return the graph of a forward pass, run when first needed; ``None`` if there is no example."""
        if not self.asked:
            self.asked = True
            if self.example is not None:
                self.graph = Graph(self.module, *self.example)
            elif (guess := guess_example(self.module)) is not None:
                self.example, self.graph = guess
            else:
                self.report.notes.append(
                    "no example input was given and none could be guessed: the graph was not asked, so no "
                    "unit is certified dead"
                )
        return self.graph

    def _weight(self, layer: Layer) -> str:
        """Return the clean name of the parameter that is the layer's weight alone, or ""."""
        name = f"{layer.name}.weight" if layer.name else "weight"
        own = self.tensors.get(name)
        plain = layer.part is None and not layer.transposed and layer.weight_name == "weight"
        fits = isinstance(own, nn.Parameter) and own.shape[:1] == (layer.out_features,)
        return name if plain and (fits or (isinstance(own, nn.Parameter) and not layer.has_input)) else ""

    def _vanished(self, layer: Layer, facts: WeightFacts) -> Iterator[Finding]:
        if not 0 < facts.size < rules.SIZE_LIMIT:
            return
        graph, name = self._ask(), self._weight(layer)
        known = graph is not None and bool(name)
        alike = [other for other in self.report.layers if other.shape == facts.shape and other.size > 0]
        excused = known and graph is not None and graph.ends_branch(name)
        excused = excused and all(other.size < 1e3 * facts.size for other in alike)
        yield from rules.vanished(facts, excused=excused, known=known)

    def _lost(self, layer: Layer, facts: WeightFacts, *, sick: bool) -> Iterator[Finding]:
        """Yield dead and zero units, unless the whole weight is zero."""
        if not facts.size or not facts.zero.any():
            return
        exact_S = torch.zeros_like(facts.zero)
        name = self._weight(layer)
        if layer.has_input and name:
            weight = self.tensors[name].detach()
            exact_S = (weight.flatten(1) == 0).all(1).cpu()
        dead_S = (
            self._dead(layer.name, name, exact_S, exact_S) if exact_S.any() and not sick else exact_S & False
        )
        yield from rules.dead_units(layer.name, int(dead_S.sum()), facts.units)
        yield from rules.zero_units(facts, int((facts.zero & ~dead_S).sum()))

    def _dead(self, layer: str, name: str, constant_S: Tensor, among_S: Tensor) -> Tensor:
        graph = self._ask()
        ways = None if graph is None else graph.rectified(name)
        if ways is None:
            return torch.zeros_like(constant_S)
        dead_S = certified_dead(constant_S, ways, self.tensors) & among_S
        if dead_S.any():
            self.report.certified[layer] = int(dead_S.sum())
        return dead_S

    def _gains(self) -> Iterator[Finding]:
        """Yield units that a normalisation's gain of zero switches off."""
        for name, child in self.module.named_modules():
            gain = getattr(child, "weight", None)
            if not isinstance(child, _GAINS) or not isinstance(gain, nn.Parameter) or gain.all():
                continue
            name = clean_name(name)
            zero_U = (gain.detach().flatten() == 0).cpu()
            dead_U = self._dead(name, f"{name}.weight" if name else "weight", zero_U & False, zero_U)
            yield from rules.dead_units(name, int(dead_U.sum()), zero_U.numel())
            if not zero_U.all():
                facts = WeightFacts(name, (1, zero_U.numel(), 1), zero=zero_U)
                yield from rules.zero_units(facts, int((zero_U & ~dead_U).sum()))

    def _zeros(self, layers: Sequence[Layer]) -> Iterator[Finding]:
        """Yield weights and gains that are zero all over and never get a gradient."""
        names = [name for layer in layers if (name := self._weight(layer))]
        for name, child in self.module.named_modules():
            if isinstance(child, _GAINS):
                names.append(clean_name(f"{name}.weight" if name else "weight"))
        more = [
            name
            for name, tensor in self.tensors.items()
            if isinstance(tensor, nn.Parameter) and tensor.ndim >= 2 and tensor.is_floating_point()
        ]
        wanted = dict.fromkeys([*names, *more])
        zero = [
            n for n in wanted if n in self.tensors and self.tensors[n].numel() and not self.tensors[n].any()
        ]
        if not zero:
            return
        graph = self._ask()
        if graph is None:
            self.report.notes.append(
                f"{zero[0]} is zero all over; whether a gradient reaches it was not asked"
            )
            return
        stuck = graph.stuck_at_zero(zero)
        self.report.initial_zeros = [name for name in zero if name not in stuck]
        known_dead = {f"{layer}.weight" for layer in self.report.certified}
        for name in zero:
            if name in stuck and name not in known_dead:
                yield from rules.stuck_at_zero(
                    name.removesuffix(".weight"),
                    "what it is multiplied with is zero as well, or ends in dead units",
                )

    def _search(self, search: bool | None) -> Mirrors:
        if self._ask() is None or self.example is None:
            return Mirrors(why="no example input was given and none could be guessed")
        size = sum(p.numel() for p in self.module.parameters())
        if search is None and size > LARGEST_SEARCH:
            return Mirrors(why=f"it has {size:,} parameters; search=True looks all the same")
        return Mirrors.found_on(self.module, self.example)
