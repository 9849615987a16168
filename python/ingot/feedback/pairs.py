"""Ranked lists as preference rows, and back: one row for each pair that the ranking orders. Ties order nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from ingot.data.judgements import current
from ingot.data.keys import Text, canonical, group_id_of
from ingot.data.rows import Content, RankedList
from ingot.errors import DataError
from ingot.feedback.records import Record


def to_preferences(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """Rows ``{"prompt", "chosen", "rejected", "weight", "group_id", "annotator", "criterion", "judgement", "response_numbers"}`` of the
    judgements that count; see :meth:`ingot.data.rows.RankedList.preferences`.

    A judgement whose responses are all tied gives no row.
    """
    for record in current(records):
        for preference in _as_row(record).preferences():
            yield preference.columns()


def _as_row(record: Record) -> RankedList:
    return RankedList(
        prompt=cast(Content, record.prompt),
        responses=cast(list[Content], list(record.responses)),
        ranks=list(record.ranks),
        group_id=record.group_id,
        annotator=record.annotator,
        criterion=record.criterion,
        id=record.id or None,
        extra=record.extra,
    )


def from_preferences(rows: Iterable[Mapping[str, Any]]) -> list[Record]:
    """The ranked lists that rows with a ``group_id`` were made from; responses in the order of first appearance.

    Rows of one judgement (group, annotator, criterion and id) make one list. Without a ``group_id`` each row is a list of two.

    Raises
    ------
    DataError
        The pairs of a group contradict each other or leave some out, so that no ranking with ties says the same.
    """
    groups: dict[object, list[Mapping[str, Any]]] = {}
    for number, row in enumerate(rows, 1):
        key = (row.get("group_id") or number, *(row.get(name, "") for name in ("annotator", "criterion", "judgement")))
        groups.setdefault(key, []).append(row)
    return [_ranked_list(rows) for rows in groups.values()]


def _ranked_list(rows: list[Mapping[str, Any]]) -> Record:
    texts: dict[bytes, Text] = {}
    for row in rows:
        for name in ("chosen", "rejected"):
            texts.setdefault(canonical(row[name]), row[name])
    pairs = {(canonical(row["chosen"]), canonical(row["rejected"])) for row in rows}
    # In a ranking with ties, what beats a response beats all that tie with it: the number of those is its level.
    beaten_by = {key: sum(worse == key for _, worse in pairs) for key in texts}
    levels = {count: number for number, count in enumerate(sorted(set(beaten_by.values())), 1)}
    ranks = {key: levels[count] for key, count in beaten_by.items()}
    implied = {(a, b) for a in texts for b in texts if ranks[a] < ranks[b]}
    first = rows[0]
    if implied != pairs:
        raise DataError(
            f"group {first.get('group_id')!r}: its {len(pairs)} pairs are not those of a ranking with ties; "
            "keep such rows as preference rows"
        )
    responses = tuple(texts.values())
    return Record(
        prompt=first["prompt"],
        responses=responses,
        ranks=tuple(ranks.values()),
        group_id=first.get("group_id") or group_id_of(first["prompt"], responses),
        annotator=first.get("annotator", ""),
        criterion=first.get("criterion", ""),
        id=first.get("judgement", ""),
    )
