"""What is seen while a run goes on, in terminals of any width."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from ingot.training.progress import RichDisplay, Status

STATUS = Status(
    step=963,
    loss=0.67771,
    eval_loss=0.69522,
    tokens_per_s=16900.0,
    share_of_peak=0.24,
    memory_bytes=182_000_000,
    eta_s=75.0,
)


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (None, "loss 0.6777  held-out 0.6952  16.9k tokens/s (24 % of peak)  0.18 GB"),
        (68, "loss 0.6777  held-out 0.6952  16.9k tokens/s (24 % of peak)  0.18 GB"),
        (67, "loss 0.6777  held-out 0.6952  16.9k tokens/s (24 % of peak)"),
        (58, "loss 0.6777  held-out 0.6952  16.9k tokens/s"),
        (40, "loss 0.6777  held-out 0.6952"),
        (20, "loss 0.6777"),
        (5, ""),
        (-3, ""),
    ],
)
def test_the_last_figures_go_first(room: int | None, expected: str) -> None:
    assert STATUS.words(room) == expected


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_a_bar_keeps_its_count_and_its_end_at_any_width(width: int) -> None:
    display, screen = RichDisplay(), io.StringIO()
    display._console = Console(file=screen, width=width, force_terminal=True, color_system=None)
    display.start(0, 1000)
    display.update(STATUS)
    display.stop()
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()).replace("\r", "\n").rstrip().splitlines()[-1]
    assert " 963/1000 " in last
    assert last.rstrip().endswith("ETA 1:15")
    assert "…" not in last
    assert len(last) <= width


def test_the_loss_stays_in_sight_while_something_else_is_measured():
    shown = io.StringIO()
    display = RichDisplay()
    display._console = Console(file=shown, force_terminal=True, width=120)
    display.start(0, 10)
    status = {"eval_loss": 4.5, "tokens_per_s": 5.0, "share_of_peak": None, "memory_bytes": 0, "eta_s": 1.0}
    display.update(Status(step=3, loss=5.25, **status))
    display.update(Status(step=3, loss=None, **status))
    display.stop()
    last = shown.getvalue().split("\r")[-1]
    assert "3/10" in last
    assert "loss 5.2500  held-out 4.5000" in last
