"""``ingot data check | show | import``."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from ingot.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ingot.data.chat import ChatEncoder, Encoded
    from ingot.data.rows import PromptOnly, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """Look through rows before they are trained on: their kind, and what is wrong with each that cannot be used.

    The kind is found by the columns: text or messages; prompt; prompt and completion; prompt, chosen and rejected; prompt, completion
    and label; prompt, completions and labels; prompt, responses and ranks. Exit code 1 if a row cannot be used.
    """

    files: Positional[tuple[str, ...]]
    """Rows: .jsonl or .json (each also as .gz or .zst), or .parquet."""
    tokenizer: str | None = None
    """Folder of a model: lengths are then those of its tokens in its chat template, else characters."""
    max_length: int | None = None
    """Count the rows that are longer than this many tokens: training drops them. Needs --tokenizer."""
    json: bool = False
    """Print the facts as JSON."""

    def run(self) -> int:
        """Check every file; 1 if a row is bad."""
        if not self.files:
            raise ConfigError("nothing to check: name files of rows")
        if self.max_length is not None and self.tokenizer is None:
            raise ConfigError("--max-length counts tokens: give --tokenizer too")
        reports = [self._check(file) for file in self.files]
        if self.json:
            print(
                json.dumps(
                    {"files": reports, "num_bad": sum(report["num_bad"] for report in reports)}, ensure_ascii=False
                )
            )
        return 1 if any(report["num_bad"] or not report["num_rows"] for report in reports) else 0

    def _check(self, file: str) -> dict[str, Any]:
        """Print a file's bad rows and its facts."""
        from ingot.data.rows import HH_USER, RowError, scan

        measure = self._measure()
        problems: list[dict[str, Any]] = []
        first_with: dict[bytes, int] = {}
        lengths: list[int] = []
        kinds: collections.Counter[str] = collections.Counter()
        duplicates: list[tuple[int, int]] = []
        transcripts = 0
        with _progress(f"checking {file}") as progress:
            for row in scan(file, progress=progress):
                if isinstance(row, RowError):
                    problems.append({"row": row.row, "field": row.field, "problem": row.problem, "fix": row.fix})
                    if not self.json:
                        print(row)
                    continue
                kinds[f"{row.kind}, {'conversational' if row.conversational else 'plain text'}"] += 1
                before = first_with.setdefault(row.fingerprint(), row.number)
                if before != row.number:
                    duplicates.append((row.number, before))
                transcripts += any(isinstance(part, str) and part.startswith(HH_USER) for part in row.parts())
                try:
                    lengths.append(measure(row))
                except RowError as error:
                    error = error.at(file, row.number)
                    problems.append(
                        {"row": error.row, "field": error.field, "problem": error.problem, "fix": error.fix}
                    )
                    if not self.json:
                        print(error)
        kind = next(iter(kinds), None)
        lengths.sort()
        unit = "characters" if self.tokenizer is None else "tokens"
        facts: dict[str, Any] = {
            "file": file,
            "kind": kind,
            "num_rows": sum(kinds.values()) + len(problems),
            "num_bad": len(problems),
            "num_duplicates": len(duplicates),
            "unit": unit,
        }
        if lengths:
            facts["lengths"] = {
                "median": lengths[len(lengths) // 2],
                "p95": lengths[len(lengths) * 95 // 100],
                "max": lengths[-1],
            }
        if self.max_length is not None:
            facts["max_length"] = self.max_length
            facts["num_too_long"] = sum(length > self.max_length for length in lengths)
        facts["problems"] = problems
        if not self.json:
            _print_facts(facts, duplicates, transcripts)
        return facts

    def _measure(self) -> Callable[[Row], int]:
        """The length of a row: of its longest sequence."""
        if self.tokenizer is None:
            return _characters
        from ingot.data.examples import encode_row
        from ingot.data.rows import PromptOnly

        encoder, _ = _encoder_of(self.tokenizer)

        def tokens(row: Row) -> int:
            if isinstance(row, PromptOnly):
                return len(_encoded_prompt(row, encoder))
            return max(map(len, encode_row(row, encoder)))

        return tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show:
    """Show rows as the model sees them: every token, which are trained, and where a turn ends.

    Trained tokens are green, or between [[ and ]] where there is no colour; special tokens are bold. Look at this before you train: what is
    green is what the model learns to write, and it has to end with the end of turn. Of an answer in steps nothing is written: a reward model
    learns to judge each step, at the token before the sign <right> or <wrong>.
    """

    file: Positional[str]
    """Rows: .jsonl or .json (each also as .gz or .zst), or .parquet."""
    tokenizer: str
    """Folder of a model (its tokenizer and chat template), or a tokenizer.json."""
    rows: int = 3
    """Show this many."""
    start: int = 1
    """Begin at the row with this number."""
    step_separator: str = "\n"
    """What ends a step of an answer in steps, as for ingot reward: a new line unless given."""
    color: Literal["auto", "always", "never"] = "auto"
    """auto: where the output is a terminal."""
    json: bool = False
    """Print ids, tokens and mask of each sequence as JSON lines, and of steps the numbers of the tokens that end them with their labels."""

    def run(self) -> int:
        """Print the rows; 1 if one of them cannot be used."""
        from ingot.data.rows import RowError, Stepwise, scan

        if not self.step_separator:
            raise ConfigError("--step-separator is empty: give the text that ends a step")
        if self.rows < 1 or self.start < 1:
            raise ConfigError("--rows and --start are at least 1")
        encoder, added = _encoder_of(self.tokenizer)
        painter = _Painter(encoder, self.color)
        if not self.json:
            _print_legend(encoder, added, painter)
        shown = bad = 0
        for row in scan(self.file):
            number = row.row if isinstance(row, RowError) else row.number
            if number < self.start:
                continue
            if shown == self.rows:
                break
            shown += 1
            try:
                if isinstance(row, RowError):
                    raise row
                sequences = _sequences(row, encoder, self.step_separator)
            except RowError as error:
                bad += 1
                print(error if error.file else error.at(self.file, number), file=sys.stderr)
                continue
            labels = row.labels if isinstance(row, Stepwise) else ()
            for name, sequence in sequences:
                if self.json:
                    print(json.dumps(_sequence_facts(number, name, sequence, encoder, labels), ensure_ascii=False))
                else:
                    trained = f"{len(labels)} judged" if labels else f"{int(sequence.mask.sum()):,} trained"
                    print(f"--- row {number}, {name}: {_count(len(sequence), 'token')}, {trained}")
                    painter.print(sequence, dict(zip(sequence.ends, labels, strict=True)) if labels else {})
        if shown == 0:
            raise ConfigError(f"{self.file}: has no row {self.start}: give a smaller --start")
        return 1 if bad else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Make rows of data in another format. Every record that gives none is named with the reason; nothing else is left out.

    hh: Anthropic's transcripts; alpaca: instruction, input, output; sharegpt: conversations; best-of-4: query, samples and the best one;
    argilla, label-studio: what these tools export, one ranked list for each judgement.
    """

    kind: Positional[Literal["hh", "alpaca", "sharegpt", "best-of-4", "argilla", "label-studio"]]
    """Format of the file."""
    file: Positional[str]
    """The data: .jsonl or .json (each also as .gz or .zst), or .parquet."""
    output: str
    """The .jsonl file to write; it must not exist yet."""
    tokenizer: str | None = None
    """Folder or tokenizer.json, for best-of-4 data that hold token ids."""
    json: bool = False
    """Print the facts as JSON."""

    def run(self) -> int:
        """Import, say what came of it."""
        import ingot
        from ingot.data.imports import import_rows, write_rows
        from ingot.durable import rename, temporary_name

        target = Path(self.output)
        if target.exists():
            raise ConfigError(f"--output {target}: exists already; give another name, or remove it")
        if not target.parent.is_dir():
            raise ConfigError(f"--output {target}: there is no folder {target.parent}; make it first")
        tokenizer = ingot.Tokenizer.from_file(self.tokenizer) if self.tokenizer is not None else None
        partial = temporary_name(target)
        try:
            with partial.open("wb") as sink, _progress(f"importing {self.file}") as progress:
                results = import_rows(self.kind, self.file, tokenizer=tokenizer, progress=progress)
                try:
                    num_records, num_rows, dropped = write_rows(results, sink.write)
                except DataError as error:
                    raise DataError(f"{self.file}, read as {self.kind}: {error}") from None
                sink.flush()
                os.fsync(sink.fileno())
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        rename(partial, target)
        if self.json:
            facts = {"output": str(target), "num_records": num_records, "num_rows": num_rows}
            print(json.dumps({**facts, "dropped": [dataclasses.asdict(drop) for drop in dropped]}, ensure_ascii=False))
            return 0
        for drop in dropped:
            print(f"{self.file}, row {drop.record}: dropped: {drop.reason}")
        print(
            f"{_count(num_records, 'record')} -> {_count(num_rows, 'row')}, {len(dropped):,} dropped{' (named above)' if dropped else ''}: {target}"
        )
        return 0


def _encoder_of(path: str) -> tuple[ChatEncoder, tuple[str, ...]]:
    """The encoder of a model as it will be trained, and the special tokens that its tokenizer does not have yet."""
    import ingot
    from ingot.data.chat import ChatEncoder, ChatTemplate

    tokenizer = ingot.Tokenizer.from_file(path)
    template = ChatTemplate.of_model(path)
    added = template.missing_special_tokens(tokenizer)
    return ChatEncoder(template, tokenizer.with_special_tokens(added)), added


def _encoded_prompt(row: PromptOnly, encoder: ChatEncoder) -> Encoded:
    import numpy as np

    from ingot.data.chat import Encoded

    prompt = row.prompt
    ids = encoder.encode_text_prompt(prompt) if isinstance(prompt, str) else encoder.encode_prompt(prompt)
    return Encoded(ids, np.zeros(len(ids), np.bool_))


def _sequences(row: Row, encoder: ChatEncoder, step_separator: str) -> list[tuple[str, Encoded]]:
    """The sequences of a row with a name each."""
    from ingot.data.examples import encode_row
    from ingot.data.rows import Candidates, Preference, PromptOnly, RankedList, Stepwise, UnpairedPreference

    if isinstance(row, PromptOnly):
        return [("prompt (the model writes on from its end)", _encoded_prompt(row, encoder))]
    sequences = encode_row(row, encoder, step_separator=step_separator)
    names = [row.kind]
    if isinstance(row, Preference):
        names = ["chosen", "rejected"]
    elif isinstance(row, UnpairedPreference):
        names = ["wanted" if row.label else "not wanted"]
    elif isinstance(row, Stepwise):
        names = [f"steps {', '.join('right' if label else 'wrong' for label in row.labels)}"]
    elif isinstance(row, RankedList):
        names = [f"response {index + 1} (rank {rank})" for index, rank in enumerate(row.ranks)]
    elif isinstance(row, Candidates):
        names = [f"response {index + 1}" for index in range(len(row.responses))]
    return list(zip(names, sequences, strict=True))


def _sequence_facts(
    number: int, name: str, sequence: Encoded, encoder: ChatEncoder, labels: Sequence[bool]
) -> dict[str, Any]:
    ids = sequence.ids.tolist()
    mask = sequence.mask & (not labels)
    judged = {"ends": list(sequence.ends), "labels": list(labels)} if labels else {}
    return {
        "row": number,
        "sequence": name,
        "ids": ids,
        "tokens": [encoder.tokenizer.token_bytes(token).decode("utf-8", "backslashreplace") for token in ids],
        "trained": mask.astype(int).tolist(),
        **judged,
    }


def _print_legend(encoder: ChatEncoder, added: tuple[str, ...], painter: _Painter) -> None:
    print(
        f"written by {encoder.template.name}; a turn of the assistant ends with {encoder.end_of_turn} (id {encoder.end_of_turn_id})"
    )
    if added:
        print(f"the tokenizer has no {', '.join(added)} yet: shown as ingot sft adds them")
    marks = "green" if painter.coloured else "between [[ and ]], tokens divided by |"
    print(f"trained tokens are {marks}; \u23ce is a new line, \u00d73 after a character says that it takes 3 tokens")


class _Painter:
    """Prints tokens in colour, or with signs where there is none."""

    def __init__(self, encoder: ChatEncoder, color: str) -> None:
        from rich.console import Console

        force = {"always": True, "never": False}.get(color)
        self._console = Console(highlight=False, markup=False, emoji=False, force_terminal=force, soft_wrap=True)
        self.coloured = self._console.is_terminal and not self._console.no_color
        self._encoder = encoder
        self._special = set(encoder.tokenizer.special_tokens.values())

    def print(self, sequence: Encoded, judged: Mapping[int, bool]) -> None:
        """One sequence; ``judged`` are the labels of the tokens at which it is judged and not written."""
        from rich.text import Text

        text = Text()
        trained_before = False
        for index, (piece, trained, special, label) in enumerate(self._pieces(sequence, judged)):
            if self.coloured:
                shade = ("bright_green", "green") if trained else ("bright_black", "white")
                text.append(piece, style=("bold " if special else "") + shade[index % 2])
            else:
                edge = {(False, True): "[[", (True, False): "]]"}.get((trained_before, trained), "|" if index else "")
                # After a new line the division is seen anyway.
                text.append("" if edge == "|" and text.plain.endswith("\n") else edge)
                text.append(piece)
            if label is not None:
                sign = " <right>" if label else " <wrong>"
                text.rstrip_end(len(text.plain.rstrip("\n")))
                text.append(sign + "\n", style="bold " + ("green" if label else "red"))
            trained_before = trained
        if trained_before and not self.coloured:
            text.append("]]")
        if judged:
            text.rstrip()
        self._console.print(text)

    def _pieces(self, sequence: Encoded, judged: Mapping[int, bool]) -> Iterator[tuple[str, bool, bool, bool | None]]:
        """Text, trained, special and label of each token; tokens that share a character are one piece with their number."""
        held, count = b"", 0
        tokens = [
            (token, trained and not judged)
            for token, trained in zip(sequence.ids.tolist(), sequence.mask.tolist(), strict=True)
        ]
        for index, (token, trained) in enumerate(tokens):
            held, count = held + self._encoder.tokenizer.token_bytes(token), count + 1
            last = index + 1 == len(tokens) or tokens[index + 1][0] in self._special or tokens[index + 1][1] != trained
            if last or index in judged or not _ends_inside_a_character(held):
                piece = _visible(held) + (f"\u00d7{count}" if count > 1 else "")
                yield piece, trained, token in self._special, judged.get(index)
                held, count = b"", 0


def _ends_inside_a_character(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


def _visible(token: bytes) -> str:
    """The text of a token with all that a terminal would not show, or would obey, as signs."""
    shown = []
    for character in token.decode("utf-8", "backslashreplace"):
        if character == "\n":
            shown.append("\u23ce\n")
        elif character == "\t":
            shown.append("\u21e5")
        elif character.isprintable():
            shown.append(character)
        else:
            shown.append(character.encode("unicode_escape").decode())
    return "".join(shown)


def _print_facts(facts: dict[str, Any], duplicates: list[tuple[int, int]], transcripts: int) -> None:
    good, bad = facts["num_rows"] - facts["num_bad"], facts["num_bad"]
    if facts["num_rows"] == 0:
        print(f"{facts['file']}: no row in it")
        return
    verdict = f"{_count(bad, 'row')} cannot be used (named above)" if bad else "every row can be used"
    print(
        f"{facts['file']}: {facts['kind'] or 'kind unknown'}; {good:,} of {_count(facts['num_rows'], 'row')} good; {verdict}"
    )
    if "lengths" in facts:
        lengths = facts["lengths"]
        print(
            f"  length in {facts['unit']}: median {lengths['median']:,}, 95 % up to {lengths['p95']:,}, longest {lengths['max']:,}"
        )
    if facts.get("num_too_long"):
        share = 100 * facts["num_too_long"] / good
        print(
            f"  {_count(facts['num_too_long'], 'row')} ({share:.1f} %) longer than --max-length {facts['max_length']}: "
            "training drops them whole; none is cut"
        )
    if duplicates:
        later, earlier = duplicates[0]
        print(
            f"  {_count(len(duplicates), 'row')} said before (row {later} repeats row {earlier}): remove those that you do not mean to weigh twice"
        )
    if transcripts:
        print(
            f"  {_count(transcripts, 'row')} hold transcripts with Human: and Assistant: as plain text; to train on messages: "
            f"ingot data import hh {facts['file']} --output pairs.jsonl"
        )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _characters(row: Row) -> int:
    """Characters of the prompt and the longest answer, or all steps of it."""
    from ingot.data.rows import Stepwise

    def size(part: Any) -> int:
        return sum(len(message["content"]) for message in part) if isinstance(part, list) else len(part or "")

    parts = row.parts()
    if isinstance(row, Stepwise):
        return sum(map(size, parts))
    return size(parts[0]) + max(map(size, parts[1:]), default=0)


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], object] | None]:
    """A bar on the error stream while a long file is read; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
