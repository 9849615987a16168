"""Learning from a teacher's probabilities.

- On the teacher's own text: fine-tune on it (:mod:`ingot.losses.sft`).
- On any text, with the teacher's likeliest tokens stored beside it: :func:`topk_distillation_loss`, forward KL.
- On the student's samples, scored by the teacher: :func:`reverse_kl_advantages`, reverse KL.
- On any text, both models' whole distributions side by side: :func:`generalized_jsd_loss`, either KL or what lies between.

Forward KL makes the student cover all that the teacher does, reverse KL keeps it to what the teacher would do.
"""

from __future__ import annotations

import numpy as np

from ingot.errors import ConfigError
from ingot.losses.numerics import Float32, Float64, Floats, Ints, Metrics, f64, require_shape

TAIL_FLOOR = 2.0**-22
"""Below this, a student's probability of all other tokens is lost in the rounding of f32 log-probabilities; -ln x goes on there as
its tangent, so the pull stays finite."""


def topk_distillation_loss(
    candidate_logprobs: Floats, teacher_logprobs: Floats, candidate_offsets: Ints, weights: Floats
) -> tuple[float, Float32, Metrics]:
    """Forward KL from a teacher of whom k tokens are known, all others being one more token, "the rest".

    L = sum_t w_t [sum_c q_c (ln q_c - ln p_c) + q_rest (ln q_rest - ln p_rest)],  q_rest = 1 - sum_c q_c,  p_rest = 1 - sum_c p_c.
    dL/d ln p_c = w (-q_c + q_rest p_c / p_rest).

    With all of the vocabulary as candidates this is KL(teacher || student); with fewer it is a lower bound of it.

    Parameters
    ----------
    candidate_logprobs, teacher_logprobs
        [C], ln p_c of the student and ln q_c of the teacher at temperature of your choice (the same for both); -inf is allowed for the
        teacher.
    candidate_offsets
        i64 [N + 1]: the candidates of token t are ``candidate_offsets[t]`` to ``candidate_offsets[t + 1]``. A token without any has
        no loss.
    weights
        [N], from :func:`~ingot.losses.packed.mean_weights`.

    Returns
    -------
    loss, d_candidates
        f64; f32 [C].
    metrics
        ``loss``, ``teacher_tail``: the mean share that the teacher gives to the rest; ``num_dropped``: tokens with a student's
        log-probability that is not finite.
    """
    num = len(candidate_offsets) - 1
    require_shape(
        (int(candidate_offsets[-1]),), candidate_logprobs=candidate_logprobs, teacher_logprobs=teacher_logprobs
    )
    require_shape((num,), weights=weights)
    rows = np.repeat(np.arange(num), np.diff(candidate_offsets))

    def sum_by_token(values: Floats) -> Float64:
        return f64(np.bincount(rows, values, minlength=num))

    broken = sum_by_token(~np.isfinite(candidate_logprobs)) > 0
    w = np.where(broken | (np.diff(candidate_offsets) == 0), 0.0, f64(weights))
    log_p = np.where(broken[rows], -1.0, f64(candidate_logprobs))
    log_q = f64(teacher_logprobs)
    p, q = np.exp(log_p), np.exp(log_q)
    p_rest, q_rest = 1 - sum_by_token(p), np.maximum(1 - sum_by_token(q), 0.0)
    q_rest = np.where(q_rest < TAIL_FLOOR, 0.0, q_rest)
    floored = np.maximum(p_rest, TAIL_FLOOR)
    minus_log_rest = -np.log(floored) + (floored - p_rest) / TAIL_FLOOR
    known = np.where(q > 0, q * (np.where(q > 0, log_q, 0.0) - log_p), 0.0)
    rest = q_rest * (np.log(np.where(q_rest > 0, q_rest, 1.0)) + minus_log_rest)
    loss = float(w @ (sum_by_token(known) + rest))
    d_candidates = w[rows] * (q_rest[rows] * p / floored[rows] - q)
    metrics = {
        "loss": loss,
        "teacher_tail": float(w @ q_rest),
        "num_dropped": float(np.count_nonzero(broken)),
    }
    return loss, d_candidates.astype(np.float32), metrics


def generalized_jsd_loss(
    candidate_logprobs: Floats, teacher_logprobs: Floats, candidate_offsets: Ints, weights: Floats, *, beta: float
) -> tuple[float, Float32, Metrics]:
    """Exact divergence of two whole distributions at each token: the generalized Jensen-Shannon divergence of Agarwal et al. (2024,
    equation 1) between student p and teacher q.

    L = sum_t w_t [beta KL(q || m) + (1 - beta) KL(p || m)],  m = beta q + (1 - beta) p,  for beta between 0 and 1;
    beta = 0 is KL(q || p), forward; beta = 1 is KL(p || q), reverse.
    dL/d ln p_c = w (1 - beta) p_c (ln p_c - ln m_c);  at 0: -w q_c;  at 1: w p_c (ln p_c - ln q_c + 1).

    Parameters
    ----------
    candidate_logprobs, teacher_logprobs
        [C], ln p_c of the student and ln q_c of the teacher for all ids that may follow, at the same temperature.
    candidate_offsets
        i64 [N + 1], as in :func:`topk_distillation_loss`. A token without candidates has no loss.
    weights
        [N], from :func:`~ingot.losses.packed.mean_weights`.
    beta
        From 0 to 1.

    Returns
    -------
    loss, d_candidates
        f64; f32 [C].
    metrics
        ``loss``; ``num_dropped``: tokens where a log-probability is not finite.

    Raises
    ------
    ConfigError
        ``beta`` is out of its range.
    """
    if not 0.0 <= beta <= 1.0:
        raise ConfigError(f"beta must be between 0 and 1, got {beta}")
    num = len(candidate_offsets) - 1
    require_shape(
        (int(candidate_offsets[-1]),), candidate_logprobs=candidate_logprobs, teacher_logprobs=teacher_logprobs
    )
    require_shape((num,), weights=weights)
    rows = np.repeat(np.arange(num), np.diff(candidate_offsets))
    finite = np.isfinite(candidate_logprobs) & np.isfinite(teacher_logprobs)
    broken = np.bincount(rows, ~finite, minlength=num) > 0
    dropped = broken[rows]
    w = np.where(dropped, 0.0, f64(weights)[rows])
    log_p, log_q = np.where(dropped, 0.0, f64(candidate_logprobs)), np.where(dropped, 0.0, f64(teacher_logprobs))
    if beta == 0.0:
        q = np.exp(log_q)
        each, d_candidates = q * (log_q - log_p), -q
    elif beta == 1.0:
        p = np.exp(log_p)
        each, d_candidates = p * (log_p - log_q), p * (log_p - log_q + 1.0)
    else:
        p, log_m = np.exp(log_p), np.logaddexp(np.log(beta) + log_q, np.log1p(-beta) + log_p)
        d_candidates = (1.0 - beta) * p * (log_p - log_m)
        each = beta * np.exp(log_q) * (log_q - log_m) + d_candidates
    loss = float(w @ each)
    return loss, (w * d_candidates).astype(np.float32), {"loss": loss, "num_dropped": float(np.count_nonzero(broken))}


def reverse_kl_advantages(logprobs: Floats, teacher_logprobs: Floats, targets: Ints) -> Float64:
    """A_t = ln teacher(a_t) - ln student(a_t), f64 [N], 0 where nothing counts, on the student's own samples.

    As advantages of a policy loss they lower KL(student || teacher) at every state that the student visits (Agarwal et al. 2024).
    Take the student's log-probabilities of the rollout, so that they are constants.
    """
    require_shape(targets.shape, logprobs=logprobs, teacher_logprobs=teacher_logprobs)
    counted = targets >= 0
    return np.where(counted, np.where(counted, f64(teacher_logprobs), 0.0) - np.where(counted, logprobs, 0.0), 0.0)
