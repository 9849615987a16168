"""The forward computation, written out in tensor operations.

Shape legend: N tokens of the batch, V vocabulary, d hidden size, H query heads, G key-value heads, h head size, k scalar heads, R chosen
rows, n sequences of one length T.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ingot.configs import ModelConfig
from ingot.models.adapters import AdapterSettings, linear_modules
from ingot.models.hf import family_of
from ingot.models.packing import Packing
from ingot.models.randomness import SITE_ADAPTER, SITE_ATTENTION_RESIDUAL, SITE_EMBEDDING, SITE_MLP_RESIDUAL
from ingot.models.torch_backend.dropout import Dropout


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """A packing on the device."""

    tokens: Tensor
    """i64[N]."""
    positions: Tensor
    """i64[N]."""
    groups: list[tuple[Tensor | None, int]]
    """Sequences of one length: their rows, i64[n, T] (None where those are all rows in order), and T. Attention runs once for each."""

    @classmethod
    def of(cls, packing: Packing, device: torch.device) -> TokenBatch:
        """Groups the sequences by length, so that no row is padding."""
        starts, lengths = packing.offsets[:-1], np.diff(packing.offsets)
        groups: list[tuple[Tensor | None, int]] = []
        for length in np.unique(lengths[lengths > 0]).tolist():
            rows = starts[lengths == length][:, None] + np.arange(length)
            whole = rows.size == len(packing.tokens)
            groups.append((None if whole else torch.from_numpy(rows).to(device), length))
        return cls(
            torch.from_numpy(packing.tokens.astype(np.int64)).to(device),
            torch.from_numpy(packing.positions).to(device),
            groups,
        )


class Network:
    """The forward computation over named tensors: stateless, differentiable."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        adapter: AdapterSettings | None = None,
    ) -> None:
        """With ``adapter``, ``MODULE.lora_A.weight`` and ``MODULE.lora_B.weight`` among the tensors count."""
        self.config = config
        self._tensors = tensors
        self.adapter = adapter
        self._adapter_dropout: Dropout | None = None
        self._dtype = dtype
        self._is_gpt2 = family_of(config) == "gpt2"
        self._names = _GPT2_NAMES if self._is_gpt2 else _LLAMA_NAMES
        self._frequencies = _rotary_frequencies(config) if config.position == "rotary" else None

    def dropping(self, dropout: Dropout) -> Network:
        """The same computation with dropout at the entrance of the adapter."""
        network = copy.copy(self)
        network._adapter_dropout = dropout
        return network

    def residual(self, batch: TokenBatch, dropout: Dropout | None) -> Tensor:
        """The residual stream after the last block, [N, d]."""
        x = self._embed(batch.tokens, batch.positions)
        if dropout is not None:
            x = dropout(x, 0, SITE_EMBEDDING)
        turn = self._rotation(batch.positions)
        for layer in range(self.config.num_hidden_layers):
            q, k, v = self._queries_keys_values(layer, x, turn)
            branch = self._linear("output", layer, self._attend(layer, batch, q, k, v, dropout))
            x = x + (branch if dropout is None else dropout(branch, layer, SITE_ATTENTION_RESIDUAL))
            branch = self._mlp(layer, x)
            x = x + (branch if dropout is None else dropout(branch, layer, SITE_MLP_RESIDUAL))
        return x

    def continuation(
        self, tokens: Tensor, positions: Tensor, cached: Callable[[int, Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """The residual stream of new rows [N, d]; ``cached`` attends from their queries to everything before them."""
        x = self._embed(tokens, positions)
        turn = self._rotation(positions)
        for layer in range(self.config.num_hidden_layers):
            q, k, v = self._queries_keys_values(layer, x, turn)
            x = x + self._linear("output", layer, cached(layer, q, k, v).flatten(1))
            x = x + self._mlp(layer, x)
        return x

    def final_norm(self, x: Tensor) -> Tensor:
        """[R, d]."""
        return self._norm(self._names["final_norm"], x)

    def scores(self, hidden: Tensor, temperature: float | Tensor, banned: Tensor) -> Tensor:
        """Logits / temperature [R, V] at f32 (or f64) from the final norm's output, banned ids at -inf."""
        head = "lm_head" if not self.config.tie_word_embeddings else self._names["embedding"]
        scores = F.linear(hidden, self._tensors[head + ".weight"]).to(self._dtype) / temperature
        return scores.masked_fill(banned, -math.inf)

    def values(self, hidden: Tensor) -> Tensor:
        """Scalar heads [R, k]."""
        return F.linear(hidden, self._tensors["score.weight"], self._tensors["score.bias"]).to(self._dtype)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = F.embedding(tokens, self._tensors[self._names["embedding"] + ".weight"])
        if self.config.position == "learned":
            x = x + F.embedding(positions, self._tensors[self._names["positions"] + ".weight"])
        return x

    def _queries_keys_values(self, layer: int, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        """[N, H, h], [N, G, h] and [N, G, h], normed and rotated."""
        config, h = self.config, self.config.head_dim or 0
        x = self._norm(self._name("attention_norm", layer), x)
        if self._is_gpt2:
            parts = self._linear("qkv", layer, x).chunk(3, dim=-1)
        else:
            parts = tuple(self._linear(role, layer, x) for role in ("query", "key", "value"))
        q, k, v = (part.reshape(len(x), part.shape[-1] // h, h) for part in parts)
        if config.qk_norm:
            q = self._rms_norm(self._name("query_norm", layer), q)
            k = self._rms_norm(self._name("key_norm", layer), k)
        if turn is not None:
            q, k = _rotate(q, *turn), _rotate(k, *turn)
        return q, k, v

    def _attend(
        self, layer: int, batch: TokenBatch, q: Tensor, k: Tensor, v: Tensor, dropout: Dropout | None
    ) -> Tensor:
        """Causal attention inside each sequence, [N, H h]."""
        if len(batch.groups) == 1:
            return self._attend_group(layer, batch.groups[0], q, k, v, dropout)
        rows = [rows.flatten() for rows, _ in batch.groups if rows is not None]
        parts = [self._attend_group(layer, group, q, k, v, dropout) for group in batch.groups]
        if not parts:
            return q.flatten(1)
        # The groups' rows are a permutation of all rows: turn it back.
        return torch.cat(parts)[torch.argsort(torch.cat(rows))]

    def _attend_group(
        self, layer: int, group: tuple[Tensor | None, int], q: Tensor, k: Tensor, v: Tensor, dropout: Dropout | None
    ) -> Tensor:
        rows, length = group
        # [n, H or G, T, h]
        q, k, v = (
            (x.reshape(-1, length, *x.shape[1:]) if rows is None else x[rows]).transpose(1, 2) for x in (q, k, v)
        )
        if dropout is None:
            mixed = attention(q, k, v, is_causal=True)
        else:
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
            future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
            scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
            weights = scores.to(self._dtype).softmax(dim=-1)
            weights = weights * dropout.weights_mask(layer, q.shape[1], rows, length, self._dtype)
            mixed = weights.to(v.dtype) @ v
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1)

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        x = self._norm(self._name("mlp_norm", layer), x)
        up = self._linear("up", layer, x)
        match self.config.activation:
            case "swiglu":
                active = F.silu(self._linear("gate", layer, x)) * up
            case "gelu_tanh":
                active = F.gelu(up, approximate="tanh")
            case "gelu":
                active = F.gelu(up)
            case "relu":
                active = F.relu(up)
            case "relu2":
                active = F.relu(up).square()
        return self._linear("down", layer, active)

    def _linear(self, role: str, layer: int, x: Tensor) -> Tensor:
        name = self._name(role, layer)
        weight = self._tensors[name + ".weight"]
        y = F.linear(x, weight.T if self._is_gpt2 else weight, self._tensors.get(name + ".bias"))
        inner = self._tensors.get(name + ".lora_A.weight")
        if inner is None or self.adapter is None:
            return y
        if self._adapter_dropout is not None:
            names = list(linear_modules(self.config))
            place = names.index(name) % (len(names) // self.config.num_hidden_layers)
            x = self._adapter_dropout(x, layer, SITE_ADAPTER + place)
        return y + F.linear(self.adapter.scale * F.linear(x, inner), self._tensors[name + ".lora_B.weight"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        if self.config.norm == "rms":
            return self._rms_norm(name, x)
        gain, bias = self._tensors[name + ".weight"], self._tensors[name + ".bias"]
        return F.layer_norm(x, x.shape[-1:], gain, bias, self.config.norm_eps)

    def _rms_norm(self, name: str, x: Tensor) -> Tensor:
        x = x.to(self._dtype)
        return (
            x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.norm_eps) * self._tensors[name + ".weight"]
        )

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines [N, 1, h/2]; angles in f64, rounded once."""
        if self._frequencies is None:
            return None
        angles = torch.outer(positions.double(), torch.from_numpy(self._frequencies).to(positions.device))[:, None]
        return angles.cos().to(self._dtype), angles.sin().to(self._dtype)

    def _name(self, role: str, layer: int) -> str:
        return self._names[role].format(layer)


_GPT2_NAMES = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "attention_norm": "transformer.h.{}.ln_1",
    "qkv": "transformer.h.{}.attn.c_attn",
    "output": "transformer.h.{}.attn.c_proj",
    "mlp_norm": "transformer.h.{}.ln_2",
    "up": "transformer.h.{}.mlp.c_fc",
    "down": "transformer.h.{}.mlp.c_proj",
    "final_norm": "transformer.ln_f",
}
_LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "positions": "model.embed_positions",
    "attention_norm": "model.layers.{}.input_layernorm",
    "query": "model.layers.{}.self_attn.q_proj",
    "key": "model.layers.{}.self_attn.k_proj",
    "value": "model.layers.{}.self_attn.v_proj",
    "query_norm": "model.layers.{}.self_attn.q_norm",
    "key_norm": "model.layers.{}.self_attn.k_norm",
    "output": "model.layers.{}.self_attn.o_proj",
    "mlp_norm": "model.layers.{}.post_attention_layernorm",
    "gate": "model.layers.{}.mlp.gate_proj",
    "up": "model.layers.{}.mlp.up_proj",
    "down": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm",
}


def attention(q: Tensor, k: Tensor, v: Tensor, **mask: Any) -> Tensor:
    """Scaled dot-product attention of [n, H, T, h] on [n, G, T', h]; scale 1 / sqrt(h)."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **mask)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021, equation 34), half-split convention; x [N, heads, h]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _rotary_frequencies(config: ModelConfig) -> npt.NDArray[np.float64]:
    """Angle per position of each pair, [h/2], radians: theta^(-2i/h), scaled as the configuration says."""
    half = (config.head_dim or 0) // 2
    plain = np.power(config.rope_theta, -np.arange(half, dtype=np.float64) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    stretched = plain / float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return stretched
    # Llama 3: pairs that make few turns within the original context are stretched in full, those with many not at all.
    turns = float(scaling["original_max_position_embeddings"]) * plain / math.tau
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 - kept) * stretched + kept * plain
