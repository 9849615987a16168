"""The gate before reinforcement learning: estimates against enumeration, a judge that agrees, one that does not, and one that is no judge."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingot.errors import ConfigError, DataError
from ingot.inference.prompts import PromptEncoder
from ingot.losses.best_of_n import expected_max, expected_of_best
from ingot.models import load_model
from ingot.tokenizer import Tokenizer
from ingot.training.gates import best_of_n, best_of_n_gate, gate_verdict, require_other_judge, same_reward
from ingot.training.rewards import RewardFunctions
from killable_reward import write_policy


def test_the_best_of_fewer_by_listing_all_subsets():
    rng = np.random.default_rng(0)
    for ties in (False, True):
        scores = rng.integers(0, 3, 6).astype(float) if ties else rng.normal(size=6)
        values = rng.normal(size=6)
        for n in range(1, 7):
            expected = []
            for subset in itertools.combinations(range(6), n):
                chosen = scores[list(subset)]
                best = [values[place] for place in subset if scores[place] == chosen.max()]
                # Equal ones stand for the mean of all of that score, wherever they are.
                best = [values[scores == chosen.max()].mean()] if ties else best
                expected.append(best[0])
            assert expected_of_best(scores, values)[n - 1] == pytest.approx(np.mean(expected))
            largest = [scores[list(subset)].max() for subset in itertools.combinations(range(6), n)]
            assert expected_max(scores)[n - 1] == pytest.approx(np.mean(largest))
    assert expected_of_best(np.empty(0), np.empty(0)).size == 0


def test_gain_and_interval_by_hand():
    reward = np.array([[1.0, 2.0], [5.0, 4.0], [0.0, 1.0], [np.nan, 1.0]])
    judge = np.array([[0.0, 1.0], [0.5, 0.0], [1.0, 0.0], [3.0, 3.0]])
    found = best_of_n(reward, judge)
    gains = np.array([0.5, 0.25, -0.5])
    np.testing.assert_allclose(found.gains, gains)
    assert found.num_unscored == 1
    assert found.judge.tolist() == [pytest.approx(1.25 / 3), pytest.approx(0.5)]
    half = 1.959964 * gains.std(ddof=1) / np.sqrt(3)
    assert found.interval == (pytest.approx(gains.mean() - half), pytest.approx(gains.mean() + half))
    assert not gate_verdict(found, reward="r", judge="j").passed


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, PromptEncoder]:
    folder = write_policy(tmp_path_factory.mktemp("policy"))
    return load_model(folder, threads=1), PromptEncoder(folder, Tokenizer.from_file(folder))


def letters(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """How many of the answer's characters are letters of the first half of the alphabet."""
    texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
    return [sum("a" <= char <= "m" for char in text.lower()) / max(len(text), 1) for text in texts]


def opposite(prompts: Any, completions: Any) -> list[float]:
    return [-score for score in letters(prompts, completions)]


def blind(prompts: Any, completions: Any) -> list[float]:
    """Knows nothing of the letters."""
    return [float(hash_of(str(each))) for each in completions]


def hash_of(text: str) -> int:
    return sum(ord(char) * (place % 7 * 31 % 13) for place, char in enumerate(text)) % 101


PROMPTS: list[Any] = [[{"role": "user", "content": f"{number}?"}] for number in range(24)]


def gate(policy: Any, judge: Any, **options: Any) -> Any:
    return best_of_n_gate(
        *policy, PROMPTS, RewardFunctions([letters]), RewardFunctions([judge]), n=4, max_new_tokens=8, **options
    )


def test_a_judge_that_agrees_opens_it_and_one_that_does_not_closes_it(policy):
    agrees = gate(policy, letters)
    assert agrees.passed
    assert agrees.figures["gain_low"] > 0
    assert agrees.figures["judge_best"] == pytest.approx(agrees.figures["reward_best"])
    assert "Of 4 answers to each of 24 prompts, the one that letters likes best gets" in agrees.text
    inverse = gate(policy, opposite)
    assert not inverse.passed
    assert inverse.figures["gain"] == pytest.approx(-agrees.figures["gain"])
    assert "would please it alone" in inverse.text
    # A judge that looks at something else is not pleased either: measured over seeds, |gain| within its interval.
    unrelated = [gate(policy, blind, seed=seed) for seed in range(4)]
    assert sum(verdict.passed for verdict in unrelated) <= 1
    assert gate(policy, letters).figures == agrees.figures


def test_columns_reach_the_judge_and_long_prompts_are_left_out(policy):
    seen: list[int] = []

    def judge(prompts: Any, completions: Any, answer: Any) -> list[float]:
        seen.extend(answer)
        return letters(prompts, completions)

    long = [{"role": "user", "content": "x" * 100}]
    verdict = best_of_n_gate(
        *policy,
        [PROMPTS[0], long, PROMPTS[1]],
        RewardFunctions([letters]),
        RewardFunctions([judge]),
        n=2,
        max_new_tokens=4,
        columns={"answer": [7, 8, 9]},
    )
    assert seen == [7, 7, 9, 9]
    assert verdict.figures["num_prompts"] == 2
    with pytest.raises(DataError, match="none of 1 prompts leaves room to answer in the model's context of 96"):
        best_of_n_gate(*policy, [long], RewardFunctions([letters]), RewardFunctions([letters]), n=2)
    with pytest.raises(ConfigError, match="best of 1 chooses nothing"):
        best_of_n_gate(*policy, PROMPTS, RewardFunctions([letters]), RewardFunctions([letters]), n=1)


def test_one_prompt_decides_nothing(policy):
    verdict = best_of_n_gate(
        *policy, PROMPTS[:1], RewardFunctions([letters]), RewardFunctions([letters]), n=2, max_new_tokens=4
    )
    assert not verdict.passed
    assert "could be judged on 1 prompts" in verdict.text


def test_the_judge_must_be_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name, examples in (("rm", "x"), ("same", "x"), ("other", "y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"data": {"examples_hash": examples}}))
    require_other_judge(["rm", letters], "other")
    require_other_judge(["rm"], letters)
    with pytest.raises(ConfigError, match=r"\./rm is the judge and the reward"):
        require_other_judge(["rm"], "./rm")
    with pytest.raises(ConfigError, match="same learnt from the same judgements as rm"):
        require_other_judge(["rm"], "same")
    with pytest.raises(ConfigError, match="letters is the judge and the reward"):
        require_other_judge([letters], letters)
    assert same_reward("./a.py:score", "a.py:score")
    assert not same_reward("a.py:score", "a.py:gold")
    assert not same_reward("rm:helpful", "rm:harmless")
