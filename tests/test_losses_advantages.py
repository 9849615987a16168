"""Advantages and the KL penalty: against definitions written another way, and the invariances that each method promises."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ingot.errors import ConfigError
from ingot.losses.advantages import (
    generalized_advantages,
    group_advantages,
    penalize_missing_eos,
    reinforce_plus_plus_advantages,
    rloo_advantages,
    token_rewards,
    whiten,
)
from ingot.losses.best_of_n import best_of_n_kl_bound, best_rows, expected_max
from ingot.losses.kl import KL_ESTIMATORS, AdaptiveKLController, FixedKLController, kl_estimate, kl_loss
from ingot.losses.packed import sum_by_sequence
from packs import Pack, gradients, leaf, packs
from tabular import ENDED, OFFSETS, RESPONSES, TARGETS, response_logprobs, token_logprobs

seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=40, deadline=None)
@given(
    pack=packs(),
    gamma=st.sampled_from([1.0, 0.9]),
    lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    bootstrap=st.booleans(),
)
def test_gae_is_the_lambda_mixture_of_n_step_returns(pack: Pack, gamma, lam, bootstrap):
    """A_t + V_t = (1 - lam) sum_n lam^(n - 1) G_n, all the weight that is left on the last, complete one."""
    rewards, values = pack.normal().astype(float), pack.normal().astype(float)
    ends = pack.rng.normal(size=pack.num_sequences) if bootstrap else None
    advantages, returns = generalized_advantages(
        rewards, values, pack.targets, pack.offsets, gamma=gamma, lam=lam, end_values=ends
    )
    assert (advantages[~pack.counted] == 0).all()
    assert (returns[~pack.counted] == 0).all()
    for i, part in enumerate(pack.slices()):
        rows = part.start + np.flatnonzero(pack.counted[part])
        r = rewards[rows]
        v = np.append(values[rows], 0.0 if ends is None else ends[i])
        for t in range(len(rows)):
            left = len(rows) - t
            g = [sum(gamma**k * r[t + k] for k in range(n)) + gamma**n * v[t + n] for n in range(1, left + 1)]
            weights = [(1 - lam) * lam ** (n - 1) for n in range(1, left)] + [lam ** (left - 1)]
            mixed = float(np.dot(weights, g))
            assert returns[rows[t]] == pytest.approx(mixed, abs=1e-12)
            assert advantages[rows[t]] == pytest.approx(mixed - v[t], abs=1e-12)


def test_gae_of_a_broken_episode_stays_in_it():
    rewards = np.array([1.0, np.inf, 1.0, 1.0])
    advantages, _ = generalized_advantages(rewards, np.zeros(4), np.zeros(4, int), np.array([0, 2, 4]), lam=1.0)
    assert np.isnan(advantages).tolist() == [True, True, False, False]
    white = whiten(advantages, np.zeros(4, int))
    assert white[2:] == pytest.approx([1.0, -1.0], abs=1e-6)
    assert np.isnan(white[:2]).all()


def test_scores_are_paid_on_the_last_counted_token():
    lp, ref = np.array([-1.0, -2.0, -3.0, -1.0, -1.0]), np.array([-1.5, -1.0, -3.0, -9.0, -2.0])
    targets, offsets = np.array([1, 1, -1, -1, 1]), np.array([0, 3, 4, 5])
    rewards, metrics = token_rewards(np.array([10.0, 20.0, 30.0]), lp, ref, targets, offsets, kl_coef=0.1)
    assert rewards == pytest.approx([-0.05, 10.1, 0, 0, 29.9])
    assert metrics["objective/kl"] == pytest.approx((0.5 - 1.0 + 0 + 1.0) / 3)
    assert metrics["objective/scores"] == 20
    assert metrics["objective/rlhf_reward"] == pytest.approx(20 - 0.1 * 0.5 / 3)
    assert sum_by_sequence(rewards, targets, offsets) == pytest.approx([10.05, 0, 29.9])
    k3, _ = token_rewards(np.zeros(3), lp, ref, targets, offsets, kl_coef=1.0, kl_estimator="k3")
    assert k3[0] == pytest.approx(-(math.exp(-0.5) - 1 + 0.5))


def test_an_episode_that_is_not_finite_leaves_the_means():
    targets, offsets = np.zeros(3, int), np.array([0, 1, 2, 3])
    lp = np.array([-1.0, -np.inf, -1.0])
    rewards, metrics = token_rewards(np.array([1.0, 1.0, np.nan]), lp, lp, targets, offsets, kl_coef=0.1)
    assert np.isfinite(rewards).tolist() == [True, False, False]
    assert (metrics["objective/scores"], metrics["num_dropped"]) == (1.0, 2.0)


def test_a_missing_end_costs():
    scores, ended = np.array([3.0, 2.0]), np.array([True, False])
    assert penalize_missing_eos(scores, ended).tolist() == [3, 1]
    assert penalize_missing_eos(scores, ended, missing_eos_penalty=1.0, replace=True).tolist() == [3, -1]


@settings(max_examples=40, deadline=None)
@given(packs(min_sequences=2, max_length=9))
def test_whitening(pack: Pack):
    x = (3 + 2 * pack.normal()).astype(float)
    sample = x[pack.counted]
    assume(sample.var() > 0.1)
    white = whiten(x, pack.targets)
    assert white[pack.counted].mean() == pytest.approx(0, abs=1e-9)
    assert white[pack.counted].std() == pytest.approx(math.sqrt(sample.var() / (sample.var() + 1e-8)))
    assert (white[~pack.counted] == 0).all()
    kept = whiten(x, pack.targets, shift_mean=False)
    assert kept[pack.counted].mean() == pytest.approx(sample.mean())
    np.testing.assert_allclose(whiten(5 * x + 2, pack.targets), white, atol=1e-6)
    assert (whiten(x, np.full(len(x), -1)) == 0).all()


@settings(max_examples=60, deadline=None)
@given(seed=seeds, scale=st.sampled_from([0.1, 1.0, 500.0]))
def test_group_advantages_are_those_of_torch(seed, scale):
    rng = np.random.default_rng(seed)
    rewards = torch.tensor(rng.normal(scale=scale, size=(3, 4)))
    rewards[0] = rewards[0, 0]
    ids, order = np.repeat([7, 1, 4], 4), rng.permutation(12)
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
    std[0] = 0
    flat = rewards.numpy().ravel()
    for scaled, expected in (
        ("group", (rewards - mean) / (std + 1e-4)),
        ("batch", (rewards - mean) / (rewards.std() + 1e-4)),
        ("none", rewards - mean),
    ):
        ours, metrics = group_advantages(flat[order], ids[order], scale_rewards=scaled)
        np.testing.assert_allclose(ours, expected.ravel()[order], rtol=1e-9, atol=1e-9 * scale)
        assert metrics["frac_reward_zero_std"] == pytest.approx(1 / 3)
        assert metrics["reward_std"] == pytest.approx(float(rewards.std()))
    others = (rewards.sum(1, keepdim=True) - rewards) / 3
    ours, _ = rloo_advantages(flat[order], ids[order])
    np.testing.assert_allclose(ours, (rewards - others).ravel()[order], rtol=1e-9, atol=1e-9 * scale)
    assert np.bincount(ids[order], ours) == pytest.approx(np.zeros(8), abs=1e-9 * scale)
    normalized, _ = rloo_advantages(flat, ids, normalize_advantages=True)
    wanted = (rewards - others).ravel()
    np.testing.assert_allclose(normalized, (wanted - wanted.mean()) / (wanted.std() + 1e-4), rtol=1e-7, atol=1e-9)


def test_group_advantages_do_not_see_affine_changes_of_the_reward():
    rng = np.random.default_rng(0)
    rewards, ids = rng.normal(size=12), np.repeat(np.arange(3), 4)
    shifts = np.array([5.0, -2.0, 0.0])[ids]
    for scaled in ("group", "none"):
        ours, _ = group_advantages(rewards, ids, scale_rewards=scaled)
        np.testing.assert_allclose(group_advantages(rewards + shifts, ids, scale_rewards=scaled)[0], ours, atol=1e-12)
    np.testing.assert_allclose(
        group_advantages(1e3 * rewards, ids)[0], group_advantages(1e6 * rewards, ids)[0], rtol=1e-6
    )
    np.testing.assert_allclose(rloo_advantages(rewards + shifts, ids)[0], rloo_advantages(rewards, ids)[0], atol=1e-12)


def test_leaving_oneself_out_is_unbiased_and_the_plain_mean_shrinks():
    """All 64 groups of three samples from four outcomes: the mean gradient is the exact one, or (K - 1) / K of it."""
    rng = np.random.default_rng(6)
    logits, reward, size = rng.normal(size=4), rng.normal(size=4), 3
    p = np.exp(logits) / np.exp(logits).sum()
    exact = p * (reward - p @ reward)
    leave_one_out, plain = np.zeros(4), np.zeros(4)
    for group in itertools.product(range(4), repeat=size):
        rewards, ids = reward[list(group)], np.zeros(size, int)
        scores = np.eye(4)[list(group)] - p  # d ln p(outcome) / d logits
        chance = p[list(group)].prod() / size
        leave_one_out += chance * rloo_advantages(rewards, ids)[0] @ scores
        plain += chance * group_advantages(rewards, ids, scale_rewards="none")[0] @ scores
    np.testing.assert_allclose(leave_one_out, exact, atol=1e-14)
    np.testing.assert_allclose(plain, exact * (size - 1) / size, atol=1e-14)


def test_responses_without_a_score_or_without_company_teach_nothing():
    rewards, ids = np.array([1.0, np.nan, 3.0, 4.0]), np.array([0, 0, 0, 1])
    ours, metrics = group_advantages(rewards, ids, scale_rewards="none")
    assert ours == pytest.approx([-1, 0, 1, 0])
    assert (metrics["num_dropped"], metrics["reward"], metrics["frac_reward_zero_std"]) == (
        1,
        pytest.approx(8 / 3),
        0.5,
    )
    assert rloo_advantages(rewards, ids)[0] == pytest.approx([-2, 0, 2, 0])
    assert rloo_advantages(rewards, ids, normalize_advantages=True)[0][[1, 3]].tolist() == [0, 0]
    assert group_advantages(rewards, ids)[0][3] == 0
    with pytest.raises(ConfigError):
        group_advantages(rewards, ids, scale_rewards="prompt")


def test_reinforce_plus_plus_whitens_what_is_still_to_come():
    rewards, targets, offsets = np.array([1.0, 2.0, 9.0, 4.0, 0.0]), np.array([1, 1, -1, 1, 1]), np.array([0, 4, 5])
    to_go = np.array([1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 4, 0])
    ours = reinforce_plus_plus_advantages(rewards, targets, offsets, gamma=0.5)
    assert ours[[0, 1, 3, 4]] == pytest.approx((to_go - to_go.mean()) / math.sqrt(to_go.var() + 1e-8))
    assert ours[2] == 0


# The KL penalty.


def test_estimates_and_their_bounds():
    d = np.array([-500.0, -1.0, 0.0, 1.0, 500.0])
    assert kl_estimate(d, np.zeros(5), "k1")[0].tolist() == d.tolist()
    assert kl_estimate(d, np.zeros(5), "k2")[0].tolist() == (d**2 / 2).tolist()
    k3, d_k3 = kl_estimate(d, np.zeros(5), "k3")
    assert k3 == pytest.approx([math.exp(20) - 501, math.e - 2, 0, math.exp(-1), 499])
    assert d_k3 == pytest.approx([1, 1 - math.e, 0, 1 - math.exp(-1), 1])
    assert (k3[1:] >= 0).all()


@settings(max_examples=60, deadline=None)
@given(pack=packs(), scale=st.sampled_from([0.01, 1.0, 500.0]), kind=st.sampled_from(["k2", "k3"]))
def test_kl_loss_is_that_of_autograd(pack: Pack, scale, kind):
    lp, ref = pack.logprobs(scale), pack.logprobs(scale)
    weights = pack.rng.random(len(lp))
    x = leaf(lp)
    d = x - torch.tensor(ref)
    k = d**2 / 2 if kind == "k2" else torch.exp(torch.clamp(-d, -20, 20)) - 1 + d
    expected = 0.3 * (torch.tensor(weights * pack.counted) * k).sum()
    loss, d_logprobs, metrics = kl_loss(lp, ref, pack.targets, weights, beta=0.3, kl_estimator=kind)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-9, abs=1e-12)
    theirs = gradients(expected, x)[0]
    np.testing.assert_allclose(d_logprobs, theirs, rtol=1e-6, atol=1e-9)
    assert (d_logprobs[~pack.counted] == 0).all()
    assert metrics["kl"] == pytest.approx(loss / 0.3)


def test_expected_gradients_are_those_of_the_two_divergences():
    """Over all outcomes of a softmax: E[grad k1] = 0, E[grad k2] = grad KL(pi | ref), E[grad k3] = grad KL(ref | pi)."""
    rng = np.random.default_rng(0)
    theta, ref = leaf(rng.normal(size=7)), torch.log_softmax(torch.tensor(rng.normal(size=7)), 0)
    logps = torch.log_softmax(theta, 0)
    p = logps.detach().exp().numpy()
    (reverse,) = gradients((logps.exp() * (logps - ref)).sum(), theta)
    (forward,) = gradients((ref.exp() * (ref - torch.log_softmax(theta, 0))).sum(), theta)
    assert np.abs(reverse - forward).max() > 0.01
    found = {}
    for kind in KL_ESTIMATORS:
        _, d_k = kl_estimate(logps.detach().numpy(), ref.numpy(), kind)
        found[kind] = p * d_k - p * (p @ d_k)
    np.testing.assert_allclose(found["k1"], np.zeros(7), atol=1e-15)
    np.testing.assert_allclose(found["k2"], reverse, atol=1e-14)
    np.testing.assert_allclose(found["k3"], forward, atol=1e-14)
    expectation = [p @ kl_estimate(logps.detach().numpy(), ref.numpy(), kind)[0] for kind in ("k1", "k3")]
    assert expectation == pytest.approx([float((logps.exp() * (logps - ref)).sum().detach())] * 2)


def test_k1_is_refused_as_a_loss_and_broken_tokens_are_dropped():
    lp, targets = np.array([-1.0, -np.inf]), np.zeros(2, int)
    with pytest.raises(ConfigError, match="k1"):
        kl_loss(lp, lp, targets, np.ones(2), beta=1.0, kl_estimator="k1")
    with pytest.raises(ConfigError, match="k4"):
        kl_estimate(np.zeros(1), np.zeros(1), "k4")
    loss, d_logprobs, metrics = kl_loss(lp, np.array([-2.0, -1.0]), targets, np.ones(2), beta=1.0)
    assert (loss, d_logprobs[1], metrics["num_dropped"]) == (pytest.approx(math.exp(-1)), 0, 1)


def test_controllers():
    fixed = FixedKLController(0.1)
    assert fixed.updated(100.0, 64).kl_coef == 0.1
    start = AdaptiveKLController(kl_coef=0.1, target=6.0, horizon=10_000)
    assert start.updated(6.0, 512).kl_coef == 0.1
    assert start.updated(6.6, 500).kl_coef == pytest.approx(0.1 * 1.005)
    assert start.updated(600.0, 500).kl_coef == pytest.approx(0.1 * 1.01)
    assert start.updated(0.0, 500).kl_coef == pytest.approx(0.1 * 0.99)
    # A policy whose KL is 1 / beta settles where that is the target.
    controller = start
    for _ in range(3000):
        controller = controller.updated(1 / controller.kl_coef, 500)
    assert 1 / controller.kl_coef == pytest.approx(6.0, rel=1e-3)
    with pytest.raises(ConfigError):
        AdaptiveKLController(kl_coef=0.0)


# Best of n.


def test_expected_max_is_the_mean_over_all_subsets():
    scores = np.array([0.3, -1.0, 2.0, 2.0, 0.5, -3.0, 1.0])
    ours = expected_max(scores)
    for n in range(1, 8):
        subsets = [max(subset) for subset in itertools.combinations(scores, n)]
        assert ours[n - 1] == pytest.approx(np.mean(subsets), abs=1e-12)
    many = expected_max(np.random.default_rng(0).normal(size=3000))
    assert np.isfinite(many).all()
    assert (np.diff(many) >= -1e-9).all()
    assert many[3] == pytest.approx(1.0294, abs=0.06)  # E[max of 4 normals]


def test_best_of_four_by_listing_all_responses():
    """Gain and cost of best of 4 in closed form, then by sampling."""
    rng = np.random.default_rng(5)
    theta, scores = rng.normal(size=(13, 4)), rng.normal(size=len(RESPONSES))
    p = np.exp(response_logprobs(theta))
    assert p.sum() == pytest.approx(1)
    np.testing.assert_allclose(sum_by_sequence(token_logprobs(theta), TARGETS, OFFSETS), np.log(p), rtol=1e-12)
    assert len(p) == 40
    assert ENDED.sum() == 13
    order = np.argsort(scores)
    below = np.concatenate([[0], np.cumsum(p[order])])
    best = np.empty(40)
    best[order] = np.diff(below**4)
    kl = float(best @ np.log(best / p))
    assert 0.5 * best_of_n_kl_bound(4) < kl <= best_of_n_kl_bound(4)
    draws = rng.choice(40, size=(20_000, 4), p=p / p.sum())
    rows = best_rows(scores[draws.ravel()], np.repeat(np.arange(20_000), 4))
    kept = scores[draws.ravel()[rows]]
    assert abs(kept.mean() - best @ scores) <= 3 * kept.std() / math.sqrt(20_000)
    assert p @ scores < best @ scores
    by_order_statistics = np.mean([expected_max(scores[draws[i : i + 4].ravel()])[3] for i in range(0, 4000, 4)])
    assert by_order_statistics == pytest.approx(best @ scores, abs=0.05)


def test_bound_and_rows():
    assert best_of_n_kl_bound(1) == 0
    assert best_of_n_kl_bound(4) == pytest.approx(0.6363, abs=1e-4)
    with pytest.raises(ValueError, match="n must be"):
        best_of_n_kl_bound(0)
    scores, ids = np.array([1.0, 3.0, 3.0, np.nan, -1.0, np.nan]), np.array([5, 5, 5, 2, 2, 9])
    assert best_rows(scores, ids).tolist() == [4, 1]
    assert best_rows(scores, ids, threshold=0.0).tolist() == [1]
