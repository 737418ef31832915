"""Charts as inline SVG: a line with events, and layers by time as heat strips."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

#: From the low end of a strip to the high one (colours told apart by brightness too).
_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
LINE_COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#c0392b", "#8c6d31")
POINTS = 160


def thinned(curve: Mapping[int, float], most: int = POINTS) -> list[tuple[int, float]]:
    """Return at most that many points of a curve: the first, the last and an even spread between.

    Args:
        curve: values by step.
        most: at least 2.
    """
    points = list(curve.items())
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def line_chart(
    curves: Mapping[str, Mapping[int, float]], events: Sequence[tuple[int, str]], *, label: str
) -> str:
    """Return curves over steps with events as vertical lines.

    Args:
        curves: by name; values that are not finite leave gaps.
        events: steps with a word each.
        label: of the vertical axis.
    """
    width, height, left, bottom, top = 720, 240, 84, 34, 26
    finite = [(s, v) for curve in curves.values() for s, v in curve.items() if math.isfinite(v)]
    if not finite:
        return ""
    last = max(1, *(step for curve in curves.values() for step in curve))
    low, high = min(v for _, v in finite), max(v for _, v in finite)
    if high - low < 0.05 * max(abs(high), 1e-12):  # a flat curve is shown flat
        low, high = low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1)

    def x(step: float) -> float:
        return left + (width - left - 12) * step / last

    def y(value: float) -> float:
        return top + (height - top - bottom) * (high - value) / (high - low)

    parts = []
    for i in range(5):
        value, step = low + (high - low) * i / 4, last * i / 4
        parts.append(
            f'<line x1="{left}" x2="{width - 12}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#8884"/>'
            f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
            f'<text x="{x(step):.1f}" y="{height - bottom + 16}" text-anchor="middle">{step:.0f}</text>'
        )
    for i, (name, curve) in enumerate(curves.items()):
        colour = LINE_COLOURS[i % len(LINE_COLOURS)]
        for piece in _pieces(thinned(curve)):
            path = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in piece)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        place = left + 8 + 150 * i
        parts.append(f'<text x="{place}" y="14" style="fill:{colour}">{html.escape(name[:24])}</text>')
    for step, word in events:
        parts.append(
            f'<line x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{top}" y2="{height - bottom}" stroke="#c0392b" '
            f'stroke-dasharray="4 3"><title>{html.escape(word)} at step {step}</title></line>'
        )
    parts.append(f'<text x="{width / 2}" y="{height - 2}" text-anchor="middle">optimizer step</text>')
    parts.append(
        f'<text transform="translate(12 {height / 2}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(label)}</text>"
    )
    return f'<svg class="chart" role="img" viewBox="0 0 {width} {height}" width="100%">{"".join(parts)}</svg>'


def _pieces(points: Sequence[tuple[int, float]]) -> list[list[tuple[int, float]]]:
    pieces: list[list[tuple[int, float]]] = [[]]
    for step, value in points:
        if math.isfinite(value):
            pieces[-1].append((step, value))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def heat_strips(layers: Mapping[str, Mapping[int, float]], *, title: str, columns: int = 60) -> str:
    """Return layers by time: a row a layer in the log's order, brighter is higher, one scale for all.

    Args:
        layers: values by step of each layer; what is not finite is hatched red, what is missing stays empty.
        title: what the values are.
        columns: most points in time.
    """
    steps = [
        step
        for step, _ in thinned(dict.fromkeys(sorted({s for c in layers.values() for s in c}), 0.0), columns)
    ]
    values = [v for curve in layers.values() for v in curve.values() if math.isfinite(v)]
    if not values or not steps:
        return ""
    low, high = min(values), max(values)
    left, row, top, width = 190, 15, 4, 720
    cell = (width - left - 8) / len(steps)
    height = top + row * len(layers) + 38
    parts = []
    for i, (name, curve) in enumerate(layers.items()):
        y = top + row * i
        shown = name if len(name) <= 28 else "..." + name[-25:]
        parts.append(f'<text x="{left - 6}" y="{y + 11}" text-anchor="end">{html.escape(shown)}</text>')
        cells = []
        for j, step in enumerate(steps):
            value = curve.get(step)
            if value is not None:
                fill = _colour(value, low, high)
                cells.append(
                    f'<rect x="{left + cell * j:.1f}" y="{y}" width="{cell + 0.3:.1f}" height="{row - 2}" '
                    f'fill="{fill}"/>'
                )
        said = ", ".join(f"{value:.3g}" for _, value in (thinned(curve, 2)))
        parts.append(f"<g><title>{html.escape(name)}: {said}</title>{''.join(cells)}</g>")
    foot = height - 20
    parts.append(f'<text x="{left}" y="{foot}">step {steps[0]}</text>')
    parts.append(f'<text x="{width - 8}" y="{foot}" text-anchor="end">step {steps[-1]}</text>')
    scale = "".join(
        f'<rect x="{left + 130 + 8 * i}" y="{foot - 9}" width="8" height="10" fill="{_colour(i, 0, 24)}"/>'
        for i in range(25)
    )
    parts.append(
        f'{scale}<text x="{left + 124}" y="{foot}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{left + 336}" y="{foot}">{high:.3g}</text>'
    )
    svg = f'<svg role="img" viewBox="0 0 {width} {height}" width="100%">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>"


def _colour(value: float, low: float, high: float) -> str:
    if not math.isfinite(value):
        return "#e00000"
    place = (value - low) / (high - low) * (len(_COLOURS) - 1) if high > low else 0.0
    i = min(int(place), len(_COLOURS) - 2)
    a, b = _COLOURS[i], _COLOURS[i + 1]
    return "#" + "".join(f"{round(p + (q - p) * (place - i)):02x}" for p, q in zip(a, b, strict=True))
