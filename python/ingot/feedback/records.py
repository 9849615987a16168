"""One record per judgement.

A record is a ranked-list row (``prompt, responses, ranks, group_id, annotator, criterion``; rank 1 is best, equal ranks are a tie)
with everything that is known about how it came to be. Records are only ever added: a judgement is taken back or replaced by a later
record that names it in ``revises``; :mod:`ingot.data.judgements` says what counts. Rows of other tools, which have no
``schema_version``, are read as judgements too: their ranked list counts, all else is kept as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

from ingot.data.judgements import Status
from ingot.data.keys import Text, digest, group_id_of
from ingot.data.rows import RANKING_SCHEMA_VERSION
from ingot.errors import DataError
from ingot.feedback.texts import text_problem

Kind = Literal["new", "repeat", "gold"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What one person said about one group of responses, once.

    Lists that speak of responses (``responses, ranks, ratings, answers, source_models``) are in the order of the group, not in the
    order in which they were shown. All ranks of a record that is no judgement are 1: it orders nothing.
    """

    prompt: Text
    """What was asked."""
    responses: tuple[Text, ...]
    """At least two."""
    ranks: tuple[int, ...]
    """1 is best, equal numbers are ties."""
    group_id: str
    """Names the prompt with these responses."""
    annotator: str = ""
    """Who judged."""
    criterion: str = ""
    """What the ranking is about."""
    id: str = ""
    """Names this record; empty in rows of other tools."""
    status: Status = "judged"
    """judged; skipped: seen and left; withdrawn: takes back the record in ``revises``."""
    revises: str | None = None
    """Id of the record that this one replaces or takes back."""
    order: tuple[int, ...] = ()
    """Index of the response shown first, second, ...; empty where not known."""
    ratings: tuple[int | None, ...] | None = None
    """1 (worst) to 7 (best) a response; None where not given."""
    answers: Mapping[str, Sequence[bool | None]] = dataclasses.field(default_factory=dict)
    """Criterion -> whether each response meets it; None where not answered."""
    flags: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    """Flag -> indexes of the responses it is on; no index: on the prompt or the whole group."""
    note: str = ""
    """In the annotator's own words."""
    kind: Kind = "new"
    """new, repeat (seen before by the same annotator), gold (with a known answer)."""
    repeat: int = 0
    """How many times the annotator had been shown this group before."""
    gold_ranks: tuple[int, ...] | None = None
    """The known answer of a gold item."""
    time_s: float | None = None
    """Seconds from showing to answer."""
    created: str = ""
    """When, in UTC (ISO 8601)."""
    source_models: tuple[str, ...] | None = None
    """What wrote each response; never shown to the annotator."""
    rubric: Mapping[str, str] | None = None
    """Version and sha256 of the guideline that the annotator had."""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Other fields of the row, kept as they are."""
    schema_version: int = 0
    """0 for rows of other tools."""


_FIELDS = tuple(field.name for field in dataclasses.fields(Record) if field.name != "extra")
_ALWAYS = ("prompt", "responses", "ranks", "group_id", "annotator", "criterion")


def with_id(record: Record) -> Record:
    """The record in the current schema, with an id made from its content."""
    record = dataclasses.replace(record, id="", schema_version=RANKING_SCHEMA_VERSION)
    return dataclasses.replace(record, id=digest(to_row(record))[:24])


def to_row(record: Record) -> dict[str, Any]:
    """The record as a JSON object; what is not known is left out."""
    row: dict[str, Any] = {}
    for name in _FIELDS:
        value = getattr(record, name)
        if name in _ALWAYS or value not in (None, "", (), {}):
            row[name] = list(value) if isinstance(value, tuple) else value
    row["answers"] = {name: list(values) for name, values in record.answers.items()}
    row["flags"] = {name: list(values) for name, values in record.flags.items()}
    for name in ("answers", "flags"):
        if not row[name]:
            del row[name]
    if record.rubric is not None:
        row["rubric"] = dict(record.rubric)
    return row | {name: value for name, value in record.extra.items() if name not in row}


def from_row(row: object, place: str) -> Record:
    """A record from a JSON object.

    Raises
    ------
    DataError
        Names ``place`` (file and row) and the field.
    """
    row = check_object(row, place)
    version = row.get("schema_version", 0)
    if not _is_whole(version) or version < 0:
        raise DataError(f'{place}: "schema_version" is {version!r}, not a whole number')
    if version > RANKING_SCHEMA_VERSION:
        raise DataError(
            f"{place}: written by a newer ingot (schema {version}, this one reads up to {RANKING_SCHEMA_VERSION})"
        )
    prompt, responses, group_id = check_group(row, place)
    if row.get("ranks") is None:
        raise DataError(f'{place}: no field "ranks"; a ranked list has "prompt", "responses" and "ranks"')
    size = len(responses)
    check = _Fields(row, place, size)
    ranks = check.whole_numbers("ranks", "1 for the best, equal numbers for ties")
    assert ranks is not None
    ranked_list: dict[str, Any] = {
        "prompt": prompt,
        "responses": responses,
        "ranks": ranks,
        "group_id": group_id,
        "annotator": check.name("annotator"),
        "criterion": check.string("criterion"),
    }
    if version == 0:
        # Other tools mean something else by the other names: an id of theirs may be that of many judgements.
        return Record(**ranked_list, extra={n: v for n, v in row.items() if n not in (*ranked_list, "schema_version")})
    order = check.whole_numbers("order", "the index of the response shown first, second, ...", least=0) or ()
    if order and sorted(order) != list(range(size)):
        raise DataError(f'{place}: "order" is {list(order)}, not an order of the {size} responses (0 to {size - 1})')
    ratings = check.values("ratings", lambda value: value is None or (_is_whole(value) and 1 <= value <= 7), "1 to 7")
    status = check.choice("status", get_args(Status), "judged")
    revises = row.get("revises")
    if revises is not None and not isinstance(revises, str):
        raise DataError(f'{place}: "revises" is {revises!r}, not the id of a record')
    time_s = row.get("time_s")
    if time_s is not None and not (
        isinstance(time_s, int | float) and not isinstance(time_s, bool) and math.isfinite(time_s)
    ):
        raise DataError(f'{place}: "time_s" is {time_s!r}, not a number of seconds')
    repeat = row.get("repeat", 0)
    if not _is_whole(repeat) or repeat < 0:
        raise DataError(f'{place}: "repeat" is {repeat!r}, not a whole number')
    rubric = row.get("rubric")
    if rubric is not None and not (isinstance(rubric, dict) and all(isinstance(v, str) for v in rubric.values())):
        raise DataError(f'{place}: "rubric" is {rubric!r}, not an object with "version" and "sha256"')
    return Record(
        **ranked_list,
        id=check.string("id"),
        status=cast(Status, status),
        revises=revises,
        order=order,
        ratings=ratings,
        answers=check.answers(),
        flags=check.flags(),
        note=check.string("note"),
        kind=cast(Kind, check.choice("kind", get_args(Kind), "new")),
        repeat=repeat,
        gold_ranks=check.whole_numbers("gold_ranks", "1 for the best, equal numbers for ties"),
        time_s=None if time_s is None else float(time_s),
        created=check.string("created"),
        source_models=check.values("source_models", lambda value: isinstance(value, str), "strings"),
        rubric=rubric,
        extra={name: value for name, value in row.items() if name not in _FIELDS},
        schema_version=version,
    )


def check_object(row: object, place: str) -> dict[str, Any]:
    """A parsed row that is a JSON object.

    Raises
    ------
    DataError
        It is not, or no JSON at all (the ``ValueError`` of :func:`ingot.data.files.parse_json`).
    """
    if isinstance(row, ValueError):
        raise DataError(f"{place}: not valid JSON ({row})")
    if not isinstance(row, dict):
        raise DataError(f"{place}: a {type(row).__name__}, not an object")
    return row


def check_group(row: Mapping[str, Any], place: str) -> tuple[Text, tuple[Text, ...], str]:
    """The prompt, the responses and the group id of a row; an id is made from the other two where there is none.

    Raises
    ------
    DataError
        One of them is missing or of a wrong kind, or there are fewer than two responses.
    """
    for name in ("prompt", "responses"):
        if row.get(name) is None:
            names = ", ".join(map(str, row)) or "none"
            raise DataError(f'{place}: no field "{name}" (fields there: {names})')
    problem = text_problem(row["prompt"])
    if problem:
        raise DataError(f'{place}: "prompt" {problem}')
    responses = row["responses"]
    if not isinstance(responses, list):
        raise DataError(f'{place}: "responses" is a {type(responses).__name__}, not a list')
    if len(responses) < 2:
        raise DataError(f'{place}: "responses" has {len(responses)} entries; at least two are needed to compare')
    for number, response in enumerate(responses, 1):
        problem = text_problem(response)
        if problem:
            raise DataError(f'{place}: response {number} in "responses" {problem}')
    group_id = _Fields(row, place, len(responses)).name("group_id") or group_id_of(row["prompt"], responses)
    return row["prompt"], tuple(responses), group_id


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class _Fields:
    """Reads optional fields of a row about ``size`` responses; errors name the field."""

    row: Mapping[str, Any]
    place: str
    size: int

    def string(self, name: str) -> str:
        value = self.row.get(name)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise DataError(f'{self.place}: "{name}" is a {type(value).__name__}, not a string')
        return value

    def name(self, name: str) -> str:
        """A string; other tools number people."""
        value = self.row.get(name)
        return str(value) if _is_whole(value) else self.string(name)

    def choice(self, name: str, choices: Sequence[str], default: str) -> str:
        value = self.row.get(name, default)
        if value not in choices:
            raise DataError(f'{self.place}: "{name}" is {value!r}; it is one of {", ".join(choices)}')
        return cast(str, value)

    def values(self, name: str, valid: Callable[[Any], bool], wanted: str) -> tuple[Any, ...] | None:
        value = self.row.get(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise DataError(f'{self.place}: "{name}" is a {type(value).__name__}, not a list')
        if len(value) != self.size:
            raise DataError(
                f'{self.place}: "{name}" has {len(value)} entries for {self.size} responses; give one for each'
            )
        for entry in value:
            if not valid(entry):
                raise DataError(f'{self.place}: "{name}" holds {entry!r}; its entries are {wanted}')
        return tuple(value)

    def whole_numbers(self, name: str, wanted: str, least: int = 1) -> tuple[int, ...] | None:
        found = self.values(
            name, lambda value: _is_whole(value) and value >= least, f"whole numbers from {least}: {wanted}"
        )
        return found

    def answers(self) -> dict[str, tuple[bool | None, ...]]:
        value = self.row.get("answers", {})
        if not isinstance(value, dict):
            raise DataError(f'{self.place}: "answers" is a {type(value).__name__}, not an object')
        inner = _Fields(value, f'{self.place}, "answers"', self.size)
        found = {
            name: inner.values(name, lambda entry: entry is None or isinstance(entry, bool), "true, false or null")
            for name in value
        }
        return {name: entries for name, entries in found.items() if entries is not None}

    def flags(self) -> dict[str, tuple[int, ...]]:
        value = self.row.get("flags", {})
        valid = isinstance(value, dict) and all(
            isinstance(entries, list) and all(_is_whole(entry) and 0 <= entry < self.size for entry in entries)
            for entries in value.values()
        )
        if not valid:
            raise DataError(
                f'{self.place}: "flags" is {value!r}; it holds lists of response indexes (0 to {self.size - 1}) by flag'
            )
        return {name: tuple(entries) for name, entries in value.items()}
