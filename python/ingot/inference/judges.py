"""Who says which answer is better: a reward model or function that scores each, a function that is shown two, a person.

Shape legend: C cases, n answers in each.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ingot.data.judgements import current
from ingot.feedback.candidates import Group
from ingot.feedback.journal import Journal
from ingot.inference.answers import Case, text_of
from ingot.losses.numerics import Float64, f64
from ingot.training.rewards import RewardError, RewardFunction, RewardFunctions, load_reward

HUMAN = "human"
"""The judge that is a person."""

Asked: TypeAlias = Callable[[Sequence[Group], Path], None]
"""Lets a person judge groups and adds the judgements to a file; ends when all are judged, or the person wants to stop."""

_VERDICTS: dict[str | None, float] = {"first": 0.0, "second": 1.0, "tie": 0.5, None: math.nan}


class Scorer:
    """Gives each answer a number."""

    def __init__(self, functions: RewardFunctions, name: str) -> None:
        self.name = name
        self._functions = functions

    def scores(self, cases: Sequence[Case]) -> Float64:
        """Of all answers, f64 [C, n], also written into the cases; NaN where there is nothing to say."""
        size = len(cases[0].texts)
        prompts = [case.prompt for case in cases for _ in range(size)]
        answers = [answer for case in cases for answer in case.answers]
        total = self._functions(prompts, answers, columns_of(cases, size)).total.reshape(len(cases), size)
        for case, row in zip(cases, total.tolist(), strict=True):
            case.scores[self.name] = [None if math.isnan(score) else score for score in row]
        return total


class PairJudge:
    """Is shown two answers at a time, in both orders."""

    def __init__(self, function: RewardFunction, name: str) -> None:
        self.name = name
        self._function = function
        self._parameters = parameters_of(function)

    def compare(self, cases: Sequence[Case], first: int, second: int) -> tuple[Float64, npt.NDArray[np.bool_]]:
        """1 where the answer ``second`` is better, 0 where ``first`` is, 0.5 for a tie, NaN for no verdict, f64 [C]; and where the verdict was
        another one in the other order, which is a tie, bool [C]. The same answer twice is a tie that is not asked about."""
        outcomes, flipped = np.full(len(cases), 0.5), np.zeros(len(cases), np.bool_)
        asked = [place for place, case in enumerate(cases) if case.texts[first] != case.texts[second]]
        if asked:
            chosen = [cases[place] for place in asked]
            there, back = self._ask(chosen, first, second), 1 - self._ask(chosen, second, first)
            known = np.isfinite(there) & np.isfinite(back)
            flipped[asked] = known & (there != back)
            outcomes[asked] = np.where(known, np.where(there == back, there, 0.5), np.nan)
        return outcomes, flipped

    def _ask(self, cases: Sequence[Case], first: int, second: int) -> Float64:
        """1 where the answer shown second is better."""
        given: dict[str, Any] = {
            **columns_of(cases, 1),
            "prompts": [case.prompt for case in cases],
            "first": [case.answers[first] for case in cases],
            "second": [case.answers[second] for case in cases],
        }
        if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in self._parameters.values()):
            given = {name: value for name, value in given.items() if name in self._parameters}
        try:
            verdicts = list(self._function(**given))
        except Exception as error:
            words = " ".join(str(error).split())
            raise RewardError(f"judge {self.name}: raised {type(error).__name__}: {words}") from error
        if len(verdicts) != len(cases):
            raise RewardError(
                f"judge {self.name}: returned {len(verdicts)} verdicts for {len(cases)} pairs; return one for each"
            )
        for number, verdict in enumerate(verdicts):
            if not isinstance(verdict, str | None) or verdict not in _VERDICTS:
                raise RewardError(
                    f'judge {self.name}: returned {verdict!r} for pair {number}; return "first", "second", "tie" or None'
                )
        return f64([_VERDICTS[verdict] for verdict in verdicts])


def open_judge(judge: str | RewardFunction, place: Mapping[str, Any]) -> Scorer | PairJudge:
    """What judges: a function that takes ``first`` and ``second`` is shown pairs, all else gives scores.

    Raises
    ------
    ConfigError
        It cannot be loaded.
    """
    name = judge if isinstance(judge, str) else name_of(judge)
    function = load_reward(judge, **place) if isinstance(judge, str) else judge
    if {"first", "second"} <= parameters_of(function).keys():
        return PairJudge(function, name)
    return Scorer(RewardFunctions([function]), name)


def sign(gap: Float64) -> Float64:
    """1 above 0, 0 below, 0.5 at it; NaN stays."""
    return f64((np.sign(gap) + 1) / 2)


# ---- people


def groups_of(cases: Sequence[Case]) -> list[Group]:
    """What a person is asked about: the different answers of each case; one answer alone is no question."""
    groups = []
    for case in cases:
        places = [place for place, text in enumerate(case.texts) if text.strip() and case.texts.index(text) == place]
        if len(places) > 1:
            groups.append(
                Group(
                    group_id=case.case_id,
                    prompt=case.prompt,
                    responses=tuple(case.answers[place] for place in places),
                    sources=tuple(case.sources[place] for place in places),
                )
            )
    return groups


def judged_by_people(cases: Sequence[Case], file: Path, first: int, second: int) -> Float64:
    """As :meth:`PairJudge.compare`, from the judgements in a file: the mean of those who judged a case. An empty answer, which nobody is
    shown, loses against another; the same answer twice is a tie."""
    ranks: dict[str, list[dict[str, int]]] = {}
    for record in current(Journal(file).records):
        by_text = {text_of(response): rank for response, rank in zip(record.responses, record.ranks, strict=True)}
        ranks.setdefault(record.group_id, []).append(by_text)
    outcomes = np.full(len(cases), np.nan)
    for place, case in enumerate(cases):
        a, b = case.texts[first], case.texts[second]
        if a == b or not (a.strip() or b.strip()):
            outcomes[place] = 0.5
        elif not a.strip() or not b.strip():
            outcomes[place] = float(not a.strip())
        elif made := [each for each in ranks.get(case.case_id, []) if a in each and b in each]:
            outcomes[place] = np.mean([sign(f64(each[a] - each[b])) for each in made])
    return outcomes


# ---- functions


def columns_of(cases: Sequence[Case], repeat: int) -> dict[str, list[Any]]:
    """The other columns of the cases' prompts, each entry so many times."""
    names = dict.fromkeys(name for case in cases for name in case.columns)
    return {name: [case.columns.get(name) for case in cases for _ in range(repeat)] for name in names}


def parameters_of(function: RewardFunction) -> Mapping[str, inspect.Parameter]:
    """Of a callable, by name; none where that is not known."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C
        return {}


def name_of(function: RewardFunction) -> str:
    """What a callable is called."""
    return str(getattr(function, "__name__", type(function).__name__))
