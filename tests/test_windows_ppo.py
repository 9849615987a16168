"""PPO on tasks whose best policy is known, and the faults that must show there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bandit
from ingot.configs import PPOConfig
from ingot.training import ppo as phase

CONFIG = PPOConfig(
    model="uniform",
    response_length=bandit.STEPS,
    max_steps=60,
    per_device_train_batch_size=64,
    num_ppo_epochs=4,
    num_mini_batches=2,
    learning_rate=3e-3,
    kl_coef=bandit.BETA,
    cliprange_value=None,
    missing_eos_penalty=None,
    held_out=0.0,
    save_steps=60,
    threads=1,
)


def train(
    folder: Path, monkeypatch: Any, seed: int = 0, score: Any = bandit.hits, gold: Any = None, **changes: Any
) -> list[dict[str, Any]]:
    """Lines of metrics of a run on the task."""
    config = dataclasses.replace(CONFIG, output=str(folder), seed=seed, **changes)
    monkeypatch.setattr(
        phase,
        "prepare",
        lambda *_, num_values=0, **__: bandit.setup(seed, num_values=num_values, score=score, gold=gold),
    )
    phase.ppo(config, quiet=True)
    return bandit.updates(folder)


def window(lines: list[dict[str, Any]]) -> dict[str, bool]:
    """The last ten updates against the optimum, and how soon it was near."""
    reward, kl = bandit.last_means(lines, "objective/scores", "objective/kl")
    early_reward, early_kl = bandit.last_means(lines[:22], "objective/scores", "objective/kl", count=5)
    return {
        "reward": 3.6 <= reward <= 4.4,
        "kl": 2.8 <= kl <= 4.2,
        "objective": reward - bandit.BETA * kl >= 2.22,
        "early": early_reward - bandit.BETA * early_kl >= 2.0,
    }


SEEDS = [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]


# Measured over seeds 0 to 4: reward 3.97 to 4.10, KL 3.32 to 3.60, objective 2.29 to 2.32, early 2.06 to 2.17.
@pytest.mark.parametrize("seed", SEEDS)
def test_the_bandit_ends_at_its_optimum(tmp_path, monkeypatch, seed):
    lines = train(tmp_path / "run", monkeypatch, seed)
    assert all(window(lines).values()), window(lines)
    for line in lines:
        assert line["sampling/sampling_logp_difference/max"] == 0.0
        assert line["val/ratio_first"] == 0.0
    assert lines[-1]["val/explained_variance"] > 0.3


# ---- what must not pass


def no_kl(monkeypatch):
    return {"kl_coef": 0.0}


def flipped_kl(monkeypatch):
    rewards = phase.token_rewards
    monkeypatch.setattr(phase, "token_rewards", lambda *a, kl_coef, **k: rewards(*a, kl_coef=-kl_coef, **k))
    return {}


def shifted_logprobs(monkeypatch):
    loss = phase.ppo_policy_loss

    def shifted(logprobs, old, advantages, targets, **options):
        value, gradient, metrics = loss(logprobs, old, advantages, targets, **options)
        return value, np.where(targets >= 0, np.roll(gradient, 1), 0).astype(np.float32), metrics

    monkeypatch.setattr(phase, "ppo_policy_loss", shifted)
    return {}


def score_on_the_first_token(monkeypatch):
    rewards = phase.token_rewards

    def early(scores, logprobs, ref_logprobs, targets, offsets, **options):
        found, metrics = rewards(np.zeros(len(scores)), logprobs, ref_logprobs, targets, offsets, **options)
        found[offsets[:-1]] += scores
        return found, metrics | {"objective/scores": float(scores.mean())}

    monkeypatch.setattr(phase, "token_rewards", early)
    return {}


# Measured objectives: -.27, -3.58, 1.86, 1.13; the window begins at 2.22.
@pytest.mark.parametrize("fault", [no_kl, flipped_kl, shifted_logprobs, score_on_the_first_token])
def test_faults_miss_the_optimum(tmp_path, monkeypatch, fault):
    lines = train(tmp_path / "run", monkeypatch, **fault(monkeypatch))
    assert not window(lines)["objective"]


# ---- a reward model that cannot know better


def wanted(n: np.ndarray) -> np.ndarray:
    """What is really wanted: up to four letters each count 1, from there on each costs 2."""
    return np.where(n <= 4, n, 4.0 - 2.0 * (n - 4))


def features(tokens: np.ndarray) -> np.ndarray:
    """One for each (prompt, place, letter), [S, 256], of answers [S, 9] with their prompts."""
    asked, letters = tokens[:, :1] - bandit.LETTERS, tokens[:, 1:]
    index = (asked * bandit.STEPS + np.arange(bandit.STEPS)) * bandit.LETTERS + letters
    found = np.zeros((len(tokens), bandit.PROMPTS * bandit.STEPS * bandit.LETTERS))
    np.put_along_axis(found, index, 1.0, axis=1)
    return found


def reward_model(seed: int) -> tuple[Any, float]:
    """A linear model of ratings of uniform answers, one in a thousand of which has more than four letters, normalised to mean 0 and
    deviation 1 on such answers: as a score of rollouts. And its accuracy on held-out pairs."""
    rng = np.random.default_rng(seed)
    asked = rng.integers(0, bandit.PROMPTS, (8192, 1))
    letters = rng.integers(0, bandit.LETTERS, (8192, bandit.STEPS))
    tokens, n = np.column_stack([asked + bandit.LETTERS, letters]), (letters == asked).sum(1)
    x, train = features(tokens), slice(0, 4096)
    weights = np.linalg.lstsq(x[train], wanted(n[train]), rcond=None)[0]
    held = x[4096:] @ weights
    first, second = wanted(n[4096::2]), wanted(n[4097::2])
    right = ((held[::2] > held[1::2]) == (first > second))[first != second]
    mean, std = held.mean(), held.std()

    def score(rollouts: Any) -> np.ndarray:
        return (features(rollouts.tokens.reshape(-1, bandit.STEPS + 1)) @ weights - mean) / std

    return score, float(right.mean())


def test_over_optimisation_is_seen_before_it_costs(tmp_path, monkeypatch):
    """Nothing that the reward model was trained on speaks of the cliff: without KL the policy falls off it, and an alarm says so
    while what is wanted still stands above its start."""
    score, accuracy = reward_model(0)
    assert accuracy > 0.95
    wish = lambda rollouts: wanted(bandit.hits(rollouts))  # noqa: E731
    hacked = train(tmp_path / "hacked", monkeypatch, score=score, gold=wish, kl_coef=0.0)
    held = train(tmp_path / "held", monkeypatch, score=score, gold=wish, kl_coef=0.6)
    (fallen,), (kept,) = bandit.last_means(hacked, "objective/gold"), bandit.last_means(held, "objective/gold")
    assert fallen <= -2.0
    assert kept >= 2.3
    alarms = [line for line in bandit.lines(tmp_path / "hacked") if "alarm" in line]
    gold = [line["objective/gold"] for line in hacked]
    below = next(n for n in range(3, 61) if np.mean(gold[n - 3 : n]) < gold[0])
    assert alarms[0]["step"] < below
    assert alarms[0]["alarm"] == "proxy against gold"
    assert "over-optimisation (gold)" in {line["alarm"] for line in alarms}
    assert not [line for line in bandit.lines(tmp_path / "held") if "alarm" in line]
