"""Small networks of every kind, batches for them, and the same network in several implementations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ingot.configs import ModelConfig
from ingot.models.parameters import parameter_table

if TYPE_CHECKING:
    from ingot.models.native import NativeModel
    from ingot.models.torch_backend import TorchModel

OUTPUTS = ("logprobs", "entropy", "lse", "zbar", "values", "hidden")
"""Outputs that have gradients."""

# Sizes that divide by nothing that a kernel likes; `wide` is more than a tile in every dimension.
SHAPES = {
    "gpt2": ModelConfig.gpt2(
        vocab_size=37,
        hidden_size=21,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=29,
        max_position_embeddings=130,
    ),
    "llama": ModelConfig.llama(
        vocab_size=41,
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        intermediate_size=27,
        tie_word_embeddings=False,
    ),
    "qwen2": ModelConfig.llama(
        vocab_size=33,
        hidden_size=18,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=1,
        intermediate_size=35,
        attention_bias="qkv",
    ),
    "qwen3": ModelConfig.llama(
        vocab_size=35,
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        intermediate_size=27,
        qk_norm=True,
        attention_bias="qkvo",
        rope_scaling={
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "mixed": ModelConfig(
        vocab_size=29,
        hidden_size=19,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=8,
        norm="layer",
        position="rotary",
        rope_scaling={"rope_type": "linear", "factor": 2.0},
        activation="relu2",
        attention_bias="none",
        mlp_bias=True,
        tie_word_embeddings=False,
    ),
    "gelu": ModelConfig.gpt2(
        vocab_size=31,
        hidden_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=80,
        activation="gelu",
    ),
    "wide": ModelConfig.gpt2(
        vocab_size=515,
        hidden_size=136,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=291,
        max_position_embeddings=130,
    ),
}


@dataclasses.dataclass(frozen=True)
class Packed:
    """A packed batch."""

    tokens: np.ndarray[Any, np.dtype[np.int32]]
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    targets: np.ndarray[Any, np.dtype[np.int32]]

    @property
    def arrays(self) -> tuple[np.ndarray[Any, Any], ...]:
        """What ``forward`` takes."""
        return self.tokens, self.offsets, self.targets

    def sequence(self, index: int) -> Packed:
        """One of its sequences as a batch."""
        rows = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return Packed(self.tokens[rows], np.array([0, rows.stop - rows.start]), self.targets[rows])


def pack(config: ModelConfig, lengths: Iterable[int], seed: int = 0, *, share: float = 0.9) -> Packed:
    """Random tokens in sequences of these lengths; a ``share`` of the rows has a target. The last id is never used."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(list(lengths))]).astype(np.int64)
    num_tokens = int(offsets[-1])
    tokens = rng.integers(0, config.vocab_size - 1, num_tokens).astype(np.int32)
    targets = rng.integers(0, config.vocab_size - 1, num_tokens).astype(np.int32)
    targets[rng.random(num_tokens) > share] = -1
    return Packed(tokens, offsets, targets)


def perturbed(config: ModelConfig, num_values: int = 0, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Weights far from their initial values: gains around 1, biases that are not 0, attention that prefers some tokens."""
    rng = np.random.default_rng(seed)
    weights = {}
    for parameter in parameter_table(config, num_values):
        spread = 0.2 if len(parameter.shape) == 1 else 1.5 / np.sqrt(parameter.shape[-1])
        values = spread * rng.standard_normal(parameter.shape) + (parameter.initial == "one")
        weights[parameter.name] = values.astype(np.float32)
    return weights


def native(config: ModelConfig, weights: Mapping[str, Any], num_values: int = 0, **options: Any) -> NativeModel:
    """The native network with these weights."""
    from ingot.models.native import NativeModel

    model = NativeModel(config, num_values=num_values, **options)
    model.load_state(weights)
    return model


def twin(config: ModelConfig, weights: Mapping[str, Any], num_values: int = 0, precision: str = "f64") -> TorchModel:
    """The torch network with these weights."""
    from ingot.models.torch_backend import TorchModel

    # One thread: tensors this small only lose by sharing work.
    model = TorchModel(config, precision=precision, device="cpu", threads=1, num_values=num_values)  # type: ignore[arg-type]
    model.load_state(weights)
    return model


def output_gradients(
    packed: Packed, config: ModelConfig, num_values: int, names: Iterable[str], seed: int = 1
) -> dict[str, np.ndarray[Any, Any]]:
    """Random gradients of some outputs by argument name, f32."""
    rng = np.random.default_rng(seed)
    num_tokens = len(packed.tokens)
    gradients = {}
    for name in names:
        shape: tuple[int, ...] = (num_tokens,)
        if name == "values" and num_values > 1:
            shape = (num_tokens, num_values)
        if name == "hidden":
            shape = (num_tokens, config.hidden_size)
        gradients[f"d_{name}"] = rng.standard_normal(shape).astype(np.float32)
    return gradients


def worst_ratio(
    got: Mapping[str, Any], expected: Mapping[str, Any], relative: float, absolute: float
) -> tuple[float, str]:
    """Largest max|got - expected| / (relative max|expected| + absolute) over the tensors, and whose: at most 1 is within."""
    assert list(got) == list(expected)
    ratios = []
    for name, want in expected.items():
        difference = np.abs(np.asarray(got[name], dtype=np.float64) - want).max()
        assert np.isfinite(difference), name
        ratios.append((float(difference / (relative * np.abs(want).max() + absolute)), name))
    return max(ratios)
