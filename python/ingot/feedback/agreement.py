"""What a file of judgements is worth: how far people agree with each other and with themselves, and what sways them.

Two views of a ranking are compared. As pairs: for any two responses of a group a labeller says first, second, or tie; shares and
kappas count equal outcomes. As positions: each response's place in its list, 0 (best) to 1, ties in the middle of the places they
take; Krippendorff's alpha compares those, and the gate is on its ordinal form. Intervals are 95 % percentiles of a bootstrap that
draws prompts, so that several groups of a prompt, and all pairs of a group, stand or fall together.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from ingot.data.judgements import current
from ingot.data.keys import Text, canonical, digest
from ingot.errors import DataError
from ingot.feedback.coefficients import Array, Coincidences, Metric, cohen_kappa, fleiss_kappa
from ingot.feedback.orderings import OrderingTest, holm, ordering_test
from ingot.feedback.records import Record
from ingot.feedback.texts import plain

GATE = 0.4
"""The least alpha (ordinal, of positions) with which a guideline counts as understood."""
LEVEL = 0.05
"""Of the tests for bias: the chance that any of a file's unbiased labellers is suspected."""

_OUTCOMES = (-1, 0, 1)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; NaN where there is nothing to estimate it from."""

    value: float
    low: float
    high: float
    count: int
    """What it was made from: pairs of responses, units, or cases."""


@dataclasses.dataclass(frozen=True)
class Bias:
    """Whether a labeller's rankings follow the order of showing, or length."""

    test: OrderingTest
    adjusted_p: float
    """Corrected for the number of labellers (Holm)."""
    alarm: bool


@dataclasses.dataclass(frozen=True)
class LabelerReport:
    """One labeller."""

    name: str
    num_judgements: int
    median_time_s: float
    """NaN where no times were recorded."""
    ties: float
    """Share of pairs ranked equal."""
    self_agreement: Estimate
    """Share of pairs with the same outcome when a group was judged again."""
    gold_accuracy: Estimate
    """Share of the pairs that gold orders that were ordered the same way; a tie counts half."""
    position: Bias
    """Share above 0.5: what is shown earlier is ranked higher."""
    alpha_without: float
    """Krippendorff's alpha (ordinal) of the others; NaN where fewer than two are left."""
    length: Bias
    """Share above 0.5: the longer response is ranked higher. Longer can be better: compare labellers."""


@dataclasses.dataclass(frozen=True)
class PairReport:
    """Two labellers, on the groups that both judged."""

    first: str
    second: str
    num_groups: int
    agreement: Estimate
    kappa: Estimate
    """Cohen's."""


@dataclasses.dataclass(frozen=True)
class Disputed:
    """A group to judge again, or to talk about."""

    group_id: str
    disagreement: float
    """Share of (two judgements, two responses) with different outcomes."""
    labelers: tuple[str, ...]
    prompt: str
    """Its beginning."""


@dataclasses.dataclass(frozen=True)
class CriterionReport:
    """All judgements about one criterion."""

    criterion: str
    num_judgements: int
    num_groups: int
    num_shared: int
    """Groups that at least two people judged."""
    labelers: tuple[LabelerReport, ...]
    pairs: tuple[PairReport, ...]
    agreement: Estimate
    """Share of equal outcomes over all pairs of labellers."""
    strict_agreement: Estimate
    """The same where neither tied: what the accuracy of a reward model can be compared with."""
    fleiss: Estimate
    """Fleiss' kappa of outcomes, over groups judged by the most common number of labellers."""
    alphas: dict[Metric, Estimate]
    """Krippendorff's, of positions."""
    rating_alpha: Estimate
    """Interval, of the 1 to 7 ratings."""
    answer_alphas: dict[str, Estimate]
    """Nominal, of the yes-or-no answers by criterion."""
    disputed: tuple[Disputed, ...]
    gate: float
    passed: bool | None
    """None where agreement could not be measured."""
    verdict: str


def criteria_of(records: Iterable[Record]) -> list[str]:
    """The criteria of the judgements that count, in the order of first appearance."""
    return list(dict.fromkeys(record.criterion for record in current(records)))


def measure_agreement(
    records: Iterable[Record],
    criterion: str | None = None,
    *,
    gate: float = GATE,
    num_draws: int = 1000,
    num_disputed: int = 10,
    seed: int = 0,
) -> CriterionReport:
    """Everything about the judgements of one criterion; of the only one there is unless named.

    Raises
    ------
    DataError
        There are no judgements, several criteria and none named, or one group id with different responses.
    """
    judgements = current(records)
    found = list(dict.fromkeys(record.criterion for record in judgements))
    if criterion is None:
        if len(found) > 1:
            raise DataError(f"judgements about several criteria ({', '.join(found)}); name one")
        criterion = found[0] if found else ""
    judgements = [record for record in judgements if record.criterion == criterion]
    if not judgements:
        raise DataError(f"no judgement about {criterion!r}" if criterion else "no judgements: label some groups first")
    groups = _groups(judgements)
    draw = _Bootstrap(groups, num_draws, seed)
    names = sorted({judgement.annotator for group in groups for judgement in group.judgements})
    alphas = {metric: _value_alpha(groups, None, metric, draw) for metric in ("nominal", "ordinal", "interval")}
    shared = [group for group in groups if len(group.first_by_annotator) >= 2]
    passed, verdict = _verdict(alphas["ordinal"], len(shared), len(names), gate)
    return CriterionReport(
        criterion=criterion,
        num_judgements=len(judgements),
        num_groups=len(groups),
        num_shared=len(shared),
        labelers=_labelers(groups, names, draw),
        pairs=tuple(_pair(groups, first, second, draw) for first, second in itertools.combinations(names, 2)),
        agreement=_agreement(groups, draw, strict=False),
        strict_agreement=_agreement(groups, draw, strict=True),
        fleiss=_fleiss(shared, draw),
        alphas=alphas,  # type: ignore[arg-type]
        rating_alpha=_value_alpha(groups, lambda judgement: judgement.record.ratings, "interval", draw),
        answer_alphas=_answer_alphas(groups, draw),
        disputed=_disputed(groups, num_disputed),
        gate=gate,
        passed=passed,
        verdict=verdict,
    )


@dataclasses.dataclass(frozen=True)
class _Judgement:
    """A record with its responses brought into the order of its group."""

    record: Record
    place: tuple[int, ...]
    """Where in the record the group's first, second, ... response is."""

    @property
    def annotator(self) -> str:
        return self.record.annotator

    @property
    def ranks(self) -> list[int]:
        return [self.record.ranks[place] for place in self.place]

    @property
    def outcomes(self) -> list[int]:
        """Of each two responses: 1 the first is better, -1 the second, 0 a tie."""
        return [(b > a) - (b < a) for a, b in itertools.combinations(self.ranks, 2)]

    @property
    def positions(self) -> list[float]:
        """0 for the best, 1 for the worst; ties in the middle of the places they take."""
        ranks = self.ranks
        return [
            (sum(other < rank for other in ranks) + (sum(other == rank for other in ranks) - 1) / 2) / (len(ranks) - 1)
            for rank in ranks
        ]


@dataclasses.dataclass(frozen=True)
class _Group:
    group_id: str
    prompt: Text
    prompt_key: str
    judgements: list[_Judgement]

    @property
    def first_by_annotator(self) -> dict[str, _Judgement]:
        first: dict[str, _Judgement] = {}
        for judgement in self.judgements:
            first.setdefault(judgement.annotator, judgement)
        return first


def _groups(records: Sequence[Record]) -> list[_Group]:
    groups: dict[str, _Group] = {}
    orders: dict[str, list[bytes]] = {}
    for record in records:
        keys = [canonical(response) for response in record.responses]
        group = groups.get(record.group_id)
        if group is None:
            group = _Group(record.group_id, record.prompt, digest(record.prompt), [])
            groups[record.group_id] = group
            # Ordered by hash, so that "the first of two responses" says nothing about what wrote it.
            orders[record.group_id] = sorted(keys, key=lambda key: digest("orientation", key.decode()))
        place: list[int] = []
        for key in orders[record.group_id]:
            at = next((number for number, other in enumerate(keys) if other == key and number not in place), None)
            if at is None or len(keys) != len(orders[record.group_id]) or digest(record.prompt) != group.prompt_key:
                raise DataError(
                    f"group {record.group_id!r} has other responses in the judgement of {record.annotator!r} than before; "
                    "give different groups different ids"
                )
            place.append(at)
        group.judgements.append(_Judgement(record, tuple(place)))
    return list(groups.values())


Values = Callable[[_Judgement], "Sequence[float | None] | None"]
"""What a judgement says of each response, in the order of its record; None where it says nothing."""


class _Bootstrap:
    """Draws prompts with replacement; the same draws for every statistic."""

    def __init__(self, groups: Sequence[_Group], num_draws: int, seed: int) -> None:
        self.index = {key: number for number, key in enumerate(dict.fromkeys(group.prompt_key for group in groups))}
        size = len(self.index)
        rng = np.random.default_rng(seed)
        self.weights: Array = (
            rng.multinomial(size, np.full(size, 1.0 / size), size=num_draws).astype(np.float64)
            if size >= 2
            else np.zeros((0, size))
        )

    def owners(self, groups: Iterable[_Group]) -> npt.NDArray[np.int64]:
        return np.array([self.index[group.prompt_key] for group in groups], dtype=np.int64)

    def estimate(
        self, owners: npt.NDArray[np.int64], count: int, statistic: Callable[[Array | None], float]
    ) -> Estimate:
        """``statistic`` of all cases (None) and of drawn ones (how often each case, f64 [cases])."""
        value = statistic(None)
        if math.isnan(value):
            return Estimate(value, value, value, count)
        drawn = np.array([statistic(weights[owners]) for weights in self.weights])
        drawn = drawn[~np.isnan(drawn)]
        if not len(drawn):
            return Estimate(value, float("nan"), float("nan"), count)
        low, high = np.percentile(drawn, [2.5, 97.5])
        return Estimate(value, float(low), float(high), count)

    def share(self, cases: Sequence[tuple[_Group, float, int]]) -> Estimate:
        """Hits / tries over cases of (group, hits, tries)."""
        owners = self.owners(group for group, _, _ in cases)
        hits = np.array([hit for _, hit, _ in cases], dtype=np.float64)
        tries = np.array([number for _, _, number in cases], dtype=np.float64)

        def statistic(weights: Array | None) -> float:
            weights = np.ones(len(cases)) if weights is None else weights
            total = float(weights @ tries)
            return float(weights @ hits) / total if total > 0 else float("nan")

        found = self.estimate(owners, int(tries.sum()), statistic)
        if found.value not in (0.0, 1.0):
            return found
        # All alike, as every draw of them is: the exact bound for so many prompts (Clopper and Pearson 1934) instead.
        bound = 0.025 ** (1 / len(set(owners[tries > 0].tolist())))
        low, high = (0.0, 1.0 - bound) if found.value == 0.0 else (bound, 1.0)
        return dataclasses.replace(found, low=low, high=high)


def _agreement(groups: Sequence[_Group], draw: _Bootstrap, strict: bool) -> Estimate:
    cases = []
    for group in groups:
        for a, b in itertools.combinations(group.first_by_annotator.values(), 2):
            cases.append((group, *_equal(a.outcomes, b.outcomes, strict)))
    return draw.share(cases)


def _equal(first: Sequence[int], second: Sequence[int], strict: bool = False) -> tuple[int, int]:
    """Equal outcomes, and those that were compared."""
    both = [(a, b) for a, b in zip(first, second, strict=True) if not strict or (a and b)]
    return sum(a == b for a, b in both), len(both)


def _value_alpha(
    groups: Sequence[_Group],
    values_of: Values | None,
    metric: Metric,
    draw: _Bootstrap,
) -> Estimate:
    """Alpha over (group, response) units: of positions, or of what ``values_of`` finds in a record."""
    units, owners = _units(groups, values_of)
    coincidences = Coincidences(units)
    return draw.estimate(
        draw.owners(owners), len(units), lambda weights: coincidences.alpha(metric, unit_weights=weights)
    )


def _units(groups: Sequence[_Group], values_of: Values | None) -> tuple[list[list[float]], list[_Group]]:
    """What different people said of each response that at least two said something of, and its group."""
    units: list[list[float]] = []
    owners: list[_Group] = []
    for group in groups:
        rows = []
        for judgement in group.first_by_annotator.values():
            if values_of is None:
                rows.append(judgement.positions)
            elif (values := values_of(judgement)) is not None:
                rows.append([values[place] for place in judgement.place])  # type: ignore[misc]
        for column in zip(*rows, strict=True):
            unit = [float(value) for value in column if value is not None]
            if len(unit) >= 2:
                units.append(unit)
                owners.append(group)
    return units, owners


def _answer_alphas(groups: Sequence[_Group], draw: _Bootstrap) -> dict[str, Estimate]:
    names = dict.fromkeys(
        name for group in groups for judgement in group.judgements for name in judgement.record.answers
    )

    def answers_to(name: str) -> Values:
        return lambda judgement: judgement.record.answers.get(name)

    return {name: _value_alpha(groups, answers_to(name), "nominal", draw) for name in names}


def _fleiss(shared: Sequence[_Group], draw: _Bootstrap) -> Estimate:
    sizes = [len(group.first_by_annotator) for group in shared]
    if not sizes:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    common = max(set(sizes), key=lambda size: (sizes.count(size), size))
    counts: list[list[int]] = []
    owners: list[_Group] = []
    for group in shared:
        judgements = group.first_by_annotator.values()
        if len(judgements) == common:
            for outcomes in zip(*(judgement.outcomes for judgement in judgements), strict=True):
                counts.append([outcomes.count(outcome) for outcome in _OUTCOMES])
                owners.append(group)
    table = np.array(counts)

    def statistic(weights: Array | None) -> float:
        return fleiss_kappa(table if weights is None else np.repeat(table, weights.astype(np.int64), axis=0))

    return draw.estimate(draw.owners(owners), len(counts), statistic)


def _pair(groups: Sequence[_Group], first: str, second: str, draw: _Bootstrap) -> PairReport:
    both = [
        (group, by[first], by[second]) for group in groups if first in (by := group.first_by_annotator) and second in by
    ]
    tables = np.zeros((len(both), 3, 3))
    for number, (_, a, b) in enumerate(both):
        for x, y in zip(a.outcomes, b.outcomes, strict=True):
            tables[number, _OUTCOMES.index(x), _OUTCOMES.index(y)] += 1

    def kappa(weights: Array | None) -> float:
        return cohen_kappa(tables.sum(axis=0) if weights is None else np.tensordot(weights, tables, axes=1))

    return PairReport(
        first=first,
        second=second,
        num_groups=len(both),
        agreement=draw.share([(group, *_equal(a.outcomes, b.outcomes)) for group, a, b in both]),
        kappa=draw.estimate(draw.owners(group for group, _, _ in both), int(tables.sum()), kappa),
    )


def _labelers(groups: Sequence[_Group], names: Sequence[str], draw: _Bootstrap) -> tuple[LabelerReport, ...]:
    mine = {
        name: [(group, judgement) for group in groups for judgement in group.judgements if judgement.annotator == name]
        for name in names
    }
    position = [
        ordering_test([[j.record.ranks[place] for place in j.record.order] for _, j in mine[name] if j.record.order])
        for name in names
    ]
    # A group judged again has the same lengths and much the same ranks: it is no second case.
    length = [
        ordering_test([_by_length(by[name].record) for group in groups if name in (by := group.first_by_annotator)])
        for name in names
    ]
    biases = [_biases(tests) for tests in (position, length)]
    reports = []
    for number, name in enumerate(names):
        times = [j.record.time_s for _, j in mine[name] if j.record.time_s is not None]
        outcomes = [outcome for _, j in mine[name] for outcome in j.outcomes]
        reports.append(
            LabelerReport(
                name=name,
                num_judgements=len(mine[name]),
                median_time_s=float(np.median(times)) if times else float("nan"),
                ties=outcomes.count(0) / len(outcomes),
                self_agreement=_self_agreement(groups, name, draw),
                gold_accuracy=draw.share([case for case in (_gold(g, j) for g, j in mine[name]) if case is not None]),
                alpha_without=_alpha_without(groups, name),
                position=biases[0][number],
                length=biases[1][number],
            )
        )
    return tuple(reports)


def _alpha_without(groups: Sequence[_Group], name: str) -> float:
    others = [
        dataclasses.replace(group, judgements=[j for j in group.judgements if j.annotator != name]) for group in groups
    ]
    return Coincidences(_units(others, None)[0]).alpha("ordinal")


def _biases(tests: Sequence[OrderingTest]) -> list[Bias]:
    adjusted = holm([test.p_value for test in tests])
    return [Bias(test, p_value, p_value < LEVEL) for test, p_value in zip(tests, adjusted, strict=True)]


def _by_length(record: Record) -> list[int]:
    """Ranks, the longest response first; equal lengths in an order that says nothing."""
    order = sorted(
        range(len(record.responses)),
        key=lambda number: (-len(plain(record.responses[number])), digest("length", record.responses[number])),
    )
    return [record.ranks[number] for number in order]


def _self_agreement(groups: Sequence[_Group], name: str, draw: _Bootstrap) -> Estimate:
    cases = []
    for group in groups:
        again = [judgement for judgement in group.judgements if judgement.annotator == name]
        for first, second in itertools.combinations(again, 2):
            cases.append((group, *_equal(first.outcomes, second.outcomes)))
    return draw.share(cases)


def _gold(group: _Group, judgement: _Judgement) -> tuple[_Group, float, int] | None:
    gold = judgement.record.gold_ranks
    if gold is None:
        return None
    ordered = [
        (better, worse) for better, worse in itertools.permutations(range(len(gold)), 2) if gold[better] < gold[worse]
    ]
    ranks = judgement.record.ranks
    hits = sum(1.0 if ranks[a] < ranks[b] else 0.5 if ranks[a] == ranks[b] else 0.0 for a, b in ordered)
    return group, hits, len(ordered)


def _disputed(groups: Sequence[_Group], count: int) -> tuple[Disputed, ...]:
    found = []
    for group in groups:
        compared = [_equal(a.outcomes, b.outcomes) for a, b in itertools.combinations(group.judgements, 2)]
        tries = sum(number for _, number in compared)
        equal = sum(number for number, _ in compared)
        if tries > equal:
            names = tuple(dict.fromkeys(judgement.annotator for judgement in group.judgements))
            beginning = " ".join(plain(group.prompt).split())[:80]
            found.append(Disputed(group.group_id, 1.0 - equal / tries, names, beginning))
    return tuple(sorted(found, key=lambda disputed: -disputed.disagreement)[:count])


def _verdict(alpha: Estimate, num_shared: int, num_labelers: int, gate: float) -> tuple[bool | None, str]:
    if num_shared == 0:
        who = "One person judged" if num_labelers == 1 else "No group was judged by two people"
        return None, (
            f"{who}: agreement between people cannot be measured. "
            "Let a second person label some of the same candidates (the same file, another --labeler)."
        )
    if math.isnan(alpha.value):
        return None, "All responses were ranked equal by all: there is nothing to agree on."
    figures = f"alpha {alpha.value:.2f}"
    if not math.isnan(alpha.low):
        figures += f" (95 % interval {alpha.low:.2f} to {alpha.high:.2f})"
    if alpha.value < gate:
        return False, (
            f"People do not agree enough: {figures}, below the gate of {gate:.2f}. "
            "Talk through the groups listed last, revise the guideline, and label them again."
        )
    if math.isnan(alpha.low) or alpha.low < gate:
        return True, (
            f"People agree so far: {figures}, above the gate of {gate:.2f}, "
            "but with so few groups it may lie below: let two people judge more of them."
        )
    return True, f"People agree: {figures}, above the gate of {gate:.2f}. These rankings can train a reward model."
