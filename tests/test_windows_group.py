"""Group methods on a task with a known answer: each settles where its own formula says, which is not where the others do.

The task is that of ``bandit``. What a method settles at is where the pull of its advantages on the wanted letter's probability p balances
that of its KL: a(p) = beta d KL / dp. The pull a is 1 for an unbiased advantage, (K - 1) / K where the mean contains the answer itself,
and is further divided by deviations where advantages are. KL in the reward or k2 in the loss is KL(pi || ref); k3 is KL(ref || pi).

Measured over seeds 0 to 2, as (reward, KL) beside the prediction: within 2.2 % and 4.6 %, but for ``dr_grpo`` with k2 from seed 0: 3.2 %
and 9.7 %; the windows are 6 % and 12 %.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bandit
from bandit import BETA, LETTERS, STEPS
from ingot.configs import GRPOConfig
from ingot.training import groups
from ingot.training import grpo as phase

K = 8
CONFIG = GRPOConfig(
    model="uniform",
    max_completion_length=STEPS,
    max_steps=200,
    per_device_train_batch_size=64,
    num_generations=K,
    learning_rate=3e-3,
    beta=BETA,
    adam_beta2=0.999,
    adam_epsilon=1e-5,
    held_out=0.0,
    save_steps=1000,
    threads=1,
)
LONGER = {"max_steps": 60, "num_iterations": 4, "per_device_train_batch_size": 128, "learning_rate": 2e-3}
"""Several passes over each rollout: the ratio is at work."""


def settles(pull: Callable[[float], float], *, towards_reference: bool) -> tuple[float, float]:
    """Reward and KL(pi || ref) where ``pull`` balances KL(pi || ref), or with ``towards_reference`` KL(ref || pi)."""

    def back(p: float) -> float:
        if towards_reference:
            return ((LETTERS - 1) / (1 - p) - 1 / p) / LETTERS
        return math.log(p * (LETTERS - 1) / (1 - p))

    low, high = 1 / LETTERS, 1.0
    for _ in range(60):
        p = (low + high) / 2
        low, high = (p, high) if pull(p) > BETA * back(p) else (low, p)
    kl = STEPS * (p * math.log(p * LETTERS) + (1 - p) * math.log((1 - p) * LETTERS / (LETTERS - 1)))
    return STEPS * p, kl


def pull_over_group_std(p: float) -> float:
    """d/dp of the expected reward by advantages (R - mean) / std of groups of K binomial rewards, for each step."""
    rewards = np.random.default_rng(0).binomial(STEPS, p, (40_000, K))
    centered = rewards - rewards.mean(1, keepdims=True)
    advantages = centered / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    return float((advantages * (rewards - STEPS * p) / (p * (1 - p))).mean()) / STEPS


def pull_over_batch_std(p: float) -> float:
    """The same where the deviation is that of all rewards less their groups' means."""
    return math.sqrt((K - 1) / K) / math.sqrt(STEPS * p * (1 - p))


UNBIASED = settles(lambda p: 1.0, towards_reference=False)
INCLUDING_ITSELF = settles(lambda p: (K - 1) / K, towards_reference=False)
METHODS: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "RLOO": ({"loss_type": "rloo"}, UNBIASED),
    "REINFORCE++": ({"loss_type": "reinforce_plus_plus", **LONGER}, UNBIASED),
    "Dr. GRPO, k2": ({"loss_type": "dr_grpo", "kl_estimator": "k2"}, INCLUDING_ITSELF),
    "Dr. GRPO, k3": ({"loss_type": "dr_grpo"}, settles(lambda p: (K - 1) / K, towards_reference=True)),
    "GRPO": ({"loss_type": "grpo"}, settles(pull_over_group_std, towards_reference=True)),
    "REINFORCE++ baseline": (
        {"loss_type": "reinforce_plus_plus_baseline"},
        settles(pull_over_batch_std, towards_reference=False),
    ),
}


def train(folder: Path, monkeypatch: Any, seed: int = 0, **changes: Any) -> tuple[float, float]:
    """Reward and KL of the last updates of a run."""
    config = dataclasses.replace(CONFIG, output=str(folder), seed=seed, **changes)
    monkeypatch.setattr(phase, "_PHASE", dataclasses.replace(phase._PHASE, prepare=lambda *_: bandit.setup(seed)))
    phase.grpo(config, quiet=True)
    reward, kl = bandit.last_means(bandit.updates(folder), "reward", "objective/kl", count=20)
    return reward, kl


def within(found: tuple[float, float], predicted: tuple[float, float]) -> bool:
    """The window."""
    return abs(found[0] / predicted[0] - 1) <= 0.06 and abs(found[1] / predicted[1] - 1) <= 0.12


def test_the_predictions_are_the_published_ones():
    known = {
        "RLOO": (4.108, 3.520),
        "Dr. GRPO, k2": (3.609, 2.585),
        "Dr. GRPO, k3": (4.455, 4.243),
        "GRPO": (3.366, 2.173),
    }
    for name, figures in known.items():
        assert METHODS[name][1] == pytest.approx(figures, abs=3e-3), name
    distinct = set(METHODS) - {"REINFORCE++"}
    assert sum(within(METHODS[a][1], METHODS[b][1]) for a in distinct for b in distinct) == len(distinct)


@pytest.mark.parametrize("name", METHODS)
def test_each_method_settles_where_its_formula_says(tmp_path, monkeypatch, name):
    changes, predicted = METHODS[name]
    found = train(tmp_path / "run", monkeypatch, **changes)
    assert within(found, predicted), (found, predicted)
    for other, (_, elsewhere) in METHODS.items():
        assert elsewhere == predicted or not within(found, elsewhere), other


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_each_method_settles_there_from_other_seeds(tmp_path, monkeypatch, name, seed):
    changes, predicted = METHODS[name]
    found = train(tmp_path / "run", monkeypatch, seed, **changes)
    assert within(found, predicted), (found, predicted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "of"),
    [
        ({"loss_type": "dapo"}, "GRPO"),
        ({"loss_type": "gspo"}, "GRPO"),
        ({"loss_type": "cispo"}, "GRPO"),
        ({"loss_type": "dapo", "num_iterations": 2, "max_steps": 100}, "GRPO"),
        ({"loss_type": "reinforce"}, "Dr. GRPO, k2"),
        ({"loss_type": "bnpo", "advantage_estimator": "rloo", "kl_penalty": "reward"}, "RLOO"),
    ],
)
def test_what_methods_are_made_of_decides_where_they_settle(tmp_path, monkeypatch, changes, of):
    found = train(tmp_path / "run", monkeypatch, **changes)
    assert within(found, METHODS[of][1]), found


# ---- faults must show


def test_with_the_kl_turned_around_it_leaves_the_window(tmp_path, monkeypatch):
    real = groups.token_rewards
    monkeypatch.setattr(groups, "token_rewards", lambda *a, kl_coef, **k: real(*a, kl_coef=-kl_coef, **k))
    found = train(tmp_path / "run", monkeypatch, loss_type="rloo", max_steps=100)
    assert not within(found, UNBIASED)
    assert found[1] > 2 * UNBIASED[1]


@pytest.mark.parametrize("name", ["Dr. GRPO, k2", "Dr. GRPO, k3"])
def test_with_logprobs_one_place_off_it_leaves_the_window(tmp_path, monkeypatch, name):
    """Of the advantages, the same for all of an answer, this is no fault; of the KL, which is each token's own, it is."""
    real = phase.grpo_loss

    def shifted(logprobs: Any, old: Any, advantages: Any, targets: Any, *rest: Any, **options: Any) -> Any:
        loss, d_logprobs, metrics = real(logprobs, old, advantages, targets, *rest, **options)
        return loss, np.where(targets >= 0, np.roll(d_logprobs, 1), 0).astype(np.float32), metrics

    monkeypatch.setattr(phase, "grpo_loss", shifted)
    changes, predicted = METHODS[name]
    found = train(tmp_path / "run", monkeypatch, **changes, max_steps=100)
    assert not within(found, predicted), found
