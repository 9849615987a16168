"""Which model answers better: the same prompts, the same random numbers, and a judge that does not know who wrote what.

A judge gives every answer a score (a reward model, a reward function), or is shown two answers at a time (a function that takes
``first`` and ``second``, or a person). A program that is shown two is asked in both orders: a verdict that turns with the order is a tie, and counted.
People see the answers blind and shuffled, with the order recorded.

Shape legend: C cases (prompts times answers to each).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.errors import ConfigError
from ingot.inference.answers import Case, draw_cases, write_cases
from ingot.inference.intervals import Share, bootstrap_share, share_of
from ingot.inference.judges import (
    HUMAN,
    Asked,
    PairJudge,
    Scorer,
    groups_of,
    judged_by_people,
    name_of,
    open_judge,
    sign,
)
from ingot.inference.scoring import split_name
from ingot.losses.numerics import Float64, f64
from ingot.models import Backend
from ingot.training.gates import best_of_n, gate_verdict, require_other_judge, same_reward
from ingot.training.progress import Display, SilentDisplay
from ingot.training.rewards import RewardFunction, RewardFunctions
from ingot.training.rollouts import MAX_SEQUENCES
from ingot.training.verdicts import Verdict

_LENGTH_EDGES = (0.1, 0.3, 0.7)


@dataclasses.dataclass(frozen=True)
class SourceFigures:
    """One model's answers, or the best of n of them."""

    source: str
    mean_tokens: float
    mean_characters: float
    eos_rate: float
    """Share of answers that ended by themselves."""
    mean_score: float | None
    """By a judge that gives scores."""


@dataclasses.dataclass(frozen=True)
class PairFigures:
    """One against another, a tie counting half."""

    source: str
    against: str
    win_rate: Share
    """With its 95 % interval over prompts."""
    wins: int
    ties: int
    losses: int
    num_unjudged: int
    """Cases that the judge had nothing to say about."""
    length_matched: Share
    """The win rate where answers are as often longer than the other's as they are shorter (:func:`length_weights`)."""
    length_matched_share: float
    """Of the judged cases, by weight, that this is made from."""
    flipped: float | None
    """Share of the cases in which the verdict turned with the order; None for judges that see no pairs, or see them once."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What came out."""

    judge: str
    proxy_of: tuple[str, ...]
    """Models that were trained against this very judge, which makes it a proxy."""
    num_prompts: int
    num_cases: int
    num_too_long: int
    """Prompts left out: no room for an answer."""
    sources: tuple[SourceFigures, ...]
    pairs: tuple[PairFigures, ...]
    notices: tuple[str, ...]
    gate: Verdict | None
    """Whether a policy may be trained against what chose the best of n; None for a comparison of models."""

    @property
    def kind(self) -> str:
        """``proxy``, ``human`` or ``judge``: to be shown wherever the judge is."""
        return "proxy" if self.proxy_of else HUMAN if self.judge == HUMAN else "judge"


def compare_models(
    models: Sequence[str | Path],
    prompts: str | Path,
    judge: str | RewardFunction,
    *,
    num_generations: int = 1,
    best_of: int | None = None,
    rewards: Sequence[str | RewardFunction] = (),
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    output: str | Path | None = None,
    ask: Asked | None = None,
    max_sequences: int = MAX_SEQUENCES,
    threads: int | None = None,
    backend: Backend = "native",
    device: str | None = None,
    display: Display | None = None,
) -> Comparison:
    """Let models answer the same prompts and a judge say whose answers are better.

    Parameters
    ----------
    models
        Folders; at least two, or one with ``best_of``.
    prompts
        File of rows with a "prompt"; functions get their other columns.
    judge
        A reward model's folder, a reward function (or ``./file.py:NAME``), a function ``(prompts, first, second, **columns)`` that returns
        "first", "second", "tie" or None for each pair, or "human".
    num_generations
        Answers of each model to each prompt; the i-th of one is compared with the i-th of the other.
    best_of, rewards
        With one model: draw so many answers to each prompt and compare the one that the rewards (summed) like best with the first. Says
        whether a policy may be trained against them (:attr:`Comparison.gate`). The judge must not be one of them.
    output
        File of the answers (JSON lines, which ``ingot label`` reads) with the judge's scores. What is there is not drawn again, so that
        another judge sees the same answers. A person needs it: the judgements go beside it, to ``NAME.judgements.jsonl``.
    ask
        Where the judge is "human".

    The other parameters are those of :func:`ingot.inference.sample.sample_candidates`.

    Raises
    ------
    ConfigError, DataError, CheckpointError
        Something does not fit; the message names it.
    RewardError
        The judge or a reward failed; answers that were drawn are kept where ``output`` is given.
    KeyboardInterrupt
        Ctrl-C; the same.
    """
    display = display or SilentDisplay()
    folders = [str(model) for model in models]
    file = None if output is None else Path(output)
    _check_settings(folders, prompts, judge, num_generations, best_of, rewards, file, ask)
    place = {"threads": threads, "backend": backend, "device": device}
    # Before anything slow: judges and rewards are what people write themselves.
    opened = None if judge == HUMAN else open_judge(judge, place)
    chooser = Scorer(RewardFunctions(rewards, place=place), " + ".join(map(_name, rewards))) if rewards else None
    notices: list[str] = []
    drawn = draw_cases(
        folders,
        prompts,
        num_generations=best_of or num_generations,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        file=file,
        display=display,
        notices=notices,
        max_sequences=max_sequences,
        **place,
    )
    cases, sources = drawn.cases, folders
    gate = None
    if chooser is not None:
        display.work("scoring", 0, 1)
        chosen = chooser.scores(cases)
        if isinstance(opened, Scorer):
            gate = gate_verdict(best_of_n(chosen, opened.scores(cases)), reward=chooser.name, judge=opened.name)
        _keep(file, cases)
        best = [int(np.nanargmax(row)) if np.isfinite(row).any() else 0 for row in chosen]
        cases = [case.select((0, place)) for case, place in zip(cases, best, strict=True)]
        sources = [folders[0], f"best of {best_of} by {chooser.name}"]
    display.work("judging", 0, 1)
    outcomes, flipped = _judge(opened, cases, len(sources), file, ask, display)
    if chooser is None:
        _keep(file, cases)
    display.stop()
    pairs = tuple(
        _pair_figures(cases, outcomes[pair], flipped.get(pair), sources, *pair)
        for pair in itertools.combinations(range(len(sources)), 2)
    )
    name = HUMAN if opened is None else opened.name
    if chooser is not None and gate is None:
        gate = _gate_by_pairs(pairs[0], best_of or 0, chooser.name, name)
    trained = [
        model
        for model in folders
        if isinstance(judge, str) and any(_same_source(each, judge) for each in training_rewards(model))
    ]
    return Comparison(
        judge=name,
        proxy_of=tuple(trained),
        num_prompts=len({case.prompt_id for case in cases}),
        num_cases=len(cases),
        num_too_long=drawn.num_too_long,
        sources=tuple(_source_figures(cases, number, source, name) for number, source in enumerate(sources)),
        pairs=pairs,
        notices=tuple(notices),
        gate=gate,
    )


def judgements_file(output: str | Path) -> Path:
    """Where a person's judgements of the answers in ``output`` are."""
    output = Path(output)
    return output.with_name(f"{output.stem}.judgements.jsonl")


def _check_settings(
    models: Sequence[str],
    prompts: str | Path,
    judge: str | RewardFunction,
    num_generations: int,
    best_of: int | None,
    rewards: Sequence[str | RewardFunction],
    output: Path | None,
    ask: Asked | None,
) -> None:
    if best_of is None:
        if len(models) < 2:
            raise ConfigError("one model alone compares with nothing: give two, or one with --best-of and --reward")
        if rewards:
            raise ConfigError("a reward chooses the best of n answers: give --best-of too; what judges is --judge")
    else:
        if len(models) != 1:
            raise ConfigError(
                f"best of n is compared with answers of the same model: give one model, not {len(models)}"
            )
        if best_of < 2:
            raise ConfigError(f"best of {best_of} chooses nothing: give at least 2")
        if num_generations != 1:
            raise ConfigError("best_of says how many answers are drawn: leave num_generations out")
        if not rewards:
            raise ConfigError("best of n needs a reward that chooses: give --reward")
        if judge != HUMAN:
            require_other_judge(rewards, judge)
    twice = next((model for model in models if models.count(model) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice} is there twice: it would only tie with itself")
    if num_generations < 1:
        raise ConfigError(f"num_generations must be at least 1, got {num_generations}")
    if output is not None and output.resolve() == Path(prompts).resolve():
        raise ConfigError(f"--output {output} is also what is read; give another file")
    if judge == HUMAN and output is None:
        raise ConfigError(
            "a person's judgements must not be lost: give --output FILE; they go beside the answers in it"
        )
    if judge == HUMAN and ask is None:
        raise ConfigError("the judge is a person, but there is nobody to ask: give ask")


def _keep(file: Path | None, cases: Sequence[Case]) -> None:
    """Write the scores that cases have, where there is a file."""
    if file is not None and any(case.scores for case in cases):
        write_cases(file, cases)


Pair = tuple[int, int]


def _judge(
    judge: Scorer | PairJudge | None,
    cases: Sequence[Case],
    count: int,
    file: Path | None,
    ask: Asked | None,
    display: Display,
) -> tuple[dict[Pair, Float64], dict[Pair, npt.NDArray[np.bool_]]]:
    """For answers first < second of each case: 1 where the second is better, 0 where the first is, 0.5 for a tie, NaN for none; and where the
    order of showing decided, for judges that tell."""
    pairs = list(itertools.combinations(range(count), 2))
    if isinstance(judge, Scorer):
        scores = judge.scores(cases)
        return {(a, b): sign(scores[:, b] - scores[:, a]) for a, b in pairs}, {}
    if isinstance(judge, PairJudge):
        both = {}
        for number, (a, b) in enumerate(pairs):
            display.work("judging", number, len(pairs))
            both[a, b] = judge.compare(cases, a, b)
        return {pair: found[0] for pair, found in both.items()}, {pair: found[1] for pair, found in both.items()}
    assert file is not None
    assert ask is not None
    display.stop()
    judgements = judgements_file(file)
    ask(groups_of(cases), judgements)
    return {(a, b): judged_by_people(cases, judgements, a, b) for a, b in pairs}, {}


# ---- figures


def _source_figures(cases: Sequence[Case], number: int, source: str, judge: str) -> SourceFigures:
    scores = [case.scores[judge][number] for case in cases if judge in case.scores]
    there = [score for score in scores if score is not None]
    return SourceFigures(
        source=source,
        mean_tokens=float(np.mean([case.num_tokens[number] for case in cases])),
        mean_characters=float(np.mean([len(case.texts[number]) for case in cases])),
        eos_rate=1.0 - float(np.mean([case.truncated[number] for case in cases])),
        mean_score=float(np.mean(there)) if there else None,
    )


def _pair_figures(
    cases: Sequence[Case],
    outcomes: Float64,
    flipped: npt.NDArray[np.bool_] | None,
    sources: Sequence[str],
    first: int,
    second: int,
) -> PairFigures:
    """Of the second against the first."""
    judged = np.isfinite(outcomes)
    prompts = np.unique([case.prompt_id for case in cases], return_inverse=True)[1][judged]
    hits = outcomes[judged]
    several = len(np.unique(prompts)) < len(prompts)
    lengths = np.array([[len(case.texts[first]), len(case.texts[second])] for case in cases])[judged]
    weights = length_weights(lengths[:, 0], lengths[:, 1])
    return PairFigures(
        source=sources[second],
        against=sources[first],
        win_rate=bootstrap_share(hits, prompts) if several else share_of(hits, prompts),
        wins=int(np.count_nonzero(hits > 0.5)),
        ties=int(np.count_nonzero(hits == 0.5)),
        losses=int(np.count_nonzero(hits < 0.5)),
        num_unjudged=int(np.count_nonzero(~judged)),
        length_matched=share_of(hits, prompts, weights),
        length_matched_share=float(weights.mean()) if len(weights) else math.nan,
        flipped=None if flipped is None else float(flipped[judged].mean()) if judged.any() else math.nan,
    )


def length_weights(first: npt.ArrayLike, second: npt.ArrayLike) -> Float64:
    """Weights with which the second answer is as often longer as it is shorter, to the same degree, f64 [C].

    Cases are put into bins by |ln(second / first)| of the lengths, with edges 0.1, 0.3 and 0.7. In the first bin all count 1; in each other one
    the side (longer or shorter) that has more cases is weighed down to the other, and where a side has none the bin counts nothing.
    """
    ratio = np.log((f64(second) + 1) / (f64(first) + 1))
    bins = np.digitize(np.abs(ratio), _LENGTH_EDGES)
    weights = np.ones(len(ratio))
    for number in range(1, len(_LENGTH_EDGES) + 1):
        longer, shorter = (bins == number) & (ratio > 0), (bins == number) & (ratio < 0)
        counts = int(np.count_nonzero(longer)), int(np.count_nonzero(shorter))
        for side, count in zip((longer, shorter), counts, strict=True):
            weights[side] = min(counts) / max(count, 1)
    return weights


def _gate_by_pairs(pair: PairFigures, n: int, reward: str, judge: str) -> Verdict:
    """Of best of n by a judge that sees pairs."""
    share = pair.win_rate
    words = f"Of {n} answers to each of {share.num_prompts:,} prompts, {judge} prefers the one that {reward} likes best to the first in {share}."
    return Verdict(
        passed=share.num_cases > 0 and share.low > 0.5,
        sentences=(words if share.num_cases else "Nothing was judged yet.",),
        figures={
            "n": n,
            "num_prompts": share.num_prompts,
            "reward": reward,
            "judge": judge,
            "win_rate": share.value,
            "win_rate_low": share.low,
            "win_rate_high": share.high,
        },
        advice=f"What {reward} likes is not clearly better: judge more prompts, or collect judgements of such answers before training against it.",
    )


# ---- what the models were trained against


def _same_source(reward: str, judge: str) -> bool:
    """Another criterion of the same reward model is no other judge."""
    return same_reward(split_name(reward)[0], split_name(judge)[0])


def training_rewards(folder: str | Path) -> list[str]:
    """What the run in a folder, and the runs that it started from, were trained against: folders and functions."""
    found: list[str] = []
    seen: set[Path] = set()
    place: Path | None = Path(folder)
    while place is not None and place.resolve() not in seen:
        seen.add(place.resolve())
        config = _run_config(place)
        named = [config.get("reward_model"), *(config.get("reward") or ())]
        found += [name for name in named if isinstance(name, str)]
        model = config.get("model")
        place = Path(model) if isinstance(model, str) and model else None
    return found


def _run_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "run.json").read_bytes())["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return config if isinstance(config, dict) else {}


def _name(reward: str | RewardFunction) -> str:
    return reward if isinstance(reward, str) else name_of(reward)
