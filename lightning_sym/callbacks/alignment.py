"""Do representations, weights and gradients align?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from torch import Tensor
from typing_extensions import override

from lightning_sym.callbacks.base import Monitor
from lightning_sym.engine.history import LAST_ROWS, Keep
from lightning_sym.engine.schedule import Schedule
from lightning_sym.functional.pah import PAHExponent, pah_phase, side_exponents
from lightning_sym.functional.split_halves import split_side_alignments
from lightning_sym.observe import Observation, Reading, SecondMoments, Weight
from lightning_sym.observe.observation import LayerObservation
from lightning_sym.observe.statistics import SampleMoments

_WEIGHT = Weight()
_STREAMS = {"in": ("inputs", "input_gradients"), "out": ("outputs", "output_gradients")}


class AlignmentMonitor(Monitor):
    r"""The six relations of the canonical representation hypothesis, and the exponents of the PAH.

    For a layer :math:`h_b = W h_a` and gradients of per-sample losses :math:`g_b`,
    :math:`g_a = W^\top g_b`; ``in`` is the a-side, ``out`` the b-side (Ziyin et al., 2024, arXiv
    2410.03006). Biases are left out. Sign and scale of the gradients do not matter here.

    Logs:
        ``alignment/<layer>/<side>/rga``, ``rwa``, ``gwa``: on the side ``in`` or ``out``, Pearson
            correlation over matrix entries of representation and gradient (rga), representation and
            weight (rwa), gradient and weight (gwa), from two halves of the samples, so that their number
            does not bias it; in [-1, 1] up to noise. A layer fed by raw data aligns little on its
            input side by construction.
        ``alignment/<layer>/<side>/null``: the mean of the same three over random rotations of the second
            matrix of each: what chance gives at these spectra
            (:func:`~lightning_sym.functional.alignment.expected_alignment`).
        ``alignment/<layer>/nonfinite``: share of samples with a NaN or Inf; only when there are any.
        ``alignment/mean``, ``alignment/null``: means over layers, sides and relations.
        ``alignment/samples``: the least number of samples that a layer was read on. It is noise that
            falls with it, not bias; that of the exponents does have a bias.
    and with ``exponents``, on raw second moments, for sides no wider than the observation's cap:
        ``alignment/<layer>/<side>/<relation>_exponent``: power p of the first matrix in the second,
            in the second's eigenbasis.
        ``alignment/<layer>/<side>/<relation>_exponent_low``, ``<relation>_exponent_high``: its 95 %
            interval.
        ``alignment/<layer>/<side>/<relation>_exponent_r2``, ``<relation>_exponent_directions``,
            ``<relation>_exponent_decades``, ``<relation>_exponent_off_diagonal``: how good the fit is, over
            how many directions and decades of eigenvalues, and the share of the first matrix that is off
            the diagonal of that basis (the fit means little where this is large).
        ``alignment/<layer>/phase`` (text): the nearest phase of the PAH table
            (:func:`~lightning_sym.functional.pah.pah_phase`), only where both sides have exponents.
        ``alignment/<layer>/phase_distance``: how far that phase is, at least 0; only where there is one.

    An undefined correlation (a constant matrix, a layer that got no gradient) is not logged.

    Args:
        every_n_steps: an interval in optimizer steps, or a schedule. Step 1 is always due.
        layers: a glob, or a list of globs, on module names; ``None``: all, at most ``max_layers``.
        max_layers: how many layers to watch when ``layers`` is ``None``.
        moments: ``"normalized"``: samples divided by their norms, then covariances, as in the
            paper's experiments; ``"raw"``: second moments, as in its theory.
        null: log the null level.
        exponents: log the PAH exponents.
        deferred: compute readings in a thread while training goes on, and publish them 4 steps later
            (:class:`~lightning_sym.callbacks.Monitor`).
        keep: rows of :attr:`history` that a checkpoint holds, or a folder for it
            (:class:`~lightning_sym.callbacks.base.Monitor`).
        name: first part of its keys instead of ``alignment``.
        strict: raise what goes wrong in here instead of warning once and going on.

    Raises:
        ValueError: if an argument is out of its range.
    """

    quantity: ClassVar[str] = "alignment"
    defers = True

    def __init__(
        self,
        *,
        every_n_steps: int | Schedule = 100,
        layers: str | list[str] | None = None,
        max_layers: int = 12,
        moments: Literal["normalized", "raw"] = "normalized",
        null: bool = True,
        exponents: bool = False,
        deferred: bool = False,
        keep: Keep = LAST_ROWS,
        name: str | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(
            every_n_steps=every_n_steps,
            layers=layers,
            max_layers=max_layers,
            deferred=deferred,
            keep=keep,
            name=name,
            strict=strict,
        )
        if moments not in ("normalized", "raw"):
            raise ValueError(f"moments must be 'normalized' or 'raw', got {moments!r}")
        self.moments, self.null, self.exponents = moments, null, exponents
        sides = [side for pair in _STREAMS.values() for side in pair]
        self._read_of = {side: SecondMoments(side, normalized=moments == "normalized") for side in sides}  # type: ignore[arg-type]
        self._raw_of = {side: SecondMoments(side) for side in sides}  # type: ignore[arg-type]
        self.needs = (_WEIGHT, *self._read_of.values(), *(self._raw_of.values() if exponents else ()))

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "moments": self.moments}

    @override
    def read(self, seen: Observation) -> Iterator[Reading]:
        levels: list[float] = []
        nulls: list[float] = []
        counts: list[int] = []
        for layer in seen.layers:
            for side in ("in", "out"):
                matrices, n = self._halves(layer, side)
                counts += [n] if n and layer.trained else []
                found, chance = split_side_alignments(matrices)
                for relation, value in ((relation, float(value)) for relation, value in found.items()):
                    if math.isfinite(value):
                        levels += [value] if layer.trained else []
                        yield Reading(layer.name, f"{side}/{relation}", value)
                by_chance = [value for value in map(float, chance.values()) if math.isfinite(value)]
                if self.null and by_chance:
                    nulls += by_chance if layer.trained else []
                    yield Reading(layer.name, f"{side}/null", sum(by_chance) / len(by_chance))
            if nonfinite := self._nonfinite(layer):
                yield Reading(layer.name, "nonfinite", nonfinite)
            if self.exponents:
                yield from self._read_exponents(layer)
        if levels:
            yield Reading("", "mean", sum(levels) / len(levels))
            yield Reading("", "samples", float(min(counts)))
        if nulls:
            yield Reading("", "null", sum(nulls) / len(nulls))

    def _halves(
        self, layer: LayerObservation, side: str
    ) -> tuple[dict[str, Tensor | tuple[Tensor, Tensor]], int]:
        """Return H, G (of each half) and Z of one side, as far as they were seen, and the least samples."""
        matrices: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
        counts = []
        keep: Tensor | None = None
        for letter, name in zip("hg", _STREAMS[side], strict=True):
            stream: SampleMoments | None = layer.get(self._read_of[name])
            if stream is None or stream.n < 2:
                continue
            keep = stream.keep
            counts.append(stream.n)
            raw = self.moments == "raw"
            matrices[letter] = stream.second_halves if raw else stream.covariance_halves
        weight = layer.get(_WEIGHT)
        if matrices and weight is not None and layer.layer.has_input:  # an embedding's rows are looked up
            matrices["z"] = weight.gram(side, keep)
        return matrices, min(counts, default=0)

    def _nonfinite(self, layer: LayerObservation) -> float:
        streams = [layer.get(statistic) for statistic in self._read_of.values()]
        return max((stream.nonfinite for stream in streams if stream is not None), default=0.0)

    def _read_exponents(self, layer: LayerObservation) -> Iterator[Reading]:
        fits: dict[str, PAHExponent] = {}
        weight = layer.get(_WEIGHT)
        for side, names in _STREAMS.items():
            streams = [layer.get(self._raw_of[name]) for name in names]
            found = [s for s in streams if s is not None and s.n > 0]
            if not found or any(s.keep is not None for s in found):
                continue  # a principal submatrix has other eigenvectors
            known = {k: s for k, s in zip("hg", streams, strict=True) if s is not None and s.n > 0}
            matrices = {letter: stream.second for letter, stream in known.items()}
            if weight is not None and layer.layer.has_input:
                matrices["z"] = weight.gram(side, None)
            ranks = {letter: stream.n for letter, stream in known.items()}
            for relation, fit in side_exponents(matrices, ranks=ranks).items():
                fits[f"{side}/{relation}"] = fit
                name = f"{side}/{relation}_exponent"
                if math.isfinite(fit.exponent):
                    yield Reading(layer.name, name, fit.exponent)
                    for what in ("low", "high", "r2", "off_diagonal", "decades"):
                        if math.isfinite(value := getattr(fit, what)):
                            yield Reading(layer.name, f"{name}_{what}", value)
                    yield Reading(layer.name, f"{name}_directions", float(fit.count))
        names_of = {"h_a": "in/rwa", "h_b": "out/rwa", "g_b": "out/gwa", "g_a": "in/gwa"}
        if all(key in fits for key in names_of.values()):
            exponents = {letter: float(fits[key].exponent) for letter, key in names_of.items()}
            phase = pah_phase(**exponents, decades=float(fits["in/gwa"].decades))
            if math.isfinite(phase.distance):
                yield Reading(layer.name, "phase_distance", phase.distance)
                yield Reading(layer.name, "phase", phase.name)
