"""Best of n: draw n responses, keep the one with the highest score. What it gains and what it costs, without drawing again."""

from __future__ import annotations

import math

import numpy as np

from ingot.losses.numerics import Float64, Floats, Ints, f64


def best_of_n_kl_bound(n: int) -> float:
    """ln n - (n - 1) / n: the most that KL(best of n || policy) can be, in nats; nearly reached when no two responses tie."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return math.log(n) - (n - 1) / n


def expected_max(scores: Floats) -> Float64:
    """f64 [N]: for n = 1 .. N an unbiased estimate of E[max of n draws] from N scores."""
    return expected_of_best(scores, scores)


def expected_of_best(scores: Floats, values: Floats) -> Float64:
    """f64 [N]: for n = 1 .. N an unbiased estimate of E[value of the one of n draws with the highest score] from N draws.

    The mean over all subsets of n of the draws, without listing them: in ascending order of score, the i-th (from 1) is the best of
    C(i - 1, n - 1) of the C(N, n) subsets. Of equal scores any may be the best: each stands for their mean value.
    """
    order = np.argsort(f64(scores), kind="stable")
    _, owner = np.unique(f64(scores)[order], return_inverse=True)
    ordered = f64(values)[order]
    ordered = (np.bincount(owner, ordered) / np.bincount(owner))[owner] if len(ordered) else ordered
    num = len(ordered)
    i = np.arange(num)
    estimates = np.empty(num)
    share = np.full(num, 1.0 / max(num, 1))  # C(i, n - 1) / C(N, n) for n = 1
    for n in range(1, num + 1):
        estimates[n - 1] = share @ ordered
        # C(i, n) / C(N, n + 1) from the one before: no factorials, no overflow.
        share = share * (i - n + 1) / n * (n + 1) / max(num - n, 1)
    return estimates


def best_rows(scores: Floats, group_ids: Ints, *, threshold: float | None = None) -> Ints:
    """i64: the row of the highest score of each group, in order of group ids, to fine-tune on; at most one a group.

    With a ``threshold``, only groups whose best reaches it. The first of equals is taken; NaN never.
    """
    order = np.lexsort((np.arange(len(scores)), -f64(scores), group_ids))
    order = order[~np.isnan(f64(scores)[order])]
    _, first = np.unique(np.asarray(group_ids)[order], return_index=True)
    best = order[first]
    return np.asarray(best if threshold is None else best[f64(scores)[best] >= threshold], np.int64)
