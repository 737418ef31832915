"""``lightning-sym report``: one self-contained page of one or several runs' logs."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_sym import diagnosis
from lightning_sym.cli import Refused
from lightning_sym.cli.charts import LINE_COLOURS, heat_strips, line_chart, thinned
from lightning_sym.cli.logs import STRIPS, Run, loss_of, read_runs, strips_of
from lightning_sym.cli.page import document, finding_block, verdict_block
from lightning_sym.cli.words import verdict
from lightning_sym.diagnosis import Finding
from lightning_sym.diagnosis.finding import LEVELS

VENDOR = Path(__file__).parent / "vendor" / "uplot"
#: Findings of a run that are told; bytes of raw curves on a page, of about 300 kB in all.
TOLD, CURVE_BYTES = 5, 150_000
_STYLE = """
.runs{display:grid;gap:2rem;grid-template-columns:repeat(auto-fit,minmax(min(460px,100%),1fr))}
body{max-width:1240px}summary{cursor:pointer;font-weight:600;margin:1rem 0}
.curves{display:grid;gap:.5rem;grid-template-columns:repeat(auto-fill,minmax(380px,1fr))}
.u-title{font-size:12px!important}
"""
_SCRIPT = """
(() => {
  const data = JSON.parse(document.getElementById("curves").textContent);
  const box = document.querySelector("details"), sync = uPlot.sync("step");
  const ink = getComputedStyle(document.body).color;
  const axis = {stroke: ink, grid: {stroke: "#8883"}, ticks: {stroke: "#8883"}};
  const draw = () => {
    if (!box.open || box.dataset.drawn) return;
    box.dataset.drawn = "1";
    const place = box.querySelector(".curves");
    for (const [key, lines] of Object.entries(data.curves)) {
      const names = Object.keys(lines);
      const tables = names.map(name => [lines[name][0], lines[name][1]]);
      const one = document.createElement("div");
      place.append(one);
      new uPlot({
        title: key, width: 380, height: 190, cursor: {sync: {key: sync.key}},
        scales: {x: {time: false}}, axes: [axis, {...axis, size: 62}],
        series: [{label: "step"}, ...names.map(name => ({
          label: name, stroke: data.colours[name], width: 1.4, spanGaps: false}))],
      }, uPlot.join(tables), one);
    }
  };
  box.addEventListener("toggle", draw);
  draw();
})();
"""
_DESCRIPTION = """\
Make one self-contained page of finished runs: verdict, findings, layers by time, loss with events, and every
raw curve folded below. It asks no server for anything, and opens offline."""


def run(argv: Sequence[str]) -> int:
    """Run the verb; return the exit code.

    Args:
        argv: arguments after the verb.

    Raises:
        Refused: if there is nothing to show, or the page can't be written.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="lightning-sym report", description=_DESCRIPTION)
    parser.add_argument(
        "logdir", nargs="+", type=str, help="folders of TensorBoard or CSV logs, or histories as JSON"
    )
    parser.add_argument("--out", type=str, default="report.html", metavar="PAGE.html", help="the page")
    options = parser.parse_args(list(argv))
    runs = read_runs([Path(name) for name in options.logdir])
    text = page(runs)
    try:
        Path(options.out).write_text(text, encoding="utf-8")
    except OSError as error:
        raise Refused(f"--out {options.out} can't be written: {error}") from error
    print(f"{options.out}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {len(text) / 1000:.0f} kB")  # noqa: T201
    return 0


def page(runs: Sequence[Run]) -> str:
    """Return the page of some runs.

    Args:
        runs: at least one.
    """
    names = _short([run.name for run in runs])
    scales = _scales(runs)
    sections = "".join(_section(run, name, scales) for run, name in zip(runs, names, strict=True))
    data, left_out = _raw(runs, names)
    more = f" {left_out} more did not fit on the page." if left_out else ""
    folded = (
        f"<details><summary>All curves ({len(data['curves'])})</summary>"
        f'<p class="soft">Over optimizer steps made; the cursor is shared.{more}</p>'
        '<div class="curves"></div></details>'
        f'<script id="curves" type="application/json">{_json(data)}</script>'
    )
    title = names[0] if len(names) == 1 else f"{len(names)} runs"
    body = f'<h1>Report: {html.escape(title)}</h1><div class="runs">{sections}</div>{folded}'
    plot = (VENDOR / "uPlot.iife.min.js").read_text(encoding="utf-8")
    style = _STYLE + (VENDOR / "uPlot.min.css").read_text(encoding="utf-8")
    licence = (VENDOR / "LICENSE").read_text(encoding="utf-8").replace("*/", "* /")
    return document(
        f"Report: {title}", body, script=f"/*! uPlot\n{licence}*/\n{plot}\n{_SCRIPT}", style=style
    )


def findings_of(run: Run) -> list[Finding]:
    """Return what the rules find in a run's curves, alarms first.

    Args:
        run: any.
    """
    found = diagnosis.diagnose_run(run.rows())
    return sorted(found, key=lambda finding: (-LEVELS.index(finding.level), finding.step))


def _scales(runs: Sequence[Run]) -> dict[str, tuple[float, float]]:
    """Return the ends of each strip's scale: one for all runs; shares from 0 to 1."""
    values: dict[str, list[float]] = {}
    for run in runs:
        for family, layers in strips_of(run).items():
            found = [v for curve in layers.values() for v in curve.values() if math.isfinite(v)]
            kept = [v for v in found if v > 0] if STRIPS.get(family) else found
            values.setdefault(family, []).extend(kept)
    ends = {family: (min(found), max(found)) for family, found in values.items() if found}
    return {
        family: (0.0, 1.0) if family.endswith("_units") and span[1] <= 1 else span
        for family, span in ends.items()
    }


def _section(run: Run, name: str, scales: Mapping[str, tuple[float, float]]) -> str:
    told = findings_of(run)
    blocks = "".join(map(finding_block, told[:TOLD]))
    if len(told) > TOLD:
        blocks += f'<p class="soft">and {len(told) - TOLD} more</p>'
    loss = loss_of(run)
    events = [(finding.step, finding.level, finding.kind) for finding in told[:TOLD] if finding.step]
    if loss is not None:
        bad = (step for step, value in run.curves[loss].items() if not math.isfinite(value))
        events += [(step, "alarm", "the loss is not finite") for step in [*bad][:1]]
    chart = line_chart({loss: run.curves[loss]}, events, label="loss") if loss is not None else ""
    families = strips_of(run)
    steps = {step for layers in families.values() for curve in layers.values() for step in curve}
    strips = "".join(
        heat_strips(
            layers,
            title=family + (", on a logarithmic scale" if STRIPS.get(family) else ""),
            steps=steps,
            logarithmic=STRIPS.get(family, False),
            limits=scales.get(family),
        )
        for family, layers in families.items()
    )
    broken = [key for key, curve in run.curves.items() if any(not math.isfinite(v) for v in curve.values())]
    gaps = f'<p class="soft">Not finite somewhere: {html.escape(", ".join(broken[:6]))}</p>' if broken else ""
    return (
        f"<section><h2>{html.escape(name)}</h2>{verdict_block(verdict(told), told)}{blocks}{chart}{gaps}"
        f"{strips or '<p class=soft>No reading by layer was logged.</p>'}</section>"
    )


def _raw(runs: Sequence[Run], names: Sequence[str]) -> tuple[dict[str, Any], int]:
    """Return the curves that fit, by key and run, and how many keys did not."""
    keys = list(dict.fromkeys(key for run in runs for key in run.curves))
    keys.sort(key=lambda key: ("loss" not in key.lower(), key.count("/")))
    curves: dict[str, Any] = {}
    room = CURVE_BYTES
    for key in keys:
        lines = {}
        for run, name in zip(runs, names, strict=True):
            if points := thinned(run.curves.get(key, {})):
                values = [float(f"{value:.4g}") if math.isfinite(value) else None for _, value in points]
                lines[name] = [[step for step, _ in points], values]
        room -= len(_json(lines)) + len(key)
        if room < 0:
            break
        curves[key] = lines
    colours = {name: LINE_COLOURS[i % len(LINE_COLOURS)] for i, name in enumerate(names)}
    return {"curves": curves, "colours": colours}, len(keys) - len(curves)


def _json(value: Any) -> str:
    """Return JSON that can stand in a script element, whatever its names hold."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _short(names: Sequence[str]) -> list[str]:
    """Return the names without the folders that all share; each its own."""
    parts = [Path(name).parts for name in names]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    short = ["/".join(part[shared:]) for part in parts]
    return [name if short.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(short)]
