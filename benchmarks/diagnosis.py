"""What does the Diagnosis callback cost a probe? Its processor time over that of a step beside it.

    python benchmarks/diagnosis.py

A timm ResNet-18 at 32x32 with the standard monitors, one thread. Each probe's share is of the plain steps
before and after it. How it grows with the history is read off the same fit's rows, at later steps again.
Processor time is taken: others who use the machine then count little. The overview picture, drawn where a
logger takes figures after 1, 2, 4, 8, ... readings, is left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import spread, write_json
from lightning.pytorch import Callback, Trainer
from overhead import Fit, resnet
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_sym.callbacks import Diagnosis, monitors
from lightning_sym.diagnosis import diagnose_course
from lightning_sym.diagnosis.course import Course
from lightning_sym.observe import Observation, Reading

RESULT = Path(__file__).parents[1] / "docs" / "results" / "diagnosis_cost.json"


class Timed(Diagnosis):
    """Notes the processor time of each reading, by step."""

    spent: dict[int, float]

    @override
    def read(self, seen: Observation) -> Iterator[Reading]:
        began = time.process_time()
        found = list(super().read(seen))
        self.spent[seen.step] = time.process_time() - began
        yield from found


class Steps(Callback):
    """Notes the processor time from the end of a step to that of the next, by step."""

    def __init__(self) -> None:
        self.last, self.spent = time.process_time(), dict[int, float]()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop the clock and start it anew."""
        now = time.process_time()
        self.spent[trainer.global_step] = now - self.last
        self.last = now


def fit(steps: int, every: int, batch: int) -> tuple[dict[int, float], dict[int, float], list[Any]]:
    """Fit once; return the seconds of probes and of steps, and the other monitors' histories."""
    torch.manual_seed(0)
    net, data = resnet(batch)
    others = list(monitors("standard", every_n_steps=every))[:-1]
    watch, clock = Timed(every_n_steps=every), Steps()
    watch.spent = {}
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*others, watch, clock],
    )
    trainer.fit(Fit(net), DataLoader(data, batch_size=batch))
    return watch.spent, clock.spent, [monitor.history for monitor in others]


def repeated(histories: list[Any], readings: int) -> Course:
    """Return a course of so many readings, made of those that there are."""
    course = Course()
    steps = sorted({row["step"] for history in histories for row in history})
    by_step = {
        step: [row for history in histories for row in history if row["step"] == step] for step in steps
    }
    for at in range(readings):
        for row in by_step[steps[at % len(steps)]]:
            for key, value in row.items():
                if key not in ("step", "fit"):
                    course.add(key, 1 + 20 * at, value)
    return course


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=21)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--readings", type=int, nargs="+", default=[10, 100, 1000, 5000])
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    probes, steps, histories = fit(options.steps, options.every, options.batch)
    shares, plain = [], []
    for step, seconds in probes.items():
        # The first steps warm up; the step after a probe is plain, as is the one before.
        beside = [steps[s] for s in (step - 1, step + 1) if s in steps and s not in probes and s > 2]
        if beside and step > 2:
            plain += beside
            shares.append(seconds / statistics.mean(beside))
    step = statistics.median(plain)
    growth = {}
    for readings in options.readings:
        course, spent = repeated(histories, readings), []
        for _ in range(5):
            began = time.process_time()
            diagnose_course(course)
            spent.append((time.process_time() - began) / step)
        growth[str(readings)] = spread(spent)
    results = {"of_a_step": spread(shares), "step_seconds": spread(plain), "rules_of_a_step": growth}
    config = {"steps": options.steps, "every": options.every, "batch": options.batch}
    write_json(options.out, config=config, results=results)
    print(results)


if __name__ == "__main__":
    main()
