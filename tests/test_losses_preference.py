"""The direct preference family: each formula against autograd, its invariances, and the optima that are known in closed form."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.errors import ConfigError
from ingot.losses.packed import add_metrics
from ingot.losses.preference import (
    LOSS_TYPES,
    SMOOTHED,
    Pairs,
    bco_reference_point,
    cpo_loss,
    dpo_loss,
    kto_loss,
    kto_reference_point,
    mixed_dpo_loss,
    orpo_loss,
)
from packs import gradients, leaf
from tabular import adam, log_softmax

seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([0.01, 1.0, 30.0, 500.0])
MARGINAL = ("sigmoid", "robust", "hinge", "exo_pair", "discopop")
"""Loss types of x = beta (d_c - d_r) alone."""


def random_pairs(rng: np.random.Generator, num_pairs: int, scale: float) -> Pairs:
    """Log-probabilities down to a few times -scale, some pairs tied, lengths from 0."""
    logps = -np.abs(rng.normal(scale=scale, size=(4, num_pairs)))
    tied = rng.random(num_pairs) < 0.2
    logps[1, tied], logps[3, tied] = logps[0, tied], logps[2, tied]
    lengths = rng.integers(0, 9, size=(2, num_pairs))
    return Pairs(
        chosen_logps=logps[0],
        rejected_logps=logps[1],
        ref_chosen_logps=logps[2],
        ref_rejected_logps=logps[3],
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
    )


def without_reference(logps: np.ndarray, lengths: np.ndarray) -> Pairs:
    return Pairs.without_reference(
        chosen_logps=logps[0], rejected_logps=logps[1], chosen_lengths=lengths[0], rejected_lengths=lengths[1]
    )


def written_out(loss_type, p, lc, lr, beta, eps, tau):
    """The losses as their papers write them, in torch."""
    rc, rr = torch.tensor(p.ref_chosen_logps), torch.tensor(p.ref_rejected_logps)
    nc = torch.tensor(np.maximum(p.chosen_lengths, 1.0))
    nr = torch.tensor(np.maximum(p.rejected_lengths, 1.0))
    dc, dr = lc - rc, lr - rr
    x = beta * (dc - dr)

    def logistic(x):
        return -(1 - eps) * F.logsigmoid(x) - eps * F.logsigmoid(-x)

    match loss_type:
        case "sigmoid":
            return logistic(x)
        case "robust":
            return (-(1 - eps) * F.logsigmoid(x) + eps * F.logsigmoid(-x)) / (1 - 2 * eps)
        case "hinge":
            return torch.relu(1 - x)
        case "ipo":
            return (dc / nc - dr / nr - 1 / (2 * beta)) ** 2
        case "sigmoid_norm":
            return logistic(beta * (dc / nc - dr / nr))
        case "exo_pair":
            q = torch.stack([F.logsigmoid(x), F.logsigmoid(-x)])
            p = torch.tensor([[1 - eps], [eps]], dtype=torch.float64).log()
            return (q.exp() * (q - p)).sum(0)
        case "nca_pair":
            return -F.logsigmoid(beta * dc) - 0.5 * F.logsigmoid(-beta * dc) - 0.5 * F.logsigmoid(-beta * dr)
        case "bco_pair":
            return -F.logsigmoid(beta * dc) - F.logsigmoid(-beta * dr)
        case "sppo_hard":
            return (dc - 0.5 / beta) ** 2 + (dr + 0.5 / beta) ** 2
        case "aot":
            return logistic(beta * (torch.sort(lc - lr, stable=True)[0] - torch.sort(rc - rr)[0]))
        case "aot_unpaired":
            return logistic(beta * (torch.sort(dc, stable=True)[0] - torch.sort(dr, stable=True)[0]))
        case "apo_zero":
            return 1 - torch.sigmoid(beta * dc) + torch.sigmoid(beta * dr)
        case "apo_down":
            return torch.sigmoid(beta * dc) + 1 - torch.sigmoid(x)
        case "discopop":
            m = torch.sigmoid(x / tau)
            return -(1 - m) * F.logsigmoid(x) + m * torch.exp(-x)
    raise AssertionError(loss_type)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@settings(max_examples=25, deadline=None)
@given(seed=seeds, scale=scales, beta=st.sampled_from([0.01, 0.1, 0.5]), num_pairs=st.integers(1, 6))
def test_values_and_gradients_are_those_of_autograd(loss_type, seed, scale, beta, num_pairs):
    rng = np.random.default_rng(seed)
    eps = float(rng.uniform(0.01, 0.4)) if loss_type in SMOOTHED else 0.0
    # e^-x of the reference overflows where ours does not.
    p = random_pairs(rng, num_pairs, min(scale, 30.0) if loss_type == "discopop" else scale)
    lc, lr = leaf(p.chosen_logps), leaf(p.rejected_logps)
    expected = written_out(loss_type, p, lc, lr, beta, eps, 0.3).sum() / 7
    loss, d_chosen, d_rejected, metrics = dpo_loss(
        p, num_pairs=7, loss_type=loss_type, beta=beta, label_smoothing=eps, discopop_tau=0.3
    )
    assert loss == pytest.approx(float(expected.detach()), rel=1e-10, abs=1e-12)
    by_chosen, by_rejected = gradients(expected, lc, lr)
    np.testing.assert_allclose(d_chosen, by_chosen, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(d_rejected, by_rejected, rtol=1e-9, atol=1e-12)
    assert metrics["num_dropped"] == 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("logps", [(-500, 0, 0, -500), (0, -500, -500, 0), (-500, -500, -500, -500)])
def test_extreme_margins_stay_finite(loss_type, logps):
    one = [np.array([float(value)]) for value in logps]
    p = Pairs(
        chosen_logps=one[0],
        rejected_logps=one[1],
        ref_chosen_logps=one[2],
        ref_rejected_logps=one[3],
        chosen_lengths=np.array([1]),
        rejected_lengths=np.array([1]),
    )
    eps = 0.1 if loss_type in SMOOTHED else 0.0
    loss, d_chosen, d_rejected, _ = dpo_loss(p, num_pairs=1, loss_type=loss_type, beta=1.0, label_smoothing=eps)
    assert np.isfinite([loss, *d_chosen, *d_rejected]).all()


def test_worked_values():
    """One pair with x = 0 and one with x = ln 3, where s(x) = 3/4."""
    p = Pairs(
        chosen_logps=np.array([-1.0, -1.0]),
        rejected_logps=np.array([-1.0, -1.0 - math.log(3)]),
        ref_chosen_logps=np.zeros(2),
        ref_rejected_logps=np.zeros(2),
        chosen_lengths=np.ones(2, int),
        rejected_lengths=np.ones(2, int),
    )
    loss, d_chosen, _, metrics = dpo_loss(p, num_pairs=2, beta=1.0)
    assert loss == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)
    assert d_chosen == pytest.approx([-0.25, -0.125])
    assert metrics["rewards/accuracies"] == 0.5  # a tie is no success
    assert metrics["rewards/margins"] == pytest.approx(math.log(3) / 2)
    smoothed = dpo_loss(p, num_pairs=2, beta=1.0, label_smoothing=0.25)[1]
    assert smoothed == pytest.approx([-0.125, 0.0])  # s(ln 3) is 1 - eps: where cDPO rests


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@given(seed=seeds, shift=st.floats(-50, 50))
@settings(max_examples=10, deadline=None)
def test_only_the_ratio_to_the_reference_counts(loss_type, seed, shift):
    """Adding c_i to l and r of pair i changes nothing; AOT compares margins, so there both responses of a pair get it."""
    rng = np.random.default_rng(seed)
    eps = 0.1 if loss_type in SMOOTHED else 0.0
    p = random_pairs(rng, 4, 2.0)
    shifted = Pairs(
        chosen_logps=p.chosen_logps + shift,
        rejected_logps=p.rejected_logps + shift,
        ref_chosen_logps=p.ref_chosen_logps + shift,
        ref_rejected_logps=p.ref_rejected_logps + shift,
        chosen_lengths=p.chosen_lengths,
        rejected_lengths=p.rejected_lengths,
    )
    loss, d_chosen, _, _ = dpo_loss(p, num_pairs=4, loss_type=loss_type, label_smoothing=eps)
    again, d_again, _, _ = dpo_loss(shifted, num_pairs=4, loss_type=loss_type, label_smoothing=eps)
    assert again == pytest.approx(loss, rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(d_again, d_chosen, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("loss_type", sorted(set(LOSS_TYPES) - {"aot", "aot_unpaired"}))
def test_micro_batches_add_up(loss_type):
    p = random_pairs(np.random.default_rng(3), 8, 5.0)
    eps = 0.1 if loss_type in SMOOTHED else 0.0
    whole = dpo_loss(p, num_pairs=8, loss_type=loss_type, label_smoothing=eps)
    parts = [
        dpo_loss(p[np.arange(8) // 3 == part], num_pairs=8, loss_type=loss_type, label_smoothing=eps)
        for part in range(3)
    ]
    assert sum(part[0] for part in parts) == pytest.approx(whole[0])
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), whole[1], rtol=1e-12)
    assert add_metrics(part[3] for part in parts) == pytest.approx(whole[3])


@pytest.mark.parametrize("loss_type", sorted(set(LOSS_TYPES) - {"aot", "aot_unpaired"}))
def test_a_pair_of_weight_two_is_that_pair_twice(loss_type):
    p = random_pairs(np.random.default_rng(4), 3, 5.0)
    eps = 0.1 if loss_type in SMOOTHED else 0.0
    weighted = dpo_loss(p, num_pairs=6, weights=np.array([2.0, 1.0, 3.0]), loss_type=loss_type, label_smoothing=eps)
    repeated = dpo_loss(p[np.array([0, 0, 1, 2, 2, 2])], num_pairs=6, loss_type=loss_type, label_smoothing=eps)
    assert weighted[0] == pytest.approx(repeated[0])
    for ours, theirs in zip(weighted[1:3], repeated[1:3], strict=True):
        np.testing.assert_allclose(ours, theirs[[0, 2, 3]] * [2, 1, 3], rtol=1e-12)
    assert weighted[3] == pytest.approx(repeated[3])


def test_weights_without_a_reference():
    p = random_pairs(np.random.default_rng(4), 3, 5.0)
    p = dataclasses.replace(p, chosen_lengths=p.chosen_lengths + 1, rejected_lengths=p.rejected_lengths + 1)
    weights, order = np.array([2.0, 1.0, 3.0]), np.array([0, 0, 1, 2, 2, 2])
    for loss, more in ((cpo_loss, {"num_chosen_tokens": 30}), (orpo_loss, {})):
        weighted = loss(p, num_pairs=6, weights=weights, **more)
        repeated = loss(p[order], num_pairs=6, **more)
        assert weighted[0] == pytest.approx(repeated[0])
        np.testing.assert_allclose(weighted[1], repeated[1][[0, 2, 3]] * weights, rtol=1e-12)
        assert weighted[3] == pytest.approx(repeated[3])
    with pytest.raises(ValueError, match="weights"):
        cpo_loss(p, num_pairs=6, num_chosen_tokens=1, weights=np.ones(2))
    with pytest.raises(ConfigError, match="aot"):
        dpo_loss(p, num_pairs=3, weights=np.ones(3), loss_type="aot")


def test_order_of_pairs_does_not_matter():
    p = random_pairs(np.random.default_rng(5), 6, 5.0)
    order = np.random.default_rng(6).permutation(6)
    for loss_type in LOSS_TYPES:
        eps = 0.1 if loss_type in SMOOTHED else 0.0
        loss, d_chosen, d_rejected, _ = dpo_loss(p, num_pairs=6, loss_type=loss_type, label_smoothing=eps)
        again = dpo_loss(p[order], num_pairs=6, loss_type=loss_type, label_smoothing=eps)
        assert again[0] == pytest.approx(loss)
        if not loss_type.startswith("aot"):  # ties change partners there
            np.testing.assert_allclose(again[1], d_chosen[order], rtol=1e-12)
            np.testing.assert_allclose(again[2], d_rejected[order], rtol=1e-12)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_row_that_is_not_finite_gives_nothing_and_is_counted(loss_type):
    p = random_pairs(np.random.default_rng(7), 5, 5.0)
    broken = np.array([0, 1, 0, 0, 1], bool)
    bad = Pairs(
        chosen_logps=np.where(broken, [0, -np.inf, 0, 0, np.nan], p.chosen_logps),
        rejected_logps=np.where(broken, -np.inf, p.rejected_logps),
        ref_chosen_logps=p.ref_chosen_logps,
        ref_rejected_logps=p.ref_rejected_logps,
        chosen_lengths=p.chosen_lengths,
        rejected_lengths=p.rejected_lengths,
    )
    eps = 0.1 if loss_type in SMOOTHED else 0.0
    loss, d_chosen, d_rejected, metrics = dpo_loss(bad, num_pairs=5, loss_type=loss_type, label_smoothing=eps)
    rest = dpo_loss(p[~broken], num_pairs=5, loss_type=loss_type, label_smoothing=eps)
    assert loss == rest[0]
    assert (d_chosen[broken] == 0).all()
    assert (d_rejected[broken] == 0).all()
    np.testing.assert_array_equal(d_chosen[~broken], rest[1])
    assert metrics["num_dropped"] == 2


def test_settings_without_effect_are_refused():
    p = random_pairs(np.random.default_rng(1), 2, 1.0)
    for wrong in (
        {"loss_type": "dpo"},
        {"beta": 0.0},
        {"label_smoothing": 0.5},
        {"loss_type": "hinge", "label_smoothing": 0.1},
        {"loss_type": "exo_pair"},
        {"discopop_tau": 0.0},
    ):
        with pytest.raises(ConfigError):
            dpo_loss(p, num_pairs=2, **wrong)
    with pytest.raises(ValueError, match="rejected_logps"):
        Pairs(
            chosen_logps=np.zeros(2),
            rejected_logps=np.zeros(1),
            ref_chosen_logps=np.zeros(2),
            ref_rejected_logps=np.zeros(2),
            chosen_lengths=np.ones(2, int),
            rejected_lengths=np.ones(2, int),
        )
    for wrong in ({"loss_type": "robust"}, {"loss_type": "ipo", "label_smoothing": 0.1}, {"beta": -1.0}):
        with pytest.raises(ConfigError):
            cpo_loss(p, num_pairs=2, cpo_alpha=0.0, **wrong)
    with pytest.raises(ValueError, match="num_chosen_tokens"):
        cpo_loss(p, num_pairs=2)
    with pytest.raises(ConfigError):
        orpo_loss(p, num_pairs=2, beta=0.0)
    with pytest.raises(ValueError, match="num_pairs"):
        dpo_loss(p, num_pairs=0)


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo", "hinge", "ipo"])
@settings(max_examples=40, deadline=None)
@given(seed=seeds, scale=scales, alpha=st.sampled_from([0.0, 1.0]))
def test_cpo_and_simpo(loss_type, seed, scale, alpha):
    rng = np.random.default_rng(seed)
    p = random_pairs(rng, 4, scale)
    eps = 0.1 if loss_type in ("sigmoid", "simpo") else 0.0
    lc, lr = leaf(p.chosen_logps), leaf(p.rejected_logps)
    per_token = loss_type in ("ipo", "simpo")
    nc = torch.tensor(np.maximum(p.chosen_lengths, 1.0) if per_token else np.ones(4))
    nr = torch.tensor(np.maximum(p.rejected_lengths, 1.0) if per_token else np.ones(4))
    h = lc / nc - lr / nr
    x = 2.0 * h - (0.7 if loss_type == "simpo" else 0)
    losses = {
        "hinge": torch.relu(1 - x),
        "ipo": (h - 0.25) ** 2,
    }.get(loss_type, -(1 - eps) * F.logsigmoid(x) - eps * F.logsigmoid(-x))
    expected = losses.sum() / 5 - alpha * lc.sum() / 20
    loss, d_chosen, d_rejected, metrics = cpo_loss(
        p,
        num_pairs=5,
        num_chosen_tokens=20 if alpha else 0,
        loss_type=loss_type,
        beta=2.0,
        label_smoothing=eps,
        simpo_gamma=0.7,
        cpo_alpha=alpha,
    )
    assert loss == pytest.approx(float(expected.detach()), rel=1e-10)
    by_chosen, by_rejected = gradients(expected, lc, lr)
    np.testing.assert_allclose(d_chosen, by_chosen, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(d_rejected, by_rejected, rtol=1e-9, atol=1e-12)
    assert metrics["nll_loss"] == pytest.approx(-p.chosen_logps.sum() / 20 if alpha else 0.0)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, scale=st.sampled_from([1e-6, 0.1, 3.0, 100.0]), nll=st.booleans())
def test_orpo(seed, scale, nll):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, size=(2, 4))
    logps = -np.abs(rng.normal(scale=scale, size=(2, 4))) * lengths - 1e-9
    lc, lr = leaf(logps[0]), leaf(logps[1])
    a, b = lc / torch.tensor(lengths[0]), lr / torch.tensor(lengths[1])
    odds = (a - torch.log(-torch.expm1(a))) - (b - torch.log(-torch.expm1(b)))
    expected = (-0.3 * F.logsigmoid(odds) - (a if nll else 0)).sum() / 5
    loss, d_chosen, d_rejected, metrics = orpo_loss(without_reference(logps, lengths), num_pairs=5, beta=0.3, nll=nll)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-8)
    by_chosen, by_rejected = gradients(expected, lc, lr)
    np.testing.assert_allclose(d_chosen, by_chosen, rtol=1e-7)
    np.testing.assert_allclose(d_rejected, by_rejected, rtol=1e-7)
    assert metrics["log_odds_chosen"] == pytest.approx(float(odds.detach().sum()) / 5)


def test_orpo_drops_certain_responses():
    """Probability 1, or no token at all: infinite odds."""
    logps, lengths = np.array([[0.0, -1.0, -1.0], [-1.0, 0.0, -2.0]]), np.array([[0, 1, 1], [1, 0, 1]])
    loss, d_chosen, d_rejected, metrics = orpo_loss(without_reference(logps, lengths), num_pairs=3)
    assert math.isfinite(loss)
    assert metrics["num_dropped"] == 2
    assert (d_chosen != 0).tolist() == (d_rejected != 0).tolist() == [False, False, True]


@settings(max_examples=60, deadline=None)
@given(seed=seeds, scale=scales, loss_type=st.sampled_from(["kto", "apo_zero_unpaired", "bco"]), weighted=st.booleans())
def test_kto(seed, scale, loss_type, weighted):
    rng = np.random.default_rng(seed)
    logps, ref = -np.abs(rng.normal(scale=scale, size=(2, 6)))
    labels = rng.random(6) < 0.5
    weights = rng.uniform(0.1, 2, 6) if weighted else np.ones(6)
    kl = 0.0
    if loss_type == "kto":
        kl = kto_reference_point(*-np.abs(rng.normal(scale=scale, size=(2, 6))))
    if loss_type == "bco":
        kl = bco_reference_point(logps, ref, labels, weights)
    lp = leaf(logps)
    x = 0.2 * (lp - torch.tensor(ref) - kl)
    good = torch.tensor(labels)
    losses = torch.where(good, 1.3 * torch.sigmoid(-x), 0.7 * torch.sigmoid(x))
    if loss_type == "bco":
        losses = torch.where(good, -1.3 * F.logsigmoid(x), -0.7 * F.logsigmoid(-x))
    expected = (torch.tensor(weights) * losses).sum() / 12
    loss, d_logps, metrics = kto_loss(
        logps,
        ref,
        labels,
        kl=kl,
        num_chosen=5,
        num_rejected=7,
        weights=weights if weighted else None,
        loss_type=loss_type,
        beta=0.2,
        desirable_weight=1.3,
        undesirable_weight=0.7,
    )
    assert loss == pytest.approx(float(expected.detach()), rel=1e-10)
    np.testing.assert_allclose(d_logps, gradients(expected, lp)[0], rtol=1e-9, atol=1e-12)
    assert metrics["rewards/chosen"] == pytest.approx(float((0.2 * (logps - ref) * weights)[labels].sum() / 5))
    assert metrics["rewards/margins"] == metrics["rewards/chosen"] - metrics["rewards/rejected"]


def test_kto_reference_point_and_dropped_rows():
    assert kto_reference_point(np.array([-3.0, -1.0]), np.array([-2.0, -4.0])) == 1.0
    assert kto_reference_point(np.array([-5.0, -np.inf]), np.array([-2.0, -np.inf])) == 0.0
    loss, d_logps, metrics = kto_loss(
        np.array([-np.inf, -1.0]),
        np.array([-np.inf, 0.0]),
        np.array([True, False]),
        kl=0.0,
        num_chosen=1,
        num_rejected=1,
    )
    assert loss == pytest.approx(0.5 / (1 + math.exp(0.1)))
    assert d_logps[0] == 0
    assert metrics["num_dropped"] == 1
    with pytest.raises(ConfigError):
        kto_loss(
            np.zeros(1),
            np.zeros(1),
            np.ones(1, bool),
            kl=1.0,
            num_chosen=1,
            num_rejected=0,
            loss_type="apo_zero_unpaired",
        )


def test_bco_reference_point_is_the_middle_of_good_and_bad():
    d, labels = np.array([3.0, 1.0, -2.0, np.nan]), np.array([True, True, False, False])
    assert bco_reference_point(d, np.zeros(4), labels) == 0.0
    assert bco_reference_point(d, np.zeros(4), labels, np.array([3.0, 1.0, 7.0, 1.0])) == 0.25
    assert bco_reference_point(d[:2], np.zeros(2), labels[:2]) == 0.0


def test_losses_of_pairs_add_up():
    p = random_pairs(np.random.default_rng(8), 5, 5.0)
    weights = np.array([0.5, 0.5, 1.0, 2.0, 1.0])
    tokens = float(weights @ p.chosen_lengths)
    mixture = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 0.3}
    settings = {"num_pairs": 5.0, "weights": weights, "beta": 0.3}
    loss, d_chosen, d_rejected, metrics = mixed_dpo_loss(
        p, loss_types=mixture, num_chosen_tokens=tokens, label_smoothing=0.1, **settings
    )
    first = dpo_loss(p, loss_type="sigmoid", label_smoothing=0.1, **settings)
    second = dpo_loss(p, loss_type="bco_pair", **settings)
    nll = -float(weights @ p.chosen_logps) / tokens
    assert loss == pytest.approx(0.8 * first[0] + 0.2 * second[0] + 0.3 * nll)
    np.testing.assert_allclose(d_chosen, 0.8 * first[1] + 0.2 * second[1] - 0.3 * weights / tokens)
    np.testing.assert_allclose(d_rejected, 0.8 * first[2] + 0.2 * second[2])
    expected = {"loss": loss, "losses/sigmoid": first[0], "losses/bco_pair": second[0], "nll_loss": nll}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    alone = mixed_dpo_loss(p, loss_types={"ipo": 1.0}, **settings)
    assert alone[3] == dpo_loss(p, loss_type="ipo", **settings)[3]
    for wrong, message in (({"sft": 1.0}, "chosen responses alone"), ({"ipo": 1.0}, "label_smoothing has no effect")):
        with pytest.raises(ConfigError, match=message):
            mixed_dpo_loss(p, loss_types=wrong, label_smoothing=0.1, **settings)


# What the optimum is.


def test_dpo_reaches_the_optimum_of_reward_minus_kl():
    """Forty sequences, all ordered pairs weighted by how often reference and Bradley-Terry judges would give them: the minimum is
    pi* = pi_ref e^(r / beta) / Z, the optimum of E r - beta KL(pi | pi_ref) (Rafailov et al. 2023, appendix A)."""
    rng = np.random.default_rng(11)
    num_sequences, beta = 40, 0.5
    reward, ref = rng.normal(size=num_sequences), log_softmax(rng.normal(size=num_sequences))
    best = log_softmax(ref + reward / beta)
    winners, losers = (index.ravel() for index in np.indices((num_sequences, num_sequences)))
    weight = np.exp(ref[winners] + ref[losers]) / (1 + np.exp(reward[losers] - reward[winners]))
    ones = np.ones(len(winners), int)

    def gradient(theta):
        logps = log_softmax(theta)
        pairs = Pairs(
            chosen_logps=logps[winners],
            rejected_logps=logps[losers],
            ref_chosen_logps=ref[winners],
            ref_rejected_logps=ref[losers],
            chosen_lengths=ones,
            rejected_lengths=ones,
        )
        _, d_chosen, d_rejected, _ = dpo_loss(pairs, num_pairs=1, beta=beta)
        d_logps = np.bincount(winners, weight * d_chosen) + np.bincount(losers, weight * d_rejected)
        return d_logps - np.exp(logps) * d_logps.sum()

    logps = log_softmax(adam(ref.copy(), gradient, steps=700, lr=0.1))
    assert np.exp(logps) @ (logps - best) <= 1e-6


@pytest.mark.parametrize("tau", [0.1, 0.7])
def test_ipo_stops_at_its_margin_where_dpo_goes_on(tau):
    """One pair that never disagrees: IPO's optimum is d_c - d_r = 1 / (2 tau), DPO has none."""

    def train(loss_type, steps):
        def gradient(theta):
            logps = log_softmax(theta)
            pairs = Pairs(
                chosen_logps=logps[:1],
                rejected_logps=logps[1:2],
                ref_chosen_logps=np.full(1, -math.log(3)),
                ref_rejected_logps=np.full(1, -math.log(3)),
                chosen_lengths=np.ones(1, int),
                rejected_lengths=np.ones(1, int),
            )
            _, d_chosen, d_rejected, _ = dpo_loss(pairs, num_pairs=1, loss_type=loss_type, beta=tau)
            d_logps = np.array([d_chosen[0], d_rejected[0], 0.0])
            return d_logps - np.exp(logps) * d_logps.sum()

        logps = log_softmax(adam(np.zeros(3), gradient, steps=steps, lr=0.05))
        return logps[0] - logps[1]

    assert train("ipo", 2000) == pytest.approx(1 / (2 * tau), abs=1e-6)
    assert train("sigmoid", 2000) > train("sigmoid", 1000) + 1
