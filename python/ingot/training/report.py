"""curves.svg: the losses of a run as one picture that opens anywhere, without a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_MAX_POINTS = 500


def draw_curves(history: Iterable[Mapping[str, Any]], title: str) -> bytes:
    """The training and held-out loss over steps, as SVG.

    Parameters
    ----------
    history
        Lines of metrics.jsonl; ``loss`` and ``eval_loss`` in nats per token are drawn where they are.
    """
    import pygal
    from pygal.style import Style

    lines = list(history)
    training = _points(lines, "loss")
    held_out = _points(lines, "eval_loss")
    style = Style(
        background="white",
        plot_background="white",
        foreground="#333333",
        foreground_strong="#111111",
        foreground_subtle="#888888",
        colors=("#4a7fb5", "#c8553d"),
        font_family="sans-serif",
        title_font_size=18,
        label_font_size=13,
        major_label_font_size=13,
        legend_font_size=14,
    )
    chart = pygal.XY(
        title=title,
        x_title="step",
        y_title="loss, nats per token",
        style=style,
        width=900,
        height=520,
        show_dots=False,
        legend_at_bottom=True,
        legend_at_bottom_columns=2,
        include_x_axis=False,
        x_value_formatter=lambda value: f"{value:,.0f}",
        value_formatter=lambda value: f"{value:.2f}",
        # No script from elsewhere: the file must open without a network.
        js=(),
    )
    chart.add("training", training, stroke_style={"width": 1.5})
    chart.add("held out", held_out, show_dots=True, dots_size=3, stroke_style={"width": 1.5})
    content: bytes = chart.render()
    return content


def _points(lines: list[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value), evenly thinned where there are very many."""
    points = [(int(line["step"]), float(line[name])) for line in lines if isinstance(line.get(name), float)]
    stride = max(1, -(-len(points) // _MAX_POINTS))
    kept = points[::stride]
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]
