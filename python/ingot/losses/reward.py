"""Reward models: a score for a whole response, learnt from comparisons, rankings or ratings.

The score is the scalar head at the response's last token (:func:`rewards_at_ends`): one column of the values for each criterion.
Comparisons are Bradley-Terry: p(w beats l) = s(r_w - r_l), with s the logistic function. They fix rewards up to a constant, which
centering or :func:`gain_and_bias` settles.

Shape legend: M responses, in the rows of ``rewards``; group g, the responses to one prompt, has the rows ``offsets[g]`` to
``offsets[g + 1]``; k criteria. Responses whose reward is not finite are left out of every comparison and counted in ``num_dropped``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from ingot.errors import ConfigError
from ingot.losses.numerics import (
    Bools,
    Float32,
    Float64,
    Floats,
    Ints,
    Metrics,
    f64,
    log_sigmoid,
    require_positive,
    require_shape,
    sigmoid,
)


def end_rows(offsets: Ints) -> Ints:
    """i64 [S]: index of the last token of each sequence, where its reward is read. An empty sequence is a ``ValueError``."""
    empty = np.flatnonzero(np.diff(offsets) == 0)
    if empty.size:
        raise ValueError(f"sequence {empty[0]} is empty: there is no token to read its reward at")
    return np.asarray(offsets[1:] - 1, np.int64)


def rewards_at_ends(values: Floats, offsets: Ints) -> Float64:
    """f64 [S] or [S, k] from the values [N] or [N, k] of a packed batch."""
    return f64(values[end_rows(offsets)])


def spread_to_ends(d_rewards: Floats, offsets: Ints) -> Float32:
    """f32 [N] or [N, k]: dL/dreward at each sequence's last token, 0 elsewhere. The transpose of :func:`rewards_at_ends`."""
    d_values = np.zeros((int(offsets[-1]), *d_rewards.shape[1:]), np.float32)
    d_values[end_rows(offsets)] = d_rewards
    return d_values


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """P pairs of rows, with how sure and how heavy each judgement is."""

    winners: Ints
    """i64 [P]."""
    losers: Ints
    """i64 [P]."""
    labels: Float64
    """p [P]: probability that the winner is the better one; 0.5 is a tie."""
    weights: Float64
    """[P]; the weights of a group's pairs add up to 1."""


def compare_ranks(ranks: Ints, offsets: Ints, *, ties: str = "drop") -> Comparisons:
    """All pairs within each group, from ranks [M]: 1 is best, equal ranks are a tie, 0 is not judged.

    ``ties="drop"`` leaves tied pairs out (InstructGPT); ``"half"`` keeps them with the label 0.5.
    """
    if ties not in ("drop", "half"):
        raise ConfigError(f"ties must be drop or half, got {ties!r}")
    require_shape((int(offsets[-1]),), ranks=ranks)
    winners, losers, weights = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0)]
    for start, end in itertools.pairwise(offsets):
        rows = start + np.flatnonzero(ranks[start:end] > 0)
        rows = rows[np.argsort(ranks[rows], kind="stable")]
        better, worse = (rows[index] for index in np.triu_indices(len(rows), k=1))
        if ties == "drop":
            strict = ranks[better] < ranks[worse]
            better, worse = better[strict], worse[strict]
        winners.append(better)
        losers.append(worse)
        weights.append(np.full(len(better), 1 / max(len(better), 1)))
    better, worse = np.concatenate(winners), np.concatenate(losers)
    labels = np.where(ranks[better] < ranks[worse], 1.0, 0.5)
    return Comparisons(better, worse, labels, np.concatenate(weights))


def count_groups(ranks: Ints, offsets: Ints, *, ties: str = "drop") -> Ints:
    """Groups that have a pair to learn from, i64 [k] for each column of ``ranks`` [M, k], i64 [1] for ranks [M].

    Summed over the batches of a step they are the normalizer of :func:`kwise_loss`.
    """
    columns = np.reshape(ranks, (len(ranks), -1)).T
    return np.array([round(compare_ranks(column, offsets, ties=ties).weights.sum()) for column in columns])


def _compare(
    rewards: Float64, by: Comparisons, margins: Float64 | float, center: float
) -> tuple[float, Float64, Metrics]:
    """Sum over pairs of weight * [-p ln s(d) - (1 - p) ln s(-d) + center (r_w + r_l)^2], d = r_w - r_l - margin; its gradient."""
    gap = rewards[by.winners] - rewards[by.losers]
    total = rewards[by.winners] + rewards[by.losers]
    d = gap - margins
    loss = by.weights @ (-by.labels * log_sigmoid(d) - (1 - by.labels) * log_sigmoid(-d) + center * total**2)
    # s(d) - p, written so that it neither cancels nor underflows at p = 1.
    d_d = by.weights * ((1 - by.labels) * sigmoid(d) - by.labels * sigmoid(-d))
    d_total = by.weights * 2 * center * total
    d_rewards = np.bincount(by.winners, d_d + d_total, minlength=len(rewards))
    d_rewards += np.bincount(by.losers, d_total - d_d, minlength=len(rewards))
    agreed = np.where(gap > 0, by.labels, np.where(gap < 0, 1 - by.labels, 0.0))
    return float(loss), f64(d_rewards), {"accuracy": float(by.weights @ agreed), "margin": float(by.weights @ gap)}


def _spread_of(rewards: Float64) -> Metrics:
    if not rewards.size:
        return {}
    return {"min_reward": float(rewards.min()), "max_reward": float(rewards.max())}


def pairwise_loss(
    chosen_rewards: Floats,
    rejected_rewards: Floats,
    *,
    num_pairs: float,
    weights: Floats | None = None,
    margins: Floats | None = None,
    labels: Floats | None = None,
    center_rewards_coefficient: float = 0.0,
) -> tuple[float, Float64, Float64, Metrics]:
    """L = (1 / num_pairs) sum [-p ln s(d) - (1 - p) ln s(-d) + c (r_c + r_r)^2] with d = r_c - r_r - m.

    Parameters
    ----------
    chosen_rewards, rejected_rewards
        r_c and r_r, [B].
    num_pairs
        Pairs of the whole step, or the sum of their weights.
    weights
        What each pair counts, [B]; 1 unless given. Pairs of one ranked list have 1 / (their number): then this is :func:`kwise_loss`.
    margins
        m [B]: by how much the chosen should win (Touvron et al. 2023); 0 unless given.
    labels
        p [B]: probability that the chosen is the better one, for soft labels (of several annotators, or of an AI judge); 1 unless given.
    center_rewards_coefficient
        c: pulls the sum of a pair's rewards to 0 (Eisenstein et al. 2023).

    Returns
    -------
    loss
        f64.
    d_chosen_rewards, d_rejected_rewards
        f64 [B].
    metrics
        ``accuracy`` (share of pairs ordered as judged, by the probability of the judgement if soft), ``margin``, ``mean_reward``,
        ``min_reward``, ``max_reward``.
    """
    require_positive(num_pairs=num_pairs)
    require_shape(
        np.shape(chosen_rewards), rejected_rewards=rejected_rewards, weights=weights, margins=margins, labels=labels
    )
    rewards = np.concatenate([f64(chosen_rewards), f64(rejected_rewards)])
    num = len(rewards) // 2
    finite = np.isfinite(rewards[:num]) & np.isfinite(rewards[num:])
    rows = np.flatnonzero(finite)
    judged = np.ones(num) if labels is None else f64(labels)
    if not ((judged >= 0) & (judged <= 1)).all():
        raise ValueError("labels must be probabilities, between 0 and 1")
    w = (np.ones(num) if weights is None else f64(weights))[rows] / num_pairs
    by = Comparisons(rows, rows + num, judged[rows], f64(w))
    m = 0.0 if margins is None else f64(margins)[rows]
    loss, d_rewards, metrics = _compare(rewards, by, m, center_rewards_coefficient)
    kept = rewards[np.concatenate([rows, rows + num])]
    metrics |= {"loss": loss, "mean_reward": float(np.tile(w, 2) @ kept / 2), **_spread_of(kept)}
    metrics["num_dropped"] = float(num - len(rows))
    return loss, d_rewards[:num], d_rewards[num:], metrics


def kwise_loss(
    rewards: Floats,
    ranks: Ints,
    offsets: Ints,
    *,
    num_groups: npt.ArrayLike,
    ties: str = "drop",
    center_rewards_coefficient: float = 0.0,
    criteria: Sequence[str] = (),
) -> tuple[float, Float64, Metrics]:
    """All pairs of K ranked responses at once (Ouyang et al. 2022, eq. 1): K forward passes for K (K - 1) / 2 comparisons.

    L = -(1 / num_groups) sum_groups (1 / |P|) sum_{(w, l) in P} ln s(r_w - r_l), P the untied ordered pairs of the group.
    A prompt counts once however many responses it has, and its pairs are never split over steps, which would overfit.

    Parameters
    ----------
    rewards
        [M], or [M, k] with a column for each criterion (helpful, honest, harmless): each is a ranking and a head of its own.
    ranks
        Like ``rewards``: 1 is best, equal is a tie, 0 is not judged.
    offsets
        i64 [G + 1], rows of each group.
    num_groups
        From :func:`count_groups`, over the whole step: a number, or [k]. The loss divides by their sum.
    ties, center_rewards_coefficient
        As in :func:`compare_ranks` and :func:`pairwise_loss`.
    criteria
        Names of the columns: metrics then have ``accuracy/NAME`` of each beside ``accuracy`` of all.

    Returns
    -------
    loss
        f64.
    d_rewards
        f64, like ``rewards``.
    metrics
        As :func:`pairwise_loss`, each group weighing the same.
    """
    counts = f64(num_groups).ravel()
    require_positive(num_groups=float(counts.sum()))
    require_shape(np.shape(rewards), ranks=ranks)
    scores = f64(rewards).reshape(len(rewards), -1)
    finite = np.isfinite(scores)
    judged = np.where(finite, np.reshape(ranks, scores.shape), 0)
    scores = np.where(finite, scores, 0.0)
    if criteria and not len(criteria) == len(counts) == scores.shape[1]:
        raise ValueError(
            f"criteria and num_groups must have one entry for each of {scores.shape[1]} columns of rewards, "
            f"got {len(criteria)} and {len(counts)}"
        )
    loss, d_rewards = 0.0, np.zeros_like(scores)
    metrics: Metrics = {"accuracy": 0.0, "margin": 0.0}
    for column in range(scores.shape[1]):
        by = compare_ranks(judged[:, column], offsets, ties=ties)
        by = dataclasses.replace(by, weights=by.weights / counts.sum())
        part, d_rewards[:, column], found = _compare(scores[:, column], by, 0.0, center_rewards_coefficient)
        loss += part
        for name in ("accuracy", "margin"):
            metrics[name] += found[name]
        if criteria:
            metrics[f"accuracy/{criteria[column]}"] = found["accuracy"] * counts.sum() / max(counts[column], 1.0)
        metrics["mean_reward"] = metrics.get("mean_reward", 0.0) + float(
            by.weights @ (scores[by.winners, column] + scores[by.losers, column]) / 2
        )
    metrics |= {"loss": loss, **_spread_of(scores[judged > 0])}
    metrics["num_dropped"] = float(np.count_nonzero(~finite))
    return loss, d_rewards.reshape(np.shape(rewards)), metrics


def plackett_luce_loss(
    rewards: Floats, ranks: Ints, offsets: Ints, *, num_groups: float
) -> tuple[float, Float64, Metrics]:
    """The ranking as K - 1 choices of the best among what is left (Plackett 1975; Luce 1959).

    L = (1 / num_groups) sum_groups sum_i [ln sum_{j = i or ranked below i} e^{r_j} - r_i].
    Tied responses are in no choice against each other; unjudged ones (rank 0) in none at all.

    Parameters
    ----------
    rewards, ranks
        [M]; ranks as in :func:`kwise_loss`.
    offsets
        i64 [G + 1].
    num_groups
        Groups of the whole step.

    Returns
    -------
    loss, d_rewards, metrics
        f64; f64 [M]; ``accuracy`` (share of groups whose best response has the highest reward) and the spread of rewards.
    """
    require_positive(num_groups=num_groups)
    require_shape((int(offsets[-1]),), rewards=rewards, ranks=ranks)
    scores = f64(rewards)
    finite = np.isfinite(scores)
    loss, right, d_rewards = 0.0, 0, np.zeros_like(scores)
    for start, end in itertools.pairwise(offsets):
        rows = start + np.flatnonzero((ranks[start:end] > 0) & finite[start:end])
        if not rows.size:
            continue
        r, rank = scores[rows], ranks[rows]
        left = (rank[None, :] > rank[:, None]) | np.eye(len(rows), dtype=bool)  # [choice, candidate]
        candidates = np.where(left, r[None, :], -np.inf)
        top = candidates.max(axis=1)
        log_sum = top + np.log(np.exp(candidates - top[:, None]).sum(axis=1))
        loss += float((log_sum - r).sum())
        d_rewards[rows] = np.exp(candidates - log_sum[:, None]).sum(axis=0) - 1
        right += int(rank[np.argmax(r)] == rank.min())
    metrics = {"accuracy": right / num_groups, "loss": loss / num_groups, **_spread_of(scores[finite & (ranks > 0)])}
    metrics["num_dropped"] = float(np.count_nonzero(~finite))
    return loss / num_groups, d_rewards / num_groups, metrics


def best_of_loss(rewards: Floats, best: Ints, offsets: Ints, *, num_groups: float) -> tuple[float, Float64, Metrics]:
    """Softmax cross-entropy with the one response that was picked (Ziegler et al. 2019, eq. 1); ``best`` i64 [G] are its rows.

    It is :func:`plackett_luce_loss` with one response first and all others tied behind it.
    """
    require_shape((len(offsets) - 1,), best=best)
    inside = (offsets[:-1] <= best) & (best < offsets[1:])
    if not inside.all():
        group = int(np.flatnonzero(~inside)[0])
        raise ValueError(f"best of group {group} must be one of its rows, {offsets[group]} to {offsets[group + 1] - 1}")
    ranks = np.full(int(offsets[-1]), 2)
    ranks[best] = 1
    return plackett_luce_loss(rewards, ranks, offsets, num_groups=num_groups)


def rating_loss(rewards: Floats, ratings: Floats, *, num_ratings: float) -> tuple[float, Float64, Metrics]:
    """L = mean (r - y)^2 for ratings y on a scale: (loss, d_rewards f64 like ``rewards``, metrics). NaN is no rating."""
    require_positive(num_ratings=num_ratings)
    require_shape(np.shape(rewards), ratings=ratings)
    finite = np.isfinite(rewards) & np.isfinite(ratings)
    error = np.where(finite, f64(rewards), 0.0) - np.where(finite, ratings, 0.0)
    loss = float((error**2).sum() / num_ratings)
    dropped = float(np.count_nonzero(~np.isfinite(rewards)))
    return (
        loss,
        f64(2 * error / num_ratings),
        {"loss": loss, **_spread_of(f64(rewards)[finite]), "num_dropped": dropped},
    )


def label_loss(rewards: Floats, labels: Bools, *, num_labels: float) -> tuple[float, Float64, Metrics]:
    """Binary cross-entropy: L = -(1 / num_labels) sum ln s(r) where the label is true, ln s(-r) where it is false.

    The reward is then the log odds of a true label, on a scale with a zero. For answers that were wanted or not, read at their last
    token, and for the steps of an answer (process rewards; Uesato et al. 2022; Lightman et al. 2023), read at each step's last token.

    Parameters
    ----------
    rewards, labels
        [M], [M].
    num_labels
        Labels of the whole step.

    Returns
    -------
    loss, d_rewards, metrics
        f64; f64 [M]; ``accuracy`` (share of rewards on the side of 0 that their label says; 0 itself is on neither) and the spread of rewards.
    """
    require_positive(num_labels=num_labels)
    require_shape(np.shape(rewards), labels=labels)
    finite = np.isfinite(rewards)
    scores, sign = np.where(finite, f64(rewards), 0.0), np.where(labels, 1.0, -1.0)
    loss = -float(log_sigmoid(sign * scores)[finite].sum() / num_labels)
    d_rewards = np.where(finite, -sign * sigmoid(-sign * scores), 0.0) / num_labels
    accuracy = float(np.count_nonzero((sign * scores > 0)[finite]) / num_labels)
    dropped = float(np.count_nonzero(~finite))
    return loss, d_rewards, {"loss": loss, "accuracy": accuracy, **_spread_of(scores[finite]), "num_dropped": dropped}


StepAggregate = Literal["last", "min", "product"]
STEP_AGGREGATES: tuple[str, ...] = get_args(StepAggregate)


def aggregate_steps(rewards: Floats, offsets: Ints, how: StepAggregate = "last") -> Float64:
    """The reward of each answer from those of its steps: f64 [S] or [S, k] from [E] or [E, k].

    ``last``: that of the last step; ``min``: the lowest of all (like ``product`` after Lightman et al. 2023); ``product``: the log
    odds that all steps are right if each is independently, with p_i = s(r_i): ln P - ln(1 - P), P = prod p_i. All agree on an answer of one step.

    Parameters
    ----------
    offsets
        i64 [S + 1]: steps of each answer, at least one.
    """
    if (np.diff(offsets) <= 0).any():
        raise ValueError("an answer has no step")
    values = f64(rewards)
    if how == "last":
        return f64(values[np.asarray(offsets[1:]) - 1])
    if how == "min":
        return f64(np.minimum.reduceat(values, offsets[:-1], axis=0))
    if how != "product":
        raise ConfigError(f"steps are put together by {', '.join(STEP_AGGREGATES)}, not {how!r}")
    # ln((1 + a)(1 + b) - 1) = ln(a + b + ab), step by step, so that nothing cancels: a = e^-r are the odds against.
    against = np.full((len(offsets) - 1, *values.shape[1:]), -np.inf)
    for answer, (low, high) in enumerate(itertools.pairwise(np.asarray(offsets).tolist())):
        for reward in values[low:high]:
            both = against[answer] - reward
            against[answer] = np.logaddexp(np.logaddexp(against[answer], -reward), both)
    return -against


def gain_and_bias(rewards: Floats, *, std: float = 1.0) -> tuple[float, float]:
    """(gain, bias) with which gain * reward + bias has mean 0 and the given standard deviation over these rewards [M].

    Reinforcement learning weighs rewards against a KL penalty, so their scale is fixed before it, on samples of the reference policy
    (Ziegler et al. 2019). Rewards that are all equal keep gain 1.
    """
    values = f64(rewards)
    spread = float(values.std())
    gain = std / spread if spread > 0 else 1.0
    return gain, -gain * float(values.mean())


def expected_calibration_error(margins: Floats, labels: Floats | None = None, *, num_bins: int = 10) -> float:
    """Mean gap between what the model is sure of and how often it is right, in bins of equal width of the surer side's probability.

    ``margins`` r_c - r_r [B]; ``labels`` [B], 1 unless given, are the shares of judges for the chosen. 0 is perfect.
    """
    sure = sigmoid(np.abs(f64(margins)))
    judged = np.ones(np.shape(margins)) if labels is None else f64(labels)
    right = np.where(f64(margins) > 0, judged, np.where(f64(margins) < 0, 1 - judged, 0.5))
    bins = np.minimum(((sure - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, sure - right, minlength=num_bins)
    return float(np.abs(gaps).sum() / max(len(sure), 1))


def length_correlation(rewards: Floats, lengths: Ints) -> float:
    """Pearson correlation of reward and response length, 0 where either is constant: above 0.5, length is being rewarded."""
    x, y = f64(rewards) - np.mean(rewards), f64(lengths) - np.mean(lengths)
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else 0.0
