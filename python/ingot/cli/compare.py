"""``ingot compare``."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional, UseAppendAction

from ingot.configs import Backend

if TYPE_CHECKING:
    from ingot.feedback.candidates import Group
    from ingot.inference.compare import Comparison


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Let models answer the same prompts, and a judge say whose answers are better.

    The judge is a reward model, a Python function, or you (`--judge human`), who see the answers blind and shuffled. With one model and
    --best-of, it says whether the model may be trained against a reward: the answer that the reward likes best must please a judge that does not
    know the reward. The exit code is then 1 where it does not.
    """

    models: Positional[tuple[str, ...]]
    """Folders of models: two or more, or one with --best-of."""
    prompts: str
    """Rows with a "prompt" that nobody trained on: .jsonl or .json (each also as .gz or .zst), or .parquet."""
    judge: str
    """Folder of a reward model, ./file.py:FUNCTION (which scores each answer, or takes first and second and returns "first", "second" or
    "tie"), or human."""
    num_generations: int = 1
    """Answers of each model to each prompt."""
    best_of: int | None = None
    """Compare the best of so many answers of one model, chosen by --reward, with its first one."""
    reward: UseAppendAction[tuple[str, ...]] = ()
    """What chooses the best: a folder or function as for --judge; may be given several times."""
    max_new_tokens: int = 256
    """End an answer after this many tokens."""
    temperature: float = 1.0
    """1 samples from the models as they are; 0 takes the likeliest token each time."""
    output: str | None = None
    """Keep answers and scores in this file (JSON lines); the same command goes on where it stopped, and another judge sees the same answers."""
    labeler: str = "me"
    """Your name, where the judge is human."""
    criterion: str = "helpful"
    """What to judge by, where the judge is human: helpful, honest, harmless, or a .toml file with name and guideline."""
    seed: int = 0
    """Of the random numbers, the same for all models."""
    max_sequences: int = 64
    """Answers that are written at a time."""
    backend: Backend = "native"
    """native or torch."""
    device: str | None = None
    """Of the torch backend: cpu or cuda."""
    threads: int | None = None
    """CPU threads; what affinity and the container allow unless given."""
    json: bool = False
    """Print the figures as one JSON object, and no progress."""

    def run(self) -> int:
        """Answer, judge, print."""
        from ingot.inference.compare import compare_models
        from ingot.training.progress import make_display

        found = compare_models(
            self.models,
            self.prompts,
            self.judge,
            num_generations=self.num_generations,
            best_of=self.best_of,
            rewards=self.reward,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            output=self.output,
            ask=self._ask,
            max_sequences=self.max_sequences,
            threads=self.threads,
            backend=self.backend,
            device=self.device,
            display=make_display(quiet=self.json),
        )
        print(json.dumps(_plain(found), ensure_ascii=False) if self.json else "\n".join(_words(found)))
        return 1 if found.gate is not None and not found.gate.passed else 0

    def _ask(self, groups: Sequence[Group], file: Path) -> None:
        """The blind labeller in the terminal, until all is judged or the person stops."""
        from rich.console import Console

        from ingot.feedback.criteria import load_criterion
        from ingot.feedback.journal import Journal
        from ingot.feedback.session import Session
        from ingot.feedback.terminal import Keyboard, Labeler, Quit

        session = Session(
            groups,
            Journal(file),
            labeler=self.labeler,
            criterion=load_criterion(self.criterion),
            seed=self.seed,
            repeats=0.0,
            gold_share=0.0,
        )
        if session.next() is None:
            return
        stream = sys.stderr if self.json else sys.stdout
        console = Console(file=stream, highlight=False, width=None if stream.isatty() else 100)
        labeler = Labeler(session, console, Keyboard(), ratings=False)
        try:
            labeler.run()
        except (Quit, KeyboardInterrupt):
            labeler.say(f"{session.remaining()} left; the same command goes on. What was judged so far:")


def _plain(found: Comparison) -> dict[str, Any]:
    """For JSON, which has no NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(entry) for name, entry in value.items()}
        if isinstance(value, list | tuple):
            return [plain(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    facts: dict[str, Any] = plain({**dataclasses.asdict(found), "judge_kind": found.kind})
    return facts


def _words(found: Comparison) -> list[str]:
    judge = f"proxy {found.judge}" if found.kind == "proxy" else found.judge
    lines = list(found.notices)
    size = found.num_cases / max(found.num_prompts, 1)
    each = "" if size == 1 else f", {size:g} answers each"
    lines.append(f"{found.num_prompts:,} prompts{each}; judge: {judge}")
    if found.proxy_of:
        lines.append(
            f"  {', '.join(found.proxy_of)} {'was' if len(found.proxy_of) == 1 else 'were'} trained against it: this is the proxy, "
            "which rises also where answers do not get better"
        )
    width = max(len(each.source) for each in found.sources)
    scored = any(each.mean_score is not None for each in found.sources)
    score_name = "proxy score" if found.kind == "proxy" else "score"
    head = f"{'':<{width}}  {'tokens':>7}  {'characters':>10}  {'ended':>6}"
    lines.append(head + (f"  {score_name:>11}" if scored else ""))
    for source in found.sources:
        line = f"{source.source:<{width}}  {source.mean_tokens:7.1f}  {source.mean_characters:10.1f}  {100 * source.eos_rate:4.0f} %"
        lines.append(line + (f"  {source.mean_score:11.3f}" if source.mean_score is not None else ""))
    for pair in found.pairs:
        if not pair.win_rate.num_cases:
            lines.append(f"{pair.source} against {pair.against}: nothing was judged")
            continue
        rate = "proxy win rate" if found.kind == "proxy" else "win rate"
        lines.append(f"{pair.source} against {pair.against}: {rate} {pair.win_rate}")
        lines.append(
            f"  {pair.wins:,} won, {pair.ties:,} ties, {pair.losses:,} lost"
            + (f", {pair.num_unjudged:,} not judged" if pair.num_unjudged else "")
        )
        if pair.length_matched.num_cases:
            lines.append(
                f"  of answers as long as the other's: {pair.length_matched} ({100 * pair.length_matched_share:.0f} % of them)"
            )
        if pair.flipped is not None:
            lines.append(f"  the verdict turned with the order in {100 * pair.flipped:.1f} %: those are ties")
    if found.gate is not None:
        lines.append(f"gate      {'passed' if found.gate.passed else 'did not pass'}: {found.gate.text}")
    return lines
