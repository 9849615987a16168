"""Every parameter's gradient: the native core at every level against the f64 torch twin, and against finite differences of itself."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

from ingot.configs import ModelConfig
from networks import OUTPUTS, SHAPES, Packed, native, output_gradients, pack, perturbed, twin, worst_ratio

# Each length once, an empty sequence, and lengths around a tile of 64 keys.
LENGTHS = [*range(1, 13), 0, 63, 64, 65, 66]
# More rows than any chunk of rows that the core works on (1024 in the blocks, 2048 in the head).
MANY_LENGTHS = range(1, 71)
RELATIVE, ABSOLUTE = 1e-4, 1e-7


@pytest.mark.parametrize("outputs", [*((name,) for name in OUTPUTS), OUTPUTS], ids=lambda names: "+".join(names))
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_gradient_through_each_output(shape: str, outputs: tuple[str, ...], level: str) -> None:
    compare_with_twin(SHAPES[shape], tuple(LENGTHS), outputs, num_values=3, level=level)


@pytest.mark.parametrize("num_values", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_every_family(shape: str, num_values: int, level: str) -> None:
    compare_with_twin(SHAPES[shape], tuple(LENGTHS), OUTPUTS, num_values=num_values, level=level)


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_gradient_of_many_rows(shape: str) -> None:
    compare_with_twin(SHAPES[shape], tuple(MANY_LENGTHS), OUTPUTS, num_values=2)


@pytest.mark.parametrize("shape", ["gpt2", "llama", "qwen3"])
def test_gradient_with_dropout(shape: str, level: str) -> None:
    # The twin makes the same masks from the same numbers.
    config = dataclasses.replace(SHAPES[shape], dropout=0.3)
    compare_with_twin(config, tuple(LENGTHS), OUTPUTS, num_values=1, level=level)


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_fused_pass_equals_forward_and_backward(shape: str, dropout: float, level: str) -> None:
    config = dataclasses.replace(SHAPES[shape], dropout=dropout)
    packed = pack(config, LENGTHS)
    weights = np.random.default_rng(3).random(len(packed.tokens)).astype(np.float32)
    model = native(config, perturbed(config), level=level)
    loss = model.forward_backward(*packed.arrays, weights, temperature=0.8, seed=5)
    fused = {name: array.copy() for name, array in model.gradients.items()}
    model.zero_grad()
    ctx, out = model.forward(*packed.arrays, temperature=0.8, seed=5)
    model.backward(ctx, d_logprobs=-weights)
    assert loss == pytest.approx(-(weights * out.logprobs.astype(np.float64)).sum(), rel=1e-12)
    for name, array in model.gradients.items():
        np.testing.assert_array_equal(array, fused[name], err_msg=name)


def test_chosen_rows_have_the_gradient_of_those_rows() -> None:
    config = SHAPES["llama"]
    weights = perturbed(config, 1)
    packed = pack(config, LENGTHS)
    num_tokens = len(packed.tokens)
    rng = np.random.default_rng(0)
    value_rows = rng.random(num_tokens) < 0.3
    # In any order, and some rows twice.
    hidden_rows = rng.integers(0, num_tokens, 40)
    options = {"want": ("values", "hidden"), "value_rows": value_rows, "hidden_rows": hidden_rows}
    d_values = rng.standard_normal(num_tokens).astype(np.float32)
    d_hidden = rng.standard_normal((40, config.hidden_size)).astype(np.float32)
    model, reference = native(config, weights, 1), twin(config, weights, 1)
    ctx, out = model.forward(*packed.arrays, **options)
    twin_ctx, twin_out = reference.forward(*packed.arrays, **options)
    assert not out.values[~value_rows].any()
    np.testing.assert_allclose(out.values, twin_out.values, atol=1e-5)
    np.testing.assert_allclose(out.hidden, twin_out.hidden, atol=1e-5)
    model.backward(ctx, d_values=d_values, d_hidden=d_hidden)
    reference.backward(twin_ctx, d_values=d_values.astype(np.float64), d_hidden=d_hidden.astype(np.float64))
    ratio, name = worst_ratio(model.gradients, reference.gradients, RELATIVE, ABSOLUTE)
    assert ratio <= 1.0, name


@pytest.mark.parametrize("shape", SHAPES)
def test_slope_along_each_gradient(shape: str) -> None:
    """Finite differences of the core itself, in f32, by writing through the views."""
    config = SHAPES[shape]
    packed = pack(config, [3, 9, 14, 30], share=1.0)
    model = native(config, perturbed(config))
    row_weights = np.full(len(packed.tokens), 1.0 / len(packed.tokens), dtype=np.float32)
    model.forward_backward(*packed.arrays, row_weights)

    def loss() -> float:
        _, out = model.forward(*packed.arrays, train=False)
        return -float(out.logprobs.mean(dtype=np.float64))

    for name, weight in model.parameters.items():
        gradient = model.gradients[name].astype(np.float64)
        size = np.linalg.norm(gradient)
        if size < 1e-5:
            # The bias of the keys: softmax does not see it.
            assert name.endswith("k_proj.bias"), name
            continue
        # A step that changes the loss by about 0.004: far above rounding, far below where it bends.
        step = 0.002 / size**2 * gradient
        start = weight.copy()
        weight[...] = start + step
        above = loss()
        weight[...] = start - step
        below = loss()
        weight[...] = start
        slope = (above - below) / (2 * np.linalg.norm(step))
        assert slope == pytest.approx(size, rel=1e-2), name


def compare_with_twin(
    config: ModelConfig,
    lengths: tuple[int, ...],
    outputs: tuple[str, ...],
    *,
    num_values: int,
    level: str | None = None,
) -> None:
    packed, gradients, expected_outputs, expected = twin_gradients(ConfigKey(config), lengths, outputs, num_values)
    model = native(config, perturbed(config, num_values), num_values, level=level)
    options = forward_options(config)
    ctx, out = model.forward(*packed.arrays, want=outputs, **options)
    model.backward(ctx, **gradients)
    for name in outputs:
        np.testing.assert_allclose(getattr(out, name), expected_outputs[name], rtol=1e-4, atol=1e-5, err_msg=name)
    ratio, name = worst_ratio(model.gradients, expected, RELATIVE, ABSOLUTE)
    assert ratio <= 1.0, f"{name}: {ratio:.2f} times the bound"


def forward_options(config: ModelConfig) -> dict[str, Any]:
    return {"temperature": 0.9, "banned_ids": [config.vocab_size - 1], "seed": 7}


class ConfigKey:
    """A configuration that a cache can tell from others (its rotary scaling is a dict)."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConfigKey) and self.config == other.config

    def __hash__(self) -> int:
        return hash((self.config.vocab_size, self.config.dropout))


@functools.cache
def twin_gradients(
    key: ConfigKey, lengths: tuple[int, ...], outputs: tuple[str, ...], num_values: int
) -> tuple[Packed, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The batch, the gradients that go in, and the f64 twin's outputs and gradients; the same for every level."""
    config = key.config
    packed = pack(config, lengths)
    gradients = output_gradients(packed, config, num_values, outputs)
    model = twin(config, perturbed(config, num_values), num_values)
    ctx, out = model.forward(*packed.arrays, want=outputs, **forward_options(config))
    model.backward(ctx, **{name: array.astype(np.float64) for name, array in gradients.items()})
    return packed, gradients, dict(out.arrays), dict(model.gradients)
