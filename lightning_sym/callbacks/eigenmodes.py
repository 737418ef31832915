"""Which dimensions of its embedding has self-supervised learning learned, and when?

Shape letters: M samples over all ranks, D embedding dimensions, J modes, T readings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_sym.callbacks.base import Monitor, at_least
from lightning_sym.engine.batch import Locator, first_samples, locate
from lightning_sym.engine.history import LAST_ROWS, Keep
from lightning_sym.engine.run import Run
from lightning_sym.engine.schedule import EpochEnds, LogSpaced, Schedule
from lightning_sym.functional.eigenmodes import (
    covariance_eigenvalues,
    cross_covariance_eigenvalues,
    mode_dates,
    step_likeness,
    variance_share,
)
from lightning_sym.functional.rank import effective_rank_from_eigenvalues
from lightning_sym.observe import Observation, Reading

NONE, DIMENSIONAL, COMPLETE = 0.0, 1.0, 2.0
LOG_SPACED = LogSpaced(12)
Embed = Callable[..., tuple[Tensor, Tensor]]


class Theory(Protocol):
    """What theory is asked: :class:`lightning_sym.papers.stepwise_ssl.Staircase` answers it."""

    def eigenvalues(self, steps: Tensor | float) -> Tensor:
        """Return the modes' eigenvalues after so many steps, ``[J]`` or ``[T, J]``."""
        ...

    def dates(self) -> Tensor:
        """Return the step at which each mode is half learned, ``[J]``."""
        ...


class EigenmodeMonitor(Monitor):
    """The spectrum of a joint embedding over time: the staircase of self-supervised learning.

    After a due step a copy of the module embeds both views of (part of) a batch, without gradients. A mode
    is an eigenvalue of the views' cross-covariance
    (:func:`~lightning_sym.functional.eigenmodes.cross_covariance_eigenvalues`), by rank; it is learned
    once it passes ``level``. See Simon et al. (2023, arXiv:2303.15438).

    Logs:
        ``eigenmodes/embedding/learned``: number of modes past ``level``.
        ``eigenmodes/embedding/date/<j>``: the step at which mode j (from 1) passed ``level``, linear between
            readings; only when it has, once.
        ``eigenmodes/embedding/step_likeness``: how much the learned modes came one at a time, in
            (0, 1] (:func:`~lightning_sym.functional.eigenmodes.step_likeness`); 0 before the first.
        ``eigenmodes/embedding/theory_error``: with ``theory``, the mean difference between measured
            and predicted eigenvalues.
        ``eigenmodes/<layer>/rank``: effective rank of the covariance, in [1, min(samples - 1, width)];
            0 for constant features. It depends on the number of samples: compare equal ones.
        ``eigenmodes/<layer>/variance``: sum of the features' variances, at least 0.
        ``eigenmodes/<layer>/variance_share``: share of the mean square that is variance, in [0, 1].
        ``eigenmodes/<layer>/collapse``: 2, complete: the variance share is at most ``complete_below``, or
            the embedding has shrunk, see ``shrunk_below``; 1, dimensional: the rank is at most
            ``dimensional_below`` of what the samples could show, min(samples - 1, width) (early in
            learning that is as it should be); else 0.
        ``eigenmodes/<layer>/spectrum`` (histogram): log10 of the covariance's eigenvalues.
        ``eigenmodes/staircase`` (picture): the eigenvalues over the steps; with ``picture``.
        ``eigenmodes/samples``: samples of the reading.

    ``<layer>`` is ``embedding`` or ``representation`` (before the projector; first view). Readings of
    features that are not finite are NaN; such an embedding is left out of later dates and step-likenesses.

    Args:
        every_n_steps: an interval in optimizer steps, a schedule, log-spaced by default, or
            :class:`~lightning_sym.engine.schedule.EpochEnds`.
        embed: how to get ``(representation, embedding)`` of a view: a method of the module, or a
            function of (module, view).
        inputs: where the list of views is in a batch: an index, a key, or a function of the batch;
            ``None``: the first entry, or the key ``views``.
        data: two views ``[M, ...]`` to look at every time, so that readings differ by the module
            alone (each rank embeds its share); None: the batch just trained on.
        samples: at most so many samples, over all ranks; None: all.
        center: subtract means before the cross-covariance. False for the linear theory's objective.
        level: an eigenvalue past it is learned.
        relative: ``level`` is a share of the largest eigenvalue read so far: for losses, SimCLR's say,
            that do not fix the embedding's scale.
        modes: how many of the largest modes to follow and to date.
        batch_statistics: normalise by the batch, as training does; False: eval mode.
        complete_below: a variance share up to which features are constant.
        dimensional_below: a share of the rank that could be.
        shrunk_below: an embedding has shrunk to nothing where its variance is at most this share of what it
            was before the first step, and where no eigenvalue of its covariance passes ``level``, the scale
            that the loss wants; the representation, where its own variance has, too. An embedding that
            starts small or that comes down to the loss's scale has not shrunk. With ``relative`` the scale
            means nothing and is not judged.
        theory: what to compare with: an object such as
            :class:`lightning_sym.papers.stepwise_ssl.Staircase`, or a function that makes one from (a copy
            of) the module as training starts; if that is a dataclass of tensors and numbers, a resumed run
            goes on with the same one.
        picture: draw the staircase for loggers that take figures.
        keep: rows of :attr:`history` that a checkpoint holds, or a folder for it
            (:class:`~lightning_sym.callbacks.base.Monitor`).
        name: first part of its keys instead of ``eigenmodes``.
        strict: raise what goes wrong in here instead of warning once and going on.

    Attributes:
        spectra: one dict a reading of the run: ``step``, and float64 vectors ``embedding``
            (cross-covariance, ``modes`` of them), ``embedding_covariance`` and
            ``representation_covariance``. Kept in checkpoints.

    Raises:
        ValueError: if an argument is out of its range; at fit start, if ``data`` has fewer samples than
            there are ranks.
        TypeError: at fit start, if the module has no method ``embed``.
    """

    quantity: ClassVar[str] = "eigenmodes"
    takes_inputs = True
    runs_module = True

    def __init__(
        self,
        *,
        every_n_steps: int | LogSpaced | Schedule | EpochEnds = LOG_SPACED,
        embed: str | Embed = "embed",
        inputs: Locator = None,
        data: tuple[Tensor, Tensor] | None = None,
        samples: int | None = 1024,
        center: bool = True,
        level: float = 0.5,
        relative: bool = False,
        modes: int = 32,
        batch_statistics: bool = True,
        complete_below: float = 1e-3,
        dimensional_below: float = 0.1,
        shrunk_below: float = 1e-2,
        theory: Theory | Callable[[nn.Module], Theory] | None = None,
        picture: bool = True,
        keep: Keep = LAST_ROWS,
        name: str | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, keep=keep, name=name, strict=strict)
        at_least("samples", samples, 2)
        at_least("modes", modes, 1)
        shares = {"complete": complete_below, "dimensional": dimensional_below, "shrunk": shrunk_below}
        for what, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{what}_below must be in [0, 1], got {share}")
        if not level > 0:
            raise ValueError(f"level must be positive, got {level}")
        if data is not None and (len(data) != 2 or len(data[0]) != len(data[1]) or len(data[0]) < 2):
            raise ValueError(
                f"data must be two views of 2 samples or more, got {[len(view) for view in data]}"
            )
        self.embed, self.inputs, self.data, self.samples = embed, inputs, data, samples
        self.center, self.level, self.relative, self.modes = center, level, relative, modes
        self.batch_statistics = batch_statistics
        self.complete_below, self.dimensional_below = complete_below, dimensional_below
        self.shrunk_below = shrunk_below
        self.theory, self.picture = theory, picture
        self._predicted: Theory | None = None

    @override
    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "center": self.center,
            "level": self.level,
            "relative": self.relative,
        }

    @override
    def check(self, run: Run) -> None:
        super().check(run)
        run.function(self.embed, argument="embed")
        if self.data is None:
            if getattr(self.schedule, "at_start", False):
                raise ValueError(
                    f"every_n_steps={self.schedule!r} reads before the first batch: pass data, two views"
                )
        elif len(self.data[0]) < run.ranks.size:
            raise ValueError(
                f"data must have a sample for each of the {run.ranks.size} ranks, got {len(self.data[0])}"
            )

    @override
    def begin_run(self) -> None:
        super().begin_run()
        self._predicted = None

    @override
    def start(self, seen: Observation) -> None:
        if self.theory is not None:
            self._predicted = self._made(seen)
        if seen.step == 0:
            h_MF, z_MD, _ = self._embeddings(seen.run)
            for layer, x in (("embedding", z_MD), ("representation", h_MF)):
                _keep_start(seen.state, layer, float(covariance_eigenvalues(x).sum()))

    def _made(self, seen: Observation) -> Theory:
        """Return the theory; one that a function makes is that of the run's start, in a resumed run too."""
        if hasattr(self.theory, "eigenvalues"):
            return self.theory  # type: ignore[return-value]
        if seen.step > 0 and "theory" not in seen.state:
            raise ValueError(
                "theory is made from the module as training starts, which this checkpoint does not hold: "
                "pass what the function made then, or let it make a dataclass of tensors and numbers"
            )
        with seen.run.sandbox.open() as apart:
            made: Any = self.theory(apart.module)  # type: ignore[operator, misc]
        if seen.step > 0:
            return dataclasses.replace(made, **seen.state["theory"])  # type: ignore[no-any-return]
        if dataclasses.is_dataclass(made) and not isinstance(made, type):
            kept = {field.name: getattr(made, field.name) for field in dataclasses.fields(made) if field.init}
            if all(isinstance(value, Tensor | int | float | str) for value in kept.values()):
                seen.state["theory"] = kept
        return made  # type: ignore[no-any-return]

    # -- what was read ------------------------------------------------------------------------

    @property
    def spectra(self) -> list[dict[str, Any]]:
        """One dict a reading of the run."""
        return self.state.get("spectra", [])  # type: ignore[no-any-return]

    @property
    def steps(self) -> Tensor:
        """Optimizer steps of the readings, ``[T]``."""
        return _steps(self.spectra)

    @property
    def eigenvalues(self) -> Tensor:
        """The modes followed, over time, ``[T, J]``; NaN where an embedding was not finite."""
        return _eigenvalues(self.spectra)

    def dates(self, *, own: bool = False) -> Tensor:
        """Return the step at which each mode was learned.

        Args:
            own: date each mode by half of its own last eigenvalue instead of ``level``; meaningful
                for modes that were learned.

        Returns:
            ``[J]``, infinite for modes that were not.
        """
        return self._dates(self.spectra, own=own)

    def _dates(self, rows: Sequence[dict[str, Any]], *, own: bool = False) -> Tensor:
        if not (fine := _finite(rows)):
            return torch.full_like(_eigenvalues(rows)[0], math.inf)
        history_TJ = _eigenvalues(fine)
        level = history_TJ[-1] / 2 if own else self._level(history_TJ)
        return mode_dates(_steps(fine), eigenvalues=history_TJ, level=level)

    def _level(self, history_TJ: Tensor) -> float:
        return self.level * float(history_TJ.max()) if self.relative else self.level

    def figure(self) -> Any:
        """Return the staircase so far, a matplotlib figure."""
        from lightning_sym.plots.eigenmodes import staircase

        predicted = None if self._predicted is None else self._prediction(self._predicted, self.steps)
        return staircase(self.steps, eigenvalues=self.eigenvalues, dates=self.dates(), predicted=predicted)

    @staticmethod
    def _prediction(theory: Theory, steps: Tensor) -> Tensor:
        """Return predicted eigenvalues by rank, as the measured ones are."""
        return theory.eigenvalues(steps).sort(dim=-1, descending=True).values

    # -- reading ------------------------------------------------------------------------------

    @override
    def read(self, seen: Observation) -> Iterable[Reading]:
        h_MF, z_a_MD, z_b_MD = self._embeddings(seen.run)
        row: dict[str, Any] = {"step": seen.step, "embedding": self._modes(z_a_MD, z_b_MD)}
        readings = [Reading("", "samples", float(len(z_a_MD)))]
        shrunk = not self.relative
        for layer, x in (("embedding", z_a_MD), ("representation", h_MF)):
            spectrum = row[f"{layer}_covariance"] = covariance_eigenvalues(x).cpu()
            variance = float(spectrum.sum())
            _keep_start(seen.state, layer, variance)
            shrunk &= variance <= self.shrunk_below * seen.state["start"].get(layer, math.nan)
            shrunk &= layer != "embedding" or float(spectrum[0]) < self.level
            share = float(variance_share(x))
            rank = float(effective_rank_from_eigenvalues(spectrum))
            collapse = self._collapse(rank, share, samples=len(x), width=len(spectrum), shrunk=shrunk)
            numbers = {"rank": rank, "variance": variance, "variance_share": share, "collapse": collapse}
            readings += [Reading(layer, what, value) for what, value in numbers.items()]
            readings.append(Reading(layer, "spectrum", spectrum[spectrum > 0].log10()))
        rows = [*self.spectra, row]
        dated, learned = seen.state.get("dated", 0), self._learned(rows)
        readings += self._progress(rows, learned, dated)
        # Kept only now: a reading that fails leaves nothing behind.
        seen.state["spectra"] = rows
        seen.state["dated"] = max(dated, learned or 0)
        return readings

    def _modes(self, z_a_MD: Tensor, z_b_MD: Tensor) -> Tensor:
        """Return the largest modes, as many at every reading."""
        found = cross_covariance_eigenvalues(z_a_MD, z_b=z_b_MD, center=self.center).cpu()
        if missing := z_a_MD.shape[1] - len(found):  # few samples: the others are zero
            found = torch.cat([found, found.new_zeros(missing)]).sort(descending=True).values
        return found[: self.modes]

    def _collapse(self, rank: float, share: float, *, samples: int, width: int, shrunk: bool) -> float:
        if not (math.isfinite(rank) and math.isfinite(share)):
            return math.nan
        if shrunk or share <= self.complete_below:
            return COMPLETE
        most = min(samples - 1, width)  # centred samples span one direction less than there are samples
        return DIMENSIONAL if rank <= self.dimensional_below * most else NONE

    def _learned(self, rows: list[dict[str, Any]]) -> int | None:
        """Return how many modes are past the level, or None where the last reading is not finite."""
        fine = _finite(rows)
        if not fine or fine[-1] is not rows[-1]:
            return None
        return int((rows[-1]["embedding"] >= self._level(_eigenvalues(fine))).sum())

    def _progress(self, rows: list[dict[str, Any]], learned: int | None, dated: int) -> Iterator[Reading]:
        yield Reading("embedding", "learned", math.nan if learned is None else float(learned))
        stepped = math.nan if learned is None else 0.0
        history_TJ = _eigenvalues(_finite(rows)) if learned else None
        if learned and history_TJ is not None and len(history_TJ) > 1:
            final_J = history_TJ[-1, :learned]
            stepped = float(step_likeness(history_TJ[:, :learned], final=final_J))
        yield Reading("embedding", "step_likeness", stepped)
        if learned and learned > dated:
            dates_J = self._dates(rows)
            for j in range(dated, learned):
                yield Reading("embedding", f"date/{j + 1}", float(dates_J[j]))
        if self._predicted is not None:
            last_J = rows[-1]["embedding"]
            predicted_J = self._prediction(self._predicted, _steps(rows)[-1])
            compared = min(len(predicted_J), len(last_J))
            error = (last_J[:compared] - predicted_J[:compared].to(last_J)).abs().mean()
            yield Reading("embedding", "theory_error", float(error))
        if self.picture:
            yield Reading("", "staircase", self.figure)

    # -- embedding ----------------------------------------------------------------------------

    def _embeddings(self, run: Run) -> tuple[Tensor, Tensor, Tensor]:
        """Return representation and both embeddings of the samples of all ranks."""
        rows = [run.ranks.gather_rows(x)[: self.samples] for x in run.ranks.attempt(lambda: self._own(run))]
        return rows[0], rows[1], rows[2]

    def _own(self, run: Run) -> tuple[Tensor, Tensor, Tensor]:
        """Return representation and both embeddings of this rank's samples."""
        views, function = self._views(run), run.function(self.embed, argument="embed")
        found = []
        with run.sandbox.open(train=self.batch_statistics) as apart:
            for k in (0, 1):
                arguments = locate(views, k, function)
                if self.samples is not None:
                    arguments = first_samples(arguments, -(-self.samples // run.ranks.size))
                args, kwargs = apart.place((arguments.args, arguments.kwargs))
                found.append(_as_pair(apart(self.embed, *args, **kwargs), self.embed))
        (h_NF, z_a_ND), (_, z_b_ND) = found
        if not len(h_NF) == len(z_a_ND) == len(z_b_ND):
            raise ValueError(
                "embed must return a row a sample, as many for both views, got "
                f"{len(h_NF)} of the representation, {len(z_a_ND)} and {len(z_b_ND)} of the embeddings"
            )
        return h_NF, z_a_ND, z_b_ND

    def _views(self, run: Run) -> Sequence[Any]:
        if self.data is not None:
            return [view[run.ranks.rank :: run.ranks.size] for view in self.data]
        found = locate(run.batch, self.inputs, _views_of)
        views = _views_of(*found.args, **found.kwargs)
        if not isinstance(views, list | tuple) or len(views) < 2:
            raise ValueError(
                f"inputs={self.inputs!r} must lead to at least 2 views in a list; or pass data. Got "
                f"{type(views).__name__}"
            )
        return views


def _views_of(views: Any) -> Any:
    """Say by its signature what is looked for in a batch."""
    return views


def _as_pair(found: Any, embed: str | Embed) -> tuple[Tensor, Tensor]:
    """Return a representation and an embedding as matrices.

    Raises:
        TypeError: if they are something else.
    """
    tensors = (
        isinstance(found, list | tuple) and len(found) == 2 and all(isinstance(x, Tensor) for x in found)
    )
    if not tensors or any(x.ndim < 2 or not x.is_floating_point() for x in found):
        name = repr(embed) if isinstance(embed, str) else getattr(embed, "__name__", type(embed).__name__)
        raise TypeError(
            f"embed={name} must return (representation, embedding), floating point tensors with a row a "
            f"sample, got {type(found).__name__}"
        )
    return found[0].flatten(1), found[1].flatten(1)


def _keep_start(state: dict[str, Any], layer: str, variance: float) -> None:
    """Remember the first variance of the run that is a number."""
    start = state.setdefault("start", {})
    if math.isfinite(variance):
        start.setdefault(layer, variance)


def _finite(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if bool(row["embedding"].isfinite().all())]


def _steps(rows: Sequence[dict[str, Any]]) -> Tensor:
    return torch.tensor([row["step"] for row in rows], dtype=torch.float64)


def _eigenvalues(rows: Sequence[dict[str, Any]]) -> Tensor:
    if not rows:
        raise ValueError("EigenmodeMonitor has no reading yet")
    return torch.stack([row["embedding"] for row in rows])
