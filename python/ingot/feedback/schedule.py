"""In which order one labeller sees what: the groups, some of them again later, gold items in between, responses shuffled.

All of it is a function of seed, labeller and group, so that a labeller who comes back goes on where they stopped, and groups can be
added at the end of the file at any time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ingot.data.keys import uniform
from ingot.errors import ConfigError
from ingot.feedback.candidates import Group
from ingot.feedback.records import Kind

_LEAST_GAP = 5
_GAP_SPREAD = 20


@dataclasses.dataclass(frozen=True)
class Item:
    """One showing of a group."""

    group: Group
    kind: Kind
    repeat: int = 0
    """1 where the labeller saw the group before."""

    @property
    def key(self) -> tuple[str, int]:
        """Names the showing."""
        return self.group.group_id, self.repeat


def schedule(
    groups: Sequence[Group],
    gold: Sequence[Group] = (),
    *,
    labeler: str,
    seed: int = 0,
    repeats: float = 0.08,
    gold_share: float = 0.05,
) -> list[Item]:
    """All showings for one labeller, in order.

    Of every ``1 / repeats`` groups one comes back, 5 to 24 groups later; before every ``1 / gold_share`` groups, somewhere among
    them, comes a gold item, each once. Labellers have different ones.

    Raises
    ------
    ConfigError
        A share is not between 0 and 0.5.
    """
    for name, share in (("repeats", repeats), ("gold_share", gold_share)):
        if not 0 <= share <= 0.5:
            raise ConfigError(f"{name} is {share}; give a share from 0 to 0.5")
    known = {group.group_id for group in gold}
    new = [group for group in groups if group.group_id not in known]
    waiting = sorted(gold, key=lambda group: uniform("gold order", seed, labeler, group.group_id))
    due: dict[int, list[Item]] = {}
    items: list[Item] = []
    for number, group in enumerate(new):
        if waiting and _chosen("gold", number, gold_share, seed, labeler):
            items.append(Item(waiting.pop(0), "gold"))
        items.append(Item(group, "new"))
        if _chosen("repeat", number, repeats, seed, labeler):
            gap = _LEAST_GAP + int(_GAP_SPREAD * uniform("gap", seed, labeler, group.group_id))
            due.setdefault(number + gap, []).append(Item(group, "repeat", 1))
        items += due.pop(number, [])
    # What would come back after the end does so at the end, unless it was seen just now.
    rest = [item for number in sorted(due) for item in due[number]]
    return items + [item for item in rest if len(items) - items.index(Item(item.group, "new")) > _LEAST_GAP]


def shown_order(size: int, *, seed: int, labeler: str, group_id: str, repeat: int) -> tuple[int, ...]:
    """The index of the response shown first, second, ...: every order is equally likely."""
    return tuple(sorted(range(size), key=lambda number: uniform("order", seed, labeler, group_id, repeat, number)))


def _chosen(what: str, number: int, share: float, seed: int, labeler: str) -> bool:
    """One of each ``1 / share`` numbers in a row, at random."""
    if share == 0:
        return False
    period = round(1 / share)
    return number % period == int(period * uniform(what, seed, labeler, number // period))
