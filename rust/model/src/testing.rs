//! Small configurations for the tests of this crate.

use crate::{ActivationKind, AttentionBias, Config, NormKind, PositionKind};

/// GPT-2's settings at a tiny size.
pub(crate) fn gpt2() -> Config {
    Config {
        vocab_size: 13,
        hidden_size: 12,
        num_hidden_layers: 2,
        num_attention_heads: 3,
        num_key_value_heads: 3,
        head_dim: 4,
        intermediate_size: 20,
        max_position_embeddings: 16,
        norm: NormKind::Layer,
        norm_eps: 1e-5,
        position: PositionKind::Learned,
        rope_theta: 10_000.0,
        rope_scaling: None,
        activation: ActivationKind::GeluTanh,
        attention_bias: AttentionBias::Qkvo,
        mlp_bias: true,
        qk_norm: false,
        tie_word_embeddings: true,
        dropout: 0.0,
        initializer_range: 0.02,
    }
}

/// Llama's settings at a tiny size, with grouped key-value heads.
pub(crate) fn llama() -> Config {
    Config {
        num_attention_heads: 4,
        num_key_value_heads: 2,
        norm: NormKind::Rms,
        position: PositionKind::Rotary,
        activation: ActivationKind::Swiglu,
        attention_bias: AttentionBias::None,
        mlp_bias: false,
        tie_word_embeddings: false,
        ..gpt2()
    }
}
