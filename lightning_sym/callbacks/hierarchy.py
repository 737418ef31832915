"""Which symmetries has training broken or restored, when, and what did the loss do meanwhile?

Shape letters: N probe samples, S units of a symmetry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_sym._names import clean_name
from lightning_sym.callbacks.base import Monitor, at_least
from lightning_sym.callbacks.reference import load_tensors
from lightning_sym.callbacks.symmetries import symmetries_of
from lightning_sym.engine.batch import Arguments, Locator, locate
from lightning_sym.engine.history import LAST_ROWS, Keep
from lightning_sym.engine.probe import gathered
from lightning_sym.engine.ranks import RankError
from lightning_sym.engine.run import Run
from lightning_sym.engine.schedule import LogSpaced, Schedule
from lightning_sym.functional.hierarchy import Phase, depth_roles, gram_alignment, loss_phases
from lightning_sym.functional.rank import effective_rank_from_eigenvalues
from lightning_sym.observe import Observation, Reading, SecondMoments
from lightning_sym.observe.layers import choose_layers, watchable_layers
from lightning_sym.observe.likeness import layer_features
from lightning_sym.symmetry import breaking_distances, effective_units, narrowed

if TYPE_CHECKING:
    from lightning_sym.symmetry import Symmetry

KINDS = ("permutation", "rescaling", "signflip", "rotation")
ROLES = {"reduction": -1.0, "transmission": 0.0, "expansion": 1.0}
LOG_SPACED = LogSpaced(12)
_OUTPUTS = SecondMoments("outputs")
_NAMED = 8  # units that an event's text names one by one


class HierarchyMonitor(Monitor):
    r"""The hierarchy of symmetry breakings: over time, in function, over depth (arXiv 2502.05300).

    The paper's exact measures were not available; those here are definitions of this package. The
    network's symmetries are found on a copy at the first step
    (:func:`~lightning_sym.symmetry.find_symmetries`). Each of their units has a breaking distance
    (:func:`~lightning_sym.functional.breaking_distance`): 0, on the mirror (a twin of another unit, or
    zero); 1, broken in direction and as long as ``scale``. A unit is *broken* once its distance passes
    ``broken_above``, and *restored* once it falls below ``restored_below``; between the two it stays what
    it was. What it is before the first step is no event.

    Logs, of each symmetry (``<what>`` is its kind; a layer's second of one kind is ``<kind>_2``):
        ``hierarchy/<layer>/<what>``: share of its units that are broken, in [0, 1].
        ``hierarchy/<layer>/effective_units``: units that are neither zero nor another one's twin, at
            ``broken_above``; units that may be rescaled are compared by direction. For a layer that may
            be rotated, the directions broken.
        ``hierarchy/<layer>/<what>/distances`` (histogram): of its units; with ``histograms``.
    of each layer:
        ``hierarchy/<layer>/rank``: effective rank of its output's covariance (before the activation), in
            [1, min(samples - 1, width)]; 0 where it does not vary.
        ``hierarchy/<layer>/role``: against the watched layer before: 1, expansion (the rank rises by
            more than 10 %); -1, reduction (it falls by more); 0, transmission.
        ``hierarchy/<layer>/alignment``: with ``reference``, the likeness of its outputs on the probe set to
            the reference's, in [0, 1] (:func:`~lightning_sym.functional.gram_alignment`).
    and of the network:
        ``hierarchy/broken``, ``hierarchy/restored``: how many units broke, or were restored, since
            the reading before: the events' markers.
        ``hierarchy/loss``: of the step, the mean over its batches and ranks; with ``loss``, that metric.
        ``hierarchy/phase``: 1 while the loss drops, 0 on a plateau
            (:func:`~lightning_sym.functional.loss_phases`); only when the first of them has come.
        ``hierarchy/alignment``: with ``reference``, its mean over layers.
        ``hierarchy/events`` (text): what happened, in words; only when something did.
        ``hierarchy/course`` (picture): loss and shares of broken units, with the events.

    The loss is that of single steps: between readings nothing is looked at. On small batches its noise
    makes phases of its own; then name an average with ``loss``, or raise ``window``.

    Args:
        every_n_steps: an interval in optimizer steps, or a schedule; ``None``: 12 a decade, log-spaced.
        layers: a glob, or a list of globs, on module names; ``None``: all, at most ``max_layers``.
            Symmetries are followed whose units one of these layers makes.
        max_layers: how many layers to watch when ``layers`` is ``None``.
        kinds: kinds of symmetry to follow; ``None``: permutation, rescaling, signflip and rotation, and of
            units that any invertible matrix may mix the rotation alone, which contains the others.
        scale: length of a unit's weights that counts as fully broken; 1 is that of the incoming weights
            at the usual initialisation. ``None``: by direction alone, so that small weights count in full.
        broken_above, restored_below: see above.
        max_units: units read of each block of a symmetry, evenly spread over it (the subgroup that
            moves these alone): distances are taken between all pairs. Counts are of these units.
        loss: key of ``trainer.callback_metrics`` to read as the loss, such as ``"val_loss"``; ``None``: what
            ``training_step`` returned.
        steep, flat, window: see :func:`~lightning_sym.functional.loss_phases`.
        reference: another network of this architecture to compare representations with: path of a
            Lightning checkpoint or state dict (read without unpickling objects) or of a
            ``.safetensors`` file.
        data: probe samples ``[N, ...]`` for it; ``None``: the first samples of the first batch.
        samples: at most so many of them, over all ranks.
        inputs: where the module's input is in a batch.
        forward: what to call on the probe samples: a method of the module, or a function of
            (module, inputs).
        keep: rows of :attr:`history` that a checkpoint holds, or a folder for it
            (:class:`~lightning_sym.callbacks.base.Monitor`).
        name: first part of its keys instead of ``hierarchy``.
        keep_distances: keep every unit's distance at every reading (4 bytes each).
        histograms: log them as histograms as well.
        picture: draw the course for loggers that take figures.
        strict: raise what goes wrong in here instead of warning once and going on.

    Attributes:
        events: one dict an event: ``event`` ("broken", "restored", "drop" or "plateau"); ``step`` and
            ``after``, the readings that it happened between; ``where``, ``"<layer>/<what>"`` or
            ``"loss"``; and ``units``, a list (of units, numbered through blocks; of a rotation, ranks of
            directions), or ``value``, the loss.
        distances: one dict a reading: ``step`` and, by ``"<layer>/<what>"``, float32 distances ``[S]``.
            Step 0 is before the first step.
        symmetries: what is followed, by ``"<layer>/<what>"``; during a fit.

    Raises:
        ValueError: if an argument is out of its range; at fit start, if a glob matches no layer or the
            reference does not fit the module.
        FileNotFoundError: at fit start, if there is no such reference.
        TypeError: at fit start, if the module has no such method.
    """

    quantity: ClassVar[str] = "hierarchy"
    takes_inputs = True
    needs = (_OUTPUTS,)
    runs_module = True

    def __init__(
        self,
        *,
        every_n_steps: int | Schedule | None = None,
        layers: str | list[str] | None = None,
        max_layers: int = 12,
        kinds: list[str] | None = None,
        scale: float | None = 1.0,
        broken_above: float = 0.1,
        restored_below: float = 0.05,
        max_units: int = 256,
        loss: str | None = None,
        steep: float = 1.0,
        flat: float = 0.25,
        window: float = 1.3,
        reference: str | Path | None = None,
        data: Tensor | None = None,
        samples: int = 256,
        inputs: Locator = None,
        forward: str | Callable[..., Any] = "forward",
        keep_distances: bool = True,
        histograms: bool = False,
        picture: bool = True,
        keep: Keep = LAST_ROWS,
        name: str | None = None,
        strict: bool = False,
    ) -> None:
        due = LOG_SPACED if every_n_steps is None else every_n_steps
        super().__init__(
            every_n_steps=due, layers=layers, max_layers=max_layers, keep=keep, name=name, strict=strict
        )
        chosen = list(KINDS) if kinds is None else list(kinds)
        if not chosen or not set(chosen) <= set(KINDS):
            raise ValueError(f"kinds must be among {list(KINDS)}, got {chosen}")
        if scale is not None and not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive or None, got {scale}")
        if not 0 <= restored_below <= broken_above < 1 or broken_above == 0:
            raise ValueError(
                "restored_below and broken_above must be in order and in [0, 1), "
                f"got {restored_below} and {broken_above}"
            )
        at_least("max_units", max_units, 2)
        at_least("samples", samples, 2)
        if not (flat < steep and window > 1):
            raise ValueError(
                f"flat must be less than steep and window above 1, got {flat}, {steep} and {window}"
            )
        if data is not None and len(data) < 2:
            raise ValueError(f"data must hold at least 2 samples, got {len(data)}")
        self.kinds, self.scale, self.max_units = chosen, scale, max_units
        self.broken_above, self.restored_below = broken_above, restored_below
        self.loss, self.steep, self.flat, self.window = loss, steep, flat, window
        self.reference = None if reference is None else str(reference)
        self.data, self.samples, self.inputs, self.forward = data, samples, inputs, forward
        self.keep_distances, self.histograms, self.picture = keep_distances, histograms, picture
        self._other: dict[str, Tensor] | None = None  # the reference's tensors, until they are used
        self.end_run()

    @override
    def end_run(self) -> None:
        self.symmetries: dict[str, Symmetry] = {}
        self._numbers: dict[str, list[int]] = {}  # of the units read, among all
        self._other = None
        self._others: dict[str, Tensor] = {}  # what its layers put out on the probe set

    @property
    def events(self) -> list[dict[str, Any]]:
        """What happened in this run."""
        return self.state.setdefault("events", [])

    @property
    def distances(self) -> list[dict[str, Any]]:
        """Every unit's distance at every reading of this run."""
        return self.state.setdefault("distances", [])

    @property
    def _course(self) -> list[list[float]]:
        return self.state.setdefault("course", [])  # [step, loss]

    @property
    def _broken(self) -> dict[str, Tensor]:
        return self.state.setdefault("broken", {})

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "kinds": self.kinds, "reference": self.reference}

    @override
    def check(self, run: Run) -> None:
        super().check(run)
        run.function(self.forward)
        if self.reference is not None:
            self._other = load_tensors(self.reference, run.module)

    @override
    def start(self, seen: Observation) -> None:
        run, failure = seen.run, None
        for look in (self._find, self._look_at_reference):
            try:
                look(run, seen.step)
            except RankError as error:  # known to all ranks: the other one can still be done
                failure = failure or error
        self._other = None
        if failure is not None:
            raise failure

    # What is read.

    @override
    def read(self, seen: Observation) -> Iterator[Reading]:
        happened = []
        distances = self._read_distances()
        changes = self._judge(distances, step=seen.step)
        for where, broken_S in self._broken.items():
            layer, _, what = where.rpartition("/")
            yield Reading(layer, what, float(broken_S.double().mean()))
            if self.histograms:
                yield Reading(layer, f"{what}/distances", distances[where])
        for event in ("broken", "restored"):
            found = [change for change in changes if change["event"] == event]
            yield Reading("", event, float(sum(len(change["units"]) for change in found)))
            happened += found
        yield from self._read_effective_units()
        yield from self._read_ranks(seen)
        if alignment := self._alignment(seen.run):
            for name, value in alignment.items():
                yield Reading(name, "alignment", value)
            yield Reading("", "alignment", sum(alignment.values()) / len(alignment))
        happened += self._follow(self._loss(seen.run), step=seen.step)
        self.state["read_at"] = seen.step
        if math.isfinite(self._course[-1][1]):
            yield Reading("", "loss", self._course[-1][1])
        if phases := self._phases():
            yield Reading("", "phase", float(phases[-1].what == "drop"))
        if happened:
            yield Reading("", "events", "  \n".join(self._in_words(event) for event in happened))
        if self.picture:
            yield Reading("", "course", self.figure)

    def _loss(self, run: Run) -> float:
        """Return the step's loss, or the metric that stands for it; NaN if there is none."""
        if self.loss is None:
            return run.loss()
        found = run.metric(self.loss)
        return math.nan if found is None else run.mean(found)

    def _find(self, run: Run, step: int) -> None:
        """Find the symmetries whose units a watched layer makes; bound to the module in training."""
        module = run.module
        found = symmetries_of(run, inputs=self.inputs, forward=self.forward, kinds=self.kinds)
        chosen, _ = choose_layers(module, self.layers, max_layers=self.max_layers)
        watched = {owner for layer in chosen for owner in _owners(layer.name, layer.part)}
        makers = {owner for layer in watchable_layers(module) for owner in _owners(layer.name, layer.part)}
        rotated = {(s.path, s.blocks, s.units) for s in found.of_kind("rotation") if s.conserved}
        self.symmetries, self._numbers = {}, {}
        for symmetry in found:
            contained = (symmetry.path, symmetry.blocks, symmetry.units) in rotated
            if contained and symmetry.kind != "rotation" and self.kinds == list(KINDS):
                continue  # every invertible matrix may act: permutations, factors and signs among them
            rows = {action.name.rpartition(".")[0] for action in symmetry.actions if action.dim == 0}
            if not (rows & makers or rows) & watched:
                continue
            where = f"{symmetry.path or 'network'}/{symmetry.kind}"
            again = sum(label == where or label.startswith(f"{where}_") for label in self.symmetries)
            where = f"{where}_{again + 1}" if again else where
            part, numbers = narrowed(symmetry, most=self.max_units)
            self.symmetries[where], self._numbers[where] = part, numbers.tolist()
        if not self._broken:
            self._judge(self._read_distances(), step=step)

    def _read_distances(self) -> dict[str, Tensor]:
        return {
            where: breaking_distances(symmetry, scale=self.scale).float().cpu()
            for where, symmetry in self.symmetries.items()
        }

    def _judge(self, distances: Mapping[str, Tensor], *, step: int) -> list[dict[str, Any]]:
        """Say which units are broken, and note those that are so since the last reading."""
        changes = []
        for where, distance_S in distances.items():
            above_S, below_S = distance_S > self.broken_above, distance_S < self.restored_below
            was_S = self._broken.get(where, above_S)
            now_S = (was_S | above_S) & ~below_S  # NaN is neither above nor below
            self._broken[where] = now_S
            for event, mask_S in (("broken", now_S & ~was_S), ("restored", was_S & ~now_S)):
                if mask_S.any():
                    units = [self._numbers[where][i] for i in mask_S.nonzero().flatten().tolist()]
                    place = {"step": step, "after": self.state.get("read_at", 0), "where": where}
                    changes.append({"event": event, **place, "units": units})
        self.events.extend(changes)
        if self.keep_distances:
            self.distances.append({"step": step, **distances})
        return changes

    def _read_effective_units(self) -> Iterator[Reading]:
        for where, symmetry in self.symmetries.items():
            path, _, what = where.rpartition("/")
            kind, _, again = what.partition("_")
            turned = any(label.startswith(f"{path}/rotation") for label in self.symmetries)
            if kind != ("rotation" if turned else "permutation"):
                continue
            scaled = any(label.startswith(f"{path}/rescaling") for label in self.symmetries)
            count = effective_units(
                symmetry, threshold=self.broken_above, scale=self.scale, by_direction=scaled
            )
            yield Reading(path, f"effective_units{again and '_' + again}", float(count))

    def _read_ranks(self, seen: Observation) -> Iterator[Reading]:
        ranks = {
            layer.name: float(effective_rank_from_eigenvalues(layer[_OUTPUTS].eigenvalues))
            for layer in seen.layers
            if layer.get(_OUTPUTS) is not None and layer[_OUTPUTS].n > 1
        }
        for name, rank in ranks.items():
            yield Reading(name, "rank", rank)
        ranks = {name: rank for name, rank in ranks.items() if math.isfinite(rank)}
        names = list(ranks)
        for name, role in zip(names[1:], depth_roles(list(ranks.values())), strict=True):
            yield Reading(name, "role", ROLES[role])

    def _follow(self, loss: float, *, step: int) -> list[dict[str, Any]]:
        """Add a loss to the course; return the phase that it opens, if it does."""
        self._course.append([float(step), loss])
        last = len(self._course) - 1
        begun = [
            {
                "event": phase.what,
                "step": step,
                "after": int(self._course[phase.after][0]),
                "where": "loss",
                "value": loss,
            }
            for phase in self._phases()
            if phase.seen == last
        ]
        self.events.extend(begun)
        return begun

    def _phases(self) -> list[Phase]:
        steps, losses = [point[0] for point in self._course], [point[1] for point in self._course]
        return loss_phases(steps, losses, steep=self.steep, flat=self.flat, window=self.window)

    def _in_words(self, event: Mapping[str, Any]) -> str:
        when = f"between steps {event['after']} and {event['step']}"
        if event["where"] == "loss":
            return f"loss: {event['event']} begins {when}, at {event['value']:.3g}"
        units, total = event["units"], len(self._numbers[event["where"]])
        named = ", ".join(str(unit) for unit in units[:_NAMED]) + (", ..." if len(units) > _NAMED else "")
        return f"{event['where']}: {len(units)} of {total} {event['event']} {when}: {named}"

    def figure(self) -> Any:
        """Return the run so far, a matplotlib figure: loss, broken units and events."""
        from lightning_sym.plots.hierarchy import course

        return course(self.fit_rows(), events=self.events, quantity=self.prefix)

    # Another network.

    def _look_at_reference(self, run: Run, step: int) -> None:
        """Run the reference once on the probe set and keep what its layers put out."""
        if self._other is None:
            return
        other = self._other
        if self.data is None:
            found = run.ranks.attempt(lambda: locate(run.batch, self.inputs, run.function(self.forward)))
            probe = gathered(run, found, self.samples)
        else:
            probe = Arguments((self.data.detach()[: self.samples].cpu().clone(),), {})
        taken = {"args": list(probe.args), "kwargs": dict(probe.kwargs)}
        kept = self.held.again(run, self.state.get("samples"), taken=taken)
        if kept is None:
            kept, self.state["samples"] = taken, self.held.take(taken, run)
        self._others = run.ranks.attempt(lambda: self._features(run, kept, other))

    def _features(
        self, run: Run, probe: Mapping[str, Any], other: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return what layers put out on the probe set, up to a rotation, ``[N, at most N]``."""
        with run.sandbox.open() as apart:
            if other is not None:
                for name, tensor in apart.module.state_dict().items():
                    tensor.copy_(other[clean_name(name)])
            args, kwargs = apart.place(probe["args"]), apart.place(probe["kwargs"])
            found = layer_features(
                apart.module,
                None,
                layers=self.layers,
                max_layers=self.max_layers,
                function=lambda _: apart(self.forward, *args, **kwargs),
            )
        return {name: _compact(features.cpu()) for name, features in found.items()}

    def _alignment(self, run: Run) -> dict[str, float]:
        other = self._others
        if not other:
            return {}
        now = run.ranks.attempt(lambda: self._features(run, self.held.samples))
        return {name: float(gram_alignment(now[name], other[name])) for name in now if name in other}


def _owners(name: str, part: str | None) -> set[str]:
    """Return the modules whose parameters are a layer's."""
    return {name} if part is None else {name, name.rpartition(".")[0]}


def _compact(features: Tensor) -> Tensor:
    """Return features ``[N, at most N]`` float64 of the same inner products between samples."""
    x_ND = features.double()
    if x_ND.shape[1] <= x_ND.shape[0] or not x_ND.isfinite().all():
        return x_ND[:, : len(x_ND)]
    return torch.linalg.qr(x_ND.mT, mode="r").R.mT
