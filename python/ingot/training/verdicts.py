"""Verdicts: what a run has shown, in words and figures, and whether the next stage may build on it.

Each phase of alignment ends with one (``verdict.json`` at the top of its run's folder); a later phase that starts from the run reads it
and refuses a failed one, unless forced.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ingot.durable import write_file
from ingot.errors import RunError
from ingot.training.runs import RUN_FILE

if TYPE_CHECKING:
    from ingot.training.progress import Display

VERDICT_FILE = "verdict.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a run has shown."""

    passed: bool
    """Whether the next stage may build on it."""
    sentences: tuple[str, ...]
    """For a person: what was measured and what it is to be compared with."""
    figures: Mapping[str, float | int | str | None]
    """The same for a program, by the names of metrics."""
    advice: str = ""
    """What to do where it did not pass."""

    @property
    def text(self) -> str:
        """All of it on one line."""
        return " ".join((*self.sentences, *([self.advice] if self.advice and not self.passed else [])))

    @property
    def closing_line(self) -> str:
        """What a run ends with."""
        if self.passed:
            return f"verdict   passed: {self.text}"
        return f"verdict   did not pass: {self.text} What builds on this model refuses it, unless --force is given."


def write_verdict(folder: str | Path, verdict: Verdict) -> None:
    """Put it at the top of a run's folder."""
    write_file(Path(folder) / VERDICT_FILE, json.dumps(dataclasses.asdict(verdict), indent=1).encode() + b"\n")


def read_verdict(folder: str | Path) -> Verdict | None:
    """The verdict of a run; None where its folder has none (a model from elsewhere, a phase without a gate).

    Raises
    ------
    RunError
        The file is damaged.
    """
    path = Path(folder) / VERDICT_FILE
    try:
        fields = json.loads(path.read_bytes())
        return Verdict(
            passed=bool(fields["passed"]),
            sentences=tuple(map(str, fields["sentences"])),
            figures=dict(fields["figures"]),
            advice=str(fields.get("advice", "")),
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path}: damaged, cannot be read; delete it to go on without a verdict") from None


def require_passed(folder: str | Path, *, force: bool, display: Display) -> Verdict | None:
    """Repeat the verdict of the run that a phase starts from, and refuse a failed or unfinished one unless ``force``.

    Raises
    ------
    RunError
        It did not pass, or has no verdict yet; says why, what to do, and how to go on all the same.
    """
    kind = _unfinished(folder)
    if kind is not None:
        problem = f"{folder}: is not finished, so there is no verdict on it"
        if not force:
            raise RunError(f"{problem}; finish it: ingot {kind} --resume {folder} (--force goes on all the same)")
        display.say(f"verdict   {problem}; going on by force")
        return None
    verdict = read_verdict(folder)
    if verdict is None:
        return None
    if verdict.passed:
        display.say(f"verdict   {folder}: {verdict.text}")
    elif force:
        display.say(f"verdict   {folder}: did not pass, going on by force: {verdict.text}")
    else:
        raise RunError(f"{folder}: did not pass its gate: {verdict.text} (--force goes on all the same)")
    return verdict


def _unfinished(folder: str | Path) -> str | None:
    """The phase of a run that ends with a verdict and has not come to its end; None for any other folder."""
    try:
        facts = json.loads((Path(folder) / RUN_FILE).read_bytes())
        kind, finished = str(facts["kind"]), bool(facts["finished"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if finished or kind == "pretrain" else kind
