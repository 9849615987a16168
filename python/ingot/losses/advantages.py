"""From scores of whole responses to what each action was worth: rewards by token, GAE, and baselines from groups of samples.

These see a whole rollout batch at once (its means and deviations are part of the objective) and run once for it, before the
epochs over its parts. All are f64. Index t of a packed batch is the decision t: its log-probability, its value, its reward, its
advantage (see :mod:`ingot.losses.packed`). The score of a response is paid on its last counted action, which is the end-of-sequence
token if it has one; nothing comes after it.

An episode whose score is not finite has advantages that are not, and the policy losses leave such tokens out and count them.
"""

from __future__ import annotations

import itertools

import numpy as np

from ingot.errors import ConfigError
from ingot.losses.kl import kl_estimate
from ingot.losses.numerics import Bools, Float64, Floats, Ints, Metrics, f64, require_shape
from ingot.losses.packed import last_counted, sequence_ids, sum_by_sequence, usable


def penalize_missing_eos(
    scores: Floats, ended: Bools, *, missing_eos_penalty: float = 1.0, replace: bool = False
) -> Float64:
    """Scores [S] of responses that were cut (``ended`` false) less the penalty, or with ``replace`` the negative penalty instead
    of a score (Ziegler et al. 2019)."""
    require_shape(np.shape(scores), ended=ended)
    return f64(np.where(ended, scores, (0.0 if replace else f64(scores)) - missing_eos_penalty))


def soft_overlong_punishment(lengths: Ints, *, max_completion_length: int, soft_punish_cache: int) -> Float64:
    """What responses of these lengths [S] lose, f64 [S]: 0 up to max_completion_length - soft_punish_cache tokens, from there linearly
    to -1 at max_completion_length (Yu et al. 2025, eq. 13)."""
    over = f64(lengths) - (max_completion_length - soft_punish_cache)
    return -np.clip(over / soft_punish_cache, 0.0, 1.0)


def token_rewards(
    scores: Floats,
    logprobs: Floats,
    ref_logprobs: Floats,
    targets: Ints,
    offsets: Ints,
    *,
    kl_coef: float,
    kl_estimator: str = "k1",
) -> tuple[Float64, Metrics]:
    """R_t = -kl_coef k(t) + [t is the last action] score (Ziegler et al. 2019, eq. 2; Ouyang et al. 2022, eq. 2).

    Parameters
    ----------
    scores
        [S], one a response. That of a response without a counted token is paid nowhere.
    logprobs, ref_logprobs
        [N], of the policy that sampled and of the reference.
    targets, offsets
        The pack.
    kl_coef, kl_estimator
        Weight and kind of the penalty (:mod:`ingot.losses.kl`).

    Returns
    -------
    rewards
        f64 [N], 0 where nothing counts. :func:`~ingot.losses.packed.sum_by_sequence` of them is score - kl_coef KL, which RLOO takes.
    metrics
        Means over episodes, all but ``num_dropped`` of them: ``objective/kl`` (the sum of k1), ``objective/non_score_reward``, ``objective/scores``,
        ``objective/rlhf_reward`` (their sum).
    """
    require_shape((len(offsets) - 1,), scores=scores)
    keep, _ = usable(targets, logprobs, ref_logprobs)
    lp, ref = np.where(keep, logprobs, 0.0), np.where(keep, ref_logprobs, 0.0)
    # A counted token without a usable log-probability makes its episode NaN, and the means leave that episode out.
    penalty = np.where(keep, -kl_coef * kl_estimate(lp, ref, kl_estimator)[0], np.where(targets >= 0, np.nan, 0.0))
    rewards, last = penalty.copy(), last_counted(targets, offsets)
    rewards[last[last >= 0]] += f64(scores)[last >= 0]
    non_score = sum_by_sequence(penalty, targets, offsets)
    whole = np.isfinite(non_score) & np.isfinite(scores)
    episodes = max(np.count_nonzero(whole), 1)
    score, non_score_reward = float(f64(scores)[whole].sum() / episodes), float(non_score[whole].sum() / episodes)
    return rewards, {
        "objective/kl": float(sum_by_sequence(f64(lp) - ref, targets, offsets)[whole].sum() / episodes),
        "objective/non_score_reward": non_score_reward,
        "objective/scores": score,
        "objective/rlhf_reward": score + non_score_reward,
        "num_dropped": float(np.count_nonzero(~whole)),
    }


def generalized_advantages(
    rewards: Floats,
    values: Floats,
    targets: Ints,
    offsets: Ints,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    end_values: Floats | None = None,
) -> tuple[Float64, Float64]:
    """GAE (Schulman et al. 2016, eq. 16), backwards over the counted actions of each sequence.

    delta_t = R_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  return_t = A_t + V_t.

    Parameters
    ----------
    rewards, values
        [N]; values are those of the policy that sampled.
    targets, offsets
        The pack. Tokens that do not count (a tool's answer) are no steps: the next counted one follows.
    gamma
        Discount.
    lam
        1 trusts the rewards (no bias from the critic), 0 the critic (least variance).
    end_values
        V after the last action, [S]: 0 unless given, as it is after an end; for cut responses it may be the critic's.

    Returns
    -------
    advantages, returns
        f64 [N], 0 where nothing counts. Returns are what the values should have been: take them before whitening.
    """
    require_shape(targets.shape, rewards=rewards, values=values)
    require_shape((len(offsets) - 1,), end_values=end_values)
    r, v = (np.where(np.isfinite(x), f64(x), np.nan) for x in (rewards, values))
    advantages = np.zeros(len(targets))
    # Counted tokens by how many of their sequence come after them, so that a step back is taken in all sequences at once.
    counted = np.flatnonzero(targets >= 0)
    sequence = sequence_ids(offsets)[counted]
    lengths = np.bincount(sequence, minlength=len(offsets) - 1)
    after = np.repeat(np.cumsum(lengths), lengths) - 1 - np.arange(len(counted))
    order = np.argsort(after, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(after))])
    next_value = np.zeros(len(lengths)) if end_values is None else f64(end_values).copy()
    advantage = np.zeros(len(lengths))
    for begin, end in itertools.pairwise(bounds.tolist()):
        of = sequence[order[begin:end]]
        at = counted[order[begin:end]]
        advantage[of] = r[at] + gamma * next_value[of] - v[at] + gamma * lam * advantage[of]
        advantages[at], next_value[of] = advantage[of], v[at]
    return advantages, np.where(targets >= 0, advantages + v, 0.0)


def whiten(values: Floats, targets: Ints, *, shift_mean: bool = True) -> Float64:
    """(x - mean) / sqrt(var + 1e-8) over the counted, finite tokens; ``shift_mean=False`` adds the mean back (Ziegler et al. 2019).

    Population variance. f64 [N]; 0 where nothing counts, and what is not finite stays so.
    """
    require_shape(targets.shape, values=values)
    x, counted = f64(values), targets >= 0
    sample = x[counted & np.isfinite(x)]
    if not sample.size:
        return np.where(counted, x, 0.0)
    mean = float(sample.mean())
    white = (x - mean) / np.sqrt(sample.var() + 1e-8) + (0.0 if shift_mean else mean)
    return np.where(counted, white, 0.0)


def group_advantages(rewards: Floats, group_ids: Ints, *, scale_rewards: str = "group") -> tuple[Float64, Metrics]:
    """A_i = R_i - mean of the group, scaled: GRPO (Shao et al. 2024); unscaled it is Dr. GRPO's (Liu et al. 2025).

    Parameters
    ----------
    rewards
        [S], one a response. One that is not finite has the advantage 0 and is counted in ``num_dropped``.
    group_ids
        [S]: which prompt each response answers.
    scale_rewards
        ``group`` divides by the group's standard deviation + 1e-4, ``batch`` by that of all rewards, ``none`` by nothing. Dividing by
        the group's favours prompts where nearly all responses succeed, or nearly all fail.

    Returns
    -------
    advantages
        f64 [S]. Standard deviations have K - 1 in the denominator.
    metrics
        ``reward``, ``reward_std`` (of the batch), ``frac_reward_zero_std``: groups whose responses all score the same teach nothing.
    """
    if scale_rewards not in ("group", "batch", "none"):
        raise ConfigError(f"scale_rewards must be group, batch or none, got {scale_rewards!r}")
    centered, std, metrics = _by_group(rewards, group_ids)
    if scale_rewards == "group":
        centered = f64(centered / (std + 1e-4))
    elif scale_rewards == "batch":
        centered = f64(centered / (metrics["reward_std"] + 1e-4))
    return centered, metrics


def rloo_advantages(rewards: Floats, group_ids: Ints, *, normalize_advantages: bool = False) -> tuple[Float64, Metrics]:
    """A_i = R_i - mean of the OTHERS in the group = (R_i - mean) K / (K - 1): leave-one-out (Ahmadian et al. 2024).

    Unbiased, where the mean that includes R_i itself shrinks the gradient by (K - 1) / K. ``rewards`` [S] contain the KL penalty (sums
    of :func:`token_rewards`). ``normalize_advantages`` then shifts and scales them to mean 0, deviation 1 over the batch. A response
    alone in its group has the advantage 0. Returns as :func:`group_advantages`.
    """
    centered, _, metrics = _by_group(rewards, group_ids)
    _, group = np.unique(group_ids, return_inverse=True)
    size = np.bincount(group, np.isfinite(rewards))[group]
    advantages = f64(centered * size / np.maximum(size - 1, 1))
    if normalize_advantages:
        compared = np.isfinite(rewards) & (size > 1)
        sample = advantages[compared]
        if sample.size > 1:
            advantages[compared] = (sample - sample.mean()) / (sample.std(ddof=1) + 1e-4)
    return advantages, metrics


def reinforce_plus_plus_advantages(rewards: Floats, targets: Ints, offsets: Ints, *, gamma: float = 1.0) -> Float64:
    """A_t = whitened discounted sum of the rewards to come, f64 [N] (REINFORCE++, Hu 2025): PPO's rewards without a critic.

    ``rewards`` [N] are :func:`token_rewards`; for the variant with a baseline, of scores from which the group's mean is taken
    (:func:`group_advantages` with ``scale_rewards="none"``).
    """
    to_go, _ = generalized_advantages(rewards, np.zeros(len(targets)), targets, offsets, gamma=gamma, lam=1.0)
    return whiten(to_go, targets)


def groups_with_signal(rewards: Floats, group_ids: Ints) -> Bools:
    """bool [S]: whether the rewards of its group differ. Where they are all the same, no answer is better than another."""
    _, std, _ = _by_group(rewards, group_ids)
    return ~np.isclose(std, 0.0)


def _by_group(rewards: Floats, group_ids: Ints) -> tuple[Float64, Float64, Metrics]:
    """R - mean of its group (0 where R is not finite), the group's deviation for each response, and metrics."""
    require_shape(np.shape(rewards), group_ids=group_ids)
    values, finite = f64(rewards), np.isfinite(rewards)
    _, group = np.unique(group_ids, return_inverse=True)
    size = np.maximum(np.bincount(group, finite), 1)
    mean = np.bincount(group, np.where(finite, values, 0.0)) / size
    centered = np.where(finite, np.where(finite, values, 0.0) - mean[group], 0.0)
    std = np.sqrt(np.bincount(group, centered**2) / np.maximum(size - 1, 1))
    sample = values[finite]
    return (
        centered,
        f64(std[group]),
        {
            "reward": float(sample.mean()) if sample.size else 0.0,
            "reward_std": float(sample.std(ddof=1)) if sample.size > 1 else 0.0,
            "frac_reward_zero_std": float(np.isclose(std, 0.0).mean()) if std.size else 0.0,
            "num_dropped": float(np.count_nonzero(~finite)),
        },
    )
