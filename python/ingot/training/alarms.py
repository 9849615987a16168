"""Alarms: signs in a run's metrics that something goes wrong, each with its likely cause.

An alarm is a function of the lines of metrics.jsonl so far, so a resumed run raises the same ones at the same steps. It is raised once
each time its condition begins to hold, said to the person, and recorded as a line of its own: ``{"step", "alarm", "message"}``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

Metrics: TypeAlias = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """One alarm."""

    name: str
    """Of the condition, in a word or two."""
    needs: tuple[str, ...]
    """Metrics without which it says nothing."""
    check: Callable[[Sequence[Metrics]], str | None]
    """What is wrong and its likely cause, from all lines so far that have these metrics (the last one is new); None where all is well."""


class Alarms:
    """Rules at watch over a run.

    Parameters
    ----------
    rules
        What to look for.
    history
        Lines of metrics.jsonl before, where the run is resumed.
    """

    def __init__(self, rules: Iterable[Rule], history: Iterable[Metrics] = ()) -> None:
        self._lines: dict[Rule, list[Metrics]] = {rule: [] for rule in rules}
        self._raised: set[str] = set()
        for line in history:
            if "alarm" not in line:
                self.check(line)

    def check(self, line: Metrics) -> list[tuple[str, str]]:
        """Names and messages of the alarms that begin with this line of metrics."""
        began = []
        for rule, lines in self._lines.items():
            if any(_number(line.get(name)) is None for name in rule.needs):
                continue
            lines.append({name: _number(line[name]) for name in rule.needs})
            message = rule.check(lines)
            if message is None:
                self._raised.discard(rule.name)
            elif rule.name not in self._raised:
                self._raised.add(rule.name)
                began.append((rule.name, message))
        return began


def above(name: str, metric: str, limit: float, cause: str, *, after: int = 1) -> Rule:
    """Alarm where a metric is above ``limit`` in each of the last ``after`` lines."""

    def check(lines: Sequence[Metrics]) -> str | None:
        if len(lines) < after or any(line[metric] <= limit for line in lines[-after:]):
            return None
        return f"{metric} is {lines[-1][metric]:.3g}, above {limit:g}: {cause}"

    return Rule(name, (metric,), check)


def below(name: str, metric: str, limit: float, cause: str, *, after: int = 1) -> Rule:
    """Alarm where a metric is below ``limit`` in each of the last ``after`` lines."""

    def check(lines: Sequence[Metrics]) -> str | None:
        if len(lines) < after or any(line[metric] >= limit for line in lines[-after:]):
            return None
        return f"{metric} is {lines[-1][metric]:.3g}, below {limit:g}: {cause}"

    return Rule(name, (metric,), check)


def below_share_of_start(name: str, metric: str, share: float, cause: str) -> Rule:
    """Alarm where a metric has fallen under ``share`` of its first value."""

    def check(lines: Sequence[Metrics]) -> str | None:
        first, last = lines[0][metric], lines[-1][metric]
        if last >= share * first:
            return None
        return f"{metric} fell from {first:.3g} to {last:.3g}, below {100 * share:.0f} % of its start: {cause}"

    return Rule(name, (metric,), check)


def drifted(name: str, metric: str, share: float, cause: str) -> Rule:
    """Alarm where a metric has moved away from its first value by more than ``share`` of it, up or down."""

    def check(lines: Sequence[Metrics]) -> str | None:
        first, last = lines[0][metric], lines[-1][metric]
        if abs(last - first) <= share * abs(first):
            return None
        return f"{metric} went from {first:.3g} to {last:.3g}, by more than {100 * share:.0f} %: {cause}"

    return Rule(name, (metric,), check)


def apart(name: str, rising: str, falling: str, lines_apart: int, cause: str) -> Rule:
    """Alarm where over ``lines_apart`` updates one metric went up while another went down."""

    def check(lines: Sequence[Metrics]) -> str | None:
        if len(lines) <= lines_apart:
            return None
        then, now = lines[-1 - lines_apart], lines[-1]
        if now[rising] <= then[rising] or now[falling] >= then[falling]:
            return None
        return (
            f"over {lines_apart} updates {rising} rose from {then[rising]:.3g} to {now[rising]:.3g} "
            f"while {falling} fell from {then[falling]:.3g} to {now[falling]:.3g}: {cause}"
        )

    return Rule(name, (rising, falling), check)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
