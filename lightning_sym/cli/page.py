"""Pages that need nothing but themselves: no script of others, no request, every name escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from lightning_sym.diagnosis import Finding, WeightsReport

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#5d6672;--line:#d5dae0;--back:#fff;--card:#f6f8fa}
@media(prefers-color-scheme:dark){
:root{--ink:#e6e9ed;--soft:#9aa4b0;--line:#3a424c;--back:#14181d;--card:#1d232a}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:1080px;
margin:2rem auto;padding:0 1rem}
h1{font-size:1.3rem}h2{font-size:1.05rem;margin-top:1.8rem}
.verdict{font-size:1.1rem;padding:.7rem 1rem;border-left:5px solid #2e8b57;background:var(--card)}
.verdict.alarm{border-color:#c0392b}.verdict.warning{border-color:#d68910}
.finding{border:1px solid var(--line);border-left:5px solid var(--soft);padding:.5rem .9rem;margin:.6rem 0}
.finding.alarm{border-left-color:#c0392b}.finding.warning{border-left-color:#d68910}
.finding p{margin:.2rem 0}.soft{color:var(--soft)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.15rem .8rem .15rem 0;text-align:right;border-bottom:1px solid var(--line)}
td:first-child,th:first-child{text-align:left}
svg text{fill:var(--ink);font:11px system-ui,sans-serif}
.chart{margin:.8rem 0}figure{margin:1rem 0}figcaption{color:var(--soft);font-size:.9rem}
@media print{details{display:block}.finding,.chart,figure{break-inside:avoid}}
"""


def document(title: str, body: str, *, script: str = "", style: str = "") -> str:
    """Return a whole page that may load nothing from anywhere.

    Args:
        title: plain text.
        body: HTML whose names are escaped already.
        script: inline script; where there is none, none may run.
        style: more style than the usual.
    """
    scripts = " script-src 'unsafe-inline';" if script else ""
    policy = f"default-src 'none'; style-src 'unsafe-inline';{scripts} img-src data:"
    tail = f"<script>{script}</script>" if script else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head>"
        f"<body>{body}{tail}</body></html>\n"
    )


def verdict_block(text: str, findings: Sequence[Finding]) -> str:
    """Return the verdict, coloured by the worst level.

    Args:
        text: the verdict.
        findings: what it is of.
    """
    levels = {finding.level for finding in findings}
    worst = next((level for level in ("alarm", "warning") if level in levels), "")
    return f'<p class="verdict {worst}">{html.escape(text)}</p>'


def finding_block(finding: Finding) -> str:
    """Return one finding: what, where, since when, the number and its limit, cause and remedy.

    Args:
        finding: any.
    """
    where = f" in <b>{html.escape(finding.layer)}</b>" if finding.layer else ""
    since = f", since step {finding.step}" if finding.step else ""
    number = f"value {finding.value:.3g}, limit {finding.limit:.3g}{since}"
    return (
        f'<div class="finding {finding.level}"><p><b>{finding.level}: {html.escape(finding.kind)}</b>{where} '
        f'<span class="soft">({number})</span></p><p>{html.escape(finding.message)}</p>'
        f'<p class="soft">Cause: {html.escape(finding.cause)}. {html.escape(finding.remedy)}</p></div>'
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table, or nothing where it has no rows.

    Args:
        head: its columns.
        rows: cells, shown as text.
    """
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    if not body:
        return ""
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def findings_page(title: str, verdict: str, report: WeightsReport) -> str:
    """Return the page that ``diagnose --html`` writes.

    Args:
        title: what was looked at.
        verdict: in one line.
        report: what was found.
    """
    rows = [
        (
            facts.name,
            f"{facts.units} x {facts.shape[2]}",
            f"{facts.rank} of {facts.random_rank}",
            f"{facts.effective_rank:.1f} of {facts.random_effective_rank:.1f}",
            f"{facts.size:.2g}",
        )
        for facts in report.layers
        if facts.random_rank
    ]
    ranks = table(("layer", "units x inputs", "rank", "effective rank", "size"), rows)
    found = "".join(map(finding_block, report.findings)) or "<p>Nothing was found.</p>"
    mirrors = [(on.kind, on.path, on.units, on.of) for on in report.mirrors.occupied()]
    where = table(("mirror", "where", "units on it", "of"), mirrors)
    if report.mirrors.symmetries is None:
        where = f"<p>Symmetries not looked for: {html.escape(report.mirrors.why)}.</p>"
    body = (
        f"<h1>{html.escape(title)}</h1>{verdict_block(verdict, report.findings)}<h2>Findings</h2>{found}"
        f"<h2>Units on mirrors</h2>{where or '<p>None.</p>'}"
        f"<h2>Rank against a random matrix of the shape</h2>{ranks or '<p>No weight is such a matrix.</p>'}"
    )
    return document(title, body)
