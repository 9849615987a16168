"""Tasks with a known answer for the preference losses, on the native core: the optimum of reward less KL, IPO's margin, a rule to be learned.

Pairs of random sequences are judged by a rule with Bradley-Terry noise, from a reference that is exactly uniform. So the optimum is
known: pi* = e^(score / beta) / Z, whose implicit reward beta d is the score up to a constant.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

from ingot.configs import DPOConfig, ModelConfig
from ingot.losses.packed import spread, sum_by_sequence
from ingot.losses.preference import kto_reference_point
from ingot.models import Model, Optimizer
from ingot.training import dpo as phase
from ingot.training.preferences import Comparisons, Verdicts
from ingot.training.rollouts import sample_rollouts
from tabular import NUM_ACTIONS, OFFSETS, RESPONSES, TARGETS

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
LETTERS, LENGTH, START = 8, 8, 8
BETA = 0.5
SLOPES = (0.8, 1.1)
WEIGHTS = np.array([1.0, -1.0, 0.5, -0.5, 0.0, 0.0, 0.0, 0.0])


def score(sequences: np.ndarray) -> np.ndarray:
    """The rule: each letter has its weight, and "4 5" is worth one more."""
    bigrams = (sequences[:, :-1] == 4) & (sequences[:, 1:] == 5)
    return WEIGHTS[sequences].sum(1) + bigrams.sum(1)


def tilted(beta: float, length: int = LENGTH) -> tuple[float, float]:
    """E score under pi = e^(score / beta) / Z, and its KL to the uniform reference.

    ln Z is a sum over letters from the end; the score is its slope by 1 / beta, and the KL is score / beta - ln Z + ln (number of sequences).
    """

    def log_z(inverse: float) -> float:
        step = np.exp(inverse * WEIGHTS)[None, :] * np.ones((LETTERS, 1))
        step[4, 5] *= np.exp(inverse)
        values = np.ones(LETTERS)
        for _ in range(length - 1):
            values = step @ values
        return float(np.log(np.exp(inverse * WEIGHTS) @ values))

    mean = (log_z(1 / beta + 1e-5) - log_z(1 / beta - 1e-5)) / 2e-5
    return mean, mean / beta - log_z(1 / beta) + length * float(np.log(LETTERS))


def test_the_tilted_policy_is_that_of_the_whole_list():
    every = np.indices((LETTERS,) * 4).reshape(4, -1).T
    weights = np.exp(score(every) / BETA)
    weights /= weights.sum()
    mean, kl = tilted(BETA, 4)
    assert mean == pytest.approx(float(weights @ score(every)), abs=1e-6)
    assert kl == pytest.approx(float(weights @ np.log(weights * len(every))), abs=1e-6)
    assert tilted(BETA) == pytest.approx((4.616, 4.212), abs=1e-3)


@dataclasses.dataclass
class Result:
    """What a trained model has learned."""

    accuracy: float
    """Share of noiseless pairs that its implicit reward orders as the rule does."""
    correlation: float
    """Of implicit rewards with scores."""
    slope: float
    """Of implicit rewards by scores: 1 at the optimum."""
    score: float
    """Mean score of its samples."""
    kl: float
    """From the uniform reference, nats a sequence, on its samples."""


SHAPE = ModelConfig.llama(
    vocab_size=LETTERS + 1,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=16,
    tie_word_embeddings=False,
)


def uniform_model(seed: int) -> Any:
    """Two layers of width 32 whose head is zero: the same probability for all."""
    model = Model(SHAPE, seed=seed, threads=1)
    state = model.state()
    state["lm_head.weight"][:] = 0.0
    model.load_state(state)
    model.optimizer = Optimizer(model, weight_decay=0.0)
    return model


def logps(
    model: Any, sequences: np.ndarray, *, train: bool, shift: int = 0
) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """Context, l of each sequence, targets and offsets. ``shift`` scores the letter so many places too far, a known mistake."""
    count = len(sequences)
    tokens = np.concatenate([np.full((count, 1), START), sequences], axis=1).astype(np.int32)
    targets = np.full_like(tokens, -1)
    targets[:, : LENGTH - shift] = tokens[:, 1 + shift :]
    offsets = np.arange(count + 1, dtype=np.int64) * (LENGTH + 1)
    ctx, out = model.forward(tokens.ravel(), offsets, targets.ravel(), train=train, banned_ids=[START])
    return ctx, sum_by_sequence(out.logprobs, targets.ravel(), offsets), targets.ravel(), offsets


@functools.lru_cache
def train(
    loss_type: str,
    seed: int,
    num_pairs: int = 8192,
    beta: float = BETA,
    shift: int = 0,
    make: Any = uniform_model,
    rate: float = 2e-3,
    **settings: Any,
) -> Result:
    """One pass over the pairs, 64 a step, the rate falling to 0; then what the model has learned."""
    rng = np.random.default_rng(seed)
    config = DPOConfig(loss_type=(loss_type,), beta=beta, **settings)
    pairs = rng.integers(0, LETTERS, (num_pairs, 2, LENGTH))
    gap = score(pairs[:, 0]) - score(pairs[:, 1])
    wrong = rng.random(num_pairs) > 1 / (1 + np.exp(-gap))
    pairs[wrong] = pairs[wrong][:, ::-1]
    model = make(seed)
    steps = num_pairs // 64
    for step in range(steps):
        batch = pairs[64 * step : 64 * step + 64].reshape(128, LENGTH)
        model.zero_grad()
        ctx, policy, targets, offsets = logps(model, batch, train=True, shift=shift)
        ref = np.full(128, -LENGTH * np.log(LETTERS))
        chosen, rows = np.arange(0, 128, 2), np.arange(64)
        compared: Comparisons | Verdicts = Comparisons(chosen, chosen + 1, np.ones(64), rows)
        point = 0.0
        if config.on_verdicts:
            # All have one prompt, so any answer is a mismatched one.
            compared = Verdicts(np.arange(128), np.arange(128) % 2 == 0, np.ones(128), np.arange(128))
            point = kto_reference_point(policy, ref)
        lengths = np.full(128, LENGTH - shift)
        answers = phase._Answers(policy, ref, lengths, compared)
        totals = phase._totals(compared, lengths)
        _, d_logps, _ = phase._objective(config, answers, totals, point)
        model.backward(ctx, d_logprobs=spread(d_logps, targets, offsets))
        model.step(rate * (1 - step / steps))
    fresh = rng.integers(0, LETTERS, (2000, LENGTH))
    d = logps(model, fresh, train=False)[1] + LENGTH * np.log(LETTERS)
    true = score(fresh)
    half = len(fresh) // 2
    gap, margin = true[:half] - true[half:], d[:half] - d[half:]
    ordered = gap != 0
    rollouts = sample_rollouts(
        model, [[START]], num_generations=512, max_new_tokens=LENGTH, end_ids=(), seed=seed, banned_ids=[START]
    )
    drawn = rollouts.tokens.reshape(512, LENGTH + 1)[:, 1:]
    return Result(
        accuracy=float(np.mean((margin > 0)[ordered] == (gap > 0)[ordered])),
        correlation=float(np.corrcoef(d, true)[0, 1]),
        slope=float(beta * np.polyfit(true, d, 1)[0]),
        score=float(score(drawn).mean()),
        kl=float(
            sum_by_sequence(rollouts.logprobs, rollouts.targets, rollouts.offsets).mean() + LENGTH * np.log(LETTERS)
        ),
    )


# Seeds 0 to 2 at 8,192 pairs (3 to 4 s each, one thread): accuracy .968 to .973, correlation .980 to .985, slope .92 to .96, score 4.30 to
# 4.41, KL 3.7 to 3.9 (4.62 and 4.21 at the optimum).
@pytest.mark.parametrize("seed", SEEDS)
def test_dpo_learns_the_rule_and_how_far_to_go(seed):
    found = train("sigmoid", seed)
    assert found.accuracy >= 0.95
    assert found.correlation >= 0.96
    assert_went_as_far(found)


def assert_went_as_far(found: Result) -> None:
    """beta d grows with the score as it should, in the tilted policies' score and KL too."""
    assert SLOPES[0] <= found.slope <= SLOPES[1]
    least, most = (tilted(BETA / slope)[1] for slope in SLOPES)
    assert found.score >= 4.0
    assert least <= found.kl <= most


# The same with other losses: least accuracy, and between what the KL lies, for nothing holds SimPO to the reference. Measured on seeds 0
# to 2: IPO .970 to .972 and 4.4 to 5.2; KTO .926 to .934 and 1.2 to 1.5; ORPO .946 to .967 and .11 to .16; SimPO .967 to .974 and 7.7 to 8.8.
OTHERS = (
    ("ipo", BETA, 0.95, (3.0, 7.0)),
    ("kto", BETA, 0.90, (0.8, 2.5)),
    ("orpo", 0.1, 0.92, (0.05, 0.5)),
    ("simpo", 2.0, 0.94, (6.0, 11.0)),
)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("loss_type", "beta", "accuracy", "kl"), OTHERS, ids=[name for name, *_ in OTHERS])
def test_its_relatives_learn_the_rule_at_another_distance(loss_type, beta, accuracy, kl, seed):
    found = train(loss_type, seed, beta=beta)
    assert found.accuracy >= accuracy
    assert found.score >= 0.7
    assert kl[0] <= found.kl <= kl[1]


def test_few_pairs_or_shifted_log_probabilities_fail():
    """512 pairs: score .6 to .7, slope .1. Log-probabilities of the letter after the next: score 2.7 to 3.4."""
    few, shifted = train("sigmoid", 0, num_pairs=512), train("sigmoid", 0, shift=1)
    assert few.score < 2.0
    assert few.slope < 0.5
    assert shifted.score < 3.8


# ---- forty answers, all of them


class Forty:
    """The forty answers of ``tabular`` as one pack of the native core, and a reference that is not uniform."""

    def __init__(self) -> None:
        shape = ModelConfig.llama(
            vocab_size=NUM_ACTIONS + 1,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=8,
            tie_word_embeddings=False,
        )
        self.model = Model(shape, seed=4, threads=1)
        state = self.model.state()
        state["lm_head.weight"] *= 20.0
        self.model.load_state(state)
        self.model.optimizer = Optimizer(self.model, weight_decay=0.0)
        self.lengths = np.diff(OFFSETS)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths + 1)]).astype(np.int64)
        self.tokens = np.full(self.offsets[-1], NUM_ACTIONS, np.int32)
        self.targets = np.full(self.offsets[-1], -1, np.int32)
        for number, answer in enumerate(RESPONSES):
            begin = self.offsets[number]
            self.tokens[begin + 1 : begin + 1 + len(answer)] = answer
            self.targets[begin : begin + len(answer)] = answer
        assert (self.targets[self.targets >= 0] == TARGETS).all()
        self.ref = self.forward(train=False)[1]
        assert np.exp(self.ref).sum() == pytest.approx(1, abs=1e-5)
        assert self.ref.std() > 0.5

    def forward(self, *, train: bool) -> tuple[Any, np.ndarray]:
        ctx, out = self.model.forward(self.tokens, self.offsets, self.targets, train=train, banned_ids=[NUM_ACTIONS])
        return ctx, sum_by_sequence(out.logprobs, self.targets, self.offsets)

    def train(self, config: DPOConfig, compared: Comparisons, steps: int, lr: float) -> np.ndarray:
        totals = phase._totals(compared, self.lengths)
        for step in range(steps):
            self.model.zero_grad()
            ctx, logps = self.forward(train=True)
            answers = phase._Answers(logps, self.ref, self.lengths, compared)
            _, d_logps, _ = phase._objective(config, answers, totals, 0.0)
            self.model.backward(ctx, d_logprobs=spread(d_logps, self.targets, self.offsets))
            self.model.step(lr * (1 - step / steps), clip_norm=None)
        return self.forward(train=False)[1]


def test_with_all_pairs_dpo_ends_at_the_optimum_of_reward_minus_kl():
    """Weighted by how often the reference would draw a pair and a judge say so, the minimum is pi* = ref e^(r / beta) / Z (Rafailov et al.
    2023, appendix A). In f64 on a table it is reached to 1e-6 (test_losses_preference); here as far as f32 and the network go."""
    task = Forty()
    reward = np.random.default_rng(11).normal(size=40)
    chosen, rejected = (index.ravel() for index in np.indices((40, 40)))
    keep = chosen != rejected
    chosen, rejected = chosen[keep], rejected[keep]
    weights = np.exp(task.ref[chosen] + task.ref[rejected]) / (1 + np.exp(reward[rejected] - reward[chosen]))

    def optimum(beta: float) -> np.ndarray:
        best = task.ref + reward / beta
        return np.asarray(best - np.log(np.exp(best).sum()))

    compared = Comparisons(chosen, rejected, weights, np.zeros(len(chosen), np.int64))
    logps = task.train(DPOConfig(beta=BETA), compared, steps=500, lr=3e-3)
    # Measured: .0016. Another beta by a tenth is further away than what is let pass, the start by a hundred times.
    far = [float(np.exp(each) @ (each - optimum(BETA))) for each in (logps, optimum(1.1 * BETA), task.ref)]
    assert far[0] <= 0.004 < far[1] < far[2]


def test_ipo_stops_at_its_margin():
    one = Comparisons(np.array([30]), np.array([17]), np.ones(1), np.zeros(1, np.int64))
    for tau in (0.25, 1.0):
        task = Forty()
        logps = task.train(DPOConfig(loss_type=("ipo",), beta=tau), one, steps=400, lr=3e-3)
        d = (logps - task.ref) / task.lengths
        assert d[30] - d[17] == pytest.approx(1 / (2 * tau), abs=1e-3)
