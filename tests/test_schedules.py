"""Learning rates at the points where their shape is known, and the loss whose weights they multiply."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ingot.losses.next_token import next_token_loss, perplexity, token_weights
from ingot.training.schedules import learning_rate, resolve_warmup


def test_warm_up_rises_linearly_to_the_peak():
    rates = [learning_rate(step, 100, peak=1.0, warmup_steps=4) for step in range(5)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0), ("wsd", 1.0)])
def test_shapes_at_their_ends_and_middle(schedule, middle):
    def at(step):
        return learning_rate(step, 1000, peak=1.0, schedule=schedule, min_ratio=0.1)

    assert at(0) == 1.0
    assert at(500) == pytest.approx(middle)
    assert at(1000) == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_wsd_keeps_the_peak_and_then_falls_with_the_square_root():
    def at(step):
        return learning_rate(step, 1000, peak=1.0, schedule="wsd", warmup_steps=10, min_ratio=0.0, decay_ratio=0.2)

    assert at(799) == at(10) == 1.0
    assert at(850) == pytest.approx(1 - math.sqrt(0.25))


def test_cosine_is_the_one_of_pytorch():
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=1e-4)
    for step in range(50):
        ours = learning_rate(step, 50, peak=1e-3, min_ratio=0.1)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


@given(
    st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    st.integers(1, 500),
    st.integers(0, 600),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_rates_stay_between_floor_and_peak_and_never_rise_after_the_warm_up(schedule, total, warmup, floor, decay):
    warmup = min(warmup, total)
    rates = [
        learning_rate(step, total, peak=2.0, schedule=schedule, warmup_steps=warmup, min_ratio=floor, decay_ratio=decay)
        for step in range(total)
    ]
    assert all(0 < rate <= 2.0 * (1 + 1e-12) for rate in rates[:warmup])
    assert all(2.0 * floor - 1e-12 <= rate <= 2.0 + 1e-12 for rate in rates[warmup:])
    assert all(b <= a + 1e-12 for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))


def test_warm_up_steps_come_from_the_ratio_unless_given():
    assert resolve_warmup(None, 0.03, 1000) == 30
    assert resolve_warmup(100, 0.03, 1000) == 100
    assert resolve_warmup(100, 0.03, 10) == 10


@given(
    st.integers(1, 30).flatmap(
        lambda n: st.tuples(
            arrays(np.float32, n, elements=st.floats(-20, 0, width=32)),
            arrays(np.int32, n, elements=st.integers(-1, 9)),
        )
    )
)
def test_the_gradient_of_the_loss_is_its_slope(values):
    logprobs, targets = values
    count = max(1, int((targets >= 0).sum()))
    weights = token_weights(targets, count)
    loss, gradient, metrics = next_token_loss(logprobs, targets, weights)
    scored = logprobs[targets >= 0]
    assert loss == pytest.approx(-scored.mean() if len(scored) else 0.0, rel=1e-5)
    assert metrics["num_tokens"] == len(scored)
    for index in range(len(targets)):
        moved = logprobs.astype(np.float64)
        moved[index] += 1.0
        slope = next_token_loss(moved, targets, weights)[0] - loss
        assert slope == pytest.approx(float(gradient[index]), abs=1e-6)


def test_parts_of_a_batch_add_up_to_the_whole():
    rng = np.random.default_rng(0)
    logprobs, targets = -rng.random(64).astype(np.float32), rng.integers(-1, 5, 64).astype(np.int32)
    count = int((targets >= 0).sum())
    whole, gradient, _ = next_token_loss(logprobs, targets, token_weights(targets, count))
    total = 0.0
    for part in range(0, 64, 16):
        one = slice(part, part + 16)
        loss, d_logprobs, _ = next_token_loss(logprobs[one], targets[one], token_weights(targets[one], count))
        np.testing.assert_array_equal(d_logprobs, gradient[one])
        total += loss
    assert total == pytest.approx(whole, rel=1e-12)


def test_tokens_without_a_target_count_nothing_whatever_they_hold():
    logprobs = np.array([-1.0, np.nan, -3.0], np.float32)
    targets = np.array([4, -1, 2], np.int32)
    loss, gradient, _ = next_token_loss(logprobs, targets, np.full(3, 0.5, np.float32))
    assert loss == 2.0
    assert gradient.tolist() == [-0.5, 0.0, -0.5]
    with pytest.raises(ValueError, match="num_targets"):
        token_weights(targets, 0)


def test_perplexity():
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert math.isfinite(perplexity(1e9))
