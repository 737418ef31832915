"""Sick or healthy? The other monitors' readings as findings, while training goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

from typing_extensions import override

from lightning_sym.callbacks.base import Monitor
from lightning_sym.diagnosis import RULES, Finding, diagnose_course, diagnose_run
from lightning_sym.diagnosis.course import Course
from lightning_sym.engine.history import LAST_ROWS, Keep
from lightning_sym.engine.run import Run
from lightning_sym.engine.schedule import Schedule
from lightning_sym.observe import Observation, Reading

KINDS = tuple(rule.__name__ for rule in RULES)


class Diagnosis(Monitor):
    """Reads what the monitors beside it have read, says what is wrong and, if asked to, ends the fit.

    It reads after all others. A finding is told once, as text and in the log of rank 0, with the step it
    began; a summary of the whole history follows at the end of the fit.

    Logs:
        ``findings/alarms``, ``findings/warnings``: how many findings of that level stand now, at least 0.
        ``findings/text`` (text): new findings, one a line; only where there are some.
        ``findings/overview`` (picture): :func:`~lightning_sym.plots.overview`; only where a finding is new,
            after 1, 2, 4, 8, ... readings and at the end of the fit, if something has been read.

    Args:
        every_n_steps: an interval in optimizer steps, or a schedule. Step 1 is always due.
        stop_on: kinds of finding; an alarm of one of them ends the fit after the step
            (``trainer.should_stop``; in a plain loop ``watching.stop``).
        picture: draw the overview for loggers that take figures.
        keep: rows of :attr:`history` that a checkpoint holds, or a folder for it
            (:class:`~lightning_sym.callbacks.base.Monitor`).
        name: first part of its keys instead of ``findings``.
        strict: raise what goes wrong in here instead of warning once and going on.

    Attributes:
        findings: those that stand at the last reading.

    Raises:
        ValueError: if an argument is out of its range, or ``stop_on`` names a kind that there is not.
    """

    quantity: ClassVar[str] = "findings"
    reads_monitors = True

    def __init__(
        self,
        *,
        every_n_steps: int | Schedule = 100,
        stop_on: Sequence[str] = (),
        picture: bool = True,
        keep: Keep = LAST_ROWS,
        name: str | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, keep=keep, name=name, strict=strict)
        if isinstance(stop_on, str) or any(kind not in KINDS for kind in stop_on):
            raise ValueError(f"stop_on must be a list of kinds among {KINDS}, got {stop_on!r}")
        self.stop_on, self.picture = list(stop_on), picture
        self.findings: list[Finding] = []
        self._forget()

    def _forget(self) -> None:
        self._course = Course()
        self._taken: dict[Any, Any] = {}
        self._run: Run | None = None
        self._others: list[Any] = []

    @override
    def begin_run(self) -> None:
        super().begin_run()
        self.findings = []
        self._forget()

    @override
    def read(self, seen: Observation) -> Iterator[Reading]:
        self._run, self._others = seen.run, seen.others
        for monitor in seen.others:
            self._take(monitor)
        self.findings = diagnose_course(self._course)
        for level in ("alarm", "warning"):
            yield Reading("", f"{level}s", float(sum(f.level == level for f in self.findings)))
        told = seen.state.setdefault("told", [])
        new = [f for f in self.findings if f.level != "note" and f"{f.kind}/{f.layer}" not in told]
        for finding in new:
            told.append(f"{finding.kind}/{finding.layer}")
            seen.run.tell(f"lightning_sym at step {seen.step}: {finding}")
        if new:
            yield Reading("", "text", "  \n".join(str(finding) for finding in new))
        seen.state["readings"] = count = seen.state.get("readings", 0) + 1
        rows = self._rows() if self.picture and (new or count & (count - 1) == 0) else []
        if rows:
            yield Reading("", "overview", partial(_draw, rows, self.findings))
        if any(f.level == "alarm" and f.kind in self.stop_on for f in self.findings):
            seen.run.stop()

    def _take(self, monitor: Any) -> None:
        """Add to the course what a monitor has read since; of this fit alone."""
        history = monitor.history
        for row in history[self._taken.get(id(monitor), 0) :]:
            if row.get("fit") == monitor.fit:
                for key, value in row.items():
                    if key not in ("step", "fit"):
                        self._course.add(key, int(row["step"]), value)
        self._taken[id(monitor)] = len(history)

    def _rows(self) -> list[dict[str, float]]:
        """Return the rows of this fit."""
        return [row for each in self._others for row in each.history if row.get("fit") == each.fit]

    @override
    def end_run(self) -> None:
        run = self._run
        if run is not None:
            found = diagnose_run([each.history for each in self._others])
            told = [str(finding) for finding in found if finding.level != "note"]
            count = f"{len(told)} finding{'s' if len(told) > 1 else ''}"
            head = f"lightning_sym after {run.step} steps: {count}" if told else ""
            run.tell("\n  ".join([head or f"lightning_sym after {run.step} steps: no finding", *told]))
            rows = self._rows() if self.picture else []
            if rows:
                picture = {f"{self.prefix}/overview": partial(_draw, rows, self.findings)}
                run.send({}, picture, run.logger_step)
        self._forget()


def _draw(rows: list[dict[str, float]], findings: list[Finding]) -> Any:
    from lightning_sym.plots import overview

    return overview(rows, findings=findings)
