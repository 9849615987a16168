"""What counts among judgements of which some take back or replace others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol, TypeVar

Status = Literal["judged", "skipped", "withdrawn"]


class Judgement(Protocol):
    """A row that says what somebody thought of some responses."""

    @property
    def id(self) -> str | None:
        """Names this row; rows of other tools have no name."""

    @property
    def status(self) -> Status:
        """judged; skipped: seen and left; withdrawn: takes back the row in ``revises``."""

    @property
    def revises(self) -> str | None:
        """Id of the row that this one replaces or takes back."""


JudgementT = TypeVar("JudgementT", bound=Judgement)


def unique(judgements: Iterable[JudgementT]) -> list[JudgementT]:
    """Each once: a row that was copied, or written again after an error, has the same id."""
    seen: set[str] = set()
    kept = []
    for judgement in judgements:
        if judgement.id:
            if judgement.id in seen:
                continue
            seen.add(judgement.id)
        kept.append(judgement)
    return kept


def in_force(judgements: Iterable[JudgementT]) -> list[JudgementT]:
    """Judgements and skips that no other row revises, in the order in which they were made."""
    kept = unique(judgements)
    revised = {judgement.revises for judgement in kept if judgement.revises is not None}
    return [each for each in kept if each.status != "withdrawn" and not (each.id and each.id in revised)]


def current(judgements: Iterable[JudgementT]) -> list[JudgementT]:
    """The judgements that count: neither revised nor taken back nor skipped. What models and statistics are made from."""
    return [judgement for judgement in in_force(judgements) if judgement.status == "judged"]
