"""What is to be judged: prompts with two or more responses each."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ingot.data.files import json_items
from ingot.data.keys import Text, canonical
from ingot.data.rows import Candidates as CandidatesRow
from ingot.data.rows import RowError, parse_row
from ingot.errors import DataError
from ingot.feedback.records import check_group, check_object


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """A prompt with the responses that are compared."""

    group_id: str
    prompt: Text
    responses: tuple[Text, ...]
    """All different."""
    sources: tuple[str, ...] | None = None
    """What wrote each response."""
    gold_ranks: tuple[int, ...] | None = None
    """The known answer, for gold items."""


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The groups of a file, and what was left out of it."""

    groups: list[Group]
    notices: list[str]
    """What a person should know about the file."""


def read_candidates(path: str | Path, gold: bool = False) -> Candidates:
    """Rows ``{"prompt", "responses"}``, optional ``group_id`` and ``sources``, of any file of rows; gold rows have ``ranks`` too.

    A missing ``group_id`` is made from prompt and responses. A response that is there twice in a group is shown once; a group
    without two different responses, and a row that is there twice, are left out and counted in ``notices``. So are rows that can be
    judged, but not trained on.

    Raises
    ------
    DataError
        Names the file, the row and what to do.
    """
    path = Path(path)
    groups: dict[str, tuple[int, bytes, Group]] = {}
    same_text = same_row = alike = 0
    untrainable: list[str] = []
    for number, row in json_items(path):
        place = f"{path}, row {number}"
        row = check_object(row, place)
        prompt, responses, group_id = check_group(row, place)
        sources = _entries(row, ("sources", "source_models"), len(responses), place)
        if sources is not None and not all(isinstance(source, str) for source in sources):
            raise DataError(f'{place}: "sources" holds something that is no string; name what wrote each response')
        ranks = _gold_ranks(row, len(responses), place) if gold else None
        kept = _first_of_each(responses)
        try:
            parse_row({"prompt": prompt, "responses": list(responses)}, kinds=[CandidatesRow])
        except RowError as error:
            untrainable.append(f'row {number}, whose field "{error.field}" {error.problem}')
        each = zip(responses, ranks or [0] * len(responses), strict=True)
        content = canonical(prompt, sorted(canonical(*entry).decode() for entry in each))
        if group_id in groups:
            earlier, same, _ = groups[group_id]
            if same != content:
                raise DataError(
                    f'{place}: "group_id" {group_id!r} is that of row {earlier}, with other content; change one'
                )
            same_row += 1
            continue
        if len(kept) < 2:
            alike += 1
            continue
        same_text += len(kept) < len(responses)
        group = Group(
            group_id=group_id,
            prompt=prompt,
            responses=tuple(responses[place] for place in kept),
            sources=tuple(sources[place] for place in kept) if sources else None,
            gold_ranks=tuple(ranks[place] for place in kept) if ranks else None,
        )
        groups[group_id] = (number, content, group)
    notices = [
        f"{path}: {count} {'row' if count == 1 else 'rows'} {what}"
        for count, what in (
            (alike, "left out: all responses are the same"),
            (same_text, "with a response that is there twice: it is shown once"),
            (same_row, "left out: the same as an earlier one"),
        )
        if count > 0
    ]
    if untrainable:
        count = len(untrainable)
        notices.append(
            f"{path}: {count} {'row' if count == 1 else 'rows'} to judge but not to train on, the first is {untrainable[0]}"
        )
    if not groups:
        raise DataError(f"{path}: nothing to judge; rows look like " + '{"prompt": "...", "responses": ["...", "..."]}')
    return Candidates([group for _, _, group in groups.values()], notices)


def _entries(row: dict[str, Any], names: tuple[str, ...], size: int, place: str) -> list[Any] | None:
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        if not isinstance(value, list) or len(value) != size:
            raise DataError(f'{place}: "{name}" is not a list with one entry for each of the {size} responses')
        return value
    return None


def _gold_ranks(row: dict[str, Any], size: int, place: str) -> list[int]:
    ranks = _entries(row, ("ranks",), size, place)
    if ranks is None:
        raise DataError(
            f'{place}: no field "ranks"; a gold row says the right order: 1 for the best, equal numbers for ties'
        )
    for rank in ranks:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise DataError(f'{place}: "ranks" holds {rank!r}; its entries are whole numbers from 1')
    if len(set(ranks)) < 2:
        raise DataError(f'{place}: "ranks" are all equal; a gold item orders at least two responses')
    return ranks


def _first_of_each(responses: tuple[Text, ...]) -> list[int]:
    """Where each different response is first."""
    first: dict[bytes, int] = {}
    for place, response in enumerate(responses):
        first.setdefault(canonical(response), place)
    return list(first.values())
