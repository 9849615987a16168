"""200 steps of training: the native core stays as close to the f64 twin as the same network in torch's f32 does."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
import pytest

import ingot
from ingot.configs import ModelConfig
from ingot.models import base
from ingot.models.native import NativeModel
from networks import Packed, perturbed, twin

NUM_STEPS = 200
SEQUENCES, LENGTH, VOCAB = 8, 24, 40

CONFIGS = {
    "gpt2": ModelConfig.gpt2(
        vocab_size=VOCAB, hidden_size=30, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=LENGTH
    ),
    "llama": ModelConfig.llama(
        vocab_size=VOCAB, hidden_size=30, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1
    ),
}


@pytest.mark.parametrize(("optim", "dropout"), [("adamw", 0.0), ("adamw", 0.1), ("muon", 0.0)])
@pytest.mark.parametrize("shape", CONFIGS)
def test_losses_follow_the_f64_twin(shape: str, optim: base.Optim, dropout: float) -> None:
    config = dataclasses.replace(CONFIGS[shape], dropout=dropout)
    # 0.3: from weights that already do something, in 200 steps to a loss well below ln V.
    weights = {name: 0.3 * array for name, array in perturbed(config).items()}

    def native() -> base.Model:
        model = NativeModel(config)
        model.load_state(weights)
        return model

    exact = train(lambda: twin(config, weights, precision="f64"), optim)
    rounded = train(lambda: twin(config, weights, precision="f32"), optim)
    ours = train(native, optim)
    assert exact[0] > 3.0
    assert exact[-10:].mean() < 0.75 * exact[0], "nothing was learned: the comparison would be of no use"
    bound = max(1e-3, 4 * np.abs(rounded - exact).max())
    assert np.abs(ours - exact).max() <= bound


def train(make: Callable[[], base.Model], optim: base.Optim) -> np.ndarray:
    """Losses of an optimizer with clipping, warm-up and cosine decay."""
    model = make()
    model.optimizer = ingot.Optimizer(model, betas=(0.9, 0.95), weight_decay=0.1, optim=optim)
    precise = model.parameters[next(iter(model.parameters))].dtype
    losses = []
    for step in range(NUM_STEPS):
        batch = windows(step)
        weights = np.full(len(batch.tokens), 1.0 / len(batch.tokens), dtype=precise)
        model.zero_grad()
        losses.append(model.forward_backward(*batch.arrays, weights, seed=step))
        warm = min(1.0, (step + 1) / 20)
        decayed = 0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * step / NUM_STEPS))
        info = model.step(3e-3 * warm * decayed, clip_norm=0.5)
        assert not info.skipped
    return np.array(losses)


def windows(step: int) -> Packed:
    """Random windows of one text."""
    starts = np.random.default_rng(step).integers(0, len(text()) - LENGTH - 1, SEQUENCES)
    rows = starts[:, None] + np.arange(LENGTH)
    offsets = np.arange(0, SEQUENCES * LENGTH + 1, LENGTH, dtype=np.int64)
    return Packed(text()[rows].ravel(), offsets, text()[rows + 1].ravel())


@functools.cache
def text() -> np.ndarray:
    """A text with structure to learn: words of a small dictionary, in random order."""
    rng = np.random.default_rng(0)
    words = [rng.integers(1, VOCAB, rng.integers(2, 6)) for _ in range(25)]
    return np.concatenate([np.append(words[i], 0) for i in rng.integers(0, 25, 2000)]).astype(np.int32)
