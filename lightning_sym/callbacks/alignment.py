"""Do representations, weights and gradients align?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Literal

from torch import Tensor
from typing_extensions import override

from lightning_sym.callbacks.base import Monitor
from lightning_sym.functional.alignment import (
    PAHExponent,
    pah_exponent,
    pah_phase,
    side_alignments,
)
from lightning_sym.observe.moments import Moments
from lightning_sym.observe.observation import LayerObservation, Observation
from lightning_sym.observe.reading import Reading
from lightning_sym.observe.schedule import Schedule
from lightning_sym.observe.wants import Wants


class AlignmentMonitor(Monitor):
    r"""The six relations of the canonical representation hypothesis, and the exponents of the PAH.

    For a layer :math:`h_b = W h_a` and gradients of per-sample losses :math:`g_b`,
    :math:`g_a = W^\top g_b`; ``in`` is the a-side, ``out`` the b-side (Ziyin et al., 2024, arXiv
    2410.03006). Biases are left out. Sign and scale of the gradients do not matter here.

    Logs:
        ``alignment/<layer>/in/rga``, ``rwa``, ``gwa`` and ``alignment/<layer>/out/...``: Pearson
            correlation over matrix entries of representation and gradient (rga), representation and
            weight (rwa), gradient and weight (gwa), in [-1, 1]. A layer fed by raw data aligns
            little on its input side by construction.
        ``alignment/<layer>/in/null``, ``.../out/null``: the mean of the same three over random
            rotations of the second matrix of each: what chance gives at these spectra
            (:func:`~lightning_sym.functional.alignment.expected_alignment`).
        ``alignment/<layer>/nonfinite``: share of samples with a NaN or Inf; only when there are any.
        ``alignment/mean``, ``alignment/null``: means over layers, sides and relations.
    and with ``exponents``, on raw second moments, for sides no wider than the observation's cap:
        ``alignment/<layer>/<side>/<relation>_exponent``: power p of the first matrix in the second,
            in the second's eigenbasis; with ``_low``, ``_high`` (95 %), ``_r2``, ``_directions``,
            ``_decades`` and ``_off_diagonal`` (the fit means little where this is large).
        ``alignment/<layer>/phase`` (text) and ``.../phase_distance``: the nearest phase of the PAH
            table (:func:`~lightning_sym.functional.alignment.pah_phase`), and how far it is.

    An undefined correlation (a constant matrix, a layer that got no gradient) is not logged.

    Args:
        every_n_steps: an interval in optimizer steps, or a schedule. Step 1 is always due.
        layers: a glob, or a list of globs, on module names; ``None``: all, at most ``max_layers``.
        max_layers: how many layers to watch when ``layers`` is ``None``.
        moments: ``"normalized"``: samples divided by their norms, then covariances, as in the
            paper's experiments; ``"raw"``: second moments, as in its theory.
        null: log the null level.
        exponents: log the PAH exponents.
        strict: raise what goes wrong in here instead of warning once and going on.

    Raises:
        ValueError: if an argument is out of its range.
    """

    quantity: ClassVar[str] = "alignment"

    def __init__(
        self,
        *,
        every_n_steps: int | Schedule = 100,
        layers: str | list[str] | None = None,
        max_layers: int = 12,
        moments: Literal["normalized", "raw"] = "normalized",
        null: bool = True,
        exponents: bool = False,
        strict: bool = False,
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, layers=layers, max_layers=max_layers, strict=strict)
        if moments not in ("normalized", "raw"):
            raise ValueError(f"moments must be 'normalized' or 'raw', got {moments!r}")
        self.moments = moments
        self.null = null
        self.exponents = exponents
        form = Moments.NORMALIZED if moments == "normalized" else Moments.SECOND
        if exponents:
            form |= Moments.SECOND
        self.wants = Wants(inputs=form, outputs=form, input_gradients=form, output_gradients=form)

    @override
    def read(self, seen: Observation) -> Iterator[Reading]:
        levels: list[float] = []
        nulls: list[float] = []
        for layer in seen.layers:
            prefix = f"alignment/{layer.name}"
            for side in ("in", "out"):
                found, chance = side_alignments(self._matrices(layer, side))
                for relation, value in found.items():
                    if value.isfinite():
                        levels.append(float(value))
                        yield Reading(f"{prefix}/{side}/{relation}", value)
                by_chance = [float(value) for value in chance.values() if value.isfinite()]
                if self.null and by_chance:
                    nulls += by_chance
                    yield Reading(f"{prefix}/{side}/null", sum(by_chance) / len(by_chance))
            if layer.nonfinite:
                yield Reading(f"{prefix}/nonfinite", layer.nonfinite)
            if self.exponents:
                yield from self._read_exponents(layer)
        if levels:
            yield Reading("alignment/mean", sum(levels) / len(levels))
        if nulls:
            yield Reading("alignment/null", sum(nulls) / len(nulls))

    def _matrices(self, layer: LayerObservation, side: str, *, raw: bool = False) -> dict[str, Tensor]:
        """Return H, G and Z of one side, as far as they were seen."""
        streams = {
            "h": layer.inputs if side == "in" else layer.outputs,
            "g": layer.input_gradients if side == "in" else layer.output_gradients,
        }
        raw = raw or self.moments == "raw"
        matrices = {
            name: stream.second() if raw else stream.covariance(Moments.NORMALIZED)
            for name, stream in streams.items()
            if stream is not None and stream.n > 0
        }
        if matrices and layer.layer.has_input:  # an embedding's rows are looked up, not multiplied
            matrices["z"] = layer.gram(side)
        return matrices

    def _read_exponents(self, layer: LayerObservation) -> Iterator[Reading]:
        prefix = f"alignment/{layer.name}"
        fits: dict[str, PAHExponent] = {}
        for side in ("in", "out"):
            stream = layer.inputs if side == "in" else layer.outputs
            if stream is None or stream.keep is not None:
                continue  # a principal submatrix has other eigenvectors
            matrices = self._matrices(layer, side, raw=True)
            for relation, a, b in (("rga", "h", "g"), ("rwa", "h", "z"), ("gwa", "g", "z")):
                if a not in matrices or b not in matrices:
                    continue
                fit = fits[f"{side}/{relation}"] = pah_exponent(matrices[a], matrices[b])
                name = f"{prefix}/{side}/{relation}_exponent"
                if math.isfinite(fit.exponent):
                    yield Reading(name, fit.exponent)
                    for what in ("low", "high", "r2", "off_diagonal", "decades"):
                        if math.isfinite(value := getattr(fit, what)):
                            yield Reading(f"{name}_{what}", value)
                    yield Reading(f"{name}_directions", float(fit.count))
        names = {"h_a": "in/rwa", "h_b": "out/rwa", "g_b": "out/gwa", "g_a": "in/gwa"}
        if all(key in fits for key in names.values()):
            exponents = {letter: float(fits[key].exponent) for letter, key in names.items()}
            phase = pah_phase(**exponents, decades=float(fits["in/gwa"].decades))
            if math.isfinite(phase.distance):
                yield Reading(f"{prefix}/phase_distance", phase.distance)
                yield Reading(f"{prefix}/phase", phase.name)
