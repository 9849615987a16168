"""Windows of reward models that learn from labels: the rule is known, so a label that is not learnt is a fault.

Letters are drawn from 8. A step of 4 letters is wrong where it has an "e", whatever the steps before it have; an answer of 8 letters is
unwanted where it has an "e". Measured on the native core, seeds 0 to 2: accuracy and area under the curve 1.000 for both (majority .57 to .69);
with shuffled labels areas of .477 to .538.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingot.configs import RewardConfig
from ingot.training.reward_model import train_reward_model
from ingot.training.verdicts import Verdict, read_verdict
from killable_reward import write_policy

LETTERS = np.array(list("abcdefgh"))
SEEDS = [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]


def rows(in_steps: bool, rng: np.random.Generator, num: int) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for number in range(num):
        size = int(rng.integers(1, 6)) if in_steps else 1
        texts = ["".join(LETTERS[rng.integers(0, 8, 4 if in_steps else 8)]) for _ in range(size)]
        right = ["e" not in text for text in texts]
        answer = {"completions": texts, "labels": right} if in_steps else {"completion": texts[0], "label": right[0]}
        made.append({"prompt": str(number), **answer})
    return made


def shuffled(entries: list[dict[str, Any]], rng: np.random.Generator) -> list[dict[str, Any]]:
    """The same answers with labels that say nothing."""
    name = "labels" if "labels" in entries[0] else "label"
    every = rng.permutation(np.concatenate([np.atleast_1d(row[name]) for row in entries])).tolist()
    drawn = iter(every)
    return [{**row, name: [next(drawn) for _ in row[name]] if name == "labels" else next(drawn)} for row in entries]


def learn(folder: Path, entries: list[dict[str, Any]], seed: int) -> Verdict:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 128, "initializer_range": 0.2}
    config = RewardConfig(
        model=str(write_policy(folder / "policy", **shape)),
        output=str(folder / "run"),
        held_out=0.15,
        learning_rate=3e-3,
        per_device_train_batch_size=32,
        save_steps=1000,
        eval_steps=1000,
        threads=1,
        seed=seed,
    )
    verdict = read_verdict(train_reward_model(config, entries, quiet=True).output)
    assert verdict is not None
    return verdict


@pytest.mark.parametrize("in_steps", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_known_rule_is_learnt_from_labels(tmp_path, in_steps, seed):
    verdict = learn(tmp_path, rows(in_steps, np.random.default_rng(seed), 2000), seed)
    assert verdict.passed, verdict.text
    assert verdict.figures["accuracy"] >= 0.95, verdict.text
    assert verdict.figures["auc"] >= 0.97, verdict.text


@pytest.mark.parametrize("in_steps", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_labels_that_say_nothing_teach_nothing(tmp_path, in_steps, seed):
    rng = np.random.default_rng(seed)
    verdict = learn(tmp_path, shuffled(rows(in_steps, rng, 2000), rng), seed)
    assert not verdict.passed, verdict.text
    assert 0.4 < verdict.figures["auc"] < 0.6, verdict.text
