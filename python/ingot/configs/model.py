"""The shape of a network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from ingot.configs.checks import check_keys, require

Norm = Literal["layer", "rms"]
Position = Literal["learned", "rotary"]
Activation = Literal["gelu_tanh", "gelu", "relu", "relu2", "swiglu"]
AttentionBias = Literal["none", "qkv", "qkvo"]

_GPT2_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 1024,
    "norm": "layer",
    "norm_eps": 1e-5,
    "position": "learned",
    "activation": "gelu_tanh",
    "attention_bias": "qkvo",
    "mlp_bias": True,
    "tie_word_embeddings": True,
}
_LLAMA_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "norm": "rms",
    "norm_eps": 1e-5,
    "position": "rotary",
    "rope_theta": 10000.0,
    "activation": "swiglu",
    "attention_bias": "none",
    "mlp_bias": False,
    "tie_word_embeddings": True,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only transformer. GPT-2, Llama, SmolLM2, Qwen2 and Qwen3 are settings of it.

    Raises :class:`ingot.errors.ConfigError` (a ``ValueError``) where the numbers do not fit together.
    Fields that may be ``None`` are filled in on construction, so a built configuration is always complete.
    """

    vocab_size: int
    """Number of token ids."""
    hidden_size: int
    """Width of the residual stream."""
    num_hidden_layers: int
    """Number of transformer blocks."""
    num_attention_heads: int
    """Query heads per block."""
    num_key_value_heads: int | None = None
    """Key and value heads per block (grouped-query attention); as many as query heads unless given."""
    head_dim: int | None = None
    """Width of one head; hidden_size / num_attention_heads unless given."""
    intermediate_size: int | None = None
    """Width of the MLP; 4 x hidden_size unless given, for swiglu 8/3 x hidden_size rounded up to a multiple of 32."""
    max_position_embeddings: int = 2048
    """Longest sequence that the model is made for, in tokens. A hard limit for learned positions."""
    norm: Norm = "rms"
    """LayerNorm (with gain and bias) or RMSNorm (gain only), before each sub-layer and after the last block."""
    norm_eps: float = 1e-5
    """Added to the variance inside the norm."""
    position: Position = "rotary"
    """Learned absolute positions, or rotary embeddings (half-split convention)."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: Mapping[str, Any] | None = None
    """Rotary scaling as in a Hugging Face config: ``{"rope_type": "linear" | "llama3", "factor": ..., ...}``."""
    activation: Activation = "swiglu"
    """Non-linearity of the MLP; swiglu has a gate, the others are plain."""
    attention_bias: AttentionBias = "none"
    """Which attention projections have a bias."""
    mlp_bias: bool = False
    """Whether the MLP's linear layers have a bias."""
    qk_norm: bool = False
    """RMSNorm on each query and key head before the rotary embedding (Qwen3)."""
    tie_word_embeddings: bool = True
    """Whether the head shares the embedding's weights."""
    dropout: float = 0.0
    """Probability of dropping a value: after the embedding, on attention weights and on both residual branches."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; output projections of both branches get it divided by sqrt(2 x layers)."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            require(
                self.hidden_size % self.num_attention_heads == 0,
                f"hidden_size {self.hidden_size} does not divide by num_attention_heads {self.num_attention_heads}: "
                "choose numbers that divide, or give head_dim",
            )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.intermediate_size is None:
            wide = 4 * self.hidden_size if self.activation != "swiglu" else 32 * math.ceil(self.hidden_size / 12)
            object.__setattr__(self, "intermediate_size", wide)
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", dict(self.rope_scaling))
        key_value_heads, head_dim = self.num_key_value_heads, self.head_dim
        assert key_value_heads is not None
        assert head_dim is not None
        assert self.intermediate_size is not None
        for name in ("num_key_value_heads", "head_dim", "intermediate_size"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        require(
            self.num_attention_heads % key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} does not divide by num_key_value_heads {key_value_heads}: "
            "choose numbers that divide",
        )
        if self.position == "rotary":
            require(head_dim % 2 == 0, f"rotary positions need an even head_dim, got {head_dim}")
            require(self.rope_theta > 0, f"rope_theta must be positive, got {self.rope_theta}")
        else:
            require(self.rope_scaling is None, "rope_scaling needs position = rotary")
        require(0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), got {self.dropout}")
        require(self.norm_eps > 0, f"norm_eps must be positive, got {self.norm_eps}")
        require(self.initializer_range >= 0, f"initializer_range must not be negative, got {self.initializer_range}")
        for name, allowed in (
            ("norm", ("layer", "rms")),
            ("position", ("learned", "rotary")),
            ("activation", ("gelu_tanh", "gelu", "relu", "relu2", "swiglu")),
            ("attention_bias", ("none", "qkv", "qkvo")),
        ):
            require(
                getattr(self, name) in allowed,
                f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}",
            )

    @classmethod
    def gpt2(cls, **fields: Any) -> ModelConfig:
        """GPT-2's family: LayerNorm, learned positions, tanh-GELU, biases everywhere, tied head. ``fields`` override."""
        return cls(**{**_GPT2_DEFAULTS, **fields})

    @classmethod
    def llama(cls, **fields: Any) -> ModelConfig:
        """Llama's family: RMSNorm, rotary positions, SwiGLU, no biases; tied head as small models have. ``fields`` override."""
        return cls(**{**_LLAMA_DEFAULTS, **fields})

    @property
    def num_parameters(self) -> int:
        """Number of weights of the whole model, a shared head counted once."""
        d, ff = self.hidden_size, self.intermediate_size or 0
        q, kv = self.num_attention_heads * (self.head_dim or 0), (self.num_key_value_heads or 0) * (self.head_dim or 0)
        norm = 2 * d if self.norm == "layer" else d
        attention = d * (q + 2 * kv) + q * d
        attention += {"none": 0, "qkv": q + 2 * kv, "qkvo": q + 2 * kv + d}[self.attention_bias]
        attention += 2 * (self.head_dim or 0) if self.qk_norm else 0
        up = 2 * ff if self.activation == "swiglu" else ff
        mlp = d * up + ff * d + ((up + d) if self.mlp_bias else 0)
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        embeddings += self.max_position_embeddings * d if self.position == "learned" else 0
        return self.num_hidden_layers * (attention + mlp + 2 * norm) + norm + embeddings

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of one training step per token, forward and backward, at sequences of ``length`` tokens.

        6 for each weight of a matrix product (the head's included, the embedding's look-up not) and
        6 x layers x heads x head_dim x length for causal attention (half of the full square).
        """
        d, ff = self.hidden_size, self.intermediate_size or 0
        q, kv = self.num_attention_heads * (self.head_dim or 0), (self.num_key_value_heads or 0) * (self.head_dim or 0)
        up = 2 * ff if self.activation == "swiglu" else ff
        matrices = self.num_hidden_layers * (d * (q + 2 * kv) + q * d + d * up + ff * d) + self.vocab_size * d
        return 6.0 * matrices + 6.0 * self.num_hidden_layers * q * length

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """The inverse of :meth:`to_dict`; an unknown field is an error that names the nearest one."""
        check_keys(cls, fields, "model configuration")
        return cls(**fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What the network looks like, before the vocabulary and the context length are known. Unset fields follow the family."""

    family: Literal["llama", "gpt2"] = "llama"
    """Whose defaults to start from: llama (RMSNorm, rotary, SwiGLU) or gpt2 (LayerNorm, learned positions, GELU)."""
    hidden_size: int = 256
    """Width of the residual stream."""
    num_hidden_layers: int = 6
    """Number of transformer blocks."""
    num_attention_heads: int = 4
    """Query heads per block."""
    num_key_value_heads: int | None = None
    """Key and value heads per block; as many as query heads unless given."""
    head_dim: int | None = None
    """Width of one head; hidden_size / num_attention_heads unless given."""
    intermediate_size: int | None = None
    """Width of the MLP."""
    max_position_embeddings: int | None = None
    """Longest sequence that the model is made for; max_length unless given."""
    norm: Norm | None = None
    """layer or rms."""
    norm_eps: float | None = None
    """Added to the variance inside the norm."""
    position: Position | None = None
    """learned or rotary."""
    rope_theta: float | None = None
    """Base of the rotary frequencies."""
    activation: Activation | None = None
    """Non-linearity of the MLP."""
    attention_bias: AttentionBias | None = None
    """Which attention projections have a bias: none, qkv or qkvo."""
    mlp_bias: bool | None = None
    """Whether the MLP's linear layers have a bias."""
    qk_norm: bool | None = None
    """RMSNorm on each query and key head (Qwen3)."""
    tie_word_embeddings: bool | None = None
    """Whether the head shares the embedding's weights."""
    dropout: float = 0.0
    """Probability of dropping a value while training."""
    initializer_range: float | None = None
    """Standard deviation of the initial weights."""

    def resolve(self, vocab_size: int, max_length: int) -> ModelConfig:
        """The complete configuration for a vocabulary of ``vocab_size`` ids and training sequences of ``max_length`` tokens."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        family = fields.pop("family")
        fields.setdefault("max_position_embeddings", max_length)
        make = ModelConfig.gpt2 if family == "gpt2" else ModelConfig.llama
        return make(vocab_size=vocab_size, **fields)
