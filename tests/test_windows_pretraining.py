"""Tasks with a known answer for next-token training and fine-tuning, on the native core: what can be known of the text is learned, and no more."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from ingot.configs import ModelConfig, SFTConfig
from ingot.data.chat import Encoded
from ingot.data.examples import assemble_pack
from ingot.models import Model, Optimizer
from ingot.models.base import Optim
from ingot.training import sft as phase

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]


def network(vocab: int, length: int, layers: int, seed: int, optim: Optim = "adamw") -> Any:
    """Positions are learned: how sure one may be depends on how much was read."""
    shape = ModelConfig.gpt2(
        vocab_size=vocab,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=length,
        tie_word_embeddings=False,
    )
    model = Model(shape, seed=seed, threads=1)
    model.optimizer = Optimizer(model, weight_decay=0.0, optim=optim)
    return model


def packed(rows: np.ndarray, shift: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows as sequences, each letter to be told from those before it; with ``shift`` 2 the letter after the next, a known mistake."""
    targets = np.full(rows.shape, -1, np.int32)
    targets[:, :-shift] = rows[:, shift:]
    offsets = np.arange(len(rows) + 1, dtype=np.int64) * rows.shape[1]
    return rows.astype(np.int32).ravel(), offsets, targets.ravel()


def train(model: Any, draw: Any, steps: int, lr: float, shift: int = 1) -> None:
    """On fresh rows in each step, the rate rising over twenty steps and falling to 0."""
    for step in range(steps):
        tokens, offsets, targets = packed(draw(), shift)
        model.zero_grad()
        weights = np.full(len(targets), 1.0 / np.count_nonzero(targets >= 0), np.float32)
        model.forward_backward(tokens, offsets, targets, weights)
        model.step(lr * min(1.0, (step + 1) / 20) * (1 - step / steps))


def losses(model: Any, rows: np.ndarray) -> np.ndarray:
    """-ln p of each letter but the first, [rows, length - 1]."""
    tokens, offsets, targets = packed(rows)
    _, out = model.forward(tokens, offsets, targets, train=False)
    return -out.logprobs.reshape(rows.shape)[:, :-1]


# ---- a chain


class Chain:
    """Letters, each drawn by the one before it."""

    def __init__(self, seed: int, letters: int = 16, length: int = 64) -> None:
        self.rng = np.random.default_rng([seed, 1])
        self.length = length
        self.table = self.rng.dirichlet(np.full(letters, 0.3), letters) + 1e-4
        self.table /= self.table.sum(1, keepdims=True)

    def draw(self, count: int) -> np.ndarray:
        rows = np.empty((count, self.length), np.int64)
        rows[:, 0] = self.rng.integers(0, len(self.table), count)
        edges = self.table.cumsum(1)
        for place in range(1, self.length):
            rows[:, place] = (
                (self.rng.random(count)[:, None] > edges[rows[:, place - 1]]).sum(1).clip(0, len(edges) - 1)
            )
        return rows

    def gap(self, model: Any) -> float:
        """Held-out loss less that of the chain itself on the same text, nats a letter."""
        rows = self.draw(128)
        return float((losses(model, rows) + np.log(self.table[rows[:, :-1], rows[:, 1:]])).mean())


@functools.lru_cache
def chain_gap(seed: int, shift: int = 1, optim: Optim = "adamw") -> float:
    chain, model = Chain(seed), network(16, 64, 1, seed, optim)
    train(model, lambda: chain.draw(16), 250, 1e-2, shift)
    return chain.gap(model)


# Seeds 0 to 2: .010 to .012. Shifted: 1.07.
@pytest.mark.parametrize("seed", SEEDS)
def test_a_chain_of_letters_is_learned(seed):
    assert chain_gap(seed) <= 0.03


@pytest.mark.parametrize("seed", SEEDS)
def test_muon_is_no_worse_in_as_many_steps(seed):
    assert chain_gap(seed, optim="muon") <= chain_gap(seed) + 0.002


def test_log_probabilities_shifted_by_one_fail():
    assert chain_gap(0, shift=2) > 0.3


# ---- learning while reading


class Urns:
    """Each row is drawn from a distribution of its own, which the reader can only infer from the row so far."""

    def __init__(self, seed: int, letters: int = 8, length: int = 64, alpha: float = 0.3) -> None:
        self.rng = np.random.default_rng([seed, 2])
        self.letters, self.length, self.alpha = letters, length, alpha

    def draw(self, count: int) -> np.ndarray:
        edges = self.rng.dirichlet(np.full(self.letters, self.alpha), count).cumsum(1)
        drawn = self.rng.random((count, self.length, 1)) > edges[:, None, :]
        return drawn.sum(2).clip(0, self.letters - 1)

    def bayes(self, rows: np.ndarray) -> np.ndarray:
        """-ln of what Bayes' rule predicts: (times seen + alpha) / (letters seen + letters alpha), [rows, length - 1]."""
        seen = np.cumsum(np.eye(self.letters)[rows], axis=1)[:, :-1]
        count = np.arange(1, self.length)[None, :]
        times = np.take_along_axis(seen, rows[:, 1:, None], 2)[..., 0]
        return -np.log((times + self.alpha) / (count + self.letters * self.alpha))


@functools.lru_cache
def urns(seed: int, steps: int) -> tuple[float, np.ndarray]:
    """Mean gap to Bayes, and the mean loss by position."""
    task, model = Urns(seed), network(8, 64, 1, seed)
    train(model, lambda: task.draw(16), steps, 1e-2)
    rows = task.draw(256)
    loss = losses(model, rows)
    return float((loss - task.bayes(rows)).mean()), loss.mean(0)


# Seeds 0 to 2: gap .022 to .024; loss after 4 letters 1.62 to 1.81, after 63 letters 1.31 to 1.33. After 20 steps: gap .35.
@pytest.mark.parametrize("seed", SEEDS)
def test_it_learns_from_its_context_as_bayes_does(seed):
    gap, by_position = urns(seed, 800)
    assert gap <= 0.03
    assert by_position[62] < by_position[3] - 0.25


def test_without_enough_training_it_does_not_read():
    gap, _ = urns(0, 20)
    assert gap > 0.1


# ---- answers alone


class Answers:
    """Prompts that use some letters much more than others; answers that say the first letter of the prompt again, or not, as a coin says."""

    LETTERS, END, RIGHT = 8, 8, 0.9

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng([seed, 3])
        self.shares = np.array([0.55, 0.2, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01])

    def draw(self, count: int) -> list[list[int]]:
        """START, five letters, START again, the answer."""
        prompts = self.rng.choice(self.LETTERS, (count, 5), p=self.shares)
        answers = np.where(
            self.rng.random(count) < self.RIGHT, prompts[:, 0], self.rng.integers(0, self.LETTERS, count)
        )
        return [
            [self.END, *prompt, self.END, answer]
            for prompt, answer in zip(prompts.tolist(), answers.tolist(), strict=True)
        ]

    @property
    def entropies(self) -> tuple[float, float]:
        """Of a letter of a prompt, and of an answer whose prompt is known, nats."""
        right = self.RIGHT + (1 - self.RIGHT) / self.LETTERS
        wrong = (1 - self.RIGHT) / self.LETTERS
        prompt = -float(self.shares @ np.log(self.shares))
        return prompt, -right * np.log(right) - (self.LETTERS - 1) * wrong * np.log(wrong)


@functools.lru_cache
def fine_tuned(seed: int, masked: bool) -> tuple[float, float]:
    """How far the losses of prompts and of answers are above their entropies after fine-tuning."""
    task, model = Answers(seed), network(9, 8, 2, seed)
    config = SFTConfig(learning_rate=1.0)
    for step in range(200):
        sequences = []
        for ids in task.draw(64):
            mask = np.arange(8) == 7 if masked else np.arange(8) >= 1
            sequences.append([Encoded(np.array(ids, np.int32), mask, (7,))])
        model.zero_grad()
        phase._backward(model, config, [assemble_pack(sequences)], step)
        model.step(5e-3 * min(1.0, (step + 1) / 20) * (1 - step / 200))
    loss = losses(model, np.array(task.draw(4000)))
    prompt, answer = task.entropies
    return float(loss[:, :5].mean()) - prompt, float(loss[:, 6].mean()) - answer


# Seeds 0 to 2: answers .007 to .031 above their entropy, prompts 1.5 to 1.9 (they were .7 before). Not masked: prompts within .01.
@pytest.mark.parametrize("seed", SEEDS)
def test_fine_tuning_learns_answers_and_not_prompts(seed):
    prompt, answer = fine_tuned(seed, True)
    assert answer <= 0.05
    assert prompt >= 0.4


def test_prompts_that_are_not_masked_fail():
    prompt, _ = fine_tuned(0, False)
    assert prompt < 0.1
