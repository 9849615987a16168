"""The slow transformer of ``oracle`` against central finite differences in f64: no torch, no native code."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from networks import OUTPUTS, SHAPES, pack, perturbed
from oracle.transformer import Transformer

NUM_VALUES = 2
STEP = 1e-5


@pytest.mark.parametrize("shape", ["gpt2", "llama", "qwen2", "qwen3", "mixed", "gelu"])
def test_every_gradient_is_the_slope_of_the_outputs(shape: str) -> None:
    config = SHAPES[shape]
    network = Transformer(config, perturbed(config, NUM_VALUES), NUM_VALUES)
    packed = pack(config, [1, 0, 4, 7], share=0.8)
    options = {"temperature": 0.7, "banned_ids": [config.vocab_size - 1, 3]}
    packed.targets[packed.targets == 3] = 4
    tapes, outputs = network.forward(*packed.arrays, **options)
    rng = np.random.default_rng(1)
    d_outputs = {name: rng.standard_normal(outputs[name].shape) for name in OUTPUTS}
    network.backward(tapes, d_outputs)

    def loss() -> float:
        _, outputs = network.forward(*packed.arrays, **options)
        return sum(float((outputs[name] * d_outputs[name]).sum()) for name in OUTPUTS)

    for name, weight in network.weights.items():
        gradient = network.gradients[name]
        size = np.linalg.norm(gradient)
        for direction in directions(gradient, rng):
            start = weight.copy()
            weight += STEP * direction
            above = loss()
            weight[...] = start - STEP * direction
            below = loss()
            weight[...] = start
            slope = (above - below) / (2 * STEP)
            # The bound is relative to the gradient's norm: the largest slope there is.
            assert abs(slope - (gradient * direction).sum()) <= 1e-6 * size + 1e-8, name


def directions(gradient: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Unit vectors: along the gradient, along two random directions, and along its largest element."""
    yield gradient / (np.linalg.norm(gradient) or 1.0)
    for _ in range(2):
        random = rng.standard_normal(gradient.shape)
        yield random / np.linalg.norm(random)
    single = np.zeros_like(gradient)
    single.flat[np.abs(gradient).argmax()] = 1.0
    yield single
