"""One case, fitted: with the monitors or without, its outcome along the way, its truth."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from .common import Case, Measures, Task, leaving_step

EVERY_N_STEPS = 20
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Along(Callback):
    """The training loss of every batch and the outcome every so many, for the truth alone."""

    def __init__(self, task: Task, every_n_batches: int) -> None:
        self.task, self.every_n_batches = task, every_n_batches
        self.losses: list[float] = []
        self.curve: list[dict[str, float]] = []

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, Mapping) and "loss" in outputs else None
        self.losses.append(math.nan if loss is None else float(loss))
        if len(self.losses) % self.every_n_batches == 0:
            self.curve.append({"step": float(trainer.global_step), **self.task.outcome(pl_module)})


def fit(case: Case, seed: int, *, bare: bool = False) -> dict[str, Any]:
    """Fit one case.

    Args:
        case: what to fit.
        seed: of weights, batches and data.
        bare: without monitors.

    Returns:
        ``outcome`` (its measures at the end, those at the start under ``start/``), ``curve``, ``losses``,
        ``histories`` (by monitor), ``findings`` (None where :mod:`lightning_sym.diagnosis` does not exist)
        and ``seconds`` of the fits, with ``build_seconds`` apart.
    """
    torch.manual_seed(1000 + seed)
    began = time.perf_counter()
    task = case.build(seed)
    with quiet():
        outcome: Measures = {f"start/{key}": value for key, value in measures(task).items()}
    built = time.perf_counter()
    along = Along(task, EVERY_N_STEPS)
    callbacks = [] if bare else watchers(task)
    torch.manual_seed(2000 + seed)
    with quiet():
        for loader in task.loaders:
            trainer = Trainer(
                max_steps=task.steps,
                max_epochs=-1,
                callbacks=[*callbacks, along],
                **{**QUIET, **task.trainer},
            )
            trainer.fit(task.module, loader)
        ended = time.perf_counter()
        outcome |= measures(task)
    histories = {type(monitor).__name__: [dict(row) for row in monitor.history] for monitor in callbacks}
    return {
        "outcome": outcome,
        "curve": along.curve,
        "losses": along.losses,
        "histories": histories,
        "findings": None if bare else diagnosed([row for rows in histories.values() for row in rows]),
        "seconds": ended - built,
        "build_seconds": built - began,
    }


def measures(task: Task) -> Measures:
    """Return everything that the task measures of its module as it is now."""
    return {**task.outcome(task.module), **task.examine(task.module)}


def watchers(task: Task) -> list[Any]:
    """Return the monitors as a user would add them."""
    from lightning_sym.callbacks import EigenmodeMonitor, monitors

    chosen: list[Any] = list(monitors("standard", every_n_steps=EVERY_N_STEPS, targets=task.targets))
    if task.embeds:
        chosen.append(EigenmodeMonitor(every_n_steps=EVERY_N_STEPS, picture=False))
    return chosen


def diagnosed(history: list[dict[str, float]]) -> list[dict[str, Any]] | None:
    """Return the findings of a history as plain dicts, or None where there is no diagnosis to ask."""
    try:
        diagnosis = importlib.import_module("lightning_sym.diagnosis")
    except ModuleNotFoundError as error:
        if error.name != "lightning_sym.diagnosis":
            raise
        return None
    return [dataclasses.asdict(finding) for finding in diagnosis.diagnose_run(history)]


def judge(case: Case, record: Mapping[str, Any], control: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the case's truth: every check, whether all hold, and when a gradual sickness showed."""
    verdict = case.verdict(record["outcome"], None if control is None else control["outcome"])
    left = None
    if case.leaves is not None and control is not None:
        left = leaving_step(case.leaves, record["curve"], control["curve"])
    return {"holds": all(check["holds"] for check in verdict), "checks": verdict, "leaves": left}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's advice and warnings on small runs off the screen."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
