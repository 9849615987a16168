"""One labeller's way through the groups: what comes next, what was said, what is taken back. Everything said is on disk at once.

Nothing that a labeller could see (``Showing``) tells which model wrote a response or whether the answer is known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TypeVar

from ingot.data.judgements import Status, in_force
from ingot.data.keys import Text, uniform
from ingot.errors import ConfigError, DataError
from ingot.feedback.candidates import Group
from ingot.feedback.criteria import BUILT_IN, Criterion
from ingot.feedback.journal import Journal
from ingot.feedback.records import Record, with_id
from ingot.feedback.schedule import Item, schedule, shown_order

T = TypeVar("T")

Key = tuple[str, int]
"""Names one showing: the group, and how often it was shown before."""


@dataclasses.dataclass(frozen=True)
class Showing:
    """What a labeller sees of an item."""

    group_id: str
    repeat: int
    prompt: Text
    responses: tuple[Text, ...]
    """In the order of showing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a labeller says; lists are in the order of showing."""

    ranks: tuple[int, ...]
    """1 is best, equal numbers are ties."""
    ratings: tuple[int | None, ...] | None = None
    answers: Mapping[str, Sequence[bool | None]] = dataclasses.field(default_factory=dict)
    flags: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    note: str = ""


@dataclasses.dataclass
class Counts:
    """What happened in a session."""

    judged: int = 0
    skipped: int = 0
    taken_back: int = 0


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Session:
    """Hands out items one by one and writes down what is said about them.

    Parameters
    ----------
    groups, gold
        What is to be judged, and items with a known answer.
    journal
        Where judgements go. Others may write to it at the same time.
    labeler
        Who judges. Coming back under the same name goes on where it stopped.
    criterion
        What the ranking is about.
    overlap
        Share of the groups that every labeller judges; each of the rest is left to whoever comes to it first.
    clock
        Gives the time that records carry; simulations give one that stands still.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        journal: Journal,
        *,
        labeler: str,
        criterion: Criterion = BUILT_IN["helpful"],
        gold: Sequence[Group] = (),
        seed: int = 0,
        repeats: float = 0.08,
        gold_share: float = 0.05,
        overlap: float = 1.0,
        clock: Callable[[], str] = now,
    ) -> None:
        if not labeler.strip():
            raise ConfigError("labeler is empty; give a name, so that judgements can be told apart")
        if not 0 <= overlap <= 1:
            raise ConfigError(f"overlap is {overlap}; give a share from 0 to 1")
        self.journal = journal
        self.labeler = labeler
        self.criterion = criterion
        self.counts = Counts()
        self._seed = seed
        self._overlap = overlap
        self._clock = clock
        self._items = schedule(groups, gold, labeler=labeler, seed=seed, repeats=repeats, gold_share=gold_share)
        self._by_key = {item.key: item for item in self._items}
        self._first: Item | None = None
        self._follow = _Follow(journal, labeler, criterion.name, set(self._by_key))
        _check_same_groups(journal, self._items)

    @property
    def notices(self) -> list[str]:
        """What the labeller should know before starting."""
        rubric = self.criterion.rubric
        other = [
            record
            for record in in_force(self.journal.records)
            if record.criterion == self.criterion.name and record.rubric is not None and record.rubric != rubric
        ]
        if not other:
            return []
        return [
            f"the guideline of {self.criterion.name!r} changed since {len(other)} of the judgements there were made"
        ]

    def next(self) -> Item | None:
        """The next item to judge; None when all is done. Asking again gives the same item."""
        self.journal.refresh()
        if self._first is not None:
            return self._first
        open_items = self._open()
        return open_items[0] if open_items else None

    def remaining(self) -> int:
        """Items still to be judged."""
        return len(self._open())

    def done(self) -> int:
        """Items that this labeller judged or skipped, now and before."""
        self._follow.update()
        return len(self._follow.mine)

    def show(self, item: Item) -> Showing:
        """What the labeller gets to see."""
        group = item.group
        order = self._order(item)
        return Showing(group.group_id, item.repeat, group.prompt, tuple(group.responses[place] for place in order))

    def judge(self, item: Item, judgement: Judgement, time_s: float | None = None) -> Record:
        """Write a judgement down; it is on the disk when this returns."""
        order = self._order(item)
        size = len(order)
        if len(judgement.ranks) != size:
            raise ValueError(f"{len(judgement.ranks)} ranks for {size} responses")
        record = self._add(
            item,
            "judged",
            ranks=_by_group(judgement.ranks, order),
            ratings=None if judgement.ratings is None else _by_group(judgement.ratings, order),
            answers={name: _by_group(values, order) for name, values in judgement.answers.items()},
            flags={name: tuple(sorted(order[place] for place in places)) for name, places in judgement.flags.items()},
            note=judgement.note,
            time_s=None if time_s is None else round(time_s, 2),
        )
        self.counts.judged += 1
        return record

    def skip(
        self, item: Item, note: str = "", flags: Mapping[str, Sequence[int]] | None = None, time_s: float | None = None
    ) -> Record:
        """Leave an item for good."""
        order = self._order(item)
        record = self._add(
            item,
            "skipped",
            ranks=(1,) * len(order),
            flags={name: tuple(sorted(order[place] for place in places)) for name, places in (flags or {}).items()},
            note=note,
            time_s=None if time_s is None else round(time_s, 2),
        )
        self.counts.skipped += 1
        return record

    def undo(self) -> Item | None:
        """Take the labeller's last judgement or skip back and hand its item out again; None where there is none."""
        self.journal.refresh()
        self._follow.update()
        if not self._follow.mine:
            return None
        key, record = next(reversed(self._follow.mine.items()))
        item = self._by_key[key]
        self._add(item, "withdrawn", ranks=(1,) * len(record.ranks), revises=record.id)
        self.counts.taken_back += 1
        self._first = item
        return item

    def _add(self, item: Item, status: Status, *, revises: str | None = None, **said: object) -> Record:
        group = item.group
        fields: dict[str, object] = {
            "prompt": group.prompt,
            "responses": group.responses,
            "group_id": group.group_id,
            "annotator": self.labeler,
            "criterion": self.criterion.name,
            "status": status,
            "revises": self._follow.taken_back.get(item.key) if revises is None else revises,
            "order": self._order(item),
            "kind": item.kind,
            "repeat": item.repeat,
            "gold_ranks": group.gold_ranks,
            "created": self._clock(),
            "source_models": group.sources,
            "rubric": self.criterion.rubric,
            **said,
        }
        record = with_id(Record(**fields))  # type: ignore[arg-type]
        self.journal.append(record)
        if self._first is not None and self._first.key == item.key:
            self._first = None
        return record

    def _order(self, item: Item) -> tuple[int, ...]:
        return shown_order(
            len(item.group.responses),
            seed=self._seed,
            labeler=self.labeler,
            group_id=item.group.group_id,
            repeat=item.repeat,
        )

    def _open(self) -> list[Item]:
        self._follow.update()
        return [item for item in self._items if item.key not in self._follow.mine and self._wanted(item)]

    def _wanted(self, item: Item) -> bool:
        group_id = item.group.group_id
        if item.kind == "repeat":
            # Comes back only once it was judged, or still will be.
            first = self._follow.mine.get((group_id, 0))
            if first is not None:
                return first.status == "judged"
        shared = item.kind == "gold" or uniform("overlap", self._seed, group_id) < self._overlap
        return shared or not self._follow.others.get(group_id)


class _Follow:
    """What is in force for one labeller and criterion, kept up with a growing journal."""

    def __init__(self, journal: Journal, labeler: str, criterion: str, keys: set[Key]) -> None:
        self._journal = journal
        self._labeler = labeler
        self._criterion = criterion
        self._keys = keys
        self._reset()
        self.update()

    def _reset(self) -> None:
        self._read = 0
        self._by_id: dict[str, Record] = {}
        self._revised: set[str] = set()
        self.mine: dict[Key, Record] = {}
        """The labeller's judgements and skips by item, in the order of saying."""
        self.others: dict[str, set[str]] = {}
        """Ids of the judgements of others by group."""
        self.taken_back: dict[Key, str] = {}
        """The record that was last taken back, by item."""

    def update(self) -> None:
        if len(self._journal.records) < self._read:
            self._reset()
        for record in self._journal.records[self._read :]:
            if record.criterion == self._criterion and not (record.id and record.id in self._by_id):
                self._add(record)
        self._read = len(self._journal.records)

    def _add(self, record: Record) -> None:
        self._by_id[record.id] = record
        key = (record.group_id, record.repeat)
        if record.revises is not None:
            self._revised.add(record.revises)
            old = self._by_id.get(record.revises)
            if old is not None:
                self.others.get(old.group_id, set()).discard(old.id)
                old_key = (old.group_id, old.repeat)
                if self.mine.get(old_key) is old:
                    del self.mine[old_key]
        if record.id and record.id in self._revised:
            return
        if record.annotator != self._labeler:
            if record.status == "judged":
                self.others.setdefault(record.group_id, set()).add(record.id)
        elif record.status == "withdrawn":
            if record.revises is not None:
                self.taken_back[key] = record.revises
        elif key in self._keys:
            # The last word is the one to take back first.
            self.mine.pop(key, None)
            self.mine[key] = record


def collect(session: Session, labeler: Callable[[Showing], Judgement | None], limit: int | None = None) -> list[Record]:
    """Let a function judge what a person would; None skips. The records, at most ``limit``."""
    records: list[Record] = []
    while (limit is None or len(records) < limit) and (item := session.next()) is not None:
        judgement = labeler(session.show(item))
        records.append(session.skip(item) if judgement is None else session.judge(item, judgement))
    return records


def _by_group(values: Sequence[T], order: Sequence[int]) -> tuple[T, ...]:
    """From the order of showing into the order of the group."""
    by_place = dict(zip(order, values, strict=True))
    return tuple(by_place[place] for place in range(len(order)))


def _check_same_groups(journal: Journal, items: Sequence[Item]) -> None:
    """A group id must mean the same responses in the candidates and in the judgements there are."""
    groups = {item.group.group_id: item.group for item in items}
    for record in journal.records:
        group = groups.get(record.group_id)
        if group is None or (record.prompt, record.responses) == (group.prompt, group.responses):
            continue
        same = all(map(record.responses.count, group.responses)) and len(record.responses) == len(group.responses)
        if record.prompt != group.prompt or not same:
            raise DataError(
                f"{journal.path}: group {record.group_id!r} was judged with another prompt or other responses; "
                "give another --output, or the candidates from then"
            )
