"""A reward model's window: rankings by a known rule with Gumbel noise, so that what it should learn, and how well, is known.

A response is 8 letters of 8; its score is the sum of letter weights (1, -1, 0.5, -0.5, 0 ...) plus 1 for each "ef". Measured on the
native core, seeds 0 to 2: accuracy .958-.963, correlation .962-.966, slope .96-1.00, calibration error .02-.03, nats above Bayes .02-.03.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingot.configs import RewardConfig
from ingot.inference.scoring import RewardModel
from ingot.losses.reward import expected_calibration_error
from ingot.training.reward_model import train_reward_model
from killable_reward import write_policy

LETTERS = np.array(list("abcdefgh"))
WEIGHTS = np.array([1, -1, 0.5, -0.5, 0, 0, 0, 0])


def worth(letters: np.ndarray) -> np.ndarray:
    """Of responses [..., 8]."""
    return WEIGHTS[letters].sum(-1) + ((letters[..., :-1] == 4) & (letters[..., 1:] == 5)).sum(-1)


def text(letters: np.ndarray) -> str:
    return "".join(LETTERS[letters])


def learn(folder: Path, num_prompts: int, seed: int, **changes: Any) -> dict[str, float]:
    """Train on 4 responses to each of so many prompts, in the order of worth plus Gumbel noise; what the result is worth."""
    rng = np.random.default_rng(seed)
    responses = rng.integers(0, 8, (num_prompts, 4, 8))
    noisy = worth(responses)
    noisy = noisy + rng.gumbel(size=noisy.shape)
    ranks = np.argsort(np.argsort(-noisy, axis=1), axis=1) + 1
    rows: list[dict[str, Any]] = [
        {"prompt": str(n), "responses": [text(each) for each in responses[n]], "ranks": ranks[n].tolist()}
        for n in range(num_prompts)
    ]
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 128, "initializer_range": 0.2}
    config = RewardConfig(
        model=str(write_policy(folder / "policy", **shape)),
        output=str(folder / "run"),
        held_out=0.0,
        learning_rate=2e-3,
        per_device_train_batch_size=32,
        save_steps=1000,
        threads=1,
        seed=seed,
    )
    result = train_reward_model(dataclasses.replace(config, **changes), rows, quiet=True)
    # The scores that were trained; those in the folder are these, brought to a standard deviation of 1.
    learned = RewardModel(result.model, RewardModel.load(result.output, threads=1).encoder)
    fresh = np.random.default_rng(seed + 1000).integers(0, 8, (2000, 2, 8))
    true = worth(fresh)
    flat = fresh.reshape(-1, 8)
    scores = learned.score([str(n) for n in range(len(flat))], [text(each) for each in flat]).reshape(-1, 2)
    gap, true_gap = scores[:, 0] - scores[:, 1], true[:, 0] - true[:, 1]
    ordered = true_gap != 0
    preferred = np.random.default_rng(seed).random(len(gap)) < 1 / (1 + np.exp(-true_gap))

    def nats(margins: np.ndarray) -> float:
        return float(np.logaddexp(0, -np.where(preferred, margins, -margins)).mean())

    return {
        "accuracy": float(((gap > 0) == (true_gap > 0))[ordered].mean()),
        "correlation": float(np.corrcoef(scores.ravel(), true.ravel())[0, 1]),
        "slope": float(np.polyfit(true.ravel(), scores.ravel(), 1)[0]),
        "calibration": expected_calibration_error(gap, preferred.astype(float)),
        "regret": nats(gap) - nats(true_gap),
    }


def outside(found: dict[str, float]) -> list[str]:
    """The figures that are not in the window."""
    window = {
        "accuracy": (0.94, 1.0),
        "correlation": (0.95, 1.0),
        "slope": (0.75, 1.1),
        "calibration": (0.0, 0.06),
        "regret": (-1.0, 0.07),
    }
    return [name for name, (low, high) in window.items() if not low <= found[name] <= high]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_a_known_rule_is_learnt_from_noisy_rankings(tmp_path, seed):
    found = learn(tmp_path, 4096, seed)
    assert not outside(found), found


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_an_eighth_of_the_rankings_is_too_little(tmp_path, seed):
    """Measured: accuracy .90-.91, correlation .88-.89."""
    found = learn(tmp_path, 512, seed)
    assert {"accuracy", "correlation"} <= set(outside(found)), found
