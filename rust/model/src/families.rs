//! Hugging Face's names and layouts. Nothing else in the network knows them.

use crate::{ActivationKind, AttentionBias, Config, NormKind, PositionKind};

/// A Hugging Face model type whose class computes exactly the configured network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    /// `GPT2LMHeadModel`: weights of its linear layers are shown as `[in, out]`.
    Gpt2,
    /// `LlamaForCausalLM`.
    Llama,
    /// `Qwen2ForCausalLM`: Llama with biases on query, key and value.
    Qwen2,
    /// `Qwen3ForCausalLM`: Llama with a norm on query and key heads.
    Qwen3,
    /// No class of Hugging Face's: names follow Llama, with additions of our own.
    Ingot,
}

impl Family {
    /// The family of a configuration. The first that fits: every Llama is also expressible in our own naming.
    pub fn of(config: &Config) -> Self {
        let gpt2 = config.norm == NormKind::Layer
            && config.position == PositionKind::Learned
            && config.activation != ActivationKind::Swiglu
            && config.attention_bias == AttentionBias::Qkvo
            && config.mlp_bias
            && !config.qk_norm
            && config.num_key_value_heads == config.num_attention_heads
            && config.query_width() == config.hidden_size;
        if gpt2 {
            return Self::Gpt2;
        }
        let llama_like = config.norm == NormKind::Rms
            && config.position == PositionKind::Rotary
            && config.activation == ActivationKind::Swiglu;
        match (
            llama_like,
            config.attention_bias,
            config.qk_norm,
            config.mlp_bias,
        ) {
            // transformers' Llama refuses a hidden size that does not divide by the heads, whatever `head_dim` says.
            (true, AttentionBias::None | AttentionBias::Qkvo, false, _)
                if config
                    .hidden_size
                    .is_multiple_of(config.num_attention_heads) =>
            {
                Self::Llama
            }
            (true, AttentionBias::Qkv, false, false) => Self::Qwen2,
            (true, AttentionBias::None | AttentionBias::Qkvo, true, false) => Self::Qwen3,
            _ => Self::Ingot,
        }
    }

    /// Value of `model_type` in a `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Gpt2 => "gpt2",
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Ingot => "ingot",
        }
    }

    /// Whether the weights of linear layers are shown as `[in, out]`.
    pub(crate) fn transposes_linear(self) -> bool {
        self == Self::Gpt2
    }

    /// Whether query, key and value are one tensor in a file.
    pub(crate) fn fuses_qkv(self) -> bool {
        self == Self::Gpt2
    }

    pub(crate) fn name(self, role: Role) -> String {
        match self {
            Self::Gpt2 => gpt2_name(role),
            _ => llama_name(role),
        }
    }
}

/// What a group of tensors (a weight and perhaps its bias) is for. The suffix `.weight` or `.bias` is added by the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Role {
    Embedding,
    Positions,
    AttentionNorm(usize),
    FusedQkv(usize),
    Query(usize),
    Key(usize),
    Value(usize),
    QueryNorm(usize),
    KeyNorm(usize),
    AttentionOutput(usize),
    MlpNorm(usize),
    Gate(usize),
    Up(usize),
    Down(usize),
    FinalNorm,
    Head,
    Score,
}

fn gpt2_name(role: Role) -> String {
    match role {
        Role::Embedding => "transformer.wte".to_owned(),
        Role::Positions => "transformer.wpe".to_owned(),
        Role::AttentionNorm(layer) => format!("transformer.h.{layer}.ln_1"),
        Role::FusedQkv(layer) => format!("transformer.h.{layer}.attn.c_attn"),
        Role::AttentionOutput(layer) => format!("transformer.h.{layer}.attn.c_proj"),
        Role::MlpNorm(layer) => format!("transformer.h.{layer}.ln_2"),
        Role::Up(layer) => format!("transformer.h.{layer}.mlp.c_fc"),
        Role::Down(layer) => format!("transformer.h.{layer}.mlp.c_proj"),
        Role::FinalNorm => "transformer.ln_f".to_owned(),
        // Not part of GPT-2: `Family::of` never leads here for the others.
        other => llama_name(other),
    }
}

fn llama_name(role: Role) -> String {
    match role {
        Role::Embedding => "model.embed_tokens".to_owned(),
        Role::Positions => "model.embed_positions".to_owned(),
        Role::AttentionNorm(layer) => format!("model.layers.{layer}.input_layernorm"),
        Role::FusedQkv(layer) => format!("model.layers.{layer}.self_attn.qkv_proj"),
        Role::Query(layer) => format!("model.layers.{layer}.self_attn.q_proj"),
        Role::Key(layer) => format!("model.layers.{layer}.self_attn.k_proj"),
        Role::Value(layer) => format!("model.layers.{layer}.self_attn.v_proj"),
        Role::QueryNorm(layer) => format!("model.layers.{layer}.self_attn.q_norm"),
        Role::KeyNorm(layer) => format!("model.layers.{layer}.self_attn.k_norm"),
        Role::AttentionOutput(layer) => format!("model.layers.{layer}.self_attn.o_proj"),
        Role::MlpNorm(layer) => format!("model.layers.{layer}.post_attention_layernorm"),
        Role::Gate(layer) => format!("model.layers.{layer}.mlp.gate_proj"),
        Role::Up(layer) => format!("model.layers.{layer}.mlp.up_proj"),
        Role::Down(layer) => format!("model.layers.{layer}.mlp.down_proj"),
        Role::FinalNorm => "model.norm".to_owned(),
        Role::Head => "lm_head".to_owned(),
        Role::Score => "score".to_owned(),
    }
}
