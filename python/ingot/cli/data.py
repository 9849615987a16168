"""``ingot data check | show | import``."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from ingot.errors import ConfigError

if TYPE_CHECKING:
    from ingot.data.rows import Row


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
        return _characters


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
    """Characters of the prompt and the longest answer."""

    def size(part: Any) -> int:
        return sum(len(message["content"]) for message in part) if isinstance(part, list) else len(part or "")

    parts = row.parts()
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
