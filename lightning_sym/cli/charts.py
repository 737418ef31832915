"""Charts as inline SVG: a line with events, and layers by time as heat strips."""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence

from lightning_sym.observe.layers import evenly

Pixel = tuple[int, int, int, int]

#: From the low end of a strip to the high one (colours told apart by brightness too).
_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
LINE_COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#c0392b", "#8c6d31")
LEVEL_COLOURS = {"alarm": "#c0392b", "warning": "#d68910"}
POINTS = 160
#: Most layers of a strip, and the colour of what is not finite.
ROWS = 48
NOT_FINITE: Pixel = (224, 0, 0, 255)


def thinned(curve: Mapping[int, float], most: int = POINTS) -> list[tuple[int, float]]:
    """Return at most that many points of a curve: the first, the last and an even spread between.

    Args:
        curve: values by step.
        most: at least 2.
    """
    points = list(curve.items())
    return [points[i] for i in evenly(len(points), most)]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers between two.

    Args:
        low: the smaller.
        high: the larger.
        about: how many.

    Example:
        >>> ticks(0.15, 2.4)
        [0.5, 1.0, 1.5, 2.0]
    """
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def line_chart(
    curves: Mapping[str, Mapping[int, float]], events: Sequence[tuple[int, str, str]], *, label: str
) -> str:
    """Return curves over steps with events as vertical lines.

    Args:
        curves: by name; values that are not finite leave gaps.
        events: steps, each with a level (``alarm``, ``warning``, ``note``) and a word.
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
    for value in ticks(low, high):
        parts.append(
            f'<line x1="{left}" x2="{width - 12}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#8884"/>'
            f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.6g}</text>'
        )
    for step in ticks(0, last):
        parts.append(
            f'<text x="{x(step):.1f}" y="{height - bottom + 16}" text-anchor="middle">{step:.6g}</text>'
        )
    for i, (name, curve) in enumerate(curves.items()):
        colour = LINE_COLOURS[i % len(LINE_COLOURS)]
        for piece in _pieces(thinned(curve)):
            path = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in piece)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        place = left + 8 + 150 * i
        parts.append(f'<text x="{place}" y="14" style="fill:{colour}">{html.escape(name[:24])}</text>')
    for i, (step, level, word) in enumerate(events):
        colour = LEVEL_COLOURS.get(level, "#888")
        near = step > 0.7 * last  # a word at the right edge stands to the left of its line
        at = f"{x(step):.1f}"
        parts.append(
            f'<line x1="{at}" x2="{at}" y1="{top}" y2="{height - bottom}" stroke="{colour}" '
            f'stroke-dasharray="4 3"><title>{html.escape(word)} at step {step}</title></line>'
            f'<text x="{x(step) + (-4 if near else 4):.1f}" y="{top + 12 + 13 * (i % 5)}" '
            f'text-anchor="{"end" if near else "start"}" style="fill:{colour}">{html.escape(word)}</text>'
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


def heat_strips(
    layers: Mapping[str, Mapping[int, float]],
    *,
    title: str,
    steps: Iterable[int] = (),
    columns: int = 120,
    logarithmic: bool = False,
    limits: tuple[float, float] | None = None,
) -> str:
    """Return layers by time: a row a layer, brighter is higher, one scale for all.

    The cells are one small picture, so that the page's size hardly depends on their number.

    Args:
        layers: values by step of each layer, in order; what is not finite is red, what is missing empty.
        title: what the values are.
        steps: at which other strips of the run have values, so that all have one time axis.
        columns: most points in time.
        logarithmic: colour by the logarithm; what is not above 0 is empty.
        limits: the ends of the scale, the same for several runs; None: those of the values.
    """
    if logarithmic:
        layers = {
            name: {
                step: math.log10(value) if math.isfinite(value) else value
                for step, value in curve.items()
                if value > 0 or not math.isfinite(value)
            }
            for name, curve in layers.items()
        }
        limits = None if limits is None else (math.log10(limits[0]), math.log10(limits[1]))
    own = {step for curve in layers.values() for step in curve}
    every = dict.fromkeys(sorted(own | set(steps)), 0.0)
    shown = [step for step, _ in thinned(every, columns)]
    values = [v for curve in layers.values() for v in curve.values() if math.isfinite(v)]
    if not values:
        return ""

    def said_of(value: float) -> str:
        return f"{10**value:.1e}" if logarithmic else f"{value:.3g}"

    names = [list(layers)[i] for i in evenly(len(layers), ROWS)]
    if len(names) < len(layers):
        title = f"{title} ({len(names)} of {len(layers)} layers)"
    low, high = limits or (min(values), max(values))
    left, row, top, width = 190, 15, 4, 720
    foot = top + row * len(names) + 18
    parts = []
    for i, name in enumerate(names):
        short = name if len(name) <= 28 else "..." + name[-25:]
        said = ", ".join(said_of(value) for _, value in thinned(layers[name], 2))
        parts.append(
            f'<text x="{left - 6}" y="{top + row * i + 11}" text-anchor="end">{html.escape(short)}'
            f"<title>{html.escape(name)}: {said}</title></text>"
        )
    cells = [[_colour(layers[name].get(step), low, high) for step in shown] for name in names]
    scale = [[_colour(float(i), 0.0, 24.0) for i in range(25)]]
    parts.append(_picture(cells, left, top, width - left - 8, row * len(names)))
    parts.append(_picture(scale, left + 130, foot - 9, 200, 10))
    parts.append(
        f'<text x="{left}" y="{foot}">step {shown[0]}</text>'
        f'<text x="{width - 8}" y="{foot}" text-anchor="end">step {shown[-1]}</text>'
        f'<text x="{left + 124}" y="{foot}" text-anchor="end">{said_of(low)}</text>'
        f'<text x="{left + 336}" y="{foot}">{said_of(high)}</text>'
    )
    svg = f'<svg role="img" viewBox="0 0 {width} {foot + 8}" width="100%">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>"


def _picture(cells: Sequence[Sequence[Pixel]], x: float, y: float, width: float, height: float) -> str:
    data = base64.b64encode(png(cells)).decode()
    return (
        f'<image x="{x}" y="{y}" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{data}"/>'
    )


def png(cells: Sequence[Sequence[Pixel]]) -> bytes:
    """Return a picture as a PNG file.

    Args:
        cells: rows of ``(red, green, blue, opacity)``, 0 to 255.
    """

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", len(cells[0]), len(cells), 8, 6, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(value for pixel in row for value in pixel) for row in cells)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def _colour(value: float | None, low: float, high: float) -> Pixel:
    if value is None:
        return (0, 0, 0, 0)
    if not math.isfinite(value):
        return NOT_FINITE
    place = (value - low) / (high - low) * (len(_COLOURS) - 1) if high > low else 0.0
    i = min(int(place), len(_COLOURS) - 2)
    red, green, blue = (
        round(p + (q - p) * (place - i)) for p, q in zip(_COLOURS[i], _COLOURS[i + 1], strict=True)
    )
    return (red, green, blue, 255)
