//! The shape of a network. Field names are those of the Python `ModelConfig`; a configuration is always complete.

use serde::{Deserialize, Serialize};

use crate::ModelError;

/// Which normalisation stands before each sub-layer and after the last block.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// `LayerNorm` with gain and bias (Ba et al. 2016).
    Layer,
    /// `RMSNorm` with gain (Zhang and Sennrich 2019).
    Rms,
}

/// How a token's position enters the network.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PositionKind {
    /// A learned vector per position, added to the embedding.
    Learned,
    /// Rotary embedding of queries and keys (Su et al. 2021), half-split convention.
    Rotary,
}

/// The non-linearity of the MLP.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActivationKind {
    /// GELU in its tanh form.
    GeluTanh,
    /// GELU with the error function.
    Gelu,
    /// max(x, 0).
    Relu,
    /// max(x, 0) squared.
    Relu2,
    /// silu(gate) * up (Shazeer 2020): the only gated one.
    Swiglu,
}

/// Which attention projections have a bias.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttentionBias {
    /// None of them.
    None,
    /// Query, key and value.
    Qkv,
    /// Query, key, value and output.
    Qkvo,
}

/// Scaling of the rotary frequencies for contexts longer than those first trained on, as Hugging Face computes it.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "snake_case", deny_unknown_fields)]
pub enum RopeScaling {
    /// All frequencies divided by `factor`.
    Linear {
        /// How much longer the context becomes.
        factor: f64,
    },
    /// Llama 3's: long wavelengths divided by `factor`, short ones kept, a smooth passage between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are scaled in full.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are not scaled.
        high_freq_factor: f64,
        /// The context length first trained on, in tokens.
        original_max_position_embeddings: usize,
    },
}

/// The shape of a decoder-only transformer. GPT-2, Llama, Qwen2 and Qwen3 are settings of it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of transformer blocks.
    pub num_hidden_layers: usize,
    /// Query heads per block.
    pub num_attention_heads: usize,
    /// Key and value heads per block; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Longest sequence the model is made for; a hard limit for learned positions.
    pub max_position_embeddings: usize,
    /// Normalisation.
    pub norm: NormKind,
    /// Added to the variance (or mean square) inside the norm.
    pub norm_eps: f64,
    /// Positions.
    pub position: PositionKind,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Scaling of the rotary frequencies.
    pub rope_scaling: Option<RopeScaling>,
    /// Non-linearity of the MLP.
    pub activation: ActivationKind,
    /// Biases of the attention projections.
    pub attention_bias: AttentionBias,
    /// Whether the MLP's linear layers have biases.
    pub mlp_bias: bool,
    /// `RMSNorm` on each query and key head before the rotary embedding.
    pub qk_norm: bool,
    /// Whether the head shares the embedding's weights.
    pub tie_word_embeddings: bool,
    /// Probability of dropping a value while training, in [0, 1).
    pub dropout: f64,
    /// Standard deviation of the initial weights.
    pub initializer_range: f64,
}

impl Config {
    /// Checks that the numbers make a network.
    ///
    /// # Errors
    /// [`ModelError::Config`] naming the field and its value.
    pub fn validate(&self) -> Result<(), ModelError> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        for (name, value) in sizes {
            require(value >= 1, || {
                format!("{name} must be at least 1, got {value}")
            })?;
            // Ids and positions are 32-bit; products of two sizes must stay far from overflow.
            require(i32::try_from(value).is_ok(), || {
                format!("{name} must be below 2^31, got {value}")
            })?;
        }
        require(self.num_hidden_layers < 1 << 16, || {
            format!(
                "num_hidden_layers must be below 65536, got {}",
                self.num_hidden_layers
            )
        })?;
        require(self.num_attention_heads < 1 << 15, || {
            format!(
                "num_attention_heads must be below 32768, got {}",
                self.num_attention_heads
            )
        })?;
        require(
            self.num_attention_heads
                .is_multiple_of(self.num_key_value_heads),
            || {
                format!(
                    "num_attention_heads {} does not divide by num_key_value_heads {}",
                    self.num_attention_heads, self.num_key_value_heads
                )
            },
        )?;
        match self.position {
            PositionKind::Rotary => {
                require(self.head_dim.is_multiple_of(2), || {
                    format!(
                        "rotary positions need an even head_dim, got {}",
                        self.head_dim
                    )
                })?;
                require(self.rope_theta > 0.0 && self.rope_theta.is_finite(), || {
                    format!("rope_theta must be positive, got {}", self.rope_theta)
                })?;
            }
            PositionKind::Learned => require(self.rope_scaling.is_none(), || {
                "rope_scaling is set, but position is \"learned\": it needs \"rotary\"".to_owned()
            })?,
        }
        if let Some(scaling) = &self.rope_scaling {
            scaling.validate()?;
        }
        require((0.0..1.0).contains(&self.dropout), || {
            format!("dropout must be in [0, 1), got {}", self.dropout)
        })?;
        require(self.norm_eps > 0.0 && self.norm_eps.is_finite(), || {
            format!("norm_eps must be positive, got {}", self.norm_eps)
        })?;
        require(
            self.initializer_range >= 0.0 && self.initializer_range.is_finite(),
            || {
                format!(
                    "initializer_range must not be negative, got {}",
                    self.initializer_range
                )
            },
        )
    }

    /// Width of all query heads together.
    pub fn query_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of all key heads together (values likewise).
    pub fn key_value_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Width of a row of queries, keys and values.
    pub fn qkv_width(&self) -> usize {
        self.query_width() + 2 * self.key_value_width()
    }

    /// Width of the MLP's first product: gate and up together where the activation is gated.
    pub fn up_width(&self) -> usize {
        if self.activation == ActivationKind::Swiglu {
            2 * self.intermediate_size
        } else {
            self.intermediate_size
        }
    }
}

impl RopeScaling {
    fn validate(&self) -> Result<(), ModelError> {
        let positive = |name: &str, value: f64| {
            require(value > 0.0 && value.is_finite(), || {
                format!("rope_scaling: {name} must be positive, got {value}")
            })
        };
        match *self {
            Self::Linear { factor } => positive("factor", factor),
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                positive("factor", factor)?;
                positive("low_freq_factor", low_freq_factor)?;
                require(high_freq_factor > low_freq_factor, || {
                    format!(
                        "rope_scaling: high_freq_factor {high_freq_factor} must be above low_freq_factor {low_freq_factor}"
                    )
                })?;
                require(original_max_position_embeddings >= 1, || {
                    "rope_scaling: original_max_position_embeddings must be at least 1".to_owned()
                })
            }
        }
    }
}

fn require(holds: bool, message: impl FnOnce() -> String) -> Result<(), ModelError> {
    if holds {
        Ok(())
    } else {
        Err(ModelError::Config(message()))
    }
}
