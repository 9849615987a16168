"""Groups of answers to one prompt: what each answer is worth beside the others, and what groups say of a policy.

Shape legend: S episodes, N tokens of all of them.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ingot.configs import GRPOConfig
from ingot.losses.advantages import (
    group_advantages,
    groups_with_signal,
    reinforce_plus_plus_advantages,
    rloo_advantages,
    soft_overlong_punishment,
    token_rewards,
)
from ingot.losses.best_of_n import expected_max
from ingot.losses.kl import kl_estimate
from ingot.losses.numerics import Bools, Float64, Ints, Metrics, f64
from ingot.losses.packed import sequence_ids, sum_by_sequence
from ingot.losses.policy import truncated_importance_weights
from ingot.training.experience import Experience


@dataclasses.dataclass(frozen=True, eq=False)
class Lesson:
    """The answers of a rollout that are learned from, and what each was worth."""

    experience: Experience
    advantages: Float64
    """By answer, f64 [S], or by token, f64 [N]."""

    def __len__(self) -> int:
        return len(self.experience)

    def advantages_of(self, numbers: Ints, rows: Ints) -> Float64:
        """Those of some answers, whose tokens lie at ``rows``."""
        return self.advantages[numbers if len(self.advantages) == len(self) else rows]


def group_ids(config: GRPOConfig, experience: Experience) -> Ints:
    """Number of each answer's group, i64 [S], in several rollouts of a run too: the answers of a group are numbered in a row."""
    return np.asarray(experience.rollouts.episode_ids // config.num_generations, np.int64)


def signal(config: GRPOConfig, experience: Experience) -> Bools:
    """bool [S]: answers of groups whose rewards differ."""
    return groups_with_signal(experience.scores.total, group_ids(config, experience))


def punish_length(config: GRPOConfig, experience: Experience) -> Experience:
    """With what overlong answers lose taken off their scores."""
    if config.soft_punish_cache is None:
        return experience
    punishment = soft_overlong_punishment(
        experience.rollouts.num_actions,
        max_completion_length=config.max_completion_length,
        soft_punish_cache=config.soft_punish_cache,
    )
    scores = dataclasses.replace(experience.scores, total=experience.scores.total + punishment)
    return dataclasses.replace(experience, scores=scores)


def make_lesson(config: GRPOConfig, experience: Experience) -> tuple[Lesson, Metrics]:
    """Choose what to learn from, and say what it was worth.

    Left out are answers that no reward applies to and, where so configured, groups without signal; of the others at most as many groups
    as an update has.

    Returns
    -------
    lesson
    metrics
        Of all answers that are rewarded: ``reward``, ``reward_std``, ``frac_reward_zero_std`` as in TRL, ``kl`` (k3 by token).
        ``objective/rlhf_reward``: reward less the weighted KL, by answer. ``val/num_trained``: answers learned from.
    """
    method = config.method
    scores, groups = experience.scores.total, group_ids(config, experience)
    _, found = group_advantages(scores, groups, scale_rewards="none")
    chosen = np.isfinite(scores)
    if config.zero_std_groups != "keep":
        chosen &= groups_with_signal(scores, groups)
        chosen &= np.isin(groups, np.unique(groups[chosen])[: config.num_prompts])
    metrics: Metrics = {
        **{name: found[name] for name in ("reward", "reward_std", "frac_reward_zero_std")},
        "kl": kl_by_token(experience),
        "objective/rlhf_reward": found["reward"] - method.beta * float(experience.kl.mean()),
        "val/num_trained": float(np.count_nonzero(chosen)),
    }
    taught = experience.select(np.flatnonzero(chosen))
    return Lesson(taught, _advantages(config, taught)), metrics


def _advantages(config: GRPOConfig, experience: Experience) -> Float64:
    if not len(experience):
        return np.zeros(0)
    method, rollouts = config.method, experience.rollouts
    targets, offsets = rollouts.targets, rollouts.offsets
    scores, groups = experience.scores.total, group_ids(config, experience)
    if method.advantage_estimator == "reinforce_plus_plus_baseline":
        scores, _ = group_advantages(scores, groups, scale_rewards="none")
    rewards, _ = token_rewards(
        scores,
        experience.logprobs,
        experience.ref_logprobs,
        targets,
        offsets,
        kl_coef=method.beta if method.kl_penalty == "reward" else 0.0,
        kl_estimator=method.kl_estimator,
    )
    if method.advantage_estimator == "group":
        by_answer = sum_by_sequence(rewards, targets, offsets)
        advantages, _ = group_advantages(by_answer, groups, scale_rewards=method.scale_rewards)
    elif method.advantage_estimator == "rloo":
        by_answer = sum_by_sequence(rewards, targets, offsets)
        advantages, _ = rloo_advantages(by_answer, groups, normalize_advantages=config.normalize_advantages)
    else:
        advantages = reinforce_plus_plus_advantages(rewards, targets, offsets, gamma=config.gamma)
    if config.sampling_ratio_cap is None:
        return advantages
    now, then = f64(experience.logprobs), f64(rollouts.logprobs)
    if config.loss_type == "rloo" or method.importance_sampling_level == "sequence":
        # The action is the whole answer, and so is its weight.
        now, then = sum_by_sequence(now, targets, offsets), sum_by_sequence(then, targets, offsets)
    weights = truncated_importance_weights(now, then, cap=config.sampling_ratio_cap)
    ids = sequence_ids(offsets)
    if len(weights) != len(advantages):
        weights, advantages = (each if len(each) == len(ids) else each[ids] for each in (weights, advantages))
    return f64(weights * advantages)


def kl_by_token(experience: Experience) -> float:
    """Mean of k3 over the tokens of answers, nats: TRL's ``kl``."""
    mask = experience.rollouts.mask
    estimate, _ = kl_estimate(experience.logprobs[mask], experience.ref_logprobs[mask], "k3")
    return float(estimate.mean())


def right_and_wrong(config: GRPOConfig, experience: Experience) -> Metrics:
    """Of each reward that is only ever 0 or 1: pass@k, and how long right and wrong answers are.

    ``rewards/NAME/pass@k`` is the chance that one of k answers to a prompt is right, 1 - C(n - c, k) / C(n, k) for c right ones of n (Chen
    et al. 2021), a mean over groups of whole size; k goes by doubling. ``rewards/NAME/length_right`` and ``length_wrong`` are in tokens.
    """
    groups, lengths = group_ids(config, experience), experience.rollouts.num_actions
    k_max = config.num_generations
    doubling = [1 << power for power in range(k_max.bit_length()) if 1 << power < k_max] + [k_max]
    found: Metrics = {}
    for name, values in experience.scores.each.items():
        applies = np.isfinite(values)
        if not applies.any() or not np.isin(values[applies], (0.0, 1.0)).all():
            continue
        whole = [values[groups == group] for group in np.unique(groups)]
        # The best of k answers is worth 1 where one of them is right.
        chances = [expected_max(each) for each in whole if len(each) == k_max and np.isfinite(each).all()]
        if chances:
            found |= {f"rewards/{name}/pass@{k}": float(np.mean(chances, axis=0)[k - 1]) for k in doubling}
        for side, value in (("right", 1.0), ("wrong", 0.0)):
            if (values == value).any():
                found[f"rewards/{name}/length_{side}"] = float(lengths[values == value].mean())
    return found
