"""curves.svg: the losses of a run as one picture that opens anywhere, without a network, a script or a font of its own.

The same history gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT = 900, 500
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 50, 85
_MAX_POINTS = 500
_COLORS = ("#4a7fb5", "#c8553d", "#5a9367", "#8a6fb0")

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Series:
    """A named line."""

    name: str
    points: Sequence[Point]
    dots: bool = False
    """Whether each point is marked: for lines of few points."""


def draw_curves(history: Iterable[Mapping[str, Any]], title: str) -> bytes:
    """The training and held-out loss over steps, as SVG.

    Parameters
    ----------
    history
        Lines of metrics.jsonl; ``loss`` and ``eval_loss`` in nats per token are drawn where they are.
    """
    lines = list(history)
    series = [
        Series("training", _points(lines, "loss")),
        Series("held out", _points(lines, "eval_loss"), dots=True),
    ]
    return draw_chart([one for one in series if one.points], title, "step", "loss, nats per token").encode()


def draw_chart(series: Sequence[Series], title: str, x_title: str, y_title: str) -> str:
    """A line chart as an SVG document, for a file of its own or the inside of an HTML page."""
    xs = [x for one in series for x, _ in one.points] or [0.0, 1.0]
    ys = [y for one in series for _, y in one.points] or [0.0, 1.0]
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = y_ticks[0], y_ticks[-1]
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def place(x: float, y: float) -> str:
        across = (x - x_low) / ((x_high - x_low) or 1.0)
        up = (y - y_low) / ((y_high - y_low) or 1.0)
        return f"{_LEFT + across * (right - _LEFT):.1f},{bottom - up * (bottom - _TOP):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        'font-family="sans-serif" font-size="13" fill="#333" role="img">',
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        _text(_WIDTH / 2, 28, title, size=17),
        _text((_LEFT + right) / 2, bottom + 42, x_title),
        f'<g transform="translate(20 {(_TOP + bottom) / 2:.0f}) rotate(-90)">{_text(0, 0, y_title)}</g>',
    ]
    for y in y_ticks:
        x1, y1 = place(x_low, y).split(",")
        parts.append(f'<line x1="{x1}" y1="{y1}" x2="{right}" y2="{y1}" stroke="#ddd"/>')
        parts.append(_text(_LEFT - 8, float(y1) + 4, _label(y, y_ticks), anchor="end"))
    for x in x_ticks:
        if x_low <= x <= x_high:
            x1, y1 = place(x, y_low).split(",")
            parts.append(f'<line x1="{x1}" y1="{y1}" x2="{x1}" y2="{float(y1) + 5:.1f}" stroke="#333"/>')
            parts.append(_text(float(x1), float(y1) + 20, _label(x, x_ticks)))
    parts.append(f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#333"/>')
    for index, one in enumerate(series):
        color = _COLORS[index % len(_COLORS)]
        places = [place(x, y) for x, y in one.points]
        parts.append(f'<polyline points="{" ".join(places)}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        if one.dots or len(places) == 1:
            dots = (dot.split(",") for dot in places)
            parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>' for x, y in dots]
        key = _LEFT + 10 + 170 * index
        parts.append(f'<rect x="{key}" y="{_HEIGHT - 25}" width="14" height="14" fill="{color}"/>')
        parts.append(_text(key + 20, _HEIGHT - 13, one.name, anchor="start"))
    parts.append("</svg>\n")
    return "\n".join(parts)


def _points(lines: list[Mapping[str, Any]], name: str) -> list[Point]:
    """(step, value), evenly thinned where there are very many; the last one is always among them."""
    points = [(float(line["step"]), float(line[name])) for line in lines if isinstance(line.get(name), float)]
    stride = max(1, -(-len(points) // _MAX_POINTS))
    kept = points[::stride]
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, five to ten of them, from at or below ``low`` to at or above ``high``."""
    span = (high - low) or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / 5))
    step = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= 8)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _label(value: float, ticks: Sequence[float]) -> str:
    """With as many decimals as tell neighbours apart."""
    step = ticks[1] - ticks[0]
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _text(x: float, y: float, text: str, size: int | None = None, anchor: str = "middle") -> str:
    font = "" if size is None else f' font-size="{size}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{font}>{escape(text)}</text>'
