"""Is each symmetry's charge where gradient noise wants it, and does it flow there as the law says?

Shape letters: B blocks, U units of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_sym.callbacks.base import Monitor, at_least
from lightning_sym.callbacks.symmetries import symmetries_of
from lightning_sym.engine.batch import Locator
from lightning_sym.engine.history import LAST_ROWS, Keep
from lightning_sym.engine.run import Run
from lightning_sym.engine.schedule import Schedule
from lightning_sym.observe import GradientNoise, Observation, Reading
from lightning_sym.observe.gains import gains
from lightning_sym.observe.layers import Layer, choose_layers, evenly, watchable_layers
from lightning_sym.observe.statistics import NoiseMoments
from lightning_sym.optim.syre import attached
from lightning_sym.symmetry import Action, Symmetry
from lightning_sym.symmetry.noether import (
    incoming,
    outgoing,
    own_moment,
    power,
    quadratic_form,
    unit_moment,
)
from lightning_sym.symmetry.symmetry import named_tensors

#: Rotations of other sizes are left to their rescalings: of one unit they are one, of more too large.
ROTATIONS = range(2, 513)


class BalanceMonitor(Monitor):
    r"""Noether charges of rescalings, rotations and scales, and how noise and decay move them.

    The charge of a unit is the squared norm of its incoming less that of its outgoing weights (of a
    rotation, the matrix of those products; of a scale, the squared norm). Gradient flow conserves it.
    One step of SGD at learning rate :math:`\eta` with decay :math:`\lambda` (torch's ``weight_decay``, which
    adds :math:`\lambda\theta` to the gradient: a penalty :math:`\gamma\lVert\theta\rVert^2` of
    :math:`\gamma = \lambda/2`) changes :math:`C = \theta^\top A\theta` by exactly

    .. math:: \Delta C = -(2\eta\lambda - \eta^2\lambda^2)\, C + \eta^2\, g^\top A g,

    since :math:`\theta^\top A g = 0`. The expectation of the last term over batches of S samples is
    :math:`\eta^2 \operatorname{tr}[\Sigma A] / S + \eta^2\, \bar g^\top A \bar g`, with :math:`\Sigma` the
    covariance of per-sample gradients. The law of balance (Ziyin et al., 2023, arXiv 2308.06671; 2024, arXiv
    2402.07193) is the decay at first order and the noise; what is left, of order :math:`\eta^2`
    without noise, is the discretisation. Both are estimated from the step's own batch, without bias if its
    samples are independent, and add up to what its gradient did; only the first is called predicted.

    Logs, for every rescaling and rotation, under the layer that makes the units (a rescaling that a
    rotation of the same tensors contains is left out; a second one of a layer is ``rescaling_2``):
        ``balance/<layer>/<kind>/charge``: sum over units (trace) after the step.
        ``balance/<layer>/<kind>/imbalance``: norm of the charges over that of both sides' sum, in [0, 1];
            0: balanced weights; NaN if all are zero.
        ``balance/<layer>/<kind>/noise_ratio``: gradient noise of the incoming side over that of the
            outgoing, at least 0; 1 where noise leaves the charge alone. Only where there is noise.
        ``balance/<layer>/<kind>/flow``: change of ``charge`` per optimizer step since the last reading (at
            the first, in the step just made). In float32 rounding moves charges, too, and gradients of
            half precision are not quite orthogonal to the symmetry.
        ``balance/<layer>/<kind>/predicted_flow``: what the law says of that time: its mean at both ends.
    for every scale:
        ``balance/<layer>/scale/charge``, ``flow``, ``predicted_flow``: the same of the squared norm.
        ``balance/<layer>/scale/equilibrium``: the squared norm at which noise and decay cancel on this ray
            (where it is reached, :math:`\eta\operatorname{tr}\Sigma/(2\lambda S)`); infinite without decay.
    with ``details``, also, ``<kind>`` including ``scale``:
        ``balance/<layer>/<kind>/noise_in``, ``noise_out``: trace of :math:`\Sigma` on each side.
        ``balance/<layer>/<kind>/norm_in``, ``norm_out``: squared norm of each side, after the step.
        ``balance/<layer>/<kind>/step_flow``: change of ``charge`` in the step just made.
        ``balance/<layer>/<kind>/step_predicted``, ``step_discretisation``: its two parts.
        ``balance/<layer>/<kind>/step_error``: norm over units of what they leave unexplained, over that of
            the change; rounding for plain SGD, 0 where nothing moves.
        ``balance/<layer>/<kind>/charges`` (histogram): all units' charges.
    and a summary:
        ``balance/imbalance``: the mean over rescalings and rotations.

    A flow is predicted for one ``torch.optim.SGD`` under automatic optimization without gradient
    clipping or syre, where one learning rate moves both sides. With momentum :math:`\mu` (dampening d) the
    rate is :math:`\eta(1-d)/(1-\mu)`: true to leading order and over more steps than
    :math:`1/(1-\mu)`, so the parts of one step are not logged. Where decay differs between sides, its
    second order counts as unexplained. For other optimizers ``unpredicted`` says why there is no prediction.

    Noise is read from weights and biases of watchable layers and normalisations. A side that an embedding, a
    tied weight or another parameter takes part in has none, nor has a layer without
    :class:`~lightning_sym.observe.statistics.GradientNoise`, or a step of one sample. Of a rotation of one
    unit or more than 512 only the rescalings are read. With batch normalisation in training mode noise is
    approximate, since samples depend on each other.

    Args:
        every_n_steps: an interval in optimizer steps, or a schedule. Step 1 is always due.
        layers: a glob, or a list of globs, on names of layers that make units; ``None``: all,
            at most ``max_layers``.
        max_layers: how many of them to watch when ``layers`` is ``None``, evenly spread.
        inputs: where the module's input is in a batch: an index, a key or a function; ``None``: what its
            ``forward`` names, or the first entry. On it the symmetries are found, at the first due step
            (seconds for a large network, on a copy).
        forward: what is called on it: a method of the module, or a function of (module, input).
        population: number of samples that batches are drawn from without replacement, where it is
            not large: noise is smaller by the factor 1 - S / population. ``None``: always fresh samples.
        details: log more of each symmetry, see above.
        keep: rows of :attr:`history` that a checkpoint holds, or a folder for it
            (:class:`~lightning_sym.callbacks.base.Monitor`).
        name: first part of its keys instead of ``balance``.
        strict: raise what goes wrong in here instead of warning once and going on.

    Attributes:
        unpredicted: why no flow is predicted, "" if it is.
        unread: by layer, why its gradient noise could not be read in the last due step.

    Raises:
        ValueError: if an argument is out of its range; at fit start, if a glob matches no layer.
    """

    quantity: ClassVar[str] = "balance"
    takes_inputs = True
    needs = (GradientNoise(),)
    runs_module = True

    def __init__(
        self,
        *,
        every_n_steps: int | Schedule = 100,
        layers: str | list[str] | None = None,
        max_layers: int = 12,
        inputs: Locator = None,
        forward: str | Callable[..., Any] = "forward",
        population: int | None = None,
        details: bool = False,
        keep: Keep = LAST_ROWS,
        name: str | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(
            every_n_steps=every_n_steps,
            layers=layers,
            max_layers=max_layers,
            keep=keep,
            name=name,
            strict=strict,
        )
        at_least("population", population, 2)
        self.inputs, self.forward = inputs, forward
        self.population, self.details = population, details
        self.unpredicted = ""
        self.unread: dict[str, str] = {}
        self.end_run()

    @override
    def end_run(self) -> None:
        self._tracks: list[_Track] | None = None
        self._places: dict[str, list[_Place]] = {}
        self._rates: dict[str, _Rate] = {}
        self._told = ""
        self._noise = GradientNoise()

    @override
    def prepare(self, seen: Observation) -> None:
        if self._tracks is None:
            self._tracks = []
            self._find(seen)
        for track in self._tracks:
            track.own = track.read_own()

    def _find(self, seen: Observation) -> None:
        """Find the symmetries, the same on every rank, and have their layers observed."""
        module = seen.run.module
        kinds = ("rescaling", "rotation", "scale")
        every = symmetries_of(
            seen.run, inputs=self.inputs, forward=self.forward, kinds=kinds, include_frozen=False
        )
        chosen, _ = choose_layers(module, self.layers, max_layers=self.max_layers)
        names = None if self.layers is None else [layer.name for layer in chosen]
        found = [s for s in every if s.conserved and (s.kind != "rotation" or s.units in ROTATIONS)]
        found = _chosen(found, names, max_layers=self.max_layers)
        self._tracks, self._places = _named(found), _places(module)
        # Only a rotation needs more than diagonals.
        turns = any(symmetry.kind == "rotation" for symmetry in found)
        self._noise = GradientNoise(max_width=ROTATIONS[-1] if turns else 1)
        self.needs = (self._noise,)
        moved = {action.name for symmetry in found for action in symmetry.actions}
        needed = {place.layer for name in moved for place in self._places.get(name, [])}
        seen.watch = [layer for layer in _observable(module) if layer.name in needed]

    @override
    def optimizer_stepped(self, run: Run, optimizer: Any) -> None:
        if self._tracks:
            self.unpredicted, self._rates = _sgd_rates(run)

    @override
    def read(self, seen: Observation) -> Iterator[Reading]:
        if self.unpredicted != self._told:
            self._told = self.unpredicted
            if self._told:
                seen.run.tell(f"BalanceMonitor predicts no flow: {self._told}")
        noises = {x.name: x.get(self._noise) for x in seen.every if x.get(self._noise) is not None}
        self.unread = {x.name: x.reason(self._noise) for x in seen.every if x.reason(self._noise)}
        before: dict[str, list[float]] = seen.state.get("marks", {})
        since = seen.step - int(seen.state.get("marked", 0))
        imbalances, marks = [], {}
        for track in self._tracks or []:
            seen.current = track.layer
            values = self._values(track, noises, before.get(track.key) if since > 0 else None, since)
            marks[track.key] = [float(values["charge"]), float(values.pop("law", math.nan))]
            yield from (Reading(track.layer, f"{track.what}/{what}", value) for what, value in values.items())
            if "imbalance" in values:
                imbalances.append(float(values["imbalance"]))
            track.own = {}
        seen.current = ""
        seen.state.update(marks=marks, marked=seen.step)
        if imbalances:
            yield Reading("", "imbalance", sum(imbalances) / len(imbalances))

    def _values(
        self, track: _Track, noises: dict[str, NoiseMoments], mark: list[float] | None, since: int
    ) -> dict[str, float | Tensor]:
        """Return what is read of a symmetry; ``mark``: charge and law at the last reading."""
        own, scale = track.read_own(), track.symmetry.kind == "scale"
        norms = _known(track.form(own, incoming)), _known(track.form(own, outgoing))
        charge, before = norms[0] - norms[1], _known(track.form(track.own))
        values: dict[str, float | Tensor] = {"charge": _total(charge), "flow": _total(charge - before)}
        if not scale:
            values["imbalance"] = _ratio(float(charge.norm()), float((norms[0] + norms[1]).norm()))
        if mark is not None:
            values["flow"] = (_total(charge) - mark[0]) / since
        if self.details:
            values |= {"charges": charge, "step_flow": _total(charge - before), "norm_in": _total(norms[0])}
            values |= {} if scale else {"norm_out": _total(norms[1])}
        covariances = self._moments(track, noises, "covariance")
        noise = track.form(covariances)
        if noise is None:
            return values
        sides = [_total(_known(track.form(covariances, side))) for side in (incoming, outgoing)]
        if not scale and any(sides):
            values["noise_ratio"] = _ratio(*sides)
        if self.details:
            values |= {"noise_in": sides[0]} if scale else {"noise_in": sides[0], "noise_out": sides[1]}
        rates = [self._rates.get(action.name) for action in own]
        first = rates[0]
        if first is None or any(rate is None or rate.rate != first.rate for rate in rates):
            return values
        samples = max(noise.n for noise in noises.values())
        fresh = 1.0 if self.population is None else max(1 - samples / self.population, 0.0)
        push = first.rate**2 * fresh / samples * noise
        pull = 2 * first.rate * self._decay(track, 1)
        values["law"] = _total(push - pull)
        values["predicted_flow"] = values["law"]
        if mark is not None and math.isfinite(mark[1]):
            values["predicted_flow"] = (values["law"] + mark[1]) / 2
        if scale:
            # Along the ray noise falls as 1 / norm^2: it cancels decay where norm^4 has risen by push / pull.
            values["equilibrium"] = _total(torch.where(pull > 0, before * (push / pull).sqrt(), torch.inf))
        if self.details and not first.averaged:
            square = _known(track.form(self._moments(track, noises, "mean_square")))
            rest = first.rate**2 * (square + self._decay(track, 2)) - push
            values |= {"step_predicted": _total(push - pull), "step_discretisation": _total(rest)}
            missed = charge - before - (push - pull) - rest
            error = float(missed.norm())
            values["step_error"] = _ratio(error, float((charge - before).norm())) if error else 0.0
        return values

    def _decay(self, track: _Track, power: int) -> Tensor:
        """Return the charge before the step, each parameter's share times its decay to a power."""
        weighted = track.form(track.own, lambda a: a.power * self._rates[a.name].decay ** power)
        return _known(weighted)

    def _moments(
        self, track: _Track, noises: dict[str, NoiseMoments], form: Literal["covariance", "mean_square"]
    ) -> dict[Action, Tensor | None]:
        """Return noise, or the mean gradient's square, of what each action moves; None: not known."""

        def of(action: Action) -> Tensor | None:
            total: Tensor | None = None
            for place in self._places.get(action.name, []):
                if action.dim == 0 and not place.holds(action):
                    continue  # another projection's rows
                if place.layer not in noises or action.dim > 1:
                    return None
                second = getattr(noises[place.layer], form)(place.tensor, action.dim)
                start = place.rows.start if action.dim == 0 else 0
                part = unit_moment(track.symmetry, action, second, start=start)
                if part is None:
                    return None
                total = part if total is None else total + part
            return total

        return {action: of(action) for action in track.own}


@dataclass
class _Track:
    """A symmetry that is watched, under a name of its own, and its parameters' moments before the step."""

    layer: str
    what: str
    symmetry: Symmetry
    own: dict[Action, Tensor] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Layer and kind."""
        return f"{self.layer}/{self.what}"

    def read_own(self) -> dict[Action, Tensor]:
        """Return the moments of the parameters as they are."""
        moment = own_moment(self.symmetry, self.symmetry._tensors(None))
        return {action: moment(action) for action in self.symmetry.actions if not action.buffer}

    def form(
        self, moments: Mapping[Action, Tensor | None], weight: Callable[[Action], float] = power
    ) -> Tensor | None:
        """Return the charge's form of some moments; None if one is not known."""
        return quadratic_form(self.symmetry, moments.get, weight)


@dataclass(frozen=True)
class _Place:
    """Rows of a parameter that are a layer's weight or bias."""

    layer: str
    tensor: Literal["weight", "bias"]
    rows: range

    def holds(self, action: Action) -> bool:
        """Return whether all positions of an action along dimension 0 are among the rows."""
        return int(action.index.min()) in self.rows and int(action.index.max()) in self.rows


@dataclass(frozen=True)
class _Rate:
    """What an optimizer does to a parameter.

    Args:
        rate: learning rate; with momentum, that of many steps.
        decay: torch's ``weight_decay``.
        averaged: whether there is momentum.
    """

    rate: float
    decay: float
    averaged: bool


def _observable(module: torch.nn.Module) -> list[Layer]:
    """Return all that gradient noise can be read of."""
    layers = [layer for layer in watchable_layers(module) if not (layer.has_input and layer.no_noise)]
    return [*layers, *gains(module)]


def _places(module: torch.nn.Module) -> dict[str, list[_Place]]:
    """Return by parameter name which layers' weight or bias it is; a tied one is nobody's."""
    found: dict[int, list[_Place]] = {}
    for layer in _observable(module):
        for tensor, parameter in (("weight", layer.parameter()), ("bias", layer.bias_parameter())):
            if parameter is None:
                continue
            numbers = torch.arange(len(parameter)).reshape(-1, *[1] * (parameter.ndim - 1))
            rows = layer.slice(numbers).flatten()
            place = _Place(layer.name, tensor, range(int(rows[0]), int(rows[-1]) + 1))  # type: ignore[arg-type]
            found.setdefault(id(parameter), []).append(place)
    for places in found.values():
        if len({place.rows for place in places}) < len(places):
            places.clear()
    return {name: found.get(id(tensor), []) for name, tensor in named_tensors(module).items()}


def _chosen(found: list[Symmetry], names: list[str] | None, *, max_layers: int) -> list[Symmetry]:
    """Return the symmetries of the layers that were asked for, without what a rotation says as well."""
    turned = {_moved(symmetry) for symmetry in found if symmetry.kind == "rotation"}
    found = [s for s in found if s.kind != "rescaling" or _moved(s) not in turned]
    paths = list(dict.fromkeys(symmetry.path for symmetry in found))
    if names is None:
        kept = {paths[i] for i in evenly(len(paths), max_layers)}
    else:
        kept = {p for p in paths if any(name == p or name.startswith(f"{p}.") for name in names)}
    return [symmetry for symmetry in found if symmetry.path in kept]


def _moved(symmetry: Symmetry) -> tuple[Any, ...]:
    return tuple((a.name, a.dim, a.power, tuple(a.index.flatten().tolist())) for a in symmetry.actions)


def _named(symmetries: list[Symmetry]) -> list[_Track]:
    """Give each symmetry its layer and kind, numbered from the second on."""
    counts: dict[str, int] = {}
    tracks = []
    for symmetry in symmetries:
        key = f"{symmetry.path}/{symmetry.kind}"
        counts[key] = counts.get(key, 0) + 1
        again = f"_{counts[key]}" if counts[key] > 1 else ""
        tracks.append(_Track(symmetry.path, symmetry.kind + again, symmetry))
    return tracks


def _sgd_rates(run: Run) -> tuple[str, dict[str, _Rate]]:
    """Return why there is no prediction, or each parameter's rates by its name."""
    optimizers = run.optimizers
    if not run.automatic or len(optimizers) != 1:
        return "there is not one optimizer under automatic optimization", {}
    if type(optimizers[0]) is not torch.optim.SGD:
        return f"{type(optimizers[0]).__name__} is not torch.optim.SGD", {}
    if run.clipped:
        return "gradients are clipped", {}
    if attached(optimizers[0]):
        return "syre changes the decay", {}
    rates: dict[int, _Rate] = {}
    for group in optimizers[0].param_groups:
        momentum = float(group["momentum"])
        rate = float(group["lr"]) * ((1 - float(group["dampening"])) / (1 - momentum) if momentum else 1.0)
        if group["maximize"]:
            return "the loss is maximized", {}
        rates |= {id(p): _Rate(rate, float(group["weight_decay"]), momentum > 0) for p in group["params"]}
    named = named_tensors(run.module)
    return "", {name: rates[id(tensor)] for name, tensor in named.items() if id(tensor) in rates}


def _known(x: Tensor | None) -> Tensor:
    if x is None:
        raise ValueError("a moment of the parameters is missing")
    return x


def _total(x: Tensor) -> float:
    """Return the sum over units, of a rotation's matrices the trace."""
    return float(x.sum() if x.ndim == 2 else x.diagonal(dim1=1, dim2=2).sum())


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else (math.inf if above > 0 else math.nan)
