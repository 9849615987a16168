"""Fine-tuning and distillation: against torch's cross-entropy and KL through real logits, and by what a student ends up with."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.errors import ConfigError
from ingot.losses.advantages import generalized_advantages
from ingot.losses.distillation import (
    TAIL_FLOOR,
    generalized_jsd_loss,
    reverse_kl_advantages,
    topk_distillation_loss,
)
from ingot.losses.next_token import next_token_loss, token_weights
from ingot.losses.packed import mean_weights
from ingot.losses.policy import ppo_policy_loss
from ingot.losses.sft import relative_weights, sft_loss, token_metrics, unlikelihood_loss
from packs import Pack, gradients, leaf, packs
from tabular import OFFSETS, TARGETS, adam, d_theta, log_softmax, response_logprobs, token_logprobs

seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=60, deadline=None)
@given(pack=packs(), prompt_weight=st.sampled_from([0.0, 0.1, 1.0]))
def test_the_three_means(pack: Pack, prompt_weight):
    mask = pack.rng.random(len(pack.targets)) < 0.6
    relative = relative_weights(pack.targets, mask, prompt_weight=prompt_weight)
    assert (relative[~pack.counted] == 0).all()
    assert relative[pack.counted].tolist() == np.where(mask, 1.0, prompt_weight)[pack.counted].tolist()
    nll = pack.rng.random(len(relative))
    total = relative.sum()
    if total > 0:
        weights = mean_weights(relative, pack.offsets, reduction="token_mean", total=total)
        assert weights @ nll == pytest.approx(np.average(nll, weights=relative))
    by_sequence = [np.average(nll[p], weights=relative[p]) for p in pack.slices() if relative[p].sum() > 0]
    weights = mean_weights(relative, pack.offsets, reduction="sequence_mean", total=max(len(by_sequence), 1))
    assert weights @ nll == pytest.approx(np.mean(by_sequence) if by_sequence else 0.0)
    assert mean_weights(relative, pack.offsets, reduction="sum") @ nll == pytest.approx(relative @ nll)


def test_token_mean_is_the_weights_of_pretraining():
    targets, offsets = np.array([1, -1, 0, 5]), np.array([0, 2, 4])
    ours = mean_weights(targets >= 0, offsets, reduction="token_mean", total=12)
    np.testing.assert_allclose(ours, token_weights(targets, 12), rtol=1e-7)
    lp = np.array([-1.0, 0.0, -2.0, -3.0], np.float32)
    loss, d_logprobs, d_lse, d_zbar, _ = sft_loss(lp, targets, ours)
    same = next_token_loss(lp, targets, token_weights(targets, 12))
    assert loss == pytest.approx(same[0])
    np.testing.assert_array_equal(d_logprobs, same[1])
    assert (d_lse, d_zbar) == (None, None)
    with pytest.raises(ConfigError):
        mean_weights(targets >= 0, offsets, reduction="mean")
    with pytest.raises(ConfigError):
        relative_weights(targets, targets > 0, prompt_weight=-1.0)


@settings(max_examples=60, deadline=None)
@given(
    pack=packs(),
    eps=st.sampled_from([0.0, 0.1]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    scale=st.sampled_from([0.1, 3.0, 100.0]),
)
def test_smoothing_and_z_loss_through_the_logits(pack: Pack, eps, z_loss, scale):
    """Our gradients by ln p, lse and zbar, sent on to the logits, are those of torch's own smoothed cross-entropy."""
    num, vocabulary = len(pack.targets), 5
    logits = leaf(pack.rng.normal(scale=scale, size=(num, vocabulary)))
    weights = pack.rng.random(num)
    lse, zbar = torch.logsumexp(logits, 1), logits.mean(1)
    lp = logits[:, 3] - lse
    each = F.cross_entropy(logits, torch.full((num,), 3), label_smoothing=eps, reduction="none") + z_loss * lse**2
    expected = (each * torch.tensor(weights * pack.counted)).sum()
    outputs = [x.detach().numpy() for x in (lp, lse, zbar)]
    loss, *ours, metrics = sft_loss(
        outputs[0], pack.targets, weights, label_smoothing=eps, z_loss=z_loss, lse=outputs[1], zbar=outputs[2]
    )
    assert loss == pytest.approx(float(expected.detach()), rel=1e-9, abs=1e-12)
    assert metrics["nll_loss"] == pytest.approx(-float((weights * pack.counted) @ outputs[0]))
    used = [(x, g) for x, g in zip((lp, lse, zbar), ours, strict=True) if g is not None]
    assert len(used) == 1 + bool(eps or z_loss) + bool(eps)
    theirs = torch.autograd.grad(expected, logits, retain_graph=True)[0].numpy()
    sent = torch.autograd.grad([x for x, _ in used], logits, [torch.tensor(g).double() for _, g in used])[0].numpy()
    np.testing.assert_allclose(sent, theirs, rtol=1e-5, atol=1e-5 * max(1.0, z_loss * scale))
    assert (ours[0][~pack.counted] == 0).all()


@settings(max_examples=40, deadline=None)
@given(pack=packs(), scale=st.sampled_from([1e-3, 1.0, 500.0]))
def test_dft_and_unlikelihood(pack: Pack, scale):
    lp, weights = pack.logprobs(scale) - 1e-6, pack.rng.random(len(pack.targets))
    x, counted = leaf(lp), torch.tensor(weights * pack.counted)
    loss, d_logprobs, *_ = sft_loss(lp, pack.targets, weights, loss_type="dft")
    expected = -(counted * x.detach().exp() * x).sum()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(d_logprobs, gradients(expected, x)[0], rtol=1e-6, atol=1e-15)
    expected = -(counted * torch.log(-torch.expm1(x))).sum()
    loss, d_logprobs, _ = unlikelihood_loss(lp, pack.targets, weights)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(d_logprobs, gradients(expected, x)[0], rtol=1e-6, atol=1e-15)


def test_what_is_not_finite_or_certain_is_dropped():
    targets, weights = np.array([1, 1, -1]), np.ones(3)
    lp = np.array([-1.0, -np.inf, np.nan])
    loss, d_logprobs, *_, metrics = sft_loss(lp, targets, weights)
    assert (loss, d_logprobs.tolist(), metrics["num_dropped"], metrics["num_tokens"]) == (1.0, [-1, 0, 0], 1, 1)
    loss, d_logprobs, metrics = unlikelihood_loss(np.array([0.0, math.log(0.5), 0.0]), targets, weights)
    assert (loss, d_logprobs.tolist(), metrics["num_dropped"]) == (pytest.approx(math.log(2)), [0, 1, 0], 1)


def test_settings_without_what_they_need_are_refused():
    lp, targets, weights = np.zeros(1), np.zeros(1, int), np.ones(1)
    for wrong in (
        {"loss_type": "mle"},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.1, "lse": lp},
        {"label_smoothing": 1.0},
        {"z_loss": 0.1},
        {"z_loss": -0.1},
        {"loss_type": "dft", "z_loss": 0.1, "lse": lp},
    ):
        with pytest.raises(ConfigError):
            sft_loss(lp, targets, weights, **wrong)


def test_token_metrics():
    metrics = token_metrics(
        np.array([1, -1, 2]), num_tokens=4, top1=np.array([True, True, False]), entropy=np.array([1.0, 9.0, 3.0])
    )
    assert metrics == {"mean_token_accuracy": 0.25, "entropy": 1.0}


# Distillation.


def random_candidates(rng, num, scale):
    """Logits of a student and log-probabilities of a teacher, and the teacher's k likeliest of six tokens, k from 0 to 6."""
    logits, teacher = rng.normal(scale=scale, size=(num, 6)), log_softmax(rng.normal(scale=scale, size=(num, 6)))
    kept = [np.argsort(-row)[: rng.integers(0, 7)] for row in teacher]
    return logits, teacher, kept


@settings(max_examples=80, deadline=None)
@given(seed=seeds, scale=st.sampled_from([0.1, 1.0, 3.0]))
def test_topk_is_forward_kl_with_all_others_as_one(seed, scale):
    rng = np.random.default_rng(seed)
    logits, teacher, kept = random_candidates(rng, 5, scale)
    weights = rng.random(5)
    z = leaf(logits)
    lp = torch.log_softmax(z, 1)
    expected = z.sum() * 0
    for t, ids in enumerate(kept):
        if not len(ids):
            continue
        others = np.setdiff1d(np.arange(6), ids)
        q, log_p = teacher[t, ids], lp[t, torch.tensor(ids)]
        if len(others):
            q = np.append(q, np.log(np.exp(teacher[t, others]).sum()))
            log_p = torch.cat([log_p, torch.logsumexp(lp[t, torch.tensor(others)], 0)[None]])
        expected = expected + weights[t] * (torch.tensor(np.exp(q)) * (torch.tensor(q) - log_p)).sum()
    rows, columns = np.repeat(np.arange(5), [len(ids) for ids in kept]), np.concatenate(kept).astype(int)
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in kept])])
    loss, d_candidates, metrics = topk_distillation_loss(
        lp.detach().numpy()[rows, columns], teacher[rows, columns], offsets, weights
    )
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-5)
    candidates = lp[torch.tensor(rows), torch.tensor(columns)]
    sent = torch.autograd.grad(candidates, z, torch.tensor(d_candidates).double(), retain_graph=True)[0].numpy()
    np.testing.assert_allclose(sent, gradients(expected, z)[0], rtol=1e-4, atol=1e-5)
    assert metrics["num_dropped"] == 0


def test_all_candidates_are_the_forward_kl():
    rng = np.random.default_rng(0)
    student, teacher = log_softmax(rng.normal(size=(2, 4, 9)))
    loss, d_candidates, metrics = topk_distillation_loss(
        student.ravel(), teacher.ravel(), np.arange(0, 37, 9), np.full(4, 0.25)
    )
    assert loss == pytest.approx(float((np.exp(teacher) * (teacher - student)).sum(1).mean()))
    np.testing.assert_allclose(d_candidates.reshape(4, 9), -np.exp(teacher) / 4, rtol=1e-6)
    assert metrics["teacher_tail"] == 0


@settings(max_examples=80, deadline=None)
@given(seed=seeds, scale=st.sampled_from([0.1, 1.0, 8.0]), beta=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
def test_the_generalized_divergence_is_that_of_the_softmax(seed, scale, beta):
    """Value against the definition in torch, gradient through the softmax against autograd; tokens without candidates have none."""
    rng = np.random.default_rng(seed)
    teacher, weights, counted = log_softmax(rng.normal(scale=scale, size=(5, 6))), rng.random(5), rng.random(5) < 0.7
    z = leaf(rng.normal(scale=scale, size=(5, 6)))
    lp, lq = torch.log_softmax(z, 1), torch.tensor(teacher)
    p, q = lp.exp(), lq.exp()
    mixed = beta * q + (1 - beta) * p
    if beta in (0.0, 1.0):
        each = (p * (lp - lq)).sum(1) if beta else (q * (lq - lp)).sum(1)
    else:
        each = (beta * q * (lq - mixed.log()) + (1 - beta) * p * (lp - mixed.log())).sum(1)
    expected = (torch.tensor(weights) * each)[torch.tensor(counted)].sum() + 0 * z.sum()
    offsets = np.concatenate([[0], np.cumsum(6 * counted)])
    loss, d_candidates, metrics = generalized_jsd_loss(
        lp.detach().numpy()[counted].ravel(), teacher[counted].ravel(), offsets, weights, beta=beta
    )
    assert loss == pytest.approx(float(expected.detach()), rel=1e-9, abs=1e-12)
    assert metrics == {"loss": loss, "num_dropped": 0.0}
    sent = torch.autograd.grad(
        lp[torch.tensor(counted)].ravel(), z, torch.tensor(d_candidates).double(), retain_graph=True
    )[0]
    np.testing.assert_allclose(sent.numpy(), gradients(expected, z)[0], rtol=1e-5, atol=1e-6)


def test_the_generalized_divergence_at_its_ends_and_of_broken_tokens():
    rng = np.random.default_rng(0)
    student, teacher = log_softmax(rng.normal(size=(2, 3, 4)))
    offsets, weights = np.arange(0, 13, 4), np.ones(3)

    def value(first, second, beta):
        return generalized_jsd_loss(first.ravel(), second.ravel(), offsets, weights, beta=beta)[0]

    assert value(student, teacher, 0.0) == pytest.approx(value(teacher, student, 1.0))
    assert value(student, teacher, 0.3) == pytest.approx(value(teacher, student, 0.7))
    assert value(student, student, 0.5) == pytest.approx(0.0, abs=1e-12)
    # Near an end it is that end's KL, times the distance from it.
    assert value(student, teacher, 1e-6) / 1e-6 == pytest.approx(value(student, teacher, 0.0), rel=1e-4)
    broken = student.copy()
    broken[1, 2] = -np.inf
    loss, d_candidates, metrics = generalized_jsd_loss(broken.ravel(), teacher.ravel(), offsets, weights, beta=1.0)
    assert np.isfinite(loss)
    assert metrics["num_dropped"] == 1
    assert not d_candidates[4:8].any()
    assert d_candidates[:4].all()
    with pytest.raises(ConfigError, match="beta must be between 0 and 1"):
        value(student, teacher, 1.5)


def test_a_student_without_a_tail_is_pulled_with_finite_force():
    """All of the student's probability on the one candidate, half of the teacher's elsewhere."""
    one, half, offsets = np.array([0.0]), np.log([0.5]), np.array([0, 1])
    loss, d_candidates, _ = topk_distillation_loss(one, half, offsets, np.ones(1))
    assert loss == pytest.approx(math.log(0.5) + 0.5 * (1 - math.log(TAIL_FLOOR)))
    assert d_candidates[0] == pytest.approx(0.5 / TAIL_FLOOR - 0.5)
    loss, d_candidates, metrics = topk_distillation_loss(
        np.array([-np.inf, -1.0]), np.log([0.5, 0.5]), np.array([0, 1, 2]), np.ones(2)
    )
    assert (d_candidates[0], metrics["num_dropped"]) == (0, 1)
    assert math.isfinite(loss)
    certain, _, _ = topk_distillation_loss(np.log([0.5, 0.5]), np.array([0.0, -np.inf]), np.array([0, 2]), np.ones(1))
    assert certain == pytest.approx(math.log(2))


def test_a_student_that_sees_the_top_of_the_teacher_learns_it():
    rng = np.random.default_rng(2)
    teacher = log_softmax(rng.normal(size=(13, 4)))
    top = np.argsort(-teacher, 1)[:, :3]
    rows = np.arange(13)[:, None]

    def gradient(theta):
        lp = log_softmax(theta)
        _, d_candidates, _ = topk_distillation_loss(
            lp[rows, top].ravel(), teacher[rows, top].ravel(), np.arange(0, 40, 3), np.ones(13)
        )
        d = np.zeros_like(theta)
        d[rows, top] = d_candidates.reshape(13, 3)
        return d - d.sum(1, keepdims=True) * np.exp(lp)

    student = log_softmax(adam(np.zeros((13, 4)), gradient, steps=500, lr=0.1))
    assert (np.exp(teacher) * (teacher - student)).sum(1).max() < 1e-6


def test_a_student_that_is_scored_by_the_teacher_learns_it():
    """Reverse KL over whole responses, with every response listed: the exact policy gradient of -KL(student | teacher)."""
    teacher = np.random.default_rng(3).normal(size=(13, 4))

    def gradient(theta):
        lp = token_logprobs(theta)
        rewards = reverse_kl_advantages(lp, token_logprobs(teacher), TARGETS)
        advantages, _ = generalized_advantages(rewards, np.zeros(len(lp)), TARGETS, OFFSETS, lam=1.0)
        probability = np.repeat(np.exp(response_logprobs(theta)), np.diff(OFFSETS))
        _, d_logprobs, _ = ppo_policy_loss(lp, lp, advantages * probability, TARGETS, num_tokens=1)
        return d_theta(theta, d_logprobs.astype(float))

    theta = adam(np.zeros((13, 4)), gradient, steps=1000, lr=0.1)
    student, wanted = response_logprobs(theta), response_logprobs(teacher)
    assert np.exp(student) @ (student - wanted) < 1e-5


def test_reverse_kl_advantages_count_where_there_are_targets():
    ours = reverse_kl_advantages(np.array([-1.0, np.nan]), np.array([-3.0, 0.0]), np.array([0, -1]))
    assert ours.tolist() == [-2, 0]
