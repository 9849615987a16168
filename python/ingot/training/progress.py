"""What the user sees while a run goes on: a bar on a terminal or in a notebook, plain lines in a file, nothing when asked."""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_PLAIN_LINES_A_RUN = 50
_HEARTBEAT_S = 30.0
_WIDE = 110
"""Columns of a terminal that has room for a long bar."""


@dataclasses.dataclass(frozen=True)
class Status:
    """One moment of a run."""

    step: int
    loss: float | None
    """Training loss of the last step, nats per token."""
    eval_loss: float | None
    """Last held-out loss, nats per token."""
    tokens_per_s: float
    share_of_peak: float | None
    """Of the arithmetic that this machine was measured to do; None where it was not measured."""
    memory_bytes: int
    eta_s: float
    """Remaining steps, evaluations and checkpoints, each at its measured time."""
    figures: tuple[str, ...] = ()
    """What is shown instead of the losses, as short texts."""

    def words(self, room: int | None = None) -> str:
        """The figures as a short text; in ``room`` columns, the last ones are left out that do not fit."""
        learning = list(self.figures)
        if self.loss is not None and not learning:
            learning.append(f"loss {self.loss:.4f}")
        if self.eval_loss is not None and not self.figures:
            learning.append(f"held-out {self.eval_loss:.4f}")
        rate = f"{_thousands(self.tokens_per_s)} tokens/s"
        of_peak = rate if self.share_of_peak is None else f"{rate} ({100 * self.share_of_peak:.0f} % of peak)"
        fuller = ([*learning, of_peak, f"{self.memory_bytes / 1e9:.2f} GB"], [*learning, of_peak], [*learning, rate])
        shorter = [learning[:count] for count in range(len(learning), -1, -1)]
        texts = ["  ".join(words) for words in (*fuller, *shorter)]
        return texts[0] if room is None else next(text for text in texts if len(text) <= max(0, room))


class Display(Protocol):
    """How a run talks."""

    def say(self, text: str) -> None:
        """A line that stays."""
        ...

    def work(self, text: str, done: int, total: int) -> None:
        """Progress of something slow before the run."""
        ...

    def start(self, step: int, total: int) -> None:
        """The run begins, with ``step`` steps done."""
        ...

    def update(self, status: Status) -> None:
        """A step is done."""
        ...

    def stop(self) -> None:
        """The run is over; may be called twice."""
        ...


def make_display(quiet: bool) -> Display:
    """The one that fits where the output goes."""
    if quiet:
        return SilentDisplay()
    if sys.stdout.isatty() or "ipykernel" in sys.modules:
        return RichDisplay()
    return PlainDisplay()


class SilentDisplay:
    """Says nothing."""

    def say(self, text: str) -> None:
        pass

    def work(self, text: str, done: int, total: int) -> None:
        pass

    def start(self, step: int, total: int) -> None:
        pass

    def update(self, status: Status) -> None:
        pass

    def stop(self) -> None:
        pass


class PlainDisplay:
    """Lines: about fifty a run, and at least one in half a minute."""

    def __init__(self) -> None:
        self._total = 0
        self._shown_step = 0
        self._shown_at = time.monotonic()

    def say(self, text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def work(self, text: str, done: int, total: int) -> None:
        if time.monotonic() - self._shown_at >= _HEARTBEAT_S / 3:
            self._shown_at = time.monotonic()
            self.say(f"{text}: {100 * done // max(1, total)} %")

    def start(self, step: int, total: int) -> None:
        self._total = total
        self._shown_step = step

    def update(self, status: Status) -> None:
        now = time.monotonic()
        heartbeat = now - self._shown_at >= _HEARTBEAT_S
        # Without a loss this is a sign of life during something else than a step.
        advanced = status.loss is not None and status.step - self._shown_step >= self._total / _PLAIN_LINES_A_RUN
        due = advanced or heartbeat
        at_the_end = status.step == self._total != self._shown_step
        if (due and now - self._shown_at >= 1.0) or at_the_end:
            self._shown_step, self._shown_at = status.step, now
            self.say(f"step {status.step}/{self._total}  {status.words()}  ETA {duration(status.eta_s)}")

    def stop(self) -> None:
        pass


class RichDisplay:
    """A bar that stays at the bottom."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._working: Progress | None = None
        self._loss: float | None = None
        self._bar_width = 24

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def work(self, text: str, done: int, total: int) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        if self._working is None:
            self._working = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=30),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._working.add_task(text, total=total)
            self._working.start()
        self._working.update(self._working.task_ids[0], description=text, completed=done, total=total)
        if done >= total:
            self._working.stop()
            self._working = None

    def start(self, step: int, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bar_width = 24 if self._console.width >= _WIDE else 12
        self._progress = Progress(
            BarColumn(bar_width=self._bar_width),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TextColumn("ETA {task.fields[eta]}"),
            console=self._console,
        )
        self._task = self._progress.add_task("", total=total, completed=step, figures="", eta="?")
        self._progress.start()

    def update(self, status: Status) -> None:
        if self._progress is not None and self._task is not None:
            if status.loss is None:
                # During something else than a step the loss of the last one stays in sight.
                status = dataclasses.replace(status, loss=self._loss)
            self._loss = status.loss
            eta, total = duration(status.eta_s), self._progress.tasks[0].total or 0
            # Four columns with a space between; the step count is as wide as that of the end.
            room = self._console.width - self._bar_width - (2 * len(f"{total:.0f}") + 1) - len(f"ETA {eta}") - 3
            self._progress.update(self._task, completed=status.step, figures=status.words(room), eta=eta)

    def stop(self) -> None:
        for progress in (self._working, self._progress):
            if progress is not None:
                progress.stop()
        self._working = self._progress = None


def duration(seconds: float) -> str:
    """Seconds for a person: 7 s, 3:05, 1:02:03.

    >>> duration(3723)
    '1:02:03'
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def _thousands(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"
