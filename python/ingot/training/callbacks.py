"""Watching a run from outside: subclass :class:`Callback` and pass it to the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ingot.models.base import Model
    from ingot.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class RunView:
    """What a callback sees. The weights may be read, not written: a run must stay a function of its settings and data."""

    model: Model
    tokenizer: Tokenizer
    output: Path
    """The run's folder."""
    step: int
    """Steps that are done."""
    max_steps: int


class Callback:
    """Each method is called at its moment and does nothing unless overridden. An exception ends the run."""

    def on_start(self, run: RunView) -> None:
        """Before the first step of this process."""

    def on_log(self, run: RunView, metrics: Mapping[str, Any]) -> None:
        """After a line of metrics about training was written."""

    def on_evaluate(self, run: RunView, metrics: Mapping[str, Any]) -> None:
        """After a held-out loss was measured: before the first step, every eval_steps, and at the end."""

    def on_save(self, run: RunView, checkpoint: Path) -> None:
        """After a checkpoint was saved."""

    def on_end(self, run: RunView) -> None:
        """After the last step, when the run's folder is complete."""
