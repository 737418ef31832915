"""Which dimensions of its embedding has self-supervised learning learned, and when?

Shape letters: M samples over all ranks, D embedding dimensions, J modes, T readings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_sym.callbacks._quiet import gather_rows, method, quietly
from lightning_sym.callbacks.base import Probe
from lightning_sym.functional.eigenmodes import (
    covariance_eigenvalues,
    cross_covariance_eigenvalues,
    mode_dates,
    step_likeness,
    variance_share,
)
from lightning_sym.functional.rank import effective_rank_from_eigenvalues
from lightning_sym.observe.reading import Reading
from lightning_sym.observe.schedule import LogSpaced, Schedule

NONE, DIMENSIONAL, COMPLETE = 0, 1, 2
LOG_SPACED = LogSpaced(12)
Embed = Callable[[LightningModule, Tensor], tuple[Tensor, Tensor]]


class Theory(Protocol):
    """What theory is asked: :class:`lightning_sym.theory.Staircase` answers it."""

    def eigenvalues(self, steps: Tensor | float) -> Tensor:
        """Return the modes' eigenvalues after so many steps, ``[J]`` or ``[T, J]``."""
        ...

    def dates(self) -> Tensor:
        """Return the step at which each mode is half learned, ``[J]``."""
        ...


class EigenmodeMonitor(Probe):
    """The spectrum of a joint embedding over time: the staircase of self-supervised learning.

    After a due step both views of (part of) a batch are embedded once more, without gradients; running
    statistics are put back. A mode is an eigenvalue of the views' cross-covariance
    (:func:`~lightning_sym.functional.eigenmodes.cross_covariance_eigenvalues`), by rank; it is learned
    once it passes ``level``. See Simon et al. (2023, arXiv:2303.15438).

    Logs:
        ``eigenmodes/embedding/learned``: number of modes past ``level``.
        ``eigenmodes/embedding/date/<j>``: at the reading after it, the step at which mode j (from 1)
            passed ``level``, linear between readings.
        ``eigenmodes/embedding/step_likeness``: how much the learned modes came one at a time, in
            (0, 1] (:func:`~lightning_sym.functional.eigenmodes.step_likeness`); 0 before the first.
        ``eigenmodes/embedding/theory_error``: with ``theory``, the mean difference between measured
            and predicted eigenvalues.
        ``eigenmodes/<layer>/rank``: effective rank of the covariance, in [1, min(samples - 1, width)];
            0 for constant features. It depends on the number of samples: compare equal ones.
        ``eigenmodes/<layer>/variance_share``: share of the mean square that is variance, in [0, 1].
        ``eigenmodes/<layer>/collapse``: 2, complete: the variance share is at most
            ``complete_below``; 1, dimensional: the rank is at most ``dimensional_below`` of what the
            samples could show (early in learning that is as it should be); else 0.
        ``eigenmodes/<layer>/spectrum``: the covariance's eigenvalues, as a histogram of log10.
        ``eigenmodes/staircase``: the picture.
        ``eigenmodes/samples``: samples of the reading.

    ``<layer>`` is ``embedding`` or ``representation`` (before the projector; first view).

    Args:
        every_n_steps: an interval in optimizer steps, or a schedule; log-spaced by default.
        embed: how to get ``(representation, embedding)`` from images: a method of the module, or a
            function of (module, images).
        data: two views ``[M, C, H, W]`` to look at every time, so that readings differ by the module
            alone (each rank embeds its share); None: the batch just trained on.
        samples: at most so many samples, over all ranks; None: all.
        center: subtract means before the cross-covariance. False for the linear theory's objective.
        level: an eigenvalue past it is learned.
        relative: ``level`` is a share of the largest eigenvalue read so far: for losses, SimCLR's say,
            that do not fix the embedding's scale.
        modes: how many of the largest modes to follow and to date.
        batch_statistics: normalise by the batch, as training does; False: eval mode.
        complete_below, dimensional_below: see ``collapse``.
        theory: what to hold against: an object such as :class:`lightning_sym.theory.Staircase`, or a
            function that makes one from the module as training starts.
        picture: draw the staircase for loggers that take figures.
        strict: raise what goes wrong in here instead of warning once and going on.

    Attributes:
        spectra: one dict a reading: ``step``, and float64 vectors ``embedding`` (cross-covariance,
            ``modes`` of them), ``embedding_covariance`` and ``representation_covariance``.

    Raises:
        ValueError: if an argument is out of its range.
        TypeError: at fit start, if the module has no method ``embed``.
    """

    quantity: ClassVar[str] = "eigenmodes"

    def __init__(
        self,
        *,
        every_n_steps: int | LogSpaced | Schedule = LOG_SPACED,
        embed: str | Embed = "embed",
        data: tuple[Tensor, Tensor] | None = None,
        samples: int | None = 1024,
        center: bool = True,
        level: float = 0.5,
        relative: bool = False,
        modes: int = 32,
        batch_statistics: bool = True,
        complete_below: float = 1e-3,
        dimensional_below: float = 0.1,
        theory: Theory | Callable[[LightningModule], Theory] | None = None,
        picture: bool = True,
        strict: bool = False,
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, strict=strict)
        for name, value in (("samples", samples), ("modes", modes)):
            if value is not None and value < 2 - (name == "modes"):
                raise ValueError(f"{name} must be at least {2 - (name == 'modes')}, got {value}")
        for name, share in (("complete_below", complete_below), ("dimensional_below", dimensional_below)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {share}")
        if not level > 0:
            raise ValueError(f"level must be positive, got {level}")
        if data is not None and (len(data) != 2 or len(data[0]) != len(data[1]) or len(data[0]) < 2):
            raise ValueError(
                f"data must be two views of 2 samples or more, got {[len(view) for view in data]}"
            )
        self.embed, self.data, self.samples = embed, data, samples
        self.center, self.level, self.relative, self.modes = center, level, relative, modes
        self.batch_statistics = batch_statistics
        self.complete_below, self.dimensional_below = complete_below, dimensional_below
        self.theory, self.picture = theory, picture
        self.spectra: list[dict[str, Any]] = []
        self._predicted: Theory | None = None
        self._dated = 0

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            every_n_steps=repr(self.schedule), center=self.center, level=self.level, relative=self.relative
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "spectra": [dict(row) for row in self.spectra], "dated": self._dated}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.spectra = [dict(row) for row in state_dict["spectra"]]
        self._dated = int(state_dict["dated"])

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            method(pl_module, self.embed, argument="embed")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.theory is not None:
            made = hasattr(self.theory, "eigenvalues")
            self._predicted = self.theory if made else self.theory(pl_module)  # type: ignore[operator, assignment]

    @property
    def steps(self) -> Tensor:
        """Optimizer steps of the readings, ``[T]``."""
        return torch.tensor([row["step"] for row in self.spectra], dtype=torch.float64)

    @property
    def eigenvalues(self) -> Tensor:
        """The modes followed, over time, ``[T, J]``."""
        return torch.stack([row["embedding"] for row in self.spectra])

    def dates(self, *, own: bool = False) -> Tensor:
        """Return the step at which each mode was learned.

        Args:
            own: date each mode by half of its own last eigenvalue instead of ``level``; meaningful
                for modes that were learned.

        Returns:
            ``[J]``, infinite for modes that were not.
        """
        level = self.eigenvalues[-1] / 2 if own else self._level()
        return mode_dates(self.steps, eigenvalues=self.eigenvalues, level=level)

    def _level(self) -> float:
        return self.level * float(self.eigenvalues.max()) if self.relative else self.level

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Iterable[Reading]:
        h_MF, z_a_MD, z_b_MD = self._embeddings(trainer, pl_module, batch)
        modes_J = cross_covariance_eigenvalues(z_a_MD, z_b=z_b_MD, center=self.center)[: self.modes].cpu()
        row: dict[str, Any] = {"step": trainer.global_step, "embedding": modes_J}
        readings = [Reading("eigenmodes/samples", float(len(z_a_MD)))]
        for layer, x in (("embedding", z_a_MD), ("representation", h_MF)):
            spectrum = covariance_eigenvalues(x).cpu()
            row[f"{layer}_covariance"] = spectrum
            readings += self._state(layer, spectrum, float(variance_share(x)), len(x))
        self.spectra.append(row)
        return [*readings, *self._progress()]

    def _state(self, layer: str, spectrum: Tensor, share: float, samples: int) -> Iterator[Reading]:
        rank = float(effective_rank_from_eigenvalues(spectrum))
        most = min(samples - 1, len(spectrum))
        yield Reading(f"eigenmodes/{layer}/rank", rank)
        yield Reading(f"eigenmodes/{layer}/variance_share", share)
        yield Reading(f"eigenmodes/{layer}/spectrum", spectrum[spectrum > 0].log10())
        if share != share:  # NaN: nothing can be said, which is no collapse
            return
        dimensional = DIMENSIONAL if rank <= self.dimensional_below * most else NONE
        yield Reading(
            f"eigenmodes/{layer}/collapse", float(COMPLETE if share <= self.complete_below else dimensional)
        )

    def _progress(self) -> Iterator[Reading]:
        history_TJ = self.eigenvalues
        learned = int((history_TJ[-1] >= self._level()).sum())
        yield Reading("eigenmodes/embedding/learned", float(learned))
        stepped = 0.0
        if learned and len(history_TJ) > 1:
            final_J = history_TJ[-1, :learned]
            stepped = float(step_likeness(history_TJ[:, :learned], final=final_J))
        yield Reading("eigenmodes/embedding/step_likeness", stepped)
        dates_J = self.dates()
        for j in range(self._dated, learned):
            yield Reading(f"eigenmodes/embedding/date/{j + 1}", float(dates_J[j]))
        self._dated = max(self._dated, learned)
        if self._predicted is not None:
            predicted_J = self._prediction(self.steps[-1])
            compared = min(len(predicted_J), history_TJ.shape[1])
            error = (history_TJ[-1, :compared] - predicted_J[:compared]).abs().mean()
            yield Reading("eigenmodes/embedding/theory_error", float(error))
        if self.picture:
            yield Reading("eigenmodes/staircase", self.figure)

    def _prediction(self, steps: Tensor) -> Tensor:
        """Return predicted eigenvalues by rank, as the measured ones are."""
        assert self._predicted is not None
        return self._predicted.eigenvalues(steps).sort(dim=-1, descending=True).values

    def figure(self) -> Any:
        """Return the staircase so far, a matplotlib figure."""
        from lightning_sym.plots.eigenmodes import staircase

        predicted = None if self._predicted is None else self._prediction(self.steps)
        return staircase(self.steps, eigenvalues=self.eigenvalues, dates=self.dates(), predicted=predicted)

    def _embeddings(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return representation and both embeddings of the samples of all ranks."""
        ranks = trainer.world_size
        views = batch[0] if self.data is None else self.data
        if not isinstance(views, list | tuple) or len(views) < 2:
            raise ValueError("a batch must be (views, labels) with at least 2 views in a list; or pass data")
        if self.data is not None:
            views = [view[trainer.global_rank :: ranks].to(pl_module.device) for view in views]
        take = None if self.samples is None else -(-self.samples // ranks)
        embed = method(pl_module, self.embed, argument="embed")
        with quietly(trainer, pl_module, batch_statistics=self.batch_statistics):
            first, second = embed(views[0][:take]), embed(views[1][:take])
        rows = [gather_rows(x.flatten(1))[: self.samples] for x in (*first, second[1])]
        return rows[0], rows[1], rows[2]
