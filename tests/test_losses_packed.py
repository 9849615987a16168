"""What all objectives stand on: functions that neither overflow nor cancel, and the way from tokens to sequences and back."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings

from ingot.losses.numerics import bounded_ratio, log1mexp, log_sigmoid, require_positive, require_shape, sigmoid
from ingot.losses.packed import add_metrics, count_by_sequence, last_counted, mean_weights, spread, sum_by_sequence
from packs import Pack, packs


def test_logistic_functions_at_both_ends():
    x = np.array([-500.0, -40.0, 0.0, 40.0, 500.0])
    assert log_sigmoid(x) == pytest.approx([-500, -40, -math.log(2), -math.exp(-40), -math.exp(-500)], rel=1e-15)
    assert sigmoid(x) == pytest.approx([math.exp(-500), math.exp(-40), 0.5, 1, 1], rel=1e-13)
    assert log_sigmoid(np.array([-1e5, 1e5])).tolist() == [-1e5, 0]


def test_log1mexp_on_both_sides_of_its_branch():
    a = np.array([-1e-12, -1e-5, -0.5, -0.7, -40.0])
    series = [math.log(1e-12) - 5e-13, math.log(1e-5 - 5e-11 + 1e-15 / 6)]
    direct = [math.log(1 - math.exp(-0.5)), math.log(1 - math.exp(-0.7)), -math.exp(-40)]
    assert log1mexp(a) == pytest.approx(series + direct, rel=1e-14)
    assert log1mexp(np.array([0.0])).tolist() == [-np.inf]
    assert np.isnan(log1mexp(np.array([0.1]))).all()


def test_ratios_are_bounded():
    ratio, inside = bounded_ratio(np.array([-500.0, -20.0, 0.0, 20.0, 21.0]))
    assert ratio == pytest.approx([math.exp(-20), math.exp(-20), 1, math.exp(20), math.exp(20)])
    assert inside.tolist() == [False, True, True, True, False]


def test_shapes_and_normalizers_are_named_when_wrong():
    with pytest.raises(ValueError, match=r"rewards must have shape \[2\], got \[2, 1\]"):
        require_shape((2,), ranks=np.zeros(2), nothing=None, rewards=np.zeros((2, 1)))
    with pytest.raises(ValueError, match="num_tokens must be above 0, got 0"):
        require_positive(num_pairs=1, num_tokens=0)
    with pytest.raises(ValueError, match="total"):
        mean_weights(np.ones(1), np.array([0, 1]), reduction="sum", total=0)


def test_metrics_of_parts():
    parts = [
        {"loss": 1.0, "min_reward": -1.0, "clip_ratio/low_min": 0.5, "val/ratio_max": 2.0},
        {"loss": 2.0, "min_reward": -3.0, "clip_ratio/low_min": 0.6, "val/ratio_max": 1.0, "minutes": 1.0},
        {"minutes": 2.0},
    ]
    assert add_metrics(parts) == {
        "loss": 3.0,
        "min_reward": -3.0,
        "clip_ratio/low_min": 0.5,
        "val/ratio_max": 2.0,
        "minutes": 3.0,
    }
    assert add_metrics([]) == {}


@settings(max_examples=60, deadline=None)
@given(packs())
def test_sums_counts_and_their_transpose(pack: Pack):
    values = pack.normal(100.0)
    sums = sum_by_sequence(values, pack.targets, pack.offsets)
    for i, part in enumerate(pack.slices()):
        counted = pack.counted[part]
        assert sums[i] == pytest.approx(math.fsum(values[part][counted].tolist()), rel=1e-12, abs=1e-12)
        assert count_by_sequence(pack.targets, pack.offsets)[i] == counted.sum()
        expected = part.start + np.flatnonzero(counted)[-1] if counted.any() else -1
        assert last_counted(pack.targets, pack.offsets)[i] == expected
    coefficients = pack.rng.normal(size=pack.num_sequences).astype(np.float32)
    spread_out = spread(coefficients, pack.targets, pack.offsets)
    assert spread_out.dtype == np.float32
    assert (spread_out[~pack.counted] == 0).all()
    # <spread(c), v> = <c, sum(v)>: one is the transpose of the other.
    assert float(spread_out.astype(float) @ values) == pytest.approx(float(coefficients @ sums), rel=1e-9, abs=1e-6)


def test_the_sum_does_not_depend_on_neighbours():
    rng = np.random.default_rng(0)
    values = rng.normal(size=300).astype(np.float32)
    targets = np.zeros(300, np.int32)
    alone = sum_by_sequence(values[100:200], targets[:100], np.array([0, 100]))
    packed = sum_by_sequence(values, targets, np.array([0, 100, 200, 300]))
    assert alone[0] == packed[1]
