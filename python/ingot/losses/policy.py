"""Policy gradients on sampled responses: PPO with its value function, the group methods, and plain REINFORCE.

All of them weigh actions by advantages (:mod:`ingot.losses.advantages`) and differ in what they do when the policy has moved away
from the one that sampled. rho = pi(a) / pi_old(a) is the ratio of the two; w_t are the weights of a mean over the step
(:func:`~ingot.losses.packed.mean_weights`). Tokens whose log-probability or advantage is not finite give nothing and are counted in
``num_dropped``; log-ratios are held within +-20.

Losses add up: a policy loss, :func:`value_loss`, :func:`entropy_bonus` and :func:`~ingot.losses.kl.kl_loss` each give their own
gradients, and the model's backward pass takes their sums.
"""

from __future__ import annotations

import numpy as np

from ingot.errors import ConfigError
from ingot.losses.kl import kl_estimate, kl_loss
from ingot.losses.numerics import (
    Bools,
    Float32,
    Float64,
    Floats,
    Ints,
    Metrics,
    bounded_ratio,
    f64,
    require_positive,
    require_shape,
)
from ingot.losses.packed import count_by_sequence, mean_weights, sequence_ids, usable


def _clipped_surrogate(
    log_ratio: Float64, advantages: Float64, epsilon: float, epsilon_high: float, delta: float | None
) -> tuple[Float64, Float64, Bools, Bools]:
    """-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A), its derivative by ln rho, and where it was clipped low and high.

    (Schulman et al. 2017, eq. 7.) With ``delta`` also rho <= delta in the first term, which bounds the loss where A < 0: dual clip
    (Ye et al. 2020). The derivative is -A rho inside and at the edges, 0 beyond.
    """
    rho, inside = bounded_ratio(log_ratio)
    low, high = (rho < 1 - epsilon) & (advantages < 0), (rho > 1 + epsilon_high) & (advantages > 0)
    capped = np.zeros_like(low) if delta is None else (rho > delta) & (advantages < 0)
    first = rho if delta is None else np.minimum(rho, delta)
    loss = -np.minimum(first * advantages, np.clip(rho, 1 - epsilon, 1 + epsilon_high) * advantages)
    return loss, -advantages * rho * (inside & ~low & ~high & ~capped), low, high


def _check_clipping(epsilon: float, epsilon_high: float, delta: float | None) -> None:
    if not 0 < epsilon < 1:
        raise ConfigError(f"epsilon (cliprange) must be above 0 and below 1, got {epsilon}")
    if not epsilon_high > 0:
        raise ConfigError(f"epsilon_high must be above 0, got {epsilon_high}")
    if delta is not None and not delta > 1 + epsilon_high:
        raise ConfigError(f"delta must be above 1 + epsilon_high = {1 + epsilon_high}, got {delta}")


def ppo_policy_loss(
    logprobs: Floats,
    old_logprobs: Floats,
    advantages: Floats,
    targets: Ints,
    *,
    num_tokens: float,
    cliprange: float = 0.2,
    delta: float | None = None,
) -> tuple[float, Float32, Metrics]:
    """PPO's clipped surrogate: L = (1 / num_tokens) sum_t max(-A_t rho_t, -A_t clip(rho_t, 1 - c, 1 + c)).

    Parameters
    ----------
    logprobs, old_logprobs
        [N]: ln pi(a_t) now and when the rollout was taken.
    advantages
        [N], constants.
    targets
        i32 [N], -1 where nothing counts.
    num_tokens
        Actions of the whole step.
    cliprange
        c.
    delta
        Dual clip: bounds rho where A < 0; 3 is usual. None is off.

    Returns
    -------
    loss, d_logprobs
        f64; f32 [N]: -A rho / num_tokens where not clipped, else 0.
    metrics
        ``loss/policy_avg``; ``policy/approxkl_avg`` (k2, from the sampling policy to this one), ``policy/approxkl_k3``;
        ``policy/clipfrac_avg`` and its parts ``policy/clipfrac_low``, ``policy/clipfrac_high``; ``val/ratio``, ``val/ratio_max``.
    """
    require_positive(num_tokens=num_tokens)
    _check_clipping(cliprange, cliprange, delta)
    keep, dropped = usable(targets, logprobs, old_logprobs, advantages)
    log_ratio = np.where(keep, f64(logprobs), 0.0) - np.where(keep, old_logprobs, 0.0)
    loss, d_log_ratio, low, high = _clipped_surrogate(
        log_ratio, np.where(keep, f64(advantages), 0.0), cliprange, cliprange, delta
    )
    rho, _ = bounded_ratio(log_ratio)
    value = float(loss[keep].sum() / num_tokens)
    metrics = {
        "loss/policy_avg": value,
        "policy/approxkl_avg": float((log_ratio[keep] ** 2).sum() / 2 / num_tokens),
        "policy/approxkl_k3": float((rho - 1 - np.clip(log_ratio, -20, 20))[keep].sum() / num_tokens),
        "policy/clipfrac_avg": float(np.count_nonzero(low | high) / num_tokens),
        "policy/clipfrac_low": float(np.count_nonzero(low) / num_tokens),
        "policy/clipfrac_high": float(np.count_nonzero(high) / num_tokens),
        "val/ratio": float(rho[keep].sum() / num_tokens),
        "val/ratio_max": float(rho[keep].max()) if keep.any() else 1.0,
        **dropped,
    }
    return value, (d_log_ratio / num_tokens).astype(np.float32), metrics


def value_loss(
    values: Floats,
    old_values: Floats,
    returns: Floats,
    targets: Ints,
    *,
    num_tokens: float,
    vf_coef: float = 0.1,
    cliprange_value: float | None = 0.2,
) -> tuple[float, Float32, Metrics]:
    """L = vf_coef / (2 num_tokens) sum_t max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2).

    Parameters
    ----------
    values, old_values, returns
        [N]: V now and at the rollout, and what it should have been (:func:`~ingot.losses.advantages.generalized_advantages`).
    targets
        i32 [N], -1 where nothing counts.
    num_tokens
        Actions of the whole step.
    vf_coef
        Weight of this loss beside the policy's.
    cliprange_value
        c, None for none. A fixed width presumes rewards of deviation about 1.

    Returns
    -------
    loss, d_values
        f64; f32 [N]: vf_coef (V - R) / num_tokens, or 0 where the clipped term is the larger.
    metrics
        ``loss/value_avg`` (before ``vf_coef``), ``val/clipfrac_avg``.
    """
    require_positive(num_tokens=num_tokens)
    if cliprange_value is not None and not cliprange_value > 0:
        raise ConfigError(f"cliprange_value must be above 0, or none, got {cliprange_value}")
    keep, dropped = usable(targets, values, old_values, returns)
    v, old, goal = (np.where(keep, f64(x), 0.0) for x in (values, old_values, returns))
    error = (v - goal) ** 2
    held = v if cliprange_value is None else np.clip(v, old - cliprange_value, old + cliprange_value)
    clipped = (held - goal) ** 2 > error
    mean = float(np.maximum(error, (held - goal) ** 2).sum() / (2 * num_tokens))
    d_values = np.where(clipped, 0.0, vf_coef * (v - goal) / num_tokens).astype(np.float32)
    metrics = {"loss/value_avg": mean, "val/clipfrac_avg": float(np.count_nonzero(clipped) / num_tokens), **dropped}
    return vf_coef * mean, d_values, metrics


def entropy_bonus(
    entropy: Floats, targets: Ints, *, num_tokens: float, ent_coef: float
) -> tuple[float, Float32, Metrics]:
    """L = -ent_coef mean H_t: (loss, d_entropy f32 [N], metrics with ``policy/entropy_avg``). ``entropy`` [N] in nats."""
    require_positive(num_tokens=num_tokens)
    keep, dropped = usable(targets, entropy)
    mean = float(f64(entropy)[keep].sum() / num_tokens)
    d_entropy = np.where(keep, -ent_coef / num_tokens, 0.0).astype(np.float32)
    return -ent_coef * mean, d_entropy, {"policy/entropy_avg": mean, **dropped}


def explained_variance(values: Floats, returns: Floats, targets: Ints) -> float:
    """1 - Var(R - V) / Var(R) over the counted tokens of a rollout: 1 is a perfect critic, 0 a constant, below 0 worse than that.

    0 where all returns are equal.
    """
    keep, _ = usable(targets, values, returns)
    variance = float(f64(returns)[keep].var()) if keep.any() else 0.0
    return 1 - float((f64(returns) - f64(values))[keep].var()) / variance if variance > 0 else 0.0


def reinforce_loss(
    logprobs: Floats, advantages: Floats, targets: Ints, weights: Floats
) -> tuple[float, Float32, Metrics]:
    """L = -sum_t w_t A_t ln pi(a_t): REINFORCE (Williams 1992), for one update on fresh samples.

    All [N]; advantages are constants, such as reward - mean of the group. Returns loss, d_logprobs f32 [N] (-w A), metrics.
    """
    keep, dropped = usable(targets, logprobs, advantages)
    require_shape(targets.shape, weights=weights)
    pull = np.where(keep, f64(weights), 0.0) * np.where(keep, advantages, 0.0)
    loss = -float(pull @ np.where(keep, f64(logprobs), 0.0))
    return loss, (-pull).astype(np.float32), {"loss": loss, **dropped}


GRPO_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")


def grpo_loss(
    logprobs: Floats,
    old_logprobs: Floats,
    advantages: Floats,
    targets: Ints,
    offsets: Ints,
    *,
    num_sequences: float,
    num_tokens: float,
    max_completion_length: int | None = None,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    ref_logprobs: Floats | None = None,
    kl_estimator: str = "k3",
) -> tuple[float, Float32, Metrics]:
    """The group methods: a surrogate of rho with one advantage for each response, averaged in the way of ``loss_type``.

    ==========  =====================================================  ==========================================
    loss_type   mean over                                              paper
    ==========  =====================================================  ==========================================
    grpo        tokens within a response, then responses               Shao et al. 2024, eq. 3
    bnpo, dapo  all tokens of the step                                 Yu et al. 2025, eq. 8
    dr_grpo     num_sequences * max_completion_length, a constant      Liu et al. 2025
    cispo       all tokens of the step                                 MiniMax 2025, eq. 4
    ==========  =====================================================  ==========================================

    ``importance_sampling_level="token"`` takes rho_t by token; ``"sequence"`` takes the geometric mean over the response,
    rho_i = exp(mean_t ln rho_t), for all its tokens: GSPO (Zheng et al. 2025) with ``loss_type="grpo"``.

    The surrogate is PPO's, -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A); ``cispo`` instead never stops a gradient,
    it bounds its weight: -stop_gradient(min(rho, epsilon_high)) A ln pi, with ``epsilon_high`` the bound itself (about 5).

    Parameters
    ----------
    logprobs, old_logprobs
        [N].
    advantages
        [S], or [N] where they differ by token (one for each token is taken as [S] where S = N); constants.
    targets, offsets
        The pack.
    num_sequences, num_tokens
        Responses and counted tokens of the whole step.
    max_completion_length
        For ``dr_grpo`` alone.
    epsilon, epsilon_high, delta
        Clip range; ``epsilon_high`` is ``epsilon`` unless given; ``delta`` as in :func:`ppo_policy_loss`.
    beta, ref_logprobs, kl_estimator
        With beta > 0, beta times :func:`~ingot.losses.kl.kl_loss` is added, averaged in the same way.

    Returns
    -------
    loss, d_logprobs
        f64; f32 [N].
    metrics
        ``loss``; ``clip_ratio/low_mean``, ``high_mean``, ``region_mean`` (shares of tokens, or of responses for ``sequence``),
        ``clip_ratio/low_min``, ``clip_ratio/high_max`` (by response), or ``cispo_clip_ratio``; ``kl`` by token with beta > 0.
    """
    require_positive(num_sequences=num_sequences, num_tokens=num_tokens)
    cispo = loss_type == "cispo"
    if loss_type not in GRPO_LOSS_TYPES:
        raise ConfigError(f"loss_type must be one of {', '.join(GRPO_LOSS_TYPES)}, got {loss_type!r}")
    if importance_sampling_level not in ("token", "sequence"):
        raise ConfigError(f"importance_sampling_level must be token or sequence, got {importance_sampling_level!r}")
    if cispo and (epsilon_high is None or delta is not None):
        raise ConfigError("loss_type cispo needs epsilon_high (its bound of the ratio, about 5) and has no delta")
    if (loss_type == "dr_grpo") != (max_completion_length is not None):
        raise ConfigError("max_completion_length goes with loss_type dr_grpo, and dr_grpo needs it")
    if (beta != 0) != (ref_logprobs is not None):
        raise ConfigError("ref_logprobs go with beta above 0, and beta needs them")
    high_bound = epsilon if epsilon_high is None else epsilon_high
    if not cispo:
        _check_clipping(epsilon, high_bound, delta)

    num, ids = len(offsets) - 1, sequence_ids(offsets)
    if np.shape(advantages) == (num,):
        advantages = f64(advantages)[ids]
    require_shape(targets.shape, advantages=advantages)
    by_sequence = importance_sampling_level == "sequence"
    keep, dropped = usable(targets, logprobs, old_logprobs, advantages, ref_logprobs)
    if by_sequence:  # a ratio over a part of the response would be another one
        broken = np.bincount(ids, (targets >= 0) & ~keep, minlength=num) > 0
        keep &= ~broken[ids]
    a = np.where(keep, f64(advantages), 0.0)
    lp = np.where(keep, f64(logprobs), 0.0)
    log_ratio = lp - np.where(keep, old_logprobs, 0.0)
    lengths = np.maximum(count_by_sequence(targets, offsets), 1)
    if by_sequence:
        log_ratio = (np.bincount(ids, log_ratio, minlength=num) / lengths)[ids]

    reduction, total = {
        "grpo": ("sequence_mean", num_sequences),
        "dr_grpo": ("token_mean", num_sequences * (max_completion_length or 0)),
    }.get(loss_type, ("token_mean", num_tokens))
    weights = np.where(keep, mean_weights(targets >= 0, offsets, reduction=reduction, total=total), 0.0)

    if cispo:
        rho, _ = bounded_ratio(log_ratio)
        losses, d_logprobs = -np.minimum(rho, high_bound) * a * lp, -weights * np.minimum(rho, high_bound) * a
        clips = {"cispo_clip_ratio": keep & (rho > high_bound) & (a > 0)}
    else:
        losses, d_log_ratio, low, high = _clipped_surrogate(log_ratio, a, epsilon, high_bound, delta)
        d_logprobs = weights * d_log_ratio
        if by_sequence:  # its n tokens share one ratio, and each moves its logarithm by 1 / n
            d_logprobs = np.where(keep, (np.bincount(ids, d_logprobs, minlength=num) / lengths)[ids], 0.0)
        clips = {
            "clip_ratio/low_mean": keep & low,
            "clip_ratio/high_mean": keep & high,
            "clip_ratio/region_mean": keep & (low | high),
        }
    loss = float(weights @ losses)
    shares = {name: np.bincount(ids, clip, minlength=num) / lengths for name, clip in clips.items()}
    metrics: Metrics = {"loss": loss, **dropped}
    for name, share in shares.items():
        metrics[name] = float(share.sum() / num_sequences if by_sequence else share @ lengths / num_tokens)
    if not cispo and num:
        metrics["clip_ratio/low_min"] = float(shares["clip_ratio/low_mean"].min())
        metrics["clip_ratio/high_max"] = float(shares["clip_ratio/high_mean"].max())
    if ref_logprobs is not None:
        ref = np.where(keep, f64(ref_logprobs), 0.0)
        penalty, d_penalty, _ = kl_loss(
            lp, ref, np.where(keep, targets, -1), weights, beta=beta, kl_estimator=kl_estimator
        )
        loss, d_logprobs = loss + penalty, d_logprobs + d_penalty
        # By token whatever the loss averages over, so that runs compare.
        metrics |= {"loss": loss, "kl": float(kl_estimate(lp, ref, kl_estimator)[0].sum() / num_tokens)}
    return loss, d_logprobs.astype(np.float32), metrics


def rloo_loss(
    logprobs: Floats,
    old_logprobs: Floats,
    advantages: Floats,
    targets: Ints,
    offsets: Ints,
    *,
    num_sequences: float,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> tuple[float, Float32, Metrics]:
    """PPO's surrogate with whole responses as actions, rho_i = exp(sum_t ln rho_t) (Ahmadian et al. 2024): a mean over responses.

    Arguments and results as :func:`grpo_loss`; ``advantages`` from :func:`~ingot.losses.advantages.rloo_advantages`.
    """
    require_positive(num_sequences=num_sequences)
    high_bound = epsilon if epsilon_high is None else epsilon_high
    _check_clipping(epsilon, high_bound, None)
    num, ids = len(offsets) - 1, sequence_ids(offsets)
    require_shape((num,), advantages=advantages)
    finite, dropped = usable(targets, logprobs, old_logprobs, f64(advantages)[ids])
    whole = np.bincount(ids, (targets >= 0) & ~finite, minlength=num) == 0
    keep = finite & whole[ids]
    log_ratio = np.where(keep, f64(logprobs), 0.0) - np.where(keep, old_logprobs, 0.0)
    losses, d_log_ratio, low, high = _clipped_surrogate(
        f64(np.bincount(ids, log_ratio, minlength=num)),
        np.where(whole & np.isfinite(advantages), f64(advantages), 0.0),
        epsilon,
        high_bound,
        None,
    )
    loss = float(losses.sum() / num_sequences)
    metrics = {
        "loss": loss,
        "clip_ratio/low_mean": float(np.count_nonzero(low) / num_sequences),
        "clip_ratio/high_mean": float(np.count_nonzero(high) / num_sequences),
        "clip_ratio/region_mean": float(np.count_nonzero(low | high) / num_sequences),
        **dropped,
    }
    return loss, np.where(keep, (d_log_ratio / num_sequences)[ids], 0.0).astype(np.float32), metrics


def truncated_importance_weights(old_logprobs: Floats, sampling_logprobs: Floats, *, cap: float = 3.0) -> Float64:
    """min(pi_old(a) / pi_sampling(a), cap), f64 [N]: what advantages are multiplied by where the sampler's arithmetic differs from
    the trainer's (Yao et al. 2025)."""
    require_shape(np.shape(old_logprobs), sampling_logprobs=sampling_logprobs)
    return f64(np.minimum(bounded_ratio(f64(old_logprobs) - f64(sampling_logprobs))[0], cap))
