"""Policy gradients: each surrogate against autograd, exact at its edges, and the optimum that PPO's reward must lead to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ingot.errors import ConfigError
from ingot.losses.advantages import generalized_advantages, penalize_missing_eos, token_rewards
from ingot.losses.kl import kl_estimate, kl_loss
from ingot.losses.packed import add_metrics, mean_weights
from ingot.losses.policy import (
    GRPO_LOSS_TYPES,
    entropy_bonus,
    explained_variance,
    grpo_loss,
    ppo_policy_loss,
    reinforce_loss,
    rloo_loss,
    truncated_importance_weights,
    value_loss,
)
from packs import Pack, gradients, leaf, packs
from tabular import ENDED, OFFSETS, TARGETS, adam, d_theta, response_logprobs, token_logprobs

scales = st.sampled_from([0.01, 0.3, 2.0, 500.0])


def clipped(log_ratio, advantages, low, high, delta=None):
    rho = torch.exp(torch.clamp(log_ratio, -20, 20))
    first = rho if delta is None else torch.clamp(rho, max=delta)
    return -torch.minimum(first * advantages, torch.clamp(rho, 1 - low, 1 + high) * advantages)


def close(ours, theirs):
    """f32 against f64, relative to each element and to what cancels in sums of them."""
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6 * np.abs(theirs).max(initial=1e-6))


@settings(max_examples=80, deadline=None)
@given(pack=packs(), scale=scales, delta=st.sampled_from([None, 3.0]))
def test_ppo(pack: Pack, scale, delta):
    lp, old, a = pack.logprobs(scale), pack.logprobs(scale), pack.normal()
    x = leaf(lp)
    per_token = clipped(x - torch.tensor(old), torch.tensor(a), 0.2, 0.2, delta)
    expected = per_token[torch.tensor(pack.counted)].sum() / 50
    loss, d_logprobs, metrics = ppo_policy_loss(lp, old, a, pack.targets, num_tokens=50, delta=delta)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-9, abs=1e-12)
    assert d_logprobs.dtype == np.float32
    close(d_logprobs, gradients(expected, x)[0])
    assert (d_logprobs[~pack.counted] == 0).all()
    d = (lp.astype(float) - old)[pack.counted]
    assert metrics["policy/approxkl_avg"] == pytest.approx((d**2).sum() / 100)
    rho = np.exp(np.clip(d, -20, 20))
    outside = ((rho > 1.2) & (a[pack.counted] > 0)) | ((rho < 0.8) & (a[pack.counted] < 0))
    assert metrics["policy/clipfrac_avg"] == pytest.approx(outside.sum() / 50)
    assert metrics["val/ratio"] == pytest.approx(rho.sum() / 50)


def test_ppo_at_the_edges_of_its_clip():
    """One token at a time, A = +-2, just inside and just outside of each edge."""
    tiny = 1e-9
    for rho, advantage, value, gradient in (
        (1.2 - tiny, 2.0, -2.4, -2.4),
        (1.2 + tiny, 2.0, -2.4, 0.0),
        (0.8 - tiny, 2.0, -1.6, -1.6),
        (0.1, 2.0, -0.2, -0.2),
        (0.8 + tiny, -2.0, 1.6, 1.6),
        (0.8 - tiny, -2.0, 1.6, 0.0),
        (1.2 + tiny, -2.0, 2.4, 2.4),
        (2.9, -2.0, 5.8, 5.8),
        (3.0 + tiny, -2.0, 6.0, 0.0),
        (9.0, 0.0, 0.0, 0.0),
    ):
        loss, d_logprobs, _ = ppo_policy_loss(
            np.array([math.log(rho)]), np.zeros(1), np.array([advantage]), np.zeros(1, int), num_tokens=1, delta=3.0
        )
        assert loss == pytest.approx(value, abs=1e-8), (rho, advantage)
        assert d_logprobs[0] == pytest.approx(gradient, abs=1e-6), (rho, advantage)
    assert ppo_policy_loss(np.array([3.0]), np.zeros(1), np.array([-1.0]), np.zeros(1, int), num_tokens=1)[0] > 20


def test_a_first_pass_has_ratio_one_and_the_gradient_of_reinforce():
    rng = np.random.default_rng(0)
    lp, a, targets = -rng.random(9), rng.normal(size=9), np.where(rng.random(9) < 0.7, 1, -1)
    loss, d_logprobs, metrics = ppo_policy_loss(lp, lp, a, targets, num_tokens=9)
    assert metrics["val/ratio"] == (targets >= 0).sum() / 9
    assert metrics["policy/approxkl_avg"] == metrics["policy/clipfrac_avg"] == 0
    assert loss == pytest.approx(-a[targets >= 0].sum() / 9)
    plain = reinforce_loss(
        lp, a, targets, mean_weights(targets >= 0, np.array([0, 9]), reduction="token_mean", total=9)
    )
    np.testing.assert_allclose(d_logprobs, plain[1], rtol=1e-6)
    assert plain[0] == pytest.approx(-(a * lp)[targets >= 0].sum() / 9)


@settings(max_examples=80, deadline=None)
@given(pack=packs(), scale=scales, clip=st.sampled_from([None, 0.2]))
def test_values(pack: Pack, scale, clip):
    v, old, goal = pack.normal(scale), pack.normal(scale), pack.normal(scale)
    x, counted = leaf(v), torch.tensor(pack.counted)
    error = (x - torch.tensor(goal)) ** 2
    if clip is not None:
        held = torch.clamp(x, torch.tensor(old.astype(float) - clip), torch.tensor(old.astype(float) + clip))
        other = (held - torch.tensor(goal)) ** 2
        assume(not ((error == other) & (held != x)).any())
        error = torch.maximum(error, other)
    expected = 0.3 * 0.5 * error[counted].sum() / 50
    loss, d_values, metrics = value_loss(v, old, goal, pack.targets, num_tokens=50, vf_coef=0.3, cliprange_value=clip)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-9, abs=1e-12)
    close(d_values, gradients(expected, x)[0])
    assert (d_values[~pack.counted] == 0).all()
    assert metrics["loss/value_avg"] == pytest.approx(loss / 0.3)


def test_values_at_the_edges_of_their_clip():
    """V_old = 0, return 1: moving away from the goal is free to be undone, moving to it stops mattering past the edge."""
    for v, value, gradient in ((0.1, 0.405, -0.9), (0.5, 0.32, 0.0), (-0.5, 1.125, -1.5), (0.2, 0.32, -0.8)):
        loss, d_values, _ = value_loss(
            np.array([v]), np.zeros(1), np.ones(1), np.zeros(1, int), num_tokens=1, vf_coef=1.0
        )
        assert (loss, d_values[0]) == (pytest.approx(value), pytest.approx(gradient))


def test_entropy_bonus_and_explained_variance():
    targets, entropy = np.array([1, -1, 2]), np.array([0.5, 9.0, 1.5])
    loss, d_entropy, metrics = entropy_bonus(entropy, targets, num_tokens=4, ent_coef=0.1)
    assert (loss, metrics["policy/entropy_avg"]) == (pytest.approx(-0.05), 0.5)
    assert d_entropy.tolist() == pytest.approx([-0.025, 0, -0.025])
    returns = np.array([1.0, 100.0, 3.0])
    assert explained_variance(returns, returns, targets) == 1.0
    assert explained_variance(np.array([2.0, 0.0, 2.0]), returns, targets) == 0.0
    assert explained_variance(np.array([3.0, 0.0, 1.0]), returns, targets) == -3.0
    assert explained_variance(returns, np.ones(3), targets) == 0.0


def grpo_written_out(pack, x, old, a, loss_type, level, low, high, delta, beta, ref, max_length):
    """Sequence by sequence, as the papers have it."""
    total, num_tokens = x.sum() * 0, 40
    for i, part in enumerate(pack.slices()):
        counted = torch.tensor(pack.counted[part])
        n = int(counted.sum())
        if n == 0:
            continue
        lp, before = x[part][counted], torch.tensor(old[part])[counted]
        advantages = torch.tensor(a[part])[counted] if len(a) == len(old) else torch.tensor(a[i]).expand(n)
        log_ratio = lp - before
        if level == "sequence":
            log_ratio = log_ratio.mean().expand(n)
        if loss_type == "cispo":
            rho = torch.exp(torch.clamp(log_ratio, -20, 20))
            losses = -torch.clamp(rho, max=high).detach() * advantages * lp
        else:
            losses = clipped(log_ratio, advantages, low, high, delta)
        if beta:
            d = lp - torch.tensor(ref[part])[counted]
            losses = losses + beta * (torch.exp(torch.clamp(-d, -20, 20)) - 1 + d)
        match loss_type:
            case "grpo":
                total = total + losses.mean() / 9
            case "dr_grpo":
                total = total + losses.sum() / (9 * max_length)
            case _:
                total = total + losses.sum() / num_tokens
    return total


@pytest.mark.parametrize("loss_type", GRPO_LOSS_TYPES)
@pytest.mark.parametrize("of", ["token", "sequence"])
@settings(max_examples=40, deadline=None)
@given(
    pack=packs(),
    scale=scales,
    delta=st.sampled_from([None, 4.0]),
    beta=st.sampled_from([0.0, 0.04]),
    by_token=st.booleans(),
)
def test_grpo_family(loss_type, of, pack: Pack, scale, delta, beta, by_token):
    lp, old, ref = pack.logprobs(scale), pack.logprobs(scale), pack.logprobs(scale)
    assume(len(lp) != pack.num_sequences)
    a = pack.rng.normal(size=len(lp) if by_token else pack.num_sequences)
    cispo = loss_type == "cispo"
    high = 5.0 if cispo else 0.28
    delta = None if cispo else delta
    x = leaf(lp)
    expected = grpo_written_out(pack, x, old, a, loss_type, of, 0.2, high, delta, beta, ref, 16)
    loss, d_logprobs, metrics = grpo_loss(
        lp,
        old,
        a,
        pack.targets,
        pack.offsets,
        num_sequences=9,
        num_tokens=40,
        max_completion_length=16 if loss_type == "dr_grpo" else None,
        loss_type=loss_type,
        importance_sampling_level=of,
        epsilon_high=high,
        delta=delta,
        beta=beta,
        ref_logprobs=ref if beta else None,
    )
    assert loss == pytest.approx(float(expected.detach()), rel=1e-9, abs=1e-12)
    close(d_logprobs, gradients(expected, x)[0])
    assert (d_logprobs[~pack.counted] == 0).all()
    assert metrics["num_dropped"] == 0
    if not cispo:
        assert metrics["clip_ratio/region_mean"] == pytest.approx(
            metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"]
        )


def test_a_clipped_response_has_no_gradient_and_is_counted():
    old = np.full(5, -1.0)
    lp = old + np.array([0.5, 0.5, 0.5, -0.1, 0.0])
    a, targets, offsets = np.array([1.0, -1.0]), np.zeros(5, int), np.array([0, 3, 5])
    for level, share in (("token", 3 / 5), ("sequence", 1 / 2)):
        _, d_logprobs, metrics = grpo_loss(
            lp, old, a, targets, offsets, num_sequences=2, num_tokens=5, importance_sampling_level=level
        )
        assert d_logprobs[:3].tolist() == [0, 0, 0]
        assert (d_logprobs[3:] > 0).all()
        assert metrics["clip_ratio/high_mean"] == share
        assert (metrics["clip_ratio/low_min"], metrics["clip_ratio/high_max"]) == (0, 1)


@pytest.mark.parametrize("loss_type", GRPO_LOSS_TYPES)
def test_sequences_in_parts_add_up(loss_type):
    rng = np.random.default_rng(3)
    offsets = np.array([0, 4, 4, 9, 12])
    lp, old, ref = -rng.random((3, 12))
    a, targets = rng.normal(size=4), np.where(rng.random(12) < 0.8, 1, -1)
    wanted = {
        "num_sequences": 4,
        "num_tokens": 9,
        "loss_type": loss_type,
        "max_completion_length": 8 if loss_type == "dr_grpo" else None,
        "epsilon_high": 1.3 if loss_type == "cispo" else None,
        "beta": 0.1,
    }
    whole = grpo_loss(lp, old, a, targets, offsets, ref_logprobs=ref, **wanted)
    parts = []
    for start, end in ((0, 2), (2, 4)):
        rows = slice(offsets[start], offsets[end])
        cut = offsets[start : end + 1] - offsets[start]
        parts.append(grpo_loss(lp[rows], old[rows], a[start:end], targets[rows], cut, ref_logprobs=ref[rows], **wanted))
    assert sum(part[0] for part in parts) == pytest.approx(whole[0])
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), whole[1], rtol=1e-6)
    assert add_metrics(part[2] for part in parts) == pytest.approx(whole[2])


@settings(max_examples=60, deadline=None)
@given(pack=packs(), scale=scales)
def test_rloo(pack: Pack, scale):
    lp, old = pack.logprobs(scale), pack.logprobs(scale)
    a = pack.rng.normal(size=pack.num_sequences)
    x = leaf(lp)
    expected = x.sum() * 0
    for i, part in enumerate(pack.slices()):
        counted = torch.tensor(pack.counted[part])
        log_ratio = (x[part][counted] - torch.tensor(old[part])[counted]).sum()
        expected = expected + clipped(log_ratio, torch.tensor(a[i]), 0.2, 0.3) / 7
    loss, d_logprobs, metrics = rloo_loss(lp, old, a, pack.targets, pack.offsets, num_sequences=7, epsilon_high=0.3)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-9, abs=1e-12)
    close(d_logprobs, gradients(expected, x)[0])
    assert (d_logprobs[~pack.counted] == 0).all()
    assert 0 <= metrics["clip_ratio/region_mean"] <= 1


def test_tokens_that_are_not_finite_give_nothing_and_are_counted():
    lp, old = np.array([-1.0, -np.inf, -1.0, np.nan, -1.0]), np.full(5, -1.05)
    targets, offsets = np.array([1, 1, 1, -1, 1]), np.array([0, 2, 5])
    a = np.ones(5)
    loss, d_logprobs, metrics = ppo_policy_loss(lp, old, a, targets, num_tokens=4)
    assert math.isfinite(loss)
    assert (d_logprobs != 0).tolist() == [True, False, True, False, True]
    assert metrics["num_dropped"] == 1
    assert value_loss(lp, old, a, targets, num_tokens=4)[2]["num_dropped"] == 1
    assert reinforce_loss(lp, a, targets, a)[2]["num_dropped"] == 1
    assert entropy_bonus(lp, targets, num_tokens=4, ent_coef=1.0)[2]["num_dropped"] == 1
    wanted = {"num_sequences": 2, "num_tokens": 4}
    by_token = grpo_loss(lp, old, a[:2], targets, offsets, **wanted)
    assert (by_token[1] != 0).tolist() == [True, False, True, False, True]
    # A ratio over part of a response would be another one: all of it goes.
    by_sequence = grpo_loss(lp, old, a[:2], targets, offsets, importance_sampling_level="sequence", **wanted)
    assert (by_sequence[1] != 0).tolist() == [False, False, True, False, True]
    whole = rloo_loss(lp, old, a[:2], targets, offsets, num_sequences=2)
    assert (whole[1] != 0).tolist() == [False, False, True, False, True]
    assert rloo_loss(old, old, np.array([np.nan, 1.0]), targets, offsets, num_sequences=2)[0] == -0.5


def test_settings_that_do_not_fit_are_refused():
    lp, a, targets, offsets = np.zeros(2), np.zeros(1), np.zeros(2, int), np.array([0, 2])
    for wrong in (
        {"loss_type": "ppo"},
        {"importance_sampling_level": "word"},
        {"loss_type": "cispo"},
        {"loss_type": "dr_grpo"},
        {"max_completion_length": 8},
        {"beta": 0.1},
        {"ref_logprobs": lp},
        {"epsilon": 0.0},
        {"epsilon_high": -0.1},
        {"delta": 1.1},
    ):
        with pytest.raises(ConfigError):
            grpo_loss(lp, lp, a, targets, offsets, **{"num_sequences": 1, "num_tokens": 2, **wrong})
    with pytest.raises(ConfigError):
        value_loss(lp, lp, lp, targets, num_tokens=2, cliprange_value=0.0)
    with pytest.raises(ValueError, match="advantages"):
        grpo_loss(lp, lp, np.zeros(3), targets, offsets, num_sequences=1, num_tokens=2)


def test_importance_weights_are_capped():
    weights = truncated_importance_weights(np.log([0.5, 0.9, 0.1]), np.log([0.25, 0.1, 0.2]))
    assert weights == pytest.approx([2.0, 3.0, 0.5])


# What the optimum is, by listing every response.

BETA = 0.5


def test_ppo_with_the_exact_gradient_reaches_the_optimum():
    """max of E r - beta KL(pi | ref) is beta ln E_ref e^(r / beta), reached by pi* = ref e^(r / beta) / Z; an end that is missing
    costs 1."""
    rng = np.random.default_rng(8)
    ref = rng.normal(size=(13, 4))
    scores = penalize_missing_eos(rng.normal(size=len(ENDED)), ENDED, missing_eos_penalty=1.0)
    ref_logprobs, ref_logps = token_logprobs(ref), response_logprobs(ref)
    best = BETA * math.log(np.exp(ref_logps + scores / BETA).sum())

    def objective(theta):
        logps = response_logprobs(theta)
        return float(np.exp(logps) @ (scores - BETA * (logps - ref_logps)))

    def gradient(theta):
        lp = token_logprobs(theta)
        rewards, _ = token_rewards(scores, lp, ref_logprobs, TARGETS, OFFSETS, kl_coef=BETA)
        advantages, _ = generalized_advantages(rewards, np.zeros(len(lp)), TARGETS, OFFSETS, lam=1.0)
        # An expectation over all responses: each token weighs as its response is likely.
        probability = np.repeat(np.exp(response_logprobs(theta)), np.diff(OFFSETS))
        _, d_logprobs, _ = ppo_policy_loss(lp, lp, advantages * probability, TARGETS, num_tokens=1)
        return d_theta(theta, d_logprobs.astype(float))

    theta = adam(ref.copy(), gradient, steps=800, lr=0.1)
    assert objective(ref) < best - 0.1
    assert best - 1e-6 <= objective(theta) <= best + 1e-12


@pytest.mark.parametrize(("kl_estimator", "forward"), [("k2", False), ("k3", True)])
def test_the_kl_loss_chooses_the_optimum(kl_estimator, forward):
    """With k2 the fixed point is that of KL(pi | ref); with k3 that of KL(ref | pi): pi = ref beta / (lambda - r), another policy."""
    rng = np.random.default_rng(1)
    ref, reward, beta = np.full(6, 1 / 6), rng.random(6), 0.7
    targets, offsets = np.arange(6), np.arange(7)

    def probabilities(theta):
        return np.exp(theta - theta.max()) / np.exp(theta - theta.max()).sum()

    def gradient(theta):
        p = probabilities(theta)
        lp = np.log(p)
        _, d_policy, _ = grpo_loss(lp, lp, reward * p, targets, offsets, num_sequences=1, num_tokens=1)
        _, d_kl, _ = kl_loss(lp, np.log(ref), targets, p, beta=beta, kl_estimator=kl_estimator)
        d = d_policy.astype(float) + d_kl
        return d - d.sum() * p

    p = probabilities(adam(np.zeros(6), gradient, steps=1500, lr=0.05))
    if forward:
        low, high = reward.max() + 1e-9, reward.max() + 10
        for _ in range(200):  # the multiplier for which the probabilities sum to 1
            middle = (low + high) / 2
            low, high = (middle, high) if (ref * beta / (middle - reward)).sum() > 1 else (low, middle)
        expected = ref * beta / (middle - reward)
    else:
        expected = ref * np.exp(reward / beta)
        expected /= expected.sum()
    np.testing.assert_allclose(p, expected, atol=1e-5)


@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_only_k1_in_the_reward_leads_to_the_optimum_of_reward_less_kl(kl_estimator):
    """The exact gradient of E[r - beta k] with k taken as a constant, for one step of eight letters of which one is worth 1."""
    reward, beta, reference = np.eye(8)[0], 0.5, np.full(8, math.log(1 / 8))
    theta = np.zeros(8)
    for _ in range(4000):
        logprobs = theta - np.log(np.exp(theta).sum())
        score = reward - beta * kl_estimate(logprobs, reference, kl_estimator)[0]
        theta = np.maximum(theta + 0.1 * np.exp(logprobs) * (score - np.exp(logprobs) @ score), -9.0)
    optimum = math.exp(1 / beta) / (math.exp(1 / beta) + 7)
    if kl_estimator == "k1":
        assert np.exp(logprobs[0]) == pytest.approx(optimum, abs=1e-3)
    else:
        assert np.exp(logprobs[0]) > 0.9
