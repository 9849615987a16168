"""Reward objectives: each formula against autograd and against another way to write it, ties and missing judgements included."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.errors import ConfigError
from ingot.losses.packed import add_metrics
from ingot.losses.reward import (
    best_of_loss,
    compare_ranks,
    count_groups,
    end_rows,
    expected_calibration_error,
    gain_and_bias,
    kwise_loss,
    label_loss,
    length_correlation,
    pairwise_loss,
    plackett_luce_loss,
    rating_loss,
    rewards_at_ends,
    spread_to_ends,
)
from packs import gradients, leaf

seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([0.01, 1.0, 500.0])


def random_groups(rng, num_columns=None):
    """Groups of 0 to 5 responses, ranked from 1 with ties, some not judged (0)."""
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 6, size=4) + (np.arange(4) == 0))])
    shape = (offsets[-1],) if num_columns is None else (offsets[-1], num_columns)
    return offsets, rng.integers(0, 5, size=shape)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, scale=scales, soft=st.booleans(), margin=st.booleans(), center=st.sampled_from([0.0, 0.01]))
def test_pairwise(seed, scale, soft, margin, center):
    rng = np.random.default_rng(seed)
    chosen, rejected = rng.normal(scale=scale, size=(2, 5))
    rejected[0] = chosen[0]
    labels = rng.random(5) if soft else None
    margins = rng.normal(size=5) if margin else None
    rc, rr = leaf(chosen), leaf(rejected)
    d = rc - rr - (torch.tensor(margins) if margin else 0)
    p = torch.tensor(labels) if soft else 1.0
    expected = (-p * F.logsigmoid(d) - (1 - p) * F.logsigmoid(-d) + center * (rc + rr) ** 2).sum() / 7
    loss, d_chosen, d_rejected, metrics = pairwise_loss(
        chosen, rejected, num_pairs=7, margins=margins, labels=labels, center_rewards_coefficient=center
    )
    assert loss == pytest.approx(float(expected.detach()), rel=1e-10)
    by_chosen, by_rejected = gradients(expected, rc, rr)
    np.testing.assert_allclose(d_chosen, by_chosen, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(d_rejected, by_rejected, rtol=1e-9, atol=1e-12)
    if not soft:
        assert metrics["accuracy"] == pytest.approx((chosen > rejected).sum() / 7)
    assert metrics["margin"] == pytest.approx((chosen - rejected).sum() / 7)
    assert metrics["mean_reward"] == pytest.approx((chosen + rejected).sum() / 14)
    assert metrics["max_reward"] == max(chosen.max(), rejected.max())


def test_pairwise_leaves_out_what_is_not_finite():
    chosen, rejected = np.array([1.0, np.nan, 3.0]), np.array([0.0, 1.0, -np.inf])
    loss, d_chosen, d_rejected, metrics = pairwise_loss(chosen, rejected, num_pairs=3)
    assert loss == pytest.approx(math.log1p(math.exp(-1)) / 3)
    assert (d_chosen != 0).tolist() == (d_rejected != 0).tolist() == [True, False, False]
    assert metrics["num_dropped"] == 2
    with pytest.raises(ValueError, match="probabilities"):
        pairwise_loss(np.zeros(1), np.zeros(1), num_pairs=1, labels=np.array([1.5]))


@settings(max_examples=80, deadline=None)
@given(seed=seeds, scale=scales, ties=st.sampled_from(["drop", "half"]), center=st.sampled_from([0.0, 0.01]))
def test_kwise_is_the_sum_over_ordered_pairs(seed, scale, ties, center):
    rng = np.random.default_rng(seed)
    offsets, ranks = random_groups(rng)
    rewards = rng.normal(scale=scale, size=len(ranks))
    r = leaf(rewards)
    expected, num_groups = r.sum() * 0, 0
    for start, end in itertools.pairwise(offsets):
        pairs = []
        for i, j in itertools.permutations(range(start, end), 2):
            if 0 < ranks[i] < ranks[j]:
                pairs.append(-F.logsigmoid(r[i] - r[j]) + center * (r[i] + r[j]) ** 2)
            if 0 < ranks[i] == ranks[j] and i < j and ties == "half":
                both = -F.logsigmoid(r[i] - r[j]) - F.logsigmoid(r[j] - r[i])
                pairs.append(0.5 * both + center * (r[i] + r[j]) ** 2)
        if pairs:
            expected = expected + torch.stack(pairs).mean()
            num_groups += 1
    assert count_groups(ranks, offsets, ties=ties) == [num_groups]
    total = max(num_groups, 1)
    loss, d_rewards, metrics = kwise_loss(
        rewards, ranks, offsets, num_groups=total, ties=ties, center_rewards_coefficient=center
    )
    assert loss == pytest.approx(float(expected.detach()) / total, rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(d_rewards, gradients(expected, r)[0] / total, rtol=1e-8, atol=1e-12)
    if center == 0:
        shifted = kwise_loss(rewards + 3, ranks, offsets, num_groups=total, ties=ties)
        assert shifted[0] == pytest.approx(loss)
        assert abs(d_rewards.sum()) <= 1e-12
    assert 0 <= metrics["accuracy"] <= 1


def test_kwise_of_two_is_pairwise():
    rng = np.random.default_rng(2)
    chosen, rejected = rng.normal(size=(2, 6))
    pairs = pairwise_loss(chosen, rejected, num_pairs=6, center_rewards_coefficient=0.01)
    ranked = kwise_loss(
        np.stack([chosen, rejected], 1).ravel(),
        np.tile([1, 2], 6),
        np.arange(0, 13, 2),
        num_groups=6,
        center_rewards_coefficient=0.01,
    )
    assert ranked[0] == pytest.approx(pairs[0])
    np.testing.assert_allclose(ranked[1].reshape(6, 2).T, pairs[1:3])
    assert ranked[2] == pytest.approx(pairs[3])


def test_ranked_lists_as_weighted_pairs():
    rng = np.random.default_rng(3)
    offsets, ranks = random_groups(rng)
    rewards, by = rng.normal(size=len(ranks)), compare_ranks(ranks, offsets)
    total = count_groups(ranks, offsets)[0]
    ranked = kwise_loss(rewards, ranks, offsets, num_groups=total, center_rewards_coefficient=0.1)
    pairs = pairwise_loss(
        rewards[by.winners], rewards[by.losers], num_pairs=total, weights=by.weights, center_rewards_coefficient=0.1
    )
    assert pairs[0] == pytest.approx(ranked[0])
    by_row = np.bincount(by.winners, pairs[1], minlength=len(ranks)) + np.bincount(
        by.losers, pairs[2], minlength=len(ranks)
    )
    np.testing.assert_allclose(by_row, ranked[1], rtol=1e-12, atol=1e-15)
    for name in ("accuracy", "margin", "mean_reward"):
        assert pairs[3][name] == pytest.approx(ranked[2][name])


def test_kwise_with_a_head_for_each_criterion():
    rng = np.random.default_rng(4)
    offsets, ranks = random_groups(rng, num_columns=3)
    rewards = rng.normal(size=ranks.shape)
    total = count_groups(ranks, offsets)
    loss, d_rewards, metrics = kwise_loss(
        rewards, ranks, offsets, num_groups=total, criteria=["helpful", "honest", "harmless"]
    )
    single = [kwise_loss(rewards[:, i], ranks[:, i], offsets, num_groups=total.sum()) for i in range(3)]
    assert loss == pytest.approx(sum(part[0] for part in single))
    np.testing.assert_array_equal(d_rewards, np.stack([part[1] for part in single], 1))
    alone = kwise_loss(rewards[:, 1], ranks[:, 1], offsets, num_groups=total[1])[2]
    assert metrics["accuracy/honest"] == pytest.approx(alone["accuracy"])
    whole = add_metrics(part[2] for part in single)
    assert {name: metrics[name] for name in whole} == pytest.approx(whole)
    with pytest.raises(ValueError, match="criteria"):
        kwise_loss(rewards, ranks, offsets, num_groups=total, criteria=["helpful"])


def test_groups_in_parts_add_up_and_their_order_does_not_matter():
    rng = np.random.default_rng(9)
    offsets, ranks = np.array([0, 4, 6, 9]), np.array([1, 2, 2, 3, 2, 1, 1, 1, 2])
    rewards = rng.normal(size=9)
    whole = kwise_loss(rewards, ranks, offsets, num_groups=3)
    parts = [
        kwise_loss(rewards[a:b], ranks[a:b], np.array([0, b - a]), num_groups=3) for a, b in itertools.pairwise(offsets)
    ]
    assert sum(part[0] for part in parts) == pytest.approx(whole[0])
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), whole[1])
    assert add_metrics(part[2] for part in parts) == pytest.approx(whole[2])
    order = np.array([3, 1, 0, 2])
    permuted = kwise_loss(rewards[:4][order], ranks[:4][order], np.array([0, 4]), num_groups=3)
    assert permuted[0] == pytest.approx(parts[0][0])
    np.testing.assert_allclose(permuted[1], parts[0][1][order])


def test_ties_never_become_strict_pairs():
    ranks, offsets = np.array([1, 1, 2, 0]), np.array([0, 4])
    by = compare_ranks(ranks, offsets)
    assert sorted(zip(by.winners, by.losers, strict=True)) == [(0, 2), (1, 2)]
    half = compare_ranks(ranks, offsets, ties="half")
    assert (0, 1, 0.5) in set(zip(half.winners, half.losers, half.labels, strict=True))
    assert half.weights.sum() == pytest.approx(1)
    with pytest.raises(ConfigError):
        compare_ranks(ranks, offsets, ties="keep")


def test_rewards_that_are_not_finite_are_not_compared():
    ranks, offsets = np.array([1, 2, 3]), np.array([0, 3])
    loss, d_rewards, metrics = kwise_loss(np.array([0.0, np.nan, 1.0]), ranks, offsets, num_groups=1)
    assert loss == pytest.approx(math.log1p(math.e))
    assert d_rewards[1] == 0
    assert metrics["num_dropped"] == 1
    loss, d_rewards, metrics = plackett_luce_loss(np.array([0.0, np.nan, 1.0]), ranks, offsets, num_groups=1)
    assert loss == pytest.approx(math.log1p(math.e))
    assert metrics["num_dropped"] == 1


@settings(max_examples=60, deadline=None)
@given(seed=seeds, scale=scales)
def test_plackett_luce_is_a_chain_of_choices(seed, scale):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 6, size=3)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    orders = [rng.permutation(n) for n in lengths]
    ranks = np.concatenate([np.argsort(order) + 1 for order in orders])
    rewards = rng.normal(scale=scale, size=offsets[-1])
    r = leaf(rewards)
    expected = r.sum() * 0
    for start, order in zip(offsets, orders, strict=False):
        for stage in range(len(order)):
            left = r[torch.tensor(start + order[stage:])]
            expected = expected + torch.logsumexp(left, 0) - left[0]
    loss, d_rewards, _ = plackett_luce_loss(rewards, ranks, offsets, num_groups=3)
    assert loss == pytest.approx(float(expected.detach()) / 3, rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(d_rewards, gradients(expected, r)[0] / 3, rtol=1e-8, atol=1e-12)
    assert plackett_luce_loss(rewards + 5, ranks, offsets, num_groups=3)[0] == pytest.approx(loss, abs=1e-9)


def test_plackett_luce_probabilities_of_all_rankings_sum_to_one():
    rewards, offsets = np.array([0.3, -1.0, 2.0, 0.0]), np.array([0, 4])
    total = sum(
        math.exp(-plackett_luce_loss(rewards, np.array(ranks), offsets, num_groups=1)[0])
        for ranks in itertools.permutations([1, 2, 3, 4])
    )
    assert total == pytest.approx(1)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, scale=scales)
def test_best_of_is_softmax_cross_entropy(seed, scale):
    rng = np.random.default_rng(seed)
    rewards, best = rng.normal(scale=scale, size=(5, 4)), rng.integers(4, size=5)
    r = leaf(rewards)
    expected = F.cross_entropy(r, torch.tensor(best))
    loss, d_rewards, metrics = best_of_loss(
        rewards.ravel(), best + np.arange(0, 20, 4), np.arange(0, 21, 4), num_groups=5
    )
    assert loss == pytest.approx(float(expected.detach()), rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(d_rewards.reshape(5, 4), gradients(expected, r)[0], rtol=1e-8, atol=1e-12)
    assert metrics["accuracy"] == (rewards.argmax(1) == best).mean()
    with pytest.raises(ValueError, match="group 1"):
        best_of_loss(rewards.ravel(), np.array([0, 3, 8, 12, 16]), np.arange(0, 21, 4), num_groups=5)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, scale=scales)
def test_ratings_and_steps(seed, scale):
    rng = np.random.default_rng(seed)
    rewards, ratings, labels = rng.normal(scale=scale, size=6), rng.normal(size=6), rng.random(6) < 0.5
    r = leaf(rewards)
    expected = F.mse_loss(r, torch.tensor(ratings))
    loss, d_rewards, _ = rating_loss(rewards, ratings, num_ratings=6)
    assert loss == pytest.approx(float(expected.detach()))
    np.testing.assert_allclose(d_rewards, gradients(expected, r)[0], rtol=1e-12)
    expected = F.binary_cross_entropy_with_logits(r, torch.tensor(labels).double())
    loss, d_rewards, metrics = label_loss(rewards, labels, num_labels=6)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(d_rewards, gradients(expected, r)[0], rtol=1e-8, atol=1e-12)
    assert metrics["accuracy"] == pytest.approx(((rewards > 0) == labels).mean())


def test_missing_ratings_and_broken_rewards_give_nothing():
    loss, d_rewards, metrics = rating_loss(np.array([1.0, 2.0, np.inf]), np.array([0.0, np.nan, 1.0]), num_ratings=2)
    assert (loss, d_rewards.tolist(), metrics["num_dropped"]) == (0.5, [1.0, 0.0, 0.0], 1.0)
    loss, d_rewards, metrics = label_loss(np.array([0.0, np.nan]), np.array([True, False]), num_labels=1)
    assert loss == pytest.approx(math.log(2))
    assert (d_rewards.tolist(), metrics["num_dropped"]) == ([-0.5, 0.0], 1.0)


def test_rewards_are_read_at_the_last_token_of_each_sequence():
    offsets = np.array([0, 3, 4, 8])
    assert end_rows(offsets).tolist() == [2, 3, 7]
    values = np.arange(16, dtype=np.float32).reshape(8, 2)
    assert rewards_at_ends(values, offsets).tolist() == [[4, 5], [6, 7], [14, 15]]
    back = spread_to_ends(np.array([1.0, 2.0, 3.0]), offsets)
    assert (back.dtype, back.tolist()) == (np.float32, [0, 0, 1, 2, 0, 0, 0, 3])
    assert spread_to_ends(np.ones((3, 2)), offsets).sum() == 6
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        end_rows(np.array([0, 3, 3]))


def test_gain_and_bias_give_mean_zero_and_one_deviation():
    rewards = np.random.default_rng(0).normal(3, 5, size=256)
    gain, bias = gain_and_bias(rewards)
    assert (gain * rewards + bias).mean() == pytest.approx(0, abs=1e-12)
    assert (gain * rewards + bias).std() == pytest.approx(1)
    assert gain_and_bias(np.array([2.0, 2.0])) == (1.0, -2.0)


def test_calibration_error_of_judges_that_follow_the_model_is_small():
    rng = np.random.default_rng(0)
    margins = rng.normal(scale=2, size=20_000)
    flips = rng.random(20_000) > 1 / (1 + np.exp(-margins))
    assert expected_calibration_error(margins, ~flips) < 0.02
    assert expected_calibration_error(3 * margins, ~flips) > 0.08  # too sure
    assert expected_calibration_error(np.array([0.0, 0.0])) == 0.0
    assert expected_calibration_error(np.array([500.0])) == 0.0
    assert expected_calibration_error(np.array([-500.0])) == 1.0


def test_length_correlation():
    lengths = np.array([1, 2, 3, 4])
    assert length_correlation(np.array([2.0, 4.0, 6.0, 8.0]), lengths) == pytest.approx(1)
    assert length_correlation(np.array([2.0, 1.0, 5.0, 3.0]), lengths) == pytest.approx(
        np.corrcoef([2, 1, 5, 3], lengths)[0, 1]
    )
    assert length_correlation(np.ones(4), lengths) == 0.0
