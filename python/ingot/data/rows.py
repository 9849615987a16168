"""Rows of the data that a model is aligned with: what kind each is, and what is wrong with those that cannot be used.

| kind | columns |
|---|---|
| language modelling | ``text``, or ``messages`` |
| prompt-only | ``prompt`` |
| prompt-completion | ``prompt``, ``completion``; ``question``, ``answer`` are read as a user's and the assistant's message |
| preference | ``chosen``, ``rejected``; ``prompt`` unless both begin with it; optional ``margin``, ``weight``, ``group_id``; reward models also read ``soft_label``, ``criterion``, ``annotator`` |
| unpaired preference | ``prompt``, ``completion``, ``label`` (true: wanted) |
| stepwise supervision | ``prompt``, ``completions`` (steps), ``labels`` (true: right) |
| ranked list | ``prompt``, ``responses`` (two or more), ``ranks`` (1 best, equal: tie); optional ``group_id``, ``annotator``, ``criterion``; judgements of ``ingot label`` also ``id``, ``status``, ``revises`` |
| candidates | ``prompt``, ``responses``: a ranked list that nobody ranked yet |

A prompt or an answer is plain text (a string) or conversational (a list of messages ``{"role", "content"}``). A line that is a bare
list of messages is a dialogue. All other columns are kept in ``extra``. The column names of the first six are those of TRL.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, TypedDict, get_args

from ingot.data.files import Progress, json_items
from ingot.data.judgements import Status, current
from ingot.data.keys import digest, group_id_of
from ingot.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)

RANKING_SCHEMA_VERSION = 1
"""``schema_version`` of the ranked lists that are written here; rows of other tools have none, or 0."""

HH_USER = "\n\nHuman:"
"""Begins a user's turn in the transcripts of Anthropic's HH data."""

_FIRST_ROWS = 100
_ROLES_ELSEWHERE = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
}


class Message(TypedDict):
    """One turn of a dialogue."""

    role: Role
    content: str


Content: TypeAlias = str | list[Message]
"""Plain text, or the messages of a conversation."""


class RowError(DataError):
    """A row that cannot be used, named by file, row number and field, with what to do about it."""

    def __init__(self, problem: str, fix: str, *, field: str = "", file: str = "", row: int = 0) -> None:
        self.problem = problem
        """What is wrong, in words."""
        self.fix = fix
        """What to do."""
        self.field = field
        """The column, or the place in it; empty where the whole row is meant."""
        self.file = file
        self.row = row
        """From 1."""
        named = f'field "{field}" {problem}' if field else problem
        super().__init__(f"{file}, row {row}: {named}; {fix}")

    def at(self, file: str, row: int) -> RowError:
        """The same in this file and row."""
        return RowError(self.problem, self.fix, field=self.field, file=file, row=row)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What all kinds share."""

    kind: ClassVar[str]

    number: int = 1
    """Of the row in its file, from 1."""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The other columns; reward functions get them."""

    @property
    def conversational(self) -> bool:
        """Messages, not plain text."""
        return any(isinstance(part, list) for part in self.parts())

    def parts(self) -> list[Content | None]:
        """Prompt and answers: all that decides the ids of a row, with its kind."""
        raise NotImplementedError

    def columns(self) -> dict[str, Any]:
        """The row as it is written to a file."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["number"], fields["extra"]
        return {**{name: value for name, value in fields.items() if value is not None}, **self.extra}

    def asked(self) -> Content:
        """The prompt; of a dialogue and of a text, all of it."""
        first = self.parts()[0]
        assert first is not None
        return first

    def fingerprint(self) -> bytes:
        """Equal for rows that say the same, whatever their other columns."""
        return bytes.fromhex(digest((dataclasses.replace(self, extra={}) if self.extra else self).columns())[:32])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelling(Row):
    """Text or a dialogue to learn from; of a dialogue, the assistant's messages."""

    kind = "language modelling"
    content: Content

    def parts(self) -> list[Content | None]:
        return [self.content]

    def columns(self) -> dict[str, Any]:
        return {"messages" if isinstance(self.content, list) else "text": self.content, **self.extra}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOnly(Row):
    """Something to answer."""

    kind = "prompt-only"
    prompt: Content

    def parts(self) -> list[Content | None]:
        return [self.prompt]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptCompletion(Row):
    """A prompt and the answer to learn."""

    kind = "prompt-completion"
    prompt: Content
    completion: Content

    def parts(self) -> list[Content | None]:
        return [self.prompt, self.completion]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference(Row):
    """Two answers, the first of which was preferred."""

    kind = "preference"
    prompt: Content | None
    """None where chosen and rejected are plain texts that both begin with it: their common tokens are the prompt then."""
    chosen: Content
    rejected: Content
    margin: float | None = None
    """By how much it was preferred."""
    weight: float | None = None
    """Of this pair beside others; 1 where it is None."""
    group_id: str | None = None
    """Pairs of one prompt, to be kept together."""

    def parts(self) -> list[Content | None]:
        return [self.prompt, self.chosen, self.rejected]

    def asked(self) -> Content:
        """The prompt; where there is none, what both answers begin with."""
        if self.prompt is not None:
            return self.prompt
        return self.chosen[: common_beginning(self.chosen, self.rejected)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnpairedPreference(Row):
    """An answer that was wanted, or was not."""

    kind = "unpaired preference"
    prompt: Content
    completion: Content
    label: bool

    def parts(self) -> list[Content | None]:
        return [self.prompt, self.completion]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stepwise(Row):
    """An answer in steps, each right or wrong. Plain text."""

    kind = "stepwise supervision"
    prompt: str
    completions: list[str]
    labels: list[bool]

    def parts(self) -> list[Content | None]:
        return [self.prompt, *self.completions]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidates(Row):
    """Several answers to one prompt, not ranked yet."""

    kind = "candidates"
    prompt: Content
    responses: list[Content]
    group_id: str | None = None

    def parts(self) -> list[Content | None]:
        return [self.prompt, *self.responses]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankedList(Row):
    """Two or more answers to one prompt in the order in which somebody preferred them.

    A row without ``schema_version`` is of another tool: what it calls id or status is in ``extra``, and it counts as it is.
    """

    kind = "ranked list"
    prompt: Content
    responses: list[Content]
    ranks: list[int]
    """One for each response: 1 is best, equal ranks are ties."""
    group_id: str | None = None
    annotator: str | None = None
    criterion: str | None = None
    id: str | None = None
    """Names the judgement."""
    status: Status = "judged"
    """judged; skipped: seen and left; withdrawn: takes back the judgement in ``revises``."""
    revises: str | None = None
    """Id of the judgement that this one replaces or takes back."""

    def parts(self) -> list[Content | None]:
        return [self.prompt, *self.responses]

    def columns(self) -> dict[str, Any]:
        columns = super().columns()
        # What was judged need not say so, and the status of other tools is in ``extra``.
        if self.status == "judged" and "status" not in self.extra:
            del columns["status"]
        return columns

    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) for every two responses that are not tied, the best first. The same answer twice is no pair."""
        order = sorted(range(len(self.ranks)), key=lambda number: self.ranks[number])
        return [
            (i, j)
            for i, j in itertools.combinations(order, 2)
            if self.ranks[i] < self.ranks[j] and self.responses[i] != self.responses[j]
        ]

    def preferences(self) -> list[Preference]:
        """The same judgement as preference rows: one for every untied pair, the best first, under one ``group_id``.

        Each weighs 1 / (untied pairs), so that a judgement that orders anything weighs 1, however many responses it ranked. Annotator,
        criterion, the judgement's id and the numbers of the two responses are in ``extra``.
        """
        pairs = self.pairs()
        group_id = self.group_id if self.group_id is not None else group_id_of(self.prompt, self.responses)
        known = {"annotator": self.annotator, "criterion": self.criterion, "judgement": self.id}
        kept = {name: value for name, value in self.extra.items() if name != "schema_version"}
        kept.update({name: value for name, value in known.items() if value is not None})
        return [
            Preference(
                number=self.number,
                prompt=self.prompt,
                chosen=self.responses[better],
                rejected=self.responses[worse],
                weight=1.0 / len(pairs),
                group_id=group_id,
                extra={**kept, "response_numbers": [better, worse]},
            )
            for better, worse in pairs
        ]


KINDS: tuple[type[Row], ...] = (
    LanguageModelling,
    PromptOnly,
    PromptCompletion,
    Preference,
    UnpairedPreference,
    Stepwise,
    Candidates,
    RankedList,
)

Source: TypeAlias = str | Path | Sequence[str | Path] | Iterable[Mapping[str, Any]]


def common_beginning(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many entries two sequences begin with in common."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


# ---- reading


def read_rows(
    source: Source, kinds: Sequence[type[Row]] | None = None, progress: Progress | None = None
) -> Iterator[Row]:
    """The rows of files (or of an iterable of dictionaries), one at a time; a file holds one kind.

    Of ranked lists come those that count, at the end: a later row, in whichever file, may take one back or replace it. For each row as
    it stands there is :func:`scan`.

    Parameters
    ----------
    source
        A path, a list of paths, or the rows themselves. ``.jsonl`` and ``.json``, each also as ``.gz`` or ``.zst``, and ``.parquet``.
    kinds
        Read each row as the first of these whose columns it has; unless given, as the kind that its columns mean.

    Raises
    ------
    RowError
        The first row that cannot be used.
    DataError
        A file cannot be read, holds no row, or holds judgements of which none counts.
    """
    judgements: list[RankedList] = []
    for row in _all_rows(source, kinds, progress):
        if isinstance(row, RankedList):
            judgements.append(row)
        else:
            yield row
    counting = current(judgements)
    if judgements and not counting:
        where = f"{source}: " if isinstance(source, str | Path) else ""
        raise DataError(
            f"{where}none of the {len(judgements)} judgements counts: each was skipped, taken back or replaced; judge some with: ingot label"
        )
    yield from counting


def _all_rows(source: Source, kinds: Sequence[type[Row]] | None, progress: Progress | None) -> Iterator[Row]:
    """All rows of the source in their order; the first that cannot be used is raised."""
    if isinstance(source, str | Path):
        source = [source]
    if isinstance(source, list | tuple) and all(isinstance(entry, str | Path) for entry in source):
        if not source:
            raise DataError("no rows were given: name at least one file")
        for path in source:
            number = 0
            for number, row in enumerate(scan(path, kinds, progress), 1):  # noqa: B007 - counted for the check below
                if isinstance(row, RowError):
                    raise row
                yield row
            if number == 0:
                raise DataError(f"{path}: no row in it; give a file that holds some")
    else:
        for row in _examined(enumerate(source, 1), "the rows given", kinds):
            if isinstance(row, RowError):
                raise row
            yield row


def scan(
    path: str | Path, kinds: Sequence[type[Row]] | None = None, progress: Progress | None = None
) -> Iterator[Row | RowError]:
    """Every row of a file, as what it is or as what is wrong with it.

    The kind of the file is that of most of its first 100 rows; rows of other kinds are wrong.

    Raises
    ------
    DataError
        The file cannot be read.
    """
    path = Path(path)
    return _examined(json_items(path, progress), str(path), kinds)


def _examined(
    items: Iterable[tuple[int, Any]], file: str, kinds: Sequence[type[Row]] | None
) -> Iterator[Row | RowError]:
    """Parsed rows, checked to be of one kind."""

    def parsed() -> Iterator[Row | RowError]:
        for number, item in items:
            try:
                yield parse_row(item, number=number, kinds=kinds)
            except RowError as error:
                yield error.at(file, number)

    rows = parsed()
    first = list(itertools.islice(rows, _FIRST_ROWS))
    forms = collections.Counter(_form(row) for row in first if isinstance(row, Row))
    usual = forms.most_common(1)[0][0] if forms else None
    example = next((row.number for row in first if isinstance(row, Row) and _form(row) == usual), 0)
    for row in itertools.chain(first, rows):
        if isinstance(row, RowError):
            yield row
            continue
        usual = usual or _form(row)
        example = example or row.number
        if _form(row) == usual:
            yield row
        else:
            yield RowError(
                f"is {_form(row)}, but the file is {usual} (see row {example})",
                "a file holds one kind of rows: put this one into another file",
                file=file,
                row=row.number,
            )


def _form(row: Row) -> str:
    return f"{row.kind} ({'conversational' if row.conversational else 'plain text'})"


# ---- one row


def parse_row(item: Any, *, number: int = 1, kinds: Sequence[type[Row]] | None = None) -> Row:
    """The row that a JSON value stands for.

    Raises
    ------
    RowError
        Names the field and the fix; the file is for the caller to add (:meth:`RowError.at`).
    """
    if isinstance(item, ValueError):
        raise RowError(f"is not valid JSON ({item})", "write one JSON object a line, or remove the line", row=number)
    if isinstance(item, list):
        item = {"messages": item}
    if not isinstance(item, Mapping):
        raise RowError(
            f"is {_named(item)}, not an object", 'a row looks like {"prompt": "...", "completion": "..."}', row=number
        )
    columns = dict(item)
    if "question" in columns and "answer" in columns and not {"prompt", "messages", "text"} & columns.keys():
        columns = _question_and_answer(columns)
    kind = _kind_of(columns, kinds)
    if columns.get("tools"):
        raise RowError(
            "is not understood", "remove it and describe the tools in a system message", field="tools", row=number
        )
    return _PARSERS[kind](columns, number)


def _question_and_answer(columns: dict[str, Any]) -> dict[str, Any]:
    """A question and its answer as a conversation, so that something stands between the two."""
    answer: dict[str, Any] = {
        "prompt": [{"role": "user", "content": _text(columns, "question")}],
        "completion": [{"role": "assistant", "content": _text(columns, "answer")}],
    }
    return {**answer, **{name: value for name, value in columns.items() if name not in ("question", "answer")}}


def _kind_of(columns: Mapping[str, Any], kinds: Sequence[type[Row]] | None) -> type[Row]:
    if kinds is None:
        found = next((kind for kind, belongs in _SIGNS if belongs(columns.keys())), None)
        if found is not None:
            return found
        _refuse_foreign(columns)
        names = ", ".join(map(str, columns)) or "none"
        raise RowError(
            f"has no columns of any kind (columns there: {names})",
            "rename them: text or messages; prompt; prompt and completion; prompt, chosen and rejected; prompt, completion and label; "
            "prompt, responses and ranks",
        )
    for kind in kinds:
        if all(any(name in columns for name in names) for names in _REQUIRED[kind]):
            return kind
    wanted = " or ".join(f"{kind.kind} ({_columns_of(kind)})" for kind in kinds)
    _refuse_foreign(columns)
    here = ", ".join(map(str, columns)) or "none"
    raise RowError(f"has the columns {here}, not those of {wanted}", "rename its columns or give another file")


def _columns_of(kind: type[Row]) -> str:
    return ", ".join(" or ".join(names) for names in _REQUIRED[kind])


_REQUIRED: dict[type[Row], tuple[tuple[str, ...], ...]] = {
    LanguageModelling: (("messages", "text"),),
    PromptOnly: (("prompt",),),
    PromptCompletion: (("prompt",), ("completion",)),
    Preference: (("chosen",), ("rejected",)),
    UnpairedPreference: (("prompt",), ("completion",), ("label",)),
    Stepwise: (("prompt",), ("completions",), ("labels",)),
    Candidates: (("prompt",), ("responses",)),
    RankedList: (("prompt",), ("responses",), ("ranks",)),
}

# In this order. A sign is what a row of that kind cannot lack by design, so that a missing column is named and not taken for another kind.
_SIGNS: tuple[tuple[type[Row], Callable[[Iterable[str]], bool]], ...] = (
    (RankedList, lambda names: "ranks" in names),
    (RankedList, lambda names: "responses" in names and bool({"annotator", "criterion", "ranking"} & set(names))),
    (Candidates, lambda names: "responses" in names),
    (Preference, lambda names: "chosen" in names or "rejected" in names),
    (Stepwise, lambda names: "completions" in names),
    (UnpairedPreference, lambda names: "completion" in names and "label" in names),
    (PromptCompletion, lambda names: "completion" in names),
    (LanguageModelling, lambda names: "messages" in names),
    (PromptOnly, lambda names: "prompt" in names),
    (LanguageModelling, lambda names: "text" in names),
)

_FOREIGN: tuple[tuple[tuple[str, ...], str], ...] = (
    (("instruction", "output"), "alpaca"),
    (("conversations",), "sharegpt"),
    (("query", "sample0", "best"), "best-of-4"),
    (("fields", "responses"), "argilla"),
    (("data", "annotations"), "label-studio"),
)


def _refuse_foreign(columns: Mapping[str, Any]) -> None:
    for names, importer in _FOREIGN:
        if all(name in columns for name in names):
            raise RowError(
                f"is a row of another format ({', '.join(names)})",
                f"make rows of it with: ingot data import {importer} FILE --output rows.jsonl",
            )


def _language_modelling(columns: dict[str, Any], number: int) -> Row:
    if "messages" not in columns:
        text = _filled_text(columns, "text")
        return LanguageModelling(number=number, content=text, extra=_without(columns, "text"))
    messages = _messages(columns, "messages")
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError(
            "has no assistant message, so that there is nothing to learn", "add the answer", field="messages"
        )
    _require_answers(messages, "messages")
    # Some data carry the rendered dialogue beside its messages; the messages count.
    return LanguageModelling(number=number, content=messages, extra=_without(columns, "messages", "text"))


def _prompt_only(columns: dict[str, Any], number: int) -> Row:
    prompt = _prompt(columns)
    return PromptOnly(number=number, prompt=prompt, extra=_without(columns, "prompt"))


def _prompt_completion(columns: dict[str, Any], number: int) -> Row:
    prompt = _prompt(columns)
    completion = _answer(columns, "completion", prompt)
    return PromptCompletion(
        number=number, prompt=prompt, completion=completion, extra=_without(columns, "prompt", "completion")
    )


def _preference(columns: dict[str, Any], number: int) -> Row:
    margin = _number(columns, "margin")
    weight = _number(columns, "weight")
    if weight is not None and weight <= 0.0:
        raise RowError(f"is {weight:g}", "give a positive number", field="weight")
    prompt: Content | None
    if "prompt" in columns:
        prompt = _prompt(columns)
        chosen, rejected = _answer(columns, "chosen", prompt), _answer(columns, "rejected", prompt)
    else:
        prompt, chosen, rejected = _implicit(columns)
    if chosen == rejected:
        raise RowError('equals field "chosen"', "remove the row: it prefers nothing", field="rejected")
    return Preference(
        number=number,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        margin=margin,
        weight=weight,
        group_id=_name(columns, "group_id"),
        extra=_without(columns, "prompt", "chosen", "rejected", "margin", "weight", "group_id"),
    )


def _implicit(columns: dict[str, Any]) -> tuple[Content | None, Content, Content]:
    """Prompt, chosen and rejected of a row in which both answers begin with the prompt."""
    chosen, rejected = _content(columns, "chosen"), _content(columns, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if chosen == rejected:
            raise RowError('equals field "chosen"', "remove the row: it prefers nothing", field="rejected")
        for short, long, field in ((chosen, rejected, "chosen"), (rejected, chosen, "rejected")):
            if not short.strip() or long.startswith(short):
                raise RowError(
                    "is the beginning of the other answer, so that without a prompt nothing is left of it",
                    "make rows of it with: ingot data import hh FILE --output pairs.jsonl"
                    if chosen.startswith(HH_USER)
                    else 'write the common beginning into a field "prompt"',
                    field=field,
                )
        return None, chosen, rejected
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise RowError(
            f'is {_named(rejected)}, but field "chosen" is {_named(chosen)}',
            "write both as text or both as messages",
            field="rejected",
        )
    if chosen == rejected:
        raise RowError('equals field "chosen"', "remove the row: it prefers nothing", field="rejected")
    common = common_beginning(chosen, rejected)
    if common == 0:
        raise RowError(
            'has no message in common with field "chosen"',
            'both begin with the prompt, or a field "prompt" holds it',
            field="rejected",
        )
    prompt = chosen[:common]
    for field, answer in (("chosen", chosen[common:]), ("rejected", rejected[common:])):
        _require_answer_to(prompt, answer, field, common)
    return prompt, chosen[common:], rejected[common:]


def _unpaired(columns: dict[str, Any], number: int) -> Row:
    prompt = _prompt(columns)
    completion = _answer(columns, "completion", prompt)
    return UnpairedPreference(
        number=number,
        prompt=prompt,
        completion=completion,
        label=_boolean(columns["label"], "label"),
        extra=_without(columns, "prompt", "completion", "label"),
    )


def _stepwise(columns: dict[str, Any], number: int) -> Row:
    prompt = _filled_text(columns, "prompt")
    steps = _list(columns, "completions")
    texts = {f"completions[{index}]": step for index, step in enumerate(steps)}
    labels = _list(columns, "labels")
    if not steps:
        raise RowError("is an empty list", "give the steps of the answer", field="completions")
    _require_length("labels", labels, "completions", steps)
    return Stepwise(
        number=number,
        prompt=prompt,
        completions=[_filled_text(texts, name) for name in texts],
        labels=[_boolean(label, f"labels[{index}]") for index, label in enumerate(labels)],
        extra=_without(columns, "prompt", "completions", "labels"),
    )


def _responses(columns: dict[str, Any], prompt: Content) -> list[Content]:
    named = {f"responses[{index}]": answer for index, answer in enumerate(_list(columns, "responses"))}
    if len(named) < 2:
        raise RowError(f"holds {len(named)} answers", "give at least two, or remove the row", field="responses")
    return [_answer(named, name, prompt) for name in named]


def _candidates(columns: dict[str, Any], number: int) -> Row:
    prompt = _prompt(columns)
    return Candidates(
        number=number,
        prompt=prompt,
        responses=_responses(columns, prompt),
        group_id=_name(columns, "group_id"),
        extra=_without(columns, "prompt", "responses", "group_id"),
    )


def _ranked_list(columns: dict[str, Any], number: int) -> Row:
    version = columns.get("schema_version", 0)
    if isinstance(version, bool) or not isinstance(version, int) or not 0 <= version <= RANKING_SCHEMA_VERSION:
        newer = isinstance(version, int) and version > RANKING_SCHEMA_VERSION
        raise RowError(
            f"is {json.dumps(version, default=str)}, but this version of ingot reads up to {RANKING_SCHEMA_VERSION}",
            "update ingot" if newer else "rank the candidates again with: ingot label",
            field="schema_version",
        )
    for name in ("prompt", "responses", "ranks"):
        if name not in columns:
            here = ", ".join(map(str, columns))
            raise RowError(
                f"is missing (columns there: {here})",
                "is the file from an older version? a ranked list needs prompt, responses and ranks (1 best, equal: tie)",
                field=name,
            )
    prompt = _prompt(columns)
    responses = _responses(columns, prompt)
    ranks = _list(columns, "ranks")
    _require_length("ranks", ranks, "responses", responses)
    for index, rank in enumerate(ranks):
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise RowError(f"is {_named(rank)}", "ranks are whole numbers, 1 for the best", field=f"ranks[{index}]")
    if min(ranks) != 1:
        raise RowError(f"begins at {min(ranks)}", "the best response has rank 1", field="ranks")
    for (i, first), (j, second) in itertools.combinations(enumerate(responses), 2):
        if first == second and ranks[i] != ranks[j]:
            raise RowError(
                f"gives ranks {ranks[i]} and {ranks[j]} to responses {i} and {j}, which are the same",
                "give them one rank, or remove one of them",
                field="ranks",
            )
    status: Status = "judged"
    own: tuple[str, ...] = ()
    if version > 0:
        # Other tools mean something else by these names.
        own = ("id", "status", "revises")
        status = columns.get("status", status)
        if status not in get_args(Status):
            raise RowError(
                f"is {json.dumps(status, default=str)}", f"it is one of {', '.join(get_args(Status))}", field="status"
            )
    return RankedList(
        number=number,
        prompt=prompt,
        responses=responses,
        ranks=ranks,
        group_id=_name(columns, "group_id"),
        annotator=_name(columns, "annotator"),
        criterion=_name(columns, "criterion"),
        id=_name(columns, "id") if own else None,
        status=status,
        revises=_name(columns, "revises") if own else None,
        extra=_without(columns, "prompt", "responses", "ranks", "group_id", "annotator", "criterion", *own),
    )


_PARSERS: dict[type[Row], Callable[[dict[str, Any], int], Row]] = {
    LanguageModelling: _language_modelling,
    PromptOnly: _prompt_only,
    PromptCompletion: _prompt_completion,
    Preference: _preference,
    UnpairedPreference: _unpaired,
    Stepwise: _stepwise,
    Candidates: _candidates,
    RankedList: _ranked_list,
}


# ---- one field


def _prompt(columns: Mapping[str, Any]) -> Content:
    prompt = _content(columns, "prompt")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RowError("is empty", "write what is to be answered, or remove the row", field="prompt")
    elif prompt[-1]["role"] == "assistant":
        raise RowError(
            "ends with an assistant message, so that the answer would be a second one in a row",
            "let it end with a user message",
            field="prompt",
        )
    return prompt


def _answer(columns: Mapping[str, Any], name: str, prompt: Content) -> Content:
    """An answer to this prompt; a string where the prompt is a conversation is the assistant's message."""
    answer = _content(columns, name)
    if isinstance(answer, str):
        if not answer.strip():
            raise RowError("is empty", "write the answer, or remove the row", field=name)
        return answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
    if isinstance(prompt, str):
        raise RowError(
            'is a list of messages, but field "prompt" is text',
            'write the prompt as messages too: [{"role": "user", "content": "..."}]',
            field=name,
        )
    if list(answer[: len(prompt)]) == prompt:
        raise RowError("begins with the prompt", "remove the messages of the prompt there", field=name)
    _require_answer_to(prompt, answer, name, 0)
    return answer


def _require_answer_to(prompt: list[Message], answer: list[Message], field: str, first: int) -> None:
    """An answer begins and ends with the assistant; ``first`` is the number of its first message in the field."""
    if not answer:
        raise RowError(
            "is the beginning of the other answer, so that nothing is left of it", "remove the row", field=field
        )
    if answer[0]["role"] != "assistant":
        raise RowError(
            f'begins with a message of role "{answer[0]["role"]}" after the prompt',
            "an answer begins with an assistant message",
            field=f"{field}[{first}]",
        )
    if prompt[-1]["role"] == "assistant":
        raise RowError(
            "is a second assistant turn in a row",
            "join the two, or put a user message between",
            field=f"{field}[{first}]",
        )
    if answer[-1]["role"] != "assistant":
        raise RowError(
            f'ends with a message of role "{answer[-1]["role"]}"',
            "an answer ends with an assistant message",
            field=field,
        )
    _require_answers(answer, field, first)


def _require_answers(messages: list[Message], field: str, first: int = 0) -> None:
    for index, message in enumerate(messages, first):
        if message["role"] == "assistant" and not message["content"].strip():
            raise RowError("is empty", "write the answer, or remove the row", field=f"{field}[{index}].content")


def _content(columns: Mapping[str, Any], name: str) -> Content:
    value = columns.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return _messages(columns, name)
    if name not in columns:
        raise RowError(f"is missing (columns there: {', '.join(map(str, columns))})", "add it", field=name)
    raise RowError(f"is {_named(value)}", "give a string or a list of messages", field=name)


def _messages(columns: Mapping[str, Any], name: str) -> list[Message]:
    value = columns[name]
    if not isinstance(value, list):
        raise RowError(f"is {_named(value)}", 'give a list of messages {"role", "content"}', field=name)
    if not value:
        raise RowError("is an empty list", "add the messages, or remove the row", field=name)
    messages: list[Message] = []
    for index, entry in enumerate(value):
        message = _message(entry, f"{name}[{index}]")
        if messages and message["role"] == "assistant" == messages[-1]["role"]:
            raise RowError(
                "is a second assistant turn in a row",
                "join the two, or put a user message between",
                field=f"{name}[{index}]",
            )
        messages.append(message)
    return messages


def _message(entry: Any, place: str) -> Message:
    if not isinstance(entry, Mapping):
        raise RowError(f"is {_named(entry)}", 'give a message {"role", "content"}', field=place)
    if "from" in entry and "value" in entry:
        raise RowError(
            'has "from" and "value"',
            "make rows of it with: ingot data import sharegpt FILE --output rows.jsonl",
            field=place,
        )
    if entry.get("tool_calls"):
        raise RowError("is not understood", "write the call into the content", field=f"{place}.tool_calls")
    for name in ("role", "content"):
        if name not in entry:
            raise RowError(f'has no "{name}"', 'a message is {"role": "user", "content": "..."}', field=place)
    role, content = entry["role"], entry["content"]
    if role not in ROLES:
        near = _ROLES_ELSEWHERE.get(str(role).lower()) or next(
            iter(difflib.get_close_matches(str(role).lower(), ROLES, n=1)), None
        )
        hint = f'write "{near}"' if near else f"the roles are {', '.join(ROLES)}"
        raise RowError(f"is {json.dumps(role, default=str)}, an unknown role", hint, field=f"{place}.role")
    if isinstance(content, list):
        content = _joined_parts(content, f"{place}.content")
    if not isinstance(content, str):
        raise RowError(f"is {_named(content)}", "give a string", field=f"{place}.content")
    return {"role": role, "content": content}


def _joined_parts(parts: list[Any], place: str) -> str:
    """Content given as a list of parts: their text."""
    texts = []
    for index, part in enumerate(parts):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RowError(
                "is no text", 'only parts {"type": "text", "text": "..."} are read', field=f"{place}[{index}]"
            )
        texts.append(part["text"])
    return "".join(texts)


def _text(columns: Mapping[str, Any], name: str) -> str:
    if name not in columns:
        raise RowError(f"is missing (columns there: {', '.join(map(str, columns))})", "add it", field=name)
    value = columns[name]
    if not isinstance(value, str):
        raise RowError(f"is {_named(value)}", "give a string", field=name)
    return value


def _filled_text(columns: Mapping[str, Any], name: str) -> str:
    value = _text(columns, name)
    if not value.strip():
        raise RowError("is empty", "fill it, or remove the row", field=name)
    return value


def _list(columns: Mapping[str, Any], name: str) -> list[Any]:
    if name not in columns:
        raise RowError(f"is missing (columns there: {', '.join(map(str, columns))})", "add it", field=name)
    value = columns[name]
    if not isinstance(value, list):
        raise RowError(f"is {_named(value)}", "give a list", field=name)
    return value


def _require_length(name: str, values: list[Any], other: str, others: Sequence[Any]) -> None:
    if len(values) != len(others):
        raise RowError(
            f'has {len(values)} entries, but field "{other}" has {len(others)}', "give one for each", field=name
        )


def _boolean(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise RowError(f"is {_named(value)}", "write true or false", field=name)
    return value


def _number(columns: Mapping[str, Any], name: str) -> float | None:
    value = columns.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(f"is {_named(value)}", "give a number", field=name)
    if not math.isfinite(value):
        raise RowError(f"is {value}", "give a finite number", field=name)
    return float(value)


def _name(columns: Mapping[str, Any], name: str) -> str | None:
    value = columns.get(name)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise RowError(f"is {_named(value)}", "give a string", field=name)


def _without(columns: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {str(name): value for name, value in columns.items() if name not in names}


def _named(value: Any) -> str:
    """A JSON value as people call it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"
