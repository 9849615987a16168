"""A slow transformer in f64 numpy with its backward pass written by hand: the reading copy of the network.

One sequence at a time, one head at a time, no tiles, no fusing: each function computes what its formula says, and the gradient
stands below it. It shares nothing with the package but the configuration and Hugging Face's names of the weights.
``test_oracle.py`` compares it with central finite differences.

Shape legend: T tokens of one sequence, d hidden size, H query heads, G key-value heads, h head size, F width of the MLP,
V vocabulary, k scalar heads. A gradient is named ``d_`` plus the name of what it belongs to.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ingot.configs import ModelConfig

Array = np.ndarray[Any, np.dtype[np.float64]]


class Transformer:
    """The network of ``config`` with ``weights`` by Hugging Face name."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Any], num_values: int = 0) -> None:
        self.config = config
        self.num_values = num_values
        self.weights = {name: np.array(array, dtype=np.float64) for name, array in weights.items()}
        self.gradients = {name: np.zeros_like(array) for name, array in self.weights.items()}
        # GPT-2's files hold the weights of linear layers as [in, out].
        self.is_gpt2 = "transformer.wte.weight" in self.weights

    def forward(
        self,
        tokens: Any,
        offsets: Any,
        targets: Any,
        *,
        temperature: float = 1.0,
        banned_ids: Sequence[int] = (),
    ) -> tuple[list[dict[str, Any]], dict[str, Array]]:
        """All outputs of a packed batch: logprobs, entropy, lse, zbar [N], values [N, k], hidden [N, d]; and the tapes."""
        tapes = []
        for start, stop in itertools.pairwise(offsets):
            tape: dict[str, Any] = {"rows": slice(int(start), int(stop))}
            self._sequence_forward(tokens[start:stop], targets[start:stop], temperature, list(banned_ids), tape)
            tapes.append(tape)
        names = ("logprobs", "entropy", "lse", "zbar", "values", "hidden")
        return tapes, {name: np.concatenate([tape["out"][name] for tape in tapes]) for name in names}

    def backward(self, tapes: list[dict[str, Any]], d_outputs: Mapping[str, Any]) -> None:
        """Add the gradient of sum(output * d_output) over the outputs in ``d_outputs``."""
        for tape in tapes:
            self._sequence_backward(tape, {name: np.float64(d[tape["rows"]]) for name, d in d_outputs.items()})

    # -- one sequence -------------------------------------------------------------------------------------------------

    def _sequence_forward(
        self, tokens: Any, targets: Any, temperature: float, banned_ids: list[int], tape: dict[str, Any]
    ) -> None:
        config, num_tokens = self.config, len(tokens)
        x = self.weights[self._name("embedding") + ".weight"][tokens]  # [T, d]
        if config.position == "learned":
            x = x + self.weights[self._name("positions") + ".weight"][:num_tokens]
        tape["tokens"] = tokens
        tape["blocks"] = []
        for layer in range(config.num_hidden_layers):
            block: dict[str, Any] = {}
            x = x + self._attention_forward(layer, self._norm_forward(layer, "attention_norm", x, block), block)
            x = x + self._mlp_forward(layer, self._norm_forward(layer, "mlp_norm", x, block), block)
            tape["blocks"].append(block)
        hidden = self._norm_forward(None, "final_norm", x, tape)  # [T, d]

        head = self.weights["lm_head.weight"] if not config.tie_word_embeddings else None
        head = self.weights[self._name("embedding") + ".weight"] if head is None else head  # [V, d]
        scaled = hidden @ head.T / temperature  # [T, V]
        allowed = np.ones(config.vocab_size, dtype=bool)
        allowed[banned_ids] = False
        has_target = targets >= 0
        largest = np.max(scaled[:, allowed], axis=1, keepdims=True, initial=-np.inf)
        exponentials = np.where(allowed, np.exp(scaled - largest), 0.0)
        total = exponentials.sum(axis=1, keepdims=True)
        p = exponentials / total  # [T, V]
        lse = largest + np.log(total)  # [T, 1]
        log_p = np.where(allowed, scaled - lse, 0.0)
        entropy = -(p * log_p).sum(axis=1)
        chosen = scaled[np.arange(num_tokens), np.where(has_target, targets, 0)]
        tape["head"] = (head, hidden, p, log_p, entropy, allowed, has_target, targets, temperature)

        values = np.zeros((num_tokens, self.num_values))
        if self.num_values:
            values = hidden @ self.weights["score.weight"].T + self.weights["score.bias"]
        tape["out"] = {
            "logprobs": np.where(has_target, chosen - lse[:, 0], 0.0),
            "entropy": np.where(has_target, entropy, 0.0),
            "lse": np.where(has_target, lse[:, 0], 0.0),
            "zbar": np.where(has_target, scaled[:, allowed].mean(axis=1), 0.0),
            "values": values,
            "hidden": hidden,
        }

    def _sequence_backward(self, tape: dict[str, Any], d_out: Mapping[str, Array]) -> None:
        head, hidden, p, log_p, entropy, allowed, has_target, targets, temperature = tape["head"]
        num_tokens = len(targets)
        if num_tokens == 0:
            return

        def rows(name: str) -> Array:
            d = d_out.get(name, np.zeros(num_tokens))
            return np.where(has_target, d, 0.0)[:, None]  # [T, 1]

        chosen = np.zeros_like(p)
        chosen[np.arange(num_tokens), np.where(has_target, targets, 0)] = 1.0
        d_scaled = (
            rows("logprobs") * (chosen - p)
            - rows("entropy") * p * (log_p + entropy[:, None])
            + rows("lse") * p
            + rows("zbar") * allowed / allowed.sum()
        )
        d_logits = d_scaled / temperature
        d_hidden = d_logits @ head
        head_name = self._name("embedding") if self.config.tie_word_embeddings else "lm_head"
        self.gradients[head_name + ".weight"] += d_logits.T @ hidden
        if "values" in d_out:
            d_values = d_out["values"].reshape(num_tokens, self.num_values)
            self.gradients["score.weight"] += d_values.T @ hidden
            self.gradients["score.bias"] += d_values.sum(axis=0)
            d_hidden += d_values @ self.weights["score.weight"]
        if "hidden" in d_out:
            d_hidden += d_out["hidden"]

        d_x = self._norm_backward(None, "final_norm", d_hidden, tape)
        for layer in reversed(range(self.config.num_hidden_layers)):
            block = tape["blocks"][layer]
            d_x = d_x + self._norm_backward(layer, "mlp_norm", self._mlp_backward(layer, d_x, block), block)
            d_x = d_x + self._norm_backward(layer, "attention_norm", self._attention_backward(layer, d_x, block), block)
        np.add.at(self.gradients[self._name("embedding") + ".weight"], tape["tokens"], d_x)
        if self.config.position == "learned":
            self.gradients[self._name("positions") + ".weight"][:num_tokens] += d_x

    # -- layers -------------------------------------------------------------------------------------------------------

    def _attention_forward(self, layer: int, x: Array, block: dict[str, Any]) -> Array:
        """softmax(q k^T / sqrt(h)) v per head, causal; query head j reads key-value head j // (H / G)."""
        config, num_tokens = self.config, len(x)
        h, num_heads, num_groups = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        assert h is not None
        assert num_groups is not None
        q = self._linear_forward(layer, "query", x).reshape(num_tokens, num_heads, h)
        k = self._linear_forward(layer, "key", x).reshape(num_tokens, num_groups, h)
        v = self._linear_forward(layer, "value", x).reshape(num_tokens, num_groups, h)
        if config.qk_norm:
            q = self._norm_forward(layer, "query_norm", q, block)
            k = self._norm_forward(layer, "key_norm", k, block)
        if config.position == "rotary":
            q, k = self._rotate(q, 1.0), self._rotate(k, 1.0)
        future = np.triu(np.ones((num_tokens, num_tokens), dtype=bool), 1)
        mixed = np.zeros_like(q)  # [T, H, h]
        probabilities = []
        for head in range(num_heads):
            group = head // (num_heads // num_groups)
            scores = np.where(future, -np.inf, q[:, head] @ k[:, group].T / math.sqrt(h))  # [T, T]
            p = np.exp(scores - scores.max(axis=1, keepdims=True, initial=-np.inf))
            p = p / p.sum(axis=1, keepdims=True)
            mixed[:, head] = p @ v[:, group]
            probabilities.append(p)
        block["attention"] = (x, q, k, v, mixed, probabilities)
        return self._linear_forward(layer, "output", mixed.reshape(num_tokens, num_heads * h))

    def _attention_backward(self, layer: int, d_y: Array, block: dict[str, Any]) -> Array:
        x, q, k, v, mixed, probabilities = block["attention"]
        num_tokens, num_heads, h = q.shape
        num_groups = k.shape[1]
        d_mixed = self._linear_backward(layer, "output", mixed.reshape(num_tokens, -1), d_y).reshape(q.shape)
        d_q, d_k, d_v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
        for head in range(num_heads):
            group = head // (num_heads // num_groups)
            p = probabilities[head]
            d_p = d_mixed[:, head] @ v[:, group].T
            d_v[:, group] += p.T @ d_mixed[:, head]
            d_scores = p * (d_p - (p * d_p).sum(axis=1, keepdims=True)) / math.sqrt(h)
            d_q[:, head] = d_scores @ k[:, group]
            d_k[:, group] += d_scores.T @ q[:, head]
        if self.config.position == "rotary":
            d_q, d_k = self._rotate(d_q, -1.0), self._rotate(d_k, -1.0)
        if self.config.qk_norm:
            d_q = self._norm_backward(layer, "query_norm", d_q, block)
            d_k = self._norm_backward(layer, "key_norm", d_k, block)
        return (
            self._linear_backward(layer, "query", x, d_q.reshape(num_tokens, -1))
            + self._linear_backward(layer, "key", x, d_k.reshape(num_tokens, -1))
            + self._linear_backward(layer, "value", x, d_v.reshape(num_tokens, -1))
        )

    def _mlp_forward(self, layer: int, x: Array, block: dict[str, Any]) -> Array:
        up = self._linear_forward(layer, "up", x)  # [T, F]
        gate = self._linear_forward(layer, "gate", x) if self.config.activation == "swiglu" else up
        active, slope = _activation(self.config.activation, gate)
        inner = active * up if self.config.activation == "swiglu" else active
        block["mlp"] = (x, up, active, slope, inner)
        return self._linear_forward(layer, "down", inner)

    def _mlp_backward(self, layer: int, d_y: Array, block: dict[str, Any]) -> Array:
        x, up, active, slope, inner = block["mlp"]
        d_inner = self._linear_backward(layer, "down", inner, d_y)
        if self.config.activation != "swiglu":
            return self._linear_backward(layer, "up", x, d_inner * slope)
        return self._linear_backward(layer, "gate", x, d_inner * up * slope) + self._linear_backward(
            layer, "up", x, d_inner * active
        )

    def _norm_forward(self, layer: int | None, role: str, x: Array, tape: dict[str, Any]) -> Array:
        """(x - mean) / sqrt(variance + eps) * gain + bias, or x / sqrt(mean square + eps) * gain; over the last axis."""
        is_rms = self.config.norm == "rms" or role in ("query_norm", "key_norm")
        centered = x if is_rms else x - x.mean(axis=-1, keepdims=True)
        scale = 1.0 / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + self.config.norm_eps)
        unit = centered * scale
        tape[role] = (unit, scale, is_rms)
        name = self._name(role, layer)
        y = unit * self.weights[name + ".weight"]
        return y if is_rms else y + self.weights[name + ".bias"]

    def _norm_backward(self, layer: int | None, role: str, d_y: Array, tape: dict[str, Any]) -> Array:
        unit, scale, is_rms = tape[role]
        name = self._name(role, layer)
        leading = tuple(range(d_y.ndim - 1))
        self.gradients[name + ".weight"] += (d_y * unit).sum(axis=leading)
        d_unit = d_y * self.weights[name + ".weight"]
        d_x = d_unit - unit * (d_unit * unit).mean(axis=-1, keepdims=True)
        if not is_rms:
            self.gradients[name + ".bias"] += d_y.sum(axis=leading)
            d_x = d_x - d_unit.mean(axis=-1, keepdims=True)
        return d_x * scale

    def _rotate(self, x: Array, direction: float) -> Array:
        """Turn the pairs (i, i + h/2) of each head by position * frequency_i; ``direction`` -1 turns back."""
        num_tokens, half = len(x), x.shape[-1] // 2
        frequencies = self.config.rope_theta ** (-np.arange(half) / half)
        scaling = self.config.rope_scaling
        if scaling is not None and scaling["rope_type"] == "linear":
            frequencies = frequencies / scaling["factor"]
        elif scaling is not None:
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            turns = scaling["original_max_position_embeddings"] * frequencies / (2.0 * math.pi)
            kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
            frequencies = kept * frequencies + (1.0 - kept) * frequencies / scaling["factor"]
        angles = direction * np.outer(np.arange(num_tokens), frequencies)[:, None, :]  # [T, 1, h/2]
        first, second = x[..., :half], x[..., half:]
        return np.concatenate(
            [
                first * np.cos(angles) - second * np.sin(angles),
                second * np.cos(angles) + first * np.sin(angles),
            ],
            axis=-1,
        )

    def _linear_forward(self, layer: int, role: str, x: Array) -> Array:
        weight, bias = self._linear_tensors(self.weights, layer, role)
        y: Array = x @ weight.T
        return y if bias is None else y + bias

    def _linear_backward(self, layer: int, role: str, x: Array, d_y: Array) -> Array:
        d_weight, d_bias = self._linear_tensors(self.gradients, layer, role)
        d_weight += d_y.T @ x
        if d_bias is not None:
            d_bias += d_y.sum(axis=0)
        d_x: Array = d_y @ self._linear_tensors(self.weights, layer, role)[0]
        return d_x

    # -- names --------------------------------------------------------------------------------------------------------

    def _linear_tensors(self, tensors: dict[str, Array], layer: int, role: str) -> tuple[Array, Array | None]:
        """Views of a linear layer's weight as [out, in], and of its bias."""
        name = self._name(role, layer)
        weight, bias = tensors[name + ".weight"], tensors.get(name + ".bias")
        if self.is_gpt2:
            weight = weight.T
            if role in ("query", "key", "value"):
                # One tensor holds the three side by side.
                part = ("query", "key", "value").index(role)
                rows = slice(part * self.config.hidden_size, (part + 1) * self.config.hidden_size)
                assert bias is not None
                weight, bias = weight[rows], bias[rows]
        return weight, bias

    def _name(self, role: str, layer: int | None = None) -> str:
        if self.is_gpt2:
            return {
                "embedding": "transformer.wte",
                "positions": "transformer.wpe",
                "attention_norm": f"transformer.h.{layer}.ln_1",
                "query": f"transformer.h.{layer}.attn.c_attn",
                "key": f"transformer.h.{layer}.attn.c_attn",
                "value": f"transformer.h.{layer}.attn.c_attn",
                "output": f"transformer.h.{layer}.attn.c_proj",
                "mlp_norm": f"transformer.h.{layer}.ln_2",
                "up": f"transformer.h.{layer}.mlp.c_fc",
                "down": f"transformer.h.{layer}.mlp.c_proj",
                "final_norm": "transformer.ln_f",
            }[role]
        return {
            "embedding": "model.embed_tokens",
            "positions": "model.embed_positions",
            "attention_norm": f"model.layers.{layer}.input_layernorm",
            "query": f"model.layers.{layer}.self_attn.q_proj",
            "key": f"model.layers.{layer}.self_attn.k_proj",
            "value": f"model.layers.{layer}.self_attn.v_proj",
            "query_norm": f"model.layers.{layer}.self_attn.q_norm",
            "key_norm": f"model.layers.{layer}.self_attn.k_norm",
            "output": f"model.layers.{layer}.self_attn.o_proj",
            "mlp_norm": f"model.layers.{layer}.post_attention_layernorm",
            "gate": f"model.layers.{layer}.mlp.gate_proj",
            "up": f"model.layers.{layer}.mlp.up_proj",
            "down": f"model.layers.{layer}.mlp.down_proj",
            "final_norm": "model.norm",
        }[role]


def _activation(kind: str, x: Array) -> tuple[Array, Array]:
    """Value and slope of the MLP's non-linearity (of its gate's SiLU for swiglu)."""
    if kind == "swiglu":
        sigmoid = 1.0 / (1.0 + np.exp(-x))
        return x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid))
    if kind == "gelu":
        cumulative = 0.5 * (1.0 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2.0)))
        return x * cumulative, cumulative + x * np.exp(-0.5 * x**2) / math.sqrt(2.0 * math.pi)
    if kind == "gelu_tanh":
        scale = math.sqrt(2.0 / math.pi)
        tanh = np.tanh(scale * (x + 0.044715 * x**3))
        slope = 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh**2) * scale * (1.0 + 3.0 * 0.044715 * x**2)
        return 0.5 * x * (1.0 + tanh), slope
    positive = np.maximum(x, 0.0)
    if kind == "relu":
        return positive, (x > 0.0).astype(np.float64)
    assert kind == "relu2"
    return positive**2, 2.0 * positive
