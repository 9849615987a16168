"""Charts as SVG: lines over steps, bars, and curves.svg, in pictures that need no network, script or font of their own.

Every shape carries its colour as an attribute, so a picture opens anywhere, and a class, so that the style of a page can give it another
one (a dark page does). The same numbers give the same bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_MAX_POINTS = 300
_TREND_FROM = 60
_COLORS = ("#2b6cb0", "#c2512f", "#2f8058", "#7a5ba6", "#946c00", "#5b6770")
_DASHES = ("", "", "7 4", "2 4", "9 3 2 3", "1 3")

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Series:
    """A named line."""

    name: str
    points: Sequence[Point]
    dots: bool = False
    """Whether each point is marked: for lines of few points."""
    look: int | None = None
    """Number of its colour and dashes; its place among the lines unless given. Two of one number differ by their dots."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """A place on the x axis with a sign above it: where an alarm was raised."""

    x: float
    sign: str
    """A character or two."""


@dataclasses.dataclass(frozen=True)
class Level:
    """A horizontal line to compare with: chance, a target, a baseline."""

    y: float
    name: str


@dataclasses.dataclass(frozen=True)
class Frame:
    """Size of a picture and what its text takes, in units of its view box."""

    width: float = 900
    height: float = 500
    font: float = 13

    @property
    def left(self) -> float:
        """Of the plot: room for the numbers of the y axis and its title."""
        return 5.4 * self.font

    @property
    def right(self) -> float:
        """Of the plot."""
        return self.width - 1.5 * self.font


WIDE = Frame()
"""For a file of its own and for the whole width of a page."""
SMALL = Frame(440, 262, 11.5)
"""For two beside each other, and for a phone."""


def draw_curves(history: Iterable[Mapping[str, Any]], title: str) -> bytes:
    """The training and held-out loss over steps, as SVG.

    Parameters
    ----------
    history
        Lines of metrics.jsonl; ``loss`` and ``eval_loss`` in nats per token are drawn where they are.
    """
    lines = list(history)
    series = [
        Series("training", points_of(lines, "loss")),
        Series("held out", points_of(lines, "eval_loss"), dots=True),
    ]
    return draw_chart([one for one in series if one.points], title, "step", "loss, nats per token").encode()


def points_of(lines: Iterable[Mapping[str, Any]], name: str, x: str = "step") -> list[Point]:
    """(x, value) of the lines of metrics.jsonl that have both as finite numbers."""
    found = []
    for line in lines:
        across, value = finite(line.get(x)), finite(line.get(name))
        if across is not None and value is not None:
            found.append((across, value))
    return found


def finite(value: object) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def thinned(points: Sequence[Point], limit: int = _MAX_POINTS) -> list[Point]:
    """At most ``limit`` of the points, and about: the first, the last, and of each stretch the lowest and the highest, so no peak is lost."""
    if len(points) <= limit:
        return list(points)
    stretches = (limit - 2) // 2
    kept = {0, len(points) - 1}
    for number in range(stretches):
        stretch = range(len(points) * number // stretches, len(points) * (number + 1) // stretches)
        kept.add(min(stretch, key=lambda index: points[index][1]))
        kept.add(max(stretch, key=lambda index: points[index][1]))
    return [points[index] for index in sorted(kept)]


def trend(points: Sequence[Point]) -> list[Point]:
    """The centred moving average over about a twentieth of the points; narrower near the ends, so that both ends are points themselves."""
    half = max(1, len(points) // 40)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    smooth = []
    for index, (x, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        first, stop = index - reach, index + reach + 1
        smooth.append((x, (sums[stop] - sums[first]) / (stop - first)))
    return smooth


def draw_chart(
    series: Sequence[Series],
    title: str,
    x_title: str,
    y_title: str,
    *,
    frame: Frame = WIDE,
    marks: Sequence[Mark] = (),
    levels: Sequence[Level] = (),
    y_top: float | None = None,
    heading: bool = True,
) -> str:
    """A line chart as an SVG document, for a file of its own or the inside of an HTML page.

    Parameters
    ----------
    series
        Lines of many points are drawn thin, with their moving average over them.
    marks, levels
        What to point out on the x axis, and what to compare with.
    y_top
        Cut the picture off above this; the top of the data unless given.
    heading
        Draw the title; it is always there for those who do not see the picture.
    """
    named = [(one.name, index if one.look is None else one.look) for index, one in enumerate(series)]
    keys, key_rows = _keys(named, frame)
    font = frame.font
    top = font * (3.6 if heading else 1.9)
    bottom = frame.height - font * (3.7 + 1.65 * key_rows)
    xs = [x for one in series for x, _ in one.points] or [0.0, 1.0]
    ys = [y for one in series for _, y in one.points] + [level.y for level in levels] or [0.0, 1.0]
    if y_top is not None:
        ys = [min(y, y_top) for y in ys]
    if min(ys) == max(ys):
        # A flat line says how high it is only beside 0: a share of 1 would stand at the foot of its picture.
        ys.append(0.0)
    x_low, x_high = min(xs), max(xs)
    x_ticks = ticks(x_low, x_high, int((frame.right - frame.left) / (6 * font)))
    y_ticks = ticks(min(ys), max(ys), max(3, int((bottom - top) / (2.6 * font))))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def across(x: float) -> float:
        return frame.left + (x - x_low) / ((x_high - x_low) or 1.0) * (frame.right - frame.left)

    def down(y: float) -> float:
        return bottom - (y - y_low) / ((y_high - y_low) or 1.0) * (bottom - top)

    parts = _begin(frame, title, heading, f"{x_low!r} {x_high!r} {frame.left!r} {frame.right!r} {top!r} {bottom!r}")
    parts.append(_text((frame.left + frame.right) / 2, bottom + 2.9 * font, x_title))
    parts.append(
        f'<g transform="translate({font:.1f} {(top + bottom) / 2:.1f}) rotate(-90)">{_text(0, 0, y_title)}</g>'
    )
    for y in y_ticks:
        parts.append(_line(frame.left, down(y), frame.right, down(y), "grid", "#dfe3e8"))
        parts.append(_text(frame.left - 0.6 * font, down(y) + 0.35 * font, label(y, y_ticks), anchor="end"))
    for x in x_ticks:
        if x_low <= x <= x_high:
            parts.append(_line(across(x), bottom, across(x), bottom + 0.4 * font, "axis", "#59636e"))
            parts.append(_text(across(x), bottom + 1.5 * font, label(x, x_ticks)))
    parts.append(_line(frame.left, bottom, frame.right, bottom, "axis", "#59636e"))
    for mark in marks:
        if x_low <= mark.x <= x_high:
            x = across(mark.x)
            parts.append(_line(x, top, x, bottom, "mark", "#b3261e", "4 3"))
            parts.append(
                f'<circle class="sign" cx="{x:.1f}" cy="{top - 0.55 * font:.1f}" r="{0.75 * font:.1f}" fill="#b3261e"/>'
            )
            parts.append(_text(x, top - 0.2 * font, mark.sign, size=0.9 * font, color="#fff", kind="onsign"))
    lines = [
        shape for one, (_, look) in zip(series, named, strict=True) for shape in _draw_series(one, look, across, down)
    ]
    if y_top is not None:
        # A picture within the picture cuts off what is above.
        box = f"0 {top - 3:.1f} {frame.width:g} {bottom - top + 6:.1f}"
        size = f'y="{top - 3:.1f}" width="{frame.width:g}" height="{bottom - top + 6:.1f}"'
        lines = [f'<svg {size} viewBox="{box}" overflow="hidden">', *lines, "</svg>"]
    parts += lines
    parts += _draw_levels([level for level in levels if y_low <= level.y <= y_high], frame, down)
    for one, (name, index), (x, row) in zip(series, named, keys, strict=True):
        y = bottom + font * (4.8 + 1.65 * row)
        dash = f' stroke-dasharray="{_dash(index)}"' if _dash(index) else ""
        parts.append(
            f'<path class="line s{index % len(_COLORS)}" d="M{x:.1f} {y - 0.35 * font:.1f}h{1.9 * font:.1f}" fill="none" '
            f'stroke="{_color(index)}" stroke-width="2.4"{dash}/>'
        )
        if one.dots:
            parts.append(_dot(index, x + 0.95 * font, y - 0.35 * font))
        parts.append(_text(x + 2.3 * font, y, name, anchor="start"))
    parts.append("</svg>\n")
    return "\n".join(parts)


def draw_bars(
    bars: Sequence[tuple[str, float]], title: str, y_title: str, *, frame: Frame = SMALL, levels: Sequence[Level] = ()
) -> str:
    """Bars from zero, each with its name below and its value above, as an SVG document."""
    font = frame.font
    top, bottom = 2.2 * font, frame.height - 2.4 * font
    values = [value for _, value in bars] + [level.y for level in levels] + [0.0]
    y_ticks = ticks(min(values), max(values), max(3, int((bottom - top) / (2.6 * font))))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def down(y: float) -> float:
        return bottom - (y - y_low) / ((y_high - y_low) or 1.0) * (bottom - top)

    parts = _begin(frame, title, False, "")
    parts.append(
        f'<g transform="translate({font:.1f} {(top + bottom) / 2:.1f}) rotate(-90)">{_text(0, 0, y_title)}</g>'
    )
    for y in y_ticks:
        parts.append(_line(frame.left, down(y), frame.right, down(y), "grid", "#dfe3e8"))
        parts.append(_text(frame.left - 0.6 * font, down(y) + 0.35 * font, label(y, y_ticks), anchor="end"))
    # Room at the right for the names of levels.
    each = (frame.right - frame.left - (3.5 * font if levels else 0)) / max(1, len(bars))
    for number, (name, value) in enumerate(bars):
        x = frame.left + each * (number + 0.5)
        width = min(0.7 * each, 5 * font)
        y, height = down(max(0.0, value)), abs(down(0.0) - down(value))
        parts.append(
            f'<rect class="bar" x="{x - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="1.5" fill="{_COLORS[0]}"/>'
        )
        parts.append(_text(x, y - 0.4 * font, f"{value:.3g}", size=0.9 * font))
        for row, word in enumerate(_wrapped(name, max(4, int(each / (0.52 * font))))):
            parts.append(_text(x, bottom + (1.2 + 1.05 * row) * font, word, size=0.9 * font))
    parts.append(_line(frame.left, down(0.0), frame.right, down(0.0), "axis", "#59636e"))
    parts += _draw_levels(levels, frame, down)
    parts.append("</svg>\n")
    return "\n".join(parts)


def ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Round numbers, at most about ``most`` of them, from at or below ``low`` to at or above ``high``."""
    size = max(abs(low), abs(high))
    span = high - low if high - low > 1e-9 * size else size
    if span < 1e-250:
        span = 1.0
    unit = 10.0 ** math.floor(math.log10(span / max(2, most)))
    step = next(unit * factor for factor in (1, 2, 5, 10, 20, 50) if span / (unit * factor) <= max(2, most))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def label(value: float, among: Sequence[float]) -> str:
    """With as many decimals as tell neighbours apart; very small and very large ones with a power of ten."""
    step = among[1] - among[0]
    place = math.floor(math.log10(step) + 1e-9)
    if value and (step < 1e-4 or max(abs(among[0]), abs(among[-1])) >= 1e7):
        return f"{value:.{max(0, math.floor(math.log10(abs(value)) + 1e-9) - place)}e}"
    return f"{value:,.{max(0, -place)}f}" if step >= 1e-4 else "0"


def rows_of(series: Sequence[Series], limit: int = 40) -> list[tuple[float, list[float | None]]]:
    """The table behind a chart: x and the value of each line there, at about ``limit`` places of each line, the first and last among them."""
    places: set[float] = set()
    for one in series:
        stride = max(1, -(-len(one.points) // limit))
        places |= {x for x, _ in one.points[::stride]}
        places |= {x for x, _ in one.points[-1:]}
    values = [dict(one.points) for one in series]
    return [(x, [each.get(x) for each in values]) for x in sorted(places)]


def settled_top(series: Sequence[Series]) -> float | None:
    """Where to cut a picture whose first points, of an untrained model, would press all others to the ground; None where they do not."""
    xs = [x for one in series for x, _ in one.points]
    if len(xs) < 8:
        return None
    begin = min(xs) + 0.08 * (max(xs) - min(xs))
    later = [y for one in series for x, y in one.points if x > begin]
    first = [y for one in series for x, y in one.points if x <= begin]
    if not later or not first:
        return None
    high, low = max(later), min(later)
    room = high + 0.15 * (high - low)
    return room if max(first) > high + 1.2 * (high - low) else None


def _draw_levels(levels: Sequence[Level], frame: Frame, down: Any) -> list[str]:
    """Dashed lines with their names at the right end, moved apart where they would lie one over the other."""
    parts = []
    above = math.inf
    for level in sorted(levels, key=lambda one: one.y):
        place = down(level.y)
        parts.append(_line(frame.left, place, frame.right, place, "level", "#59636e", "3 3"))
        above = min(place - 0.3 * frame.font, above - 1.05 * frame.font)
        parts.append(_text(frame.right, above, level.name, size=0.9 * frame.font, anchor="end", kind="halo"))
    return parts


def _wrapped(name: str, width: int) -> list[str]:
    """A name in at most two rows of about this many characters, cut at spaces."""
    rows = [""]
    for word in name.split():
        if rows[-1] and len(rows[-1]) + 1 + len(word) > width and len(rows) < 2:
            rows.append(word)
        else:
            rows[-1] = f"{rows[-1]} {word}".strip()
    return [row if len(row) <= width + 2 else row[:width] + "…" for row in rows]


def _draw_series(one: Series, index: int, across: Any, down: Any) -> list[str]:
    """A line's shapes. Where x does not rise, the points are a path through time: dots, and a line through their moving averages."""
    rising = all(a[0] < b[0] for a, b in zip(one.points, one.points[1:], strict=False))
    parts = []

    def polyline(points: Sequence[Point], kind: str, width: float, opacity: float) -> str:
        places = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
        dash = f' stroke-dasharray="{_dash(index)}"' if _dash(index) and opacity == 1 else ""
        faint = "" if opacity == 1 else f' stroke-opacity="{opacity}"'
        return (
            f'<polyline class="{kind} s{index % len(_COLORS)}" points="{places}" fill="none" stroke="{_color(index)}" '
            f'stroke-width="{width}" stroke-linejoin="round"{dash}{faint}/>'
        )

    points = thinned(one.points)
    if not rising:
        stride = max(1, len(one.points) // _MAX_POINTS)
        parts += [_dot(index, across(x), down(y), 1.6, ' fill-opacity="0.35"') for x, y in one.points[::stride]]
        numbered = [(float(number), point) for number, point in enumerate(one.points)]
        xs = trend([(number, x) for number, (x, _) in numbered])
        ys = trend([(number, y) for number, (_, y) in numbered])
        path = [(x, y) for (_, x), (_, y) in zip(xs, ys, strict=True)]
        stride = max(1, len(path) // 25)
        parts.append(polyline([*path[::stride], *path[-1:]], "line", 2.2, 1))
    elif not one.dots and len(one.points) >= _TREND_FROM:
        parts.append(polyline(points, "raw", 1, 0.4))
        smooth = trend(one.points)
        stride = max(1, len(smooth) // 150)
        parts.append(polyline([*smooth[::stride], *smooth[-1:]], "line", 2.2, 1))
    else:
        parts.append(polyline(points, "line", 2, 1))
    if (rising and one.dots and len(points) <= 80) or len(points) == 1:
        parts += [_dot(index, across(x), down(y)) for x, y in points]
    return parts


def _begin(frame: Frame, title: str, heading: bool, scale: str) -> list[str]:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {frame.width:g} {frame.height:g}" width="{frame.width:g}" '
        f'height="{frame.height:g}" font-family="system-ui, sans-serif" font-size="{frame.font:g}" fill="#3b434b" role="img"'
        + (f' data-scale="{scale}"' if scale else "")
        + ">",
        f"<title>{escape(title)}</title>",
        '<rect class="paper" width="100%" height="100%" fill="#fff"/>',
    ]
    if heading:
        parts.append(_text(frame.width / 2, 1.9 * frame.font, title, size=1.3 * frame.font))
    return parts


def _keys(named: Sequence[tuple[str, int]], frame: Frame) -> tuple[list[tuple[float, int]], int]:
    """Where the names of lines stand below a chart: x and row of each, and the number of rows."""
    places: list[tuple[float, int]] = []
    x, row = frame.left, 0
    for name, _ in named:
        width = frame.font * (3.6 + 0.56 * len(name))
        if x + width > frame.width and x > frame.left:
            x, row = frame.left, row + 1
        places.append((x, row))
        x += width
    return places, row + 1 if named else 0


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]


def _dash(index: int) -> str:
    return _DASHES[index % len(_DASHES)]


def _dot(index: int, x: float, y: float, radius: float = 3, more: str = "") -> str:
    kind = f"fill{index % len(_COLORS)}"
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{_color(index)}"{more}/>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str, color: str, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"{dashes}/>'


def _text(
    x: float, y: float, text: str, size: float | None = None, anchor: str = "middle", color: str = "", kind: str = ""
) -> str:
    font = "" if size is None else f' font-size="{size:.4g}"'
    fill = f' fill="{color}"' if color else ""
    style = f' class="{kind}"' if kind else ""
    return f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{font}{fill}>{escape(text)}</text>'
