"""The page of a report. Everything that a run, a model or a person wrote is escaped, and hidden characters are written out."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

from ingot.feedback.display import visible
from ingot.reporting.charts import SMALL, Level, Mark, Series, draw_bars, draw_chart, rows_of, settled_top
from ingot.reporting.figures import PHASES

if TYPE_CHECKING:
    from jinja2 import Environment

_ROWS_EACH = 40


def draw_page(report: Mapping[str, Any]) -> str:
    """HTML of what :func:`ingot.reporting.facts` tells."""
    return render("compare.html" if "compared" in report else "report.html", report=report)


def render(template: str, **values: Any) -> str:
    """One of the templates as a page that needs nothing from elsewhere: its style and its only script are in it."""
    import ingot

    script = (resources.files("ingot") / "templates" / "page.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        environment()
        .get_template(template)
        .render(
            **values, script=script, script_hash=f"sha256-{digest}", rows_each=_ROWS_EACH, version=ingot.__version__
        )
    )


@functools.cache
def environment() -> Environment:
    """The templates and the filters that they use."""
    from jinja2 import PackageLoader
    from jinja2.sandbox import SandboxedEnvironment

    made = SandboxedEnvironment(
        loader=PackageLoader("ingot", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {
        "visible": lambda value: visible(str(value)),
        "figure": figure,
        "short": lambda value: figure(value if isinstance(value, int) else float(f"{value:.3g}")),
        "brief": lambda value: figure(float(f"{value:.4g}") if isinstance(value, float) else value),
        "draw": draw_figure,
        "rows": lambda told: rows_of(_series(told), _ROWS_EACH),
        "cut": lambda told: _y_top(told) is not None,
        "phase": lambda kind: PHASES.get(kind, PHASES["run"])[0],
    }
    return made


def draw_figure(told: Mapping[str, Any]) -> str:
    """A chart of the report as SVG."""
    levels = [Level(level["y"], visible(level["name"])) for level in told["levels"]]
    if told["kind"] == "bars":
        bars = [(visible(bar["name"]), bar["value"]) for bar in told["bars"]]
        return draw_bars(bars, visible(told["title"]), visible(told["y_title"]), levels=levels)
    marks = [Mark(mark["x"], mark["sign"]) for mark in told["marks"]]
    return draw_chart(
        _series(told),
        visible(told["title"]),
        visible(told["x_title"]),
        visible(told["y_title"]),
        frame=SMALL,
        marks=marks,
        levels=levels,
        y_top=_y_top(told),
        heading=False,
    )


def figure(value: object) -> str:
    """A value for a person: numbers to six digits, lists joined, nothing for None.

    >>> figure(1234567), figure(0.1234567), figure(None), figure(["a", 2])
    ('1,234,567', '0.123457', '', 'a, 2')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}" if abs(value) >= 10_000 else f"{int(value)}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(figure, value))
    if isinstance(value, Mapping):
        return visible(json.dumps(value, ensure_ascii=False))
    return visible(str(value))


def _series(told: Mapping[str, Any]) -> list[Series]:
    """Its lines. Where several things are drawn, each has one colour, in training and held out; what is held out has dots."""
    each = told["series"]
    things = list(dict.fromkeys(one["name"].removesuffix(", held out") for one in each))
    by_thing = len(things) > 1 and len(things) < len(each)
    return [
        Series(
            visible(one["name"]),
            one["points"],
            dots=one["metric"].startswith("eval_") or len(one["points"]) == 1,
            look=things.index(one["name"].removesuffix(", held out")) if by_thing else None,
        )
        for one in each
    ]


def _y_top(told: Mapping[str, Any]) -> float | None:
    return settled_top(_series(told)) if told.get("cut") else None
