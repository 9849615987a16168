"""Names, shapes and first values of a network's parameters, in the order of the flat buffers.

The same list as the native core's, for backends that are written in Python.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal, TypeAlias

import numpy as np

from ingot.configs import ModelConfig
from ingot.models.base import FloatArray
from ingot.models.hf import family_of
from ingot.models.randomness import normals

Initial: TypeAlias = Literal["zero", "one", "normal", "residual", "score"]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One named tensor."""

    name: str
    """Hugging Face name."""
    shape: tuple[int, ...]
    """Shape under that name: linear layers are [out, in], but [in, out] in GPT-2's files."""
    offset: int
    """Index of its first element in a flat buffer."""
    initial: Initial
    """How it gets its first values."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def turned(self) -> bool:
        """Whether it is the weight of a linear layer shown as [in, out]: GPT-2's alone."""
        return self.name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))

    @property
    def in_block(self) -> bool:
        """Whether it is a matrix of a block: a projection of attention or of the MLP."""
        return len(self.shape) == 2 and self.name.startswith(("transformer.h.", "model.layers."))

    @property
    def fused(self) -> tuple[slice, ...]:
        """Columns of the matrices that it holds: one, or GPT-2's query, key and value, which are of one width."""
        if not self.name.endswith(".c_attn.weight"):
            return (slice(None),)
        width = self.shape[1] // 3
        return tuple(slice(i * width, (i + 1) * width) for i in range(3))

    @property
    def decays(self) -> bool:
        """Whether weight decay applies by default: to matrices, not to vectors."""
        return len(self.shape) > 1


def parameter_table(config: ModelConfig, num_values: int = 0) -> list[Parameter]:
    """All parameters: embedding, positions, the blocks, final norm, head (where not shared), scalar heads."""
    table: list[Parameter] = []
    for name, shape, initial in _gpt2_entries(config) if family_of(config) == "gpt2" else _llama_entries(config):
        offset = table[-1].offset + table[-1].size if table else 0
        table.append(Parameter(name, shape, offset, initial))
    entries: list[_Entry] = []
    if not config.tie_word_embeddings:
        entries.append(("lm_head.weight", (config.vocab_size, config.hidden_size), "normal"))
    if num_values:
        entries.append(("score.weight", (num_values, config.hidden_size), "score"))
        entries.append(("score.bias", (num_values,), "zero"))
    for name, shape, initial in entries:
        table.append(Parameter(name, shape, table[-1].offset + table[-1].size, initial))
    return table


def initial_values(config: ModelConfig, table: list[Parameter], seed: int) -> Iterator[tuple[Parameter, FloatArray]]:
    """First values, one parameter at a time; those of the native core for the same seed (but for a rounding in the last bit).

    GPT-2's scheme (Radford et al. 2019, section 2.3): normal, the projections that end in the residual stream divided by
    sqrt(2 layers); norms one, biases zero. Scalar heads have variance 1 / (hidden_size + 1) (Stiennon et al. 2020).
    """
    deviations = {
        "normal": config.initializer_range,
        "residual": config.initializer_range / math.sqrt(2.0 * config.num_hidden_layers),
        "score": 1.0 / math.sqrt(config.hidden_size + 1.0),
    }
    for stream, parameter in enumerate(table):
        if parameter.initial in deviations:
            flat = normals(seed, stream, parameter.size, deviations[parameter.initial])
            # The native buffer holds every linear layer as [out, in]: the numbers are dealt out in that order.
            yield (
                parameter,
                flat.reshape(parameter.shape[::-1]).T if parameter.turned else flat.reshape(parameter.shape),
            )
        else:
            yield parameter, np.full(parameter.shape, float(parameter.initial == "one"), dtype=np.float32)


_Entry: TypeAlias = tuple[str, tuple[int, ...], Initial]


def _gpt2_entries(config: ModelConfig) -> Iterator[_Entry]:
    d, width = config.hidden_size, config.intermediate_size or 0
    yield "transformer.wte.weight", (config.vocab_size, d), "normal"
    yield "transformer.wpe.weight", (config.max_position_embeddings, d), "normal"
    for layer in range(config.num_hidden_layers):
        block = f"transformer.h.{layer}"
        yield from _norm(config, f"{block}.ln_1")
        yield from _turned_linear(f"{block}.attn.c_attn", d, 3 * d, "normal")
        yield from _turned_linear(f"{block}.attn.c_proj", d, d, "residual")
        yield from _norm(config, f"{block}.ln_2")
        yield from _turned_linear(f"{block}.mlp.c_fc", d, width, "normal")
        yield from _turned_linear(f"{block}.mlp.c_proj", width, d, "residual")
    yield from _norm(config, "transformer.ln_f")


def _turned_linear(name: str, inputs: int, outputs: int, initial: Initial) -> Iterator[_Entry]:
    yield f"{name}.weight", (inputs, outputs), initial
    yield f"{name}.bias", (outputs,), "zero"


def _llama_entries(config: ModelConfig) -> Iterator[_Entry]:
    d, width, h = config.hidden_size, config.intermediate_size or 0, config.head_dim or 0
    query, key_value = config.num_attention_heads * h, (config.num_key_value_heads or 0) * h
    yield "model.embed_tokens.weight", (config.vocab_size, d), "normal"
    if config.position == "learned":
        yield "model.embed_positions.weight", (config.max_position_embeddings, d), "normal"
    qkv = (("q_proj", query), ("k_proj", key_value), ("v_proj", key_value))
    expansions = ("gate_proj", "up_proj") if config.activation == "swiglu" else ("up_proj",)
    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}"
        attention, mlp = f"{block}.self_attn", f"{block}.mlp"
        yield from _norm(config, f"{block}.input_layernorm")
        # Neighbours that one product serves: all weights, then all biases.
        for name, outputs in qkv:
            yield f"{attention}.{name}.weight", (outputs, d), "normal"
        for name, outputs in qkv if config.attention_bias != "none" else ():
            yield f"{attention}.{name}.bias", (outputs,), "zero"
        for name in ("q_norm", "k_norm") if config.qk_norm else ():
            yield f"{attention}.{name}.weight", (h,), "one"
        yield f"{attention}.o_proj.weight", (d, query), "residual"
        if config.attention_bias == "qkvo":
            yield f"{attention}.o_proj.bias", (d,), "zero"
        yield from _norm(config, f"{block}.post_attention_layernorm")
        for name in expansions:
            yield f"{mlp}.{name}.weight", (width, d), "normal"
        for name in expansions if config.mlp_bias else ():
            yield f"{mlp}.{name}.bias", (width,), "zero"
        yield f"{mlp}.down_proj.weight", (d, width), "residual"
        if config.mlp_bias:
            yield f"{mlp}.down_proj.bias", (d,), "zero"
    yield from _norm(config, "model.norm")


def _norm(config: ModelConfig, name: str) -> Iterator[_Entry]:
    yield f"{name}.weight", (config.hidden_size,), "one"
    if config.norm == "layer":
        yield f"{name}.bias", (config.hidden_size,), "zero"
