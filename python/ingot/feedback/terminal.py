"""The labeller's screen and keyboard: shows an item, reads what is typed, and hands it to the session. Works in a pipe too."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.segment import Segment, Segments
from rich.text import Text as RichText

from ingot.feedback.answers import (
    FLAGS,
    AnswerError,
    describe_ranking,
    parse_failures,
    parse_flag,
    parse_ranking,
    parse_ratings,
)
from ingot.feedback.display import escape, is_hidden, visible
from ingot.feedback.session import Judgement, Session, Showing

if TYPE_CHECKING:
    from ingot.data.keys import Text
    from ingot.feedback.criteria import Criterion
    from ingot.feedback.schedule import Item

T = TypeVar("T")

_WIDTH = 100
_KEYS = "2 1=3 rank  s skip  u undo  f flag  n note  v view  g guideline  h help  q quit"

HELP = """\
Rank the responses, best first; = between ties. Then go on with Enter, or say more.
  2 1=3        2 is best, 1 and 3 are equally good; = alone: all are
  5 3 3        ratings in the order shown: 1 worst, 7 best; - for none
  hon 2        response 2 fails "honest" (names can be shortened); ok: none fails
At any time:
  s            skip this one for good
  u            undo: back to the ranking, or take the last judgement back
  f unsafe 2   flag response 2, or without a number the whole; again: unflag
  n some text  a note in your own words
  v, v 2       view everything again, or response 2
  g, h         the guideline, this help
  q            stop: all is saved, and the same command goes on from here"""


class Quit(Exception):
    """The labeller wants to stop."""


class _Undo(Exception):
    """The labeller wants the last judgement back."""


class _Skip(Exception):
    """The labeller leaves the item."""


class Keyboard:
    """Lines from a person or a pipe."""

    def __init__(self, interactive: bool | None = None) -> None:
        self.interactive = sys.stdin.isatty() if interactive is None else interactive
        if self.interactive:
            # Arrow keys and history while typing, where Python has them.
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401

    def ask(self, console: Console, prompt: str) -> str:
        """One line, without white space around it; ``Quit`` at the end of the input."""
        if self.interactive and console.file is sys.stdout:
            try:
                return input(prompt).strip()
            except EOFError:
                console.print()
                raise Quit from None
        console.print(prompt, end="", markup=False, highlight=False)
        console.file.flush()
        line = sys.stdin.readline()
        if not self.interactive:
            # What is typed at a terminal ends the line by itself.
            console.print()
        if not line:
            raise Quit
        return line.strip()


class Labeler:
    """A person at the terminal.

    Parameters
    ----------
    questions
        Criteria asked for each response, yes or no, after the ranking.
    ratings
        Whether a rating from 1 to 7 is asked for.
    """

    def __init__(
        self,
        session: Session,
        console: Console,
        keyboard: Keyboard,
        *,
        questions: Sequence[Criterion] = (),
        ratings: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.session = session
        self.console = console
        self.keyboard = keyboard
        self._questions = questions
        self._ratings = ratings
        self._clock = clock
        self._times: list[float] = []
        self._told = 0

    def run(self, limit: int | None = None) -> None:
        """Label until all is done, ``limit`` items are judged, or the labeller stops (``Quit``, Ctrl-C)."""
        self._guideline()
        while (limit is None or self.session.counts.judged < limit) and (item := self.session.next()) is not None:
            entry = _Entry(self, item, self.session.show(item))
            try:
                entry.label()
            except _Undo:
                self._undo()
                continue
            self._times.append(self._clock() - entry.started)
            self.tell_notices()

    def progress(self) -> str:
        """``12 of 250, 38 s each, about 2.5 h left``."""
        done, remaining = self.session.done(), self.session.remaining()
        text = f"{done + 1} of {done + remaining}"
        if self._times:
            recent = sorted(self._times[-20:])
            pace = recent[len(recent) // 2]
            text += f", {_duration(pace)} each, about {_duration(pace * remaining)} left"
        return text

    def tell_notices(self) -> None:
        """Say what is new about the file of judgements."""
        notices = self.session.journal.notices
        for notice in notices[self._told :]:
            self.say(notice, "yellow")
        self._told = len(notices)

    def say(self, text: str, style: str = "") -> None:
        """One line from ingot itself."""
        self.console.print(visible(text), style=style, markup=False, highlight=False)

    def _undo(self) -> None:
        item = self._saved(self.session.undo)
        self.say("nothing to take back" if item is None else "taken back; here it is again", "yellow")

    def _saved(self, write: Callable[[], T]) -> T:
        """Write, and let a person make room and try again where that fails."""
        while True:
            try:
                return write()
            except OSError as error:
                if not self.keyboard.interactive:
                    raise
                self.say(f"NOT SAVED: {error.filename}: {error.strerror}", "bold red")
                answer = self.keyboard.ask(self.console, "Enter: try again, q: quit without it > ")
                if answer.casefold() == "q":
                    raise Quit from None

    def _guideline(self) -> None:
        criterion = self.session.criterion
        self.console.print(Rule(RichText(f"what to look for: {criterion.name}", "bold"), align="left", style="cyan"))
        self.console.print(Padding(shown(criterion.guideline), (0, 2)))
        self.console.print()
        for question in self._questions:
            if question.name != criterion.name:
                self.say(f"  also asked: {question.name}. {question.guideline.splitlines()[0]}", "dim")
        self.say("  h for help, q to stop; everything is saved at once", "dim")

    def _show(self, blocks: Sequence[RenderableType]) -> str:
        """Print; on a screen too small, a page at a time. What was typed instead of Enter, if anything."""
        lines = self.console.render_lines(Group(*blocks), self.console.options.update(width=self._width), pad=False)
        page = self.console.height - 2
        # The lines that are typed and said under an item need room as well.
        if not self.keyboard.interactive or not self.console.is_terminal or len(lines) + 4 <= page:
            self._print(lines)
            return ""
        for start in range(0, len(lines), page):
            self._print(lines[start : start + page])
            left = len(lines) - start - page
            if left > 0:
                answer = self.keyboard.ask(self.console, f"-- {left} more lines: Enter --")
                if answer:
                    return answer
        return ""

    def _print(self, lines: Sequence[Sequence[Segment]]) -> None:
        for line in lines:
            self.console.print(Segments([*line, Segment.line()]), end="")

    @property
    def _width(self) -> int:
        return min(self.console.width, _WIDTH)


class _Entry:
    """One item on the screen, until it is judged, skipped or left."""

    def __init__(self, labeler: Labeler, item: Item, showing: Showing) -> None:
        self.started = labeler._clock()
        self._labeler = labeler
        self._item = item
        self._showing = showing
        self._size = len(showing.responses)
        self._waiting = ""
        self._note = ""
        self._flags: dict[str, list[int]] = {}
        self._time_s: float | None = None
        self._ratings: tuple[int | None, ...] | None = None
        self._answers: Mapping[str, Sequence[bool | None]] = {}

    def label(self) -> None:
        """Show, ask, save."""
        try:
            self._view("")
            while True:
                ranks = self._ask("rank > ", lambda text: parse_ranking(text, self._size))
                self._time_s = self._labeler._clock() - self.started
                self._labeler.say(f"       {describe_ranking(ranks)}", "green")
                try:
                    self._ask_more()
                except _Undo:
                    self._labeler.say("       ranking taken back", "yellow")
                    continue
                except (Quit, KeyboardInterrupt):
                    # A ranking that was given is kept, whatever was still to be asked.
                    self._judge(ranks)
                    raise
                return self._judge(ranks)
        except _Skip:
            self._skip()

    def _judge(self, ranks: tuple[int, ...]) -> None:
        judgement = Judgement(
            ranks=ranks, ratings=self._ratings, answers=self._answers, flags=self._flags, note=self._note
        )
        self._labeler._saved(lambda: self._labeler.session.judge(self._item, judgement, time_s=self._time_s))

    def _skip(self) -> None:
        session, time_s = self._labeler.session, self._labeler._clock() - self.started
        self._labeler._saved(lambda: session.skip(self._item, note=self._note, flags=self._flags, time_s=time_s))
        self._labeler.say("       skipped", "yellow")

    def _ask_more(self) -> None:
        """What may be said beside the ranking."""
        self._ratings, self._answers = None, {}
        if self._labeler._ratings:
            self._ratings = self._ask("rate 1-7 (Enter: no rating) > ", lambda text: parse_ratings(text, self._size))
        names = [question.name for question in self._labeler._questions]
        if names:
            question = f"which fail {'/'.join(names)}? (as in {names[0][:3]} 1; ok: none; Enter: no answer) > "
            self._answers = self._ask(question, lambda text: parse_failures(text, names, self._size))

    def _ask(self, question: str, parse: Callable[[str], T]) -> T:
        """Ask until the answer can be read; commands are obeyed in between."""
        labeler = self._labeler
        while True:
            text, self._waiting = self._waiting, ""
            text = text or labeler.keyboard.ask(labeler.console, question)
            try:
                if not self._command(text):
                    if question == "rank > " and not text:
                        raise AnswerError("rank the responses, best first, such as 2 1=3; s skips, h helps")
                    return parse(text)
            except AnswerError as error:
                labeler.say(f"       {error}", "red")

    def _command(self, text: str) -> bool:
        """Obey a command; whether it was one."""
        word, _, rest = text.partition(" ")
        rest = rest.strip()
        match word.casefold():
            case "q" | "quit" if not rest:
                raise Quit
            case "s" | "skip" if not rest:
                raise _Skip
            case "u" | "undo" if not rest:
                raise _Undo
            case "h" | "help" | "?" if not rest:
                self._labeler.console.print(HELP, markup=False, highlight=False)
                for name, meaning in FLAGS.items():
                    self._labeler.say(f"  flag {name:<12} {meaning}")
            case "g" | "guideline" if not rest:
                self._labeler._guideline()
            case "v" | "view":
                self._view(rest)
            case "n" | "note":
                self._note = rest
                self._labeler.say(f"       noted: {rest}" if rest else "       note removed", "dim")
            case "f" | "flag":
                self._flag(rest)
            case _:
                return False
        return True

    def _flag(self, text: str) -> None:
        name, places = parse_flag(text, self._size)
        before = self._flags.get(name)
        if before is not None and set(places) <= set(before):
            left = sorted(set(before) - set(places))
            del self._flags[name]
            if left and places:
                self._flags[name] = left
        else:
            self._flags[name] = sorted({*(before or []), *places})
        on = [name + "".join(f" {place + 1}" for place in places) for name, places in self._flags.items()]
        self._labeler.say(f"       flags: {', '.join(on) or 'none'}", "dim")

    def _view(self, which: str) -> None:
        """Show the item, or one response of it."""
        if which:
            if not which.isdecimal() or not 1 <= int(which) <= self._size:
                raise AnswerError(f"there is no response {which}; they are 1 to {self._size}")
            blocks = self._response(int(which) - 1)
        else:
            progress = RichText(self._labeler.progress(), "bold")
            blocks = [RichText(), Rule(progress, align="left", characters="━", style="cyan")]
            blocks.append(Padding(_conversation(self._showing.prompt), (0, 2)))
            for number in range(self._size):
                blocks += self._response(number)
            line = "\u2500" if self._labeler.console.encoding.startswith("utf") else "-"
            blocks += [Rule(characters=line, style="dim"), RichText(_KEYS, "dim")]
        self._waiting = self._labeler._show(blocks)

    def _response(self, number: int) -> list[RenderableType]:
        heading = Rule(RichText(f"[{number + 1}]", "bold cyan"), align="left", style="cyan")
        return [heading, Padding(_conversation(self._showing.responses[number], "assistant"), (0, 2))]


def shown(text: str) -> RichText:
    """Text as it may appear on a terminal: what would command the terminal is written out, in reverse."""
    if not text.strip():
        return RichText("(empty)", "dim italic")
    found = RichText(overflow="fold")
    plain: list[str] = []
    for character in text.strip("\n").expandtabs(4):
        if is_hidden(character):
            found.append("".join(plain))
            plain.clear()
            found.append(escape(character), "reverse")
        else:
            plain.append(character)
    found.append("".join(plain))
    return found


def _conversation(text: Text, silent: str = "") -> RenderableType:
    """A string, or messages under the names of their roles; a single message of the ``silent`` role needs no name."""
    if isinstance(text, str):
        return shown(text)
    if len(text) == 1 and text[0]["role"] == silent:
        return shown(text[0]["content"])
    parts: list[RenderableType] = []
    for message in text:
        parts.append(RichText(visible(message["role"]) + ":", "bold"))
        parts.append(Padding(shown(message["content"]), (0, 0, 0, 2)))
    return Group(*parts)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
