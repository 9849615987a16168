"""Ranked lists as preference rows, and back: one row for each pair that the ranking orders. Ties order nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ingot.errors import DataError
from ingot.feedback.records import Record, group_id_of
from ingot.feedback.texts import Text, canonical


def to_preferences(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """Rows ``{"prompt", "chosen", "rejected", "group_id", "weight", "annotator", "criterion", "judgement"}``, the best response first.

    The weight is 1 / (untied pairs of the judgement), so that each judgement that orders anything weighs 1, however many responses
    it ranked. A judgement whose responses are all tied gives no row.
    """
    for record in records:
        ranked = sorted(zip(record.ranks, record.responses, strict=True), key=lambda entry: entry[0])
        pairs = [
            (better, worse)
            for (rank_a, better), (rank_b, worse) in itertools.combinations(ranked, 2)
            # The same text twice, ranked apart, teaches nothing.
            if rank_a < rank_b and better != worse
        ]
        for better, worse in pairs:
            row = {
                "prompt": record.prompt,
                "chosen": better,
                "rejected": worse,
                "group_id": record.group_id,
                "weight": 1.0 / len(pairs),
                "annotator": record.annotator,
                "criterion": record.criterion,
            }
            yield row | ({"judgement": record.id} if record.id else {})


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
    group = {"prompt": first["prompt"], "responses": list(responses), "group_id": first.get("group_id")}
    return Record(
        prompt=first["prompt"],
        responses=responses,
        ranks=tuple(ranks.values()),
        group_id=group_id_of(group, "preference rows"),
        annotator=first.get("annotator", ""),
        criterion=first.get("criterion", ""),
        id=first.get("judgement", ""),
    )
