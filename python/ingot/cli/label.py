"""``ingot label``."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING

from tyro.conf import Positional

if TYPE_CHECKING:
    from ingot.feedback.session import Session


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label:
    """Rank responses in the terminal, without knowing what wrote them; every judgement is saved at once.

    The same command goes on where it stopped. Several people can label the same file at the same time, each under a --labeler of
    their own. Some groups come back later and some have a known answer (--gold): `ingot agreement` tells from these how steady and
    how careful a labeller is.
    """

    candidates: Positional[str]
    """JSON lines with "prompt" and "responses", optional "group_id" and "sources", as `ingot sample` writes them."""
    output: str
    """File that judgements are added to (JSON lines)."""
    labeler: str
    """Your name; judgements are kept apart by it."""
    criterion: str = "helpful"
    """What to rank by: helpful, honest, harmless, or a .toml file with name and guideline."""
    questions: tuple[str, ...] = ("helpful", "honest", "harmless")
    """Yes-or-no questions about each response after ranking: names or .toml files as above; no value for none."""
    ratings: bool = True
    """Ask for a rating from 1 to 7 for each response."""
    gold: str | None = None
    """JSON lines with "prompt", "responses" and the right "ranks", mixed in to check labellers."""
    gold_share: float = 0.05
    """One gold item among so many: 0.05 is one in 20."""
    repeats: float = 0.08
    """Share of groups that come back once, to see whether they are judged the same."""
    overlap: float = 1.0
    """Share of groups that every labeller judges; the others go to whoever comes first."""
    limit: int | None = None
    """Stop after so many judgements."""
    seed: int = 0
    """Of the order of responses, repeats and gold items; the same for all who label one file."""
    json: bool = False
    """Print a summary as one JSON object at the end; the screen goes to standard error."""

    def run(self) -> int:
        """Label until done or stopped."""
        from pathlib import Path

        from rich.console import Console

        from ingot.errors import ConfigError
        from ingot.feedback.candidates import read_candidates
        from ingot.feedback.criteria import load_criterion
        from ingot.feedback.journal import Journal
        from ingot.feedback.session import Session
        from ingot.feedback.terminal import Keyboard, Labeler, Quit

        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit is {self.limit}; give at least 1")
        for path in (self.candidates, self.gold):
            if path is not None and Path(path).resolve() == Path(self.output).resolve():
                raise ConfigError(f"--output {self.output} is also what is read; give another file")
        criterion = load_criterion(self.criterion)
        questions = [load_criterion(name) for name in dict.fromkeys(self.questions)]
        candidates = read_candidates(self.candidates)
        gold = read_candidates(self.gold, gold=True) if self.gold is not None else None
        journal = Journal(self.output)
        session = Session(
            candidates.groups,
            journal,
            labeler=self.labeler,
            criterion=criterion,
            gold=gold.groups if gold else (),
            seed=self.seed,
            repeats=self.repeats,
            gold_share=self.gold_share,
            overlap=self.overlap,
        )
        stream = sys.stderr if self.json else sys.stdout
        # What the terminal cannot encode is shown as an escape, too.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
        console = Console(file=stream, highlight=False, width=None if stream.isatty() else 100)
        labeler = Labeler(session, console, Keyboard(), questions=questions, ratings=self.ratings)
        for notice in (*candidates.notices, *(gold.notices if gold else ()), *session.notices):
            labeler.say(notice, "yellow")
        labeler.tell_notices()
        interrupted = False
        try:
            labeler.run(self.limit)
        except Quit:
            pass
        except KeyboardInterrupt:
            interrupted = True
        finally:
            console.print()
            labeler.say(_closing(session))
            if self.json:
                print(json.dumps(_summary(session), ensure_ascii=False))
        return 130 if interrupted else 0


def _closing(session: Session) -> str:
    counts = session.counts
    text = f"{counts.judged} judged"
    if counts.skipped:
        text += f", {counts.skipped} skipped"
    if counts.taken_back:
        text += f", {counts.taken_back} taken back"
    remaining = session.remaining()
    return text + f"; {remaining or 'none'} left. Saved in {session.journal.path}."


def _summary(session: Session) -> dict[str, object]:
    counts = session.counts
    return {
        "output": str(session.journal.path),
        "labeler": session.labeler,
        "criterion": session.criterion.name,
        "judged": counts.judged,
        "skipped": counts.skipped,
        "taken_back": counts.taken_back,
        "done": session.done(),
        "remaining": session.remaining(),
    }
