"""Data of other formats as rows: each record becomes one row or more, or is dropped with the reason.

| kind | records | rows |
|---|---|---|
| hh | ``chosen``, ``rejected``: transcripts with ``Human:`` and ``Assistant:`` (Anthropic HH) | preference |
| alpaca | ``instruction``, ``input``, ``output``; ``system``, ``history`` | prompt-completion |
| sharegpt | ``conversations``: ``from``, ``value`` | language modelling |
| best-of-4 | ``query``, ``sample0``, ``sample1`` ..., ``best``: texts or token ids (lm-human-preferences) | ranked list |
| argilla | records with a ranking or label question, as ``dataset.records.to_json`` or ``to_datasets`` writes them | ranked list |
| label-studio | tasks with a ``Pairwise`` or ``Ranker`` result (export format JSON) | ranked list |

Columns that mean nothing here are kept. One judgement of one annotator is one ranked list; equal ranks where nobody said which is better.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ingot.data.files import Progress, json_items, json_line
from ingot.data.rows import RowError, common_beginning, parse_row
from ingot.errors import ConfigError, DataError
from ingot.tokenizer import Tokenizer

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
_PROMPT_FIELDS = ("prompt", "instruction", "question", "query", "input", "context")
_ITEM_TEXTS = ("text", "body", "html", "title")


@dataclasses.dataclass(frozen=True)
class Imported:
    """A row that was made."""

    record: int
    """Number of its record in the file, from 1."""
    columns: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A record, or a judgement in it, that no row can be made of."""

    record: int
    reason: str


class _Drop(Exception):
    """Why no row can be made."""


Record: TypeAlias = Mapping[str, Any]
Importer: TypeAlias = Callable[[Record, Tokenizer | None], Iterator[dict[str, Any] | _Drop]]


def import_rows(
    kind: str, path: str | Path, *, tokenizer: Tokenizer | None = None, progress: Progress | None = None
) -> Iterator[Imported | Dropped]:
    """The rows of a file in another format, in its order; every record gives at least one row or reason.

    Parameters
    ----------
    kind
        One of :data:`KINDS`.
    tokenizer
        Of token ids in best-of-4 data.

    Raises
    ------
    ConfigError
        There is no such kind.
    DataError
        The file cannot be read.
    """
    if kind not in KINDS:
        raise ConfigError(f"{kind!r} is no format that can be imported: give one of {', '.join(KINDS)}")
    importer = KINDS[kind]
    for number, record in json_items(Path(path), progress):
        if isinstance(record, ValueError):
            yield Dropped(number, f"not valid JSON ({record})")
            continue
        if not isinstance(record, Mapping):
            yield Dropped(number, f"a {type(record).__name__}, not an object")
            continue
        results = importer(record, tokenizer)
        while True:
            try:
                result = next(results, None)
                if result is None:
                    break
                if isinstance(result, _Drop):
                    yield Dropped(number, str(result))
                else:
                    parse_row(result)
                    yield Imported(number, result)
            except _Drop as drop:
                yield Dropped(number, str(drop))
            except RowError as error:
                yield Dropped(number, f'field "{error.field}" {error.problem}' if error.field else error.problem)


def _rest(record: Record, *names: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in names}


def _string(record: Record, name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        here = ", ".join(map(str, record)) or "none"
        raise _Drop(
            f'has no field "{name}" (fields there: {here})' if name not in record else f'field "{name}" is not a string'
        )
    return value


def _objects(value: Any, name: str) -> list[Record]:
    """A list of objects; nothing is an empty one."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise _Drop(f'field "{name}" is no list of objects')
    return value


# ---- demonstrations and pairs


def _hh(record: Record, tokenizer: Tokenizer | None) -> Iterator[dict[str, Any] | _Drop]:
    chosen, rejected = (_transcript(_string(record, name), name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise _Drop("chosen and rejected are the same")
    common = common_beginning(chosen, rejected)
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages[common:]:
            raise _Drop(f"{name} is the beginning of the other dialogue")
        if not messages[-1]["content"]:
            raise _Drop(f"the answer of {name} is empty")
    prompt, answers = chosen[:common], (chosen[common:], rejected[common:])
    yield {"prompt": prompt, "chosen": answers[0], "rejected": answers[1], **_rest(record, "chosen", "rejected")}


def _transcript(text: str, name: str) -> list[dict[str, str]]:
    """The messages of a transcript. Turns of one person in a row are one message, as where an answer has the word ``Assistant:`` in it."""
    before, *parts = _HH_TURN.split(text)
    if not parts or before.strip():
        raise _Drop(f'field "{name}" is no transcript: it does not begin with a blank line and Human: or Assistant:')
    turns = [(_HH_ROLES[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]
    messages = []
    for role, said in itertools.groupby(turns, key=lambda turn: turn[0]):
        messages.append({"role": role, "content": "\n\n".join(text for _, text in said if text)})
    return messages


def _alpaca(record: Record, tokenizer: Tokenizer | None) -> Iterator[dict[str, Any] | _Drop]:
    system, history = record.get("system"), record.get("history") or []
    prompt = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise _Drop('field "history" is no list of [question, answer] pairs')
    for question, answer in history:
        prompt += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    given = record.get("input") or ""
    if not isinstance(given, str):
        raise _Drop('field "input" is not a string')
    asked = _string(record, "instruction")
    prompt.append({"role": "user", "content": f"{asked}\n\n{given}" if given.strip() else asked})
    completion = [{"role": "assistant", "content": _string(record, "output")}]
    yield {
        "prompt": prompt,
        "completion": completion,
        **_rest(record, "instruction", "input", "output", "system", "history", "text"),
    }


def _sharegpt(record: Record, tokenizer: Tokenizer | None) -> Iterator[dict[str, Any] | _Drop]:
    turns = record.get("conversations", record.get("conversation"))
    if not isinstance(turns, list):
        raise _Drop(f'has no list "conversations" (fields there: {", ".join(map(str, record)) or "none"})')
    messages = []
    system = record.get("system")
    if isinstance(system, str) and system.strip():
        messages.append({"role": "system", "content": system})
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise _Drop(f"conversations[{index}] is not an object")
        who = turn.get("from", turn.get("role"))
        role = _SHAREGPT_ROLES.get(str(who).lower())
        if role is None:
            raise _Drop(f'conversations[{index}] is from {who!r}, which is neither "human" nor "gpt"')
        messages.append({"role": role, "content": turn.get("value", turn.get("content"))})
    yield {"messages": messages, **_rest(record, "conversations", "conversation", "system")}


# ---- judgements


def _ranked(
    prompt: Any, responses: Sequence[Any], ranks: Sequence[int], annotator: Any, criterion: str | None, extra: Record
) -> dict[str, Any]:
    """A ranked list; ranks are moved so that the best is 1."""
    columns: dict[str, Any] = {"prompt": prompt, "responses": list(responses)}
    columns["ranks"] = [rank - min(ranks) + 1 for rank in ranks]
    if annotator is not None:
        columns["annotator"] = str(annotator)
    if criterion is not None:
        columns["criterion"] = criterion
    return {**columns, **{name: value for name, value in extra.items() if name not in columns}}


def _best_of_n(record: Record, tokenizer: Tokenizer | None) -> Iterator[dict[str, Any] | _Drop]:
    names = sorted((name for name in record if re.fullmatch(r"sample\d+", name)), key=lambda name: int(name[6:]))
    best = record.get("best")
    if isinstance(best, bool) or not isinstance(best, int) or not 0 <= best < len(names):
        raise _Drop(f'field "best" is {best!r}, not the number of one of {len(names)} samples, counted from 0')
    samples = [_text_of(record[name], tokenizer) for name in names]
    # A copy of another sample says nothing; the best one stays.
    kept = [n for n, text in enumerate(samples) if n == best or (text != samples[best] and samples.index(text) == n)]
    if len(kept) < 2:
        raise _Drop("all samples are the same")
    yield _ranked(
        _text_of(record.get("query"), tokenizer),
        [samples[number] for number in kept],
        [1 if number == best else 2 for number in kept],
        None,
        None,
        _rest(record, "query", "best", *names),
    )


def _text_of(value: Any, tokenizer: Tokenizer | None) -> str:
    """A text, or that of token ids; ids of no token at either end are padding."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(
        isinstance(token, int) and not isinstance(token, bool) for token in value
    ):
        raise _Drop("a query or sample is neither text nor token ids")
    if tokenizer is None:
        raise ConfigError(
            "the samples are token ids: give their tokenizer with --tokenizer (GPT-2's for lm-human-preferences)"
        )
    known = [0 <= token < tokenizer.vocab_size for token in value]
    if True not in known:
        return ""
    first, last = known.index(True), len(known) - known[::-1].index(True)
    if not all(known[first:last]):
        raise _Drop("a query or sample has ids in it that the tokenizer does not have")
    return tokenizer.decode(value[first:last])


def _argilla(record: Record, tokenizer: Tokenizer | None) -> Iterator[dict[str, Any] | _Drop]:
    if isinstance(record.get("fields"), Mapping):
        fields, questions = record["fields"], record.get("responses") or {}
        if not isinstance(questions, Mapping):
            raise _Drop('field "responses" is no object of questions')
        extra = _rest(record, "fields", "responses", "suggestions", "vectors", "_server_id", "status")
    else:
        questions = {
            name: value
            for name, value in record.items()
            if isinstance(value, list)
            and value
            and all(isinstance(each, Mapping) and "value" in each for each in value)
        }
        fields = {
            name: value
            for name, value in record.items()
            if isinstance(value, str) and name not in ("id", "external_id")
        }
        extra = {name: record[name] for name in ("id", "external_id", "metadata") if record.get(name) is not None}
    found = False
    for question, answers in questions.items():
        for answer in _objects(answers, question):
            found = True
            try:
                if answer.get("status", "submitted") != "submitted":
                    raise _Drop(f'the answer to "{question}" is {answer["status"]}, not submitted')
                ranks = _argilla_ranks(question, answer.get("value"), fields)
                prompt = _prompt_among(fields, ranks)
                responses = [fields[name] for name in ranks]
                yield _ranked(prompt, responses, list(ranks.values()), answer.get("user_id"), question, extra)
            except _Drop as drop:
                yield drop
    if not found:
        raise _Drop("nobody has answered a question of it")


def _argilla_ranks(question: str, value: Any, fields: Record) -> dict[str, int]:
    """The rank of each field that a question is about."""
    if isinstance(value, Mapping) and isinstance(value.get("value"), list) and isinstance(value.get("rank"), list):
        ranks = dict(zip(map(str, value["value"]), value["rank"], strict=False))
    elif isinstance(value, list) and value and all(isinstance(each, Mapping) and "rank" in each for each in value):
        ranks = {str(each.get("value")): each["rank"] for each in value}
    elif isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        ranks = {name: place for place, name in enumerate(value, 1)}
    elif isinstance(value, str):
        others = [name for name in fields if name != value and name not in _PROMPT_FIELDS]
        ranks = {value: 1, **dict.fromkeys(others, 2)}
    else:
        raise _Drop(f'the answer to "{question}" is neither a ranking nor the name of a field')
    unknown = [name for name in ranks if name not in fields]
    if unknown:
        raise _Drop(
            f'the answer to "{question}" names {unknown[0]!r}, which is no field (fields there: {", ".join(fields)})'
        )
    if not all(isinstance(rank, int) for rank in ranks.values()):
        raise _Drop(f'the answer to "{question}" leaves a field without a rank')
    return ranks


def _prompt_among(fields: Record, answers: Mapping[str, Any] | Sequence[str]) -> Any:
    """The field that was answered: one with a usual name, or the only one left."""
    left = [name for name in fields if name not in answers]
    usual = [name for name in _PROMPT_FIELDS if name in left]
    if not usual and len(left) != 1:
        raise _Drop(
            f"which field is the prompt? None is called {', '.join(_PROMPT_FIELDS)} (fields there: {', '.join(fields)})"
        )
    return fields[usual[0] if usual else left[0]]


def _label_studio(record: Record, tokenizer: Tokenizer | None) -> Iterator[dict[str, Any] | _Drop]:
    data = record.get("data")
    if not isinstance(data, Mapping) or "annotations" not in record:
        raise _Drop('has no "data" and "annotations": export the project as JSON (not JSON-MIN)')
    extra = {"id": record["id"]} if "id" in record else {}
    annotations = _objects(record["annotations"], "annotations")
    if not annotations:
        raise _Drop("nobody has annotated it")
    for annotation in annotations:
        try:
            if annotation.get("was_cancelled"):
                raise _Drop("was skipped by its annotator")
            who = annotation.get("completed_by")
            who = who.get("email", who.get("id")) if isinstance(who, Mapping) else who
            results = [
                each
                for each in _objects(annotation.get("result"), "result")
                if each.get("type") in ("pairwise", "ranker")
            ]
            if not results:
                raise _Drop("an annotation has neither a Pairwise nor a Ranker result")
            for result in results:
                order = _pairwise(result, data) if result["type"] == "pairwise" else _ranker(result, data)
                prompt, responses = order
                yield _ranked(prompt, responses, range(1, len(responses) + 1), who, result.get("from_name"), extra)
        except _Drop as drop:
            yield drop


def _pairwise(result: Record, data: Record) -> tuple[Any, list[Any]]:
    """The prompt, and the two answers with the selected one first."""
    names = [name.strip() for name in str(result.get("to_name", "")).split(",")]
    if len(names) != 2 or not all(name in data for name in names):
        # The names in the labelling interface need not be those of the data.
        names = [name for name, value in data.items() if isinstance(value, str) and name not in _PROMPT_FIELDS]
    if len(names) != 2:
        raise _Drop(f"which two fields were compared? (fields there: {', '.join(map(str, data))})")
    selected = _value(result, "selected")
    if selected not in ("left", "right"):
        raise _Drop("a Pairwise result selects neither left nor right")
    best, other = names if selected == "left" else names[::-1]
    return _prompt_among(data, names), [data[best], data[other]]


def _value(result: Record, name: str) -> Any:
    value = result.get("value")
    return value.get(name) if isinstance(value, Mapping) else None


def _ranker(result: Record, data: Record) -> tuple[Any, list[Any]]:
    """The prompt, and the items in the order in which they were put."""
    order = _value(result, "ranker")
    if isinstance(order, Mapping):
        filled = {name: ids for name, ids in order.items() if ids}
        if len(filled) != 1:
            raise _Drop(
                f"its items lie in {len(filled)} buckets ({', '.join(filled)}), between which no order is known"
            )
        [order] = filled.values()
    lists = {
        name: value
        for name, value in data.items()
        if isinstance(value, list) and value and all(isinstance(item, Mapping) and "id" in item for item in value)
    }
    if not isinstance(order, list) or len(lists) != 1:
        raise _Drop("a Ranker result without a list of items with ids")
    [(name, items)] = lists.items()
    texts = {
        str(item["id"]): next((item[key] for key in _ITEM_TEXTS if isinstance(item.get(key), str)), None)
        for item in items
    }
    if any(texts.get(str(item)) is None for item in order):
        raise _Drop(f"an item of the ranking has no text ({', '.join(_ITEM_TEXTS)})")
    return _prompt_among(data, [name]), [texts[str(item)] for item in order]


KINDS: dict[str, Importer] = {
    "hh": _hh,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "best-of-4": _best_of_n,
    "argilla": _argilla,
    "label-studio": _label_studio,
}


def write_rows(
    results: Iterator[Imported | Dropped], write: Callable[[bytes], object]
) -> tuple[int, int, list[Dropped]]:
    """Write the rows as JSON lines; the number of records, of rows, and what was dropped.

    Raises
    ------
    DataError
        Not a single row could be made.
    """
    records: set[int] = set()
    num_rows = 0
    dropped: list[Dropped] = []
    for result in results:
        records.add(result.record)
        if isinstance(result, Dropped):
            dropped.append(result)
        else:
            num_rows += 1
            write(json_line(result.columns))
    if num_rows == 0:
        why = f"; the first because it {dropped[0].reason}" if dropped else ""
        raise DataError(f"none of {len(records)} records gives a row{why}")
    return len(records), num_rows, dropped
