"""What a run shows on a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from ingot.training.progress import RichDisplay, Status


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
