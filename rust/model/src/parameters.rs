//! Where every tensor of a model lies in the one flat buffer, and under which name and shape it is shown.
//!
//! Order: embedding, positions, the blocks, final norm, head (where not shared), scalar heads. Query, key and value of a
//! block are neighbours, so that one product serves them; so are gate and up.

use std::ops::Range;

use crate::families::{Family, Role};
use crate::layers::{Attention, Block, Embedding, Linear, Mlp, Norm};
use crate::{ActivationKind, AttentionBias, Config, NormKind, PositionKind};

/// One named tensor of a model.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Parameter {
    /// Hugging Face name.
    pub name: String,
    /// Index of its first element in the flat buffers.
    pub offset: usize,
    /// Shape as Hugging Face shows it.
    pub shape: Vec<usize>,
    /// Whether the memory is the transpose of `shape` in row-major order (GPT-2's linear layers: shown as `[in, out]`,
    /// stored as `[out, in]`).
    pub transposed: bool,
    /// Whether weight decay applies by default: to matrices, not to vectors.
    pub decay: bool,
}

impl Parameter {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the tensor has no elements (never so in a valid model).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its place in the flat buffers.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len()
    }
}

/// How a tensor gets its first values.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Initial {
    Zero,
    One,
    /// N(0, `initializer_range`).
    Normal,
    /// N(0, `initializer_range` / sqrt(2 layers)): a projection that ends in the residual stream.
    Residual,
    /// N(0, 1 / sqrt(hidden + 1)): a scalar head.
    Score,
}

/// The layers of a network with the places of their tensors, and the table of names.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub(crate) embedding: Embedding,
    pub(crate) blocks: Vec<Block>,
    pub(crate) final_norm: Norm,
    /// The vocabulary's product; shares the embedding's place where tied.
    pub(crate) head: Linear,
    /// The scalar heads.
    pub(crate) score: Option<Linear>,
    pub(crate) table: Vec<Parameter>,
    pub(crate) initial: Vec<Initial>,
    /// Number of floats of a flat buffer.
    pub(crate) len: usize,
    /// What adapters may change, in the order of the table.
    pub(crate) modules: Vec<Module>,
    /// Number of linear layers that the modules are parts of.
    pub(crate) num_linears: usize,
}

/// A part of a linear layer of a block that has a name of its own.
#[derive(Clone, Debug)]
pub(crate) struct Module {
    /// The name of its weight without `.weight`.
    pub(crate) name: String,
    /// [`Linear::index`] of the layer.
    pub(crate) linear: usize,
    pub(crate) inputs: usize,
    /// Its columns of the layer's result.
    pub(crate) columns: Range<usize>,
}

/// A matrix of a linear layer of a block, row-major in the flat buffers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Matrix {
    pub(crate) offset: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl Matrix {
    /// Its place in the flat buffers.
    pub(crate) fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.rows * self.cols
    }
}

impl Layout {
    pub(crate) fn new(config: &Config, num_values: usize) -> Self {
        let mut table = TableBuilder::new(Family::of(config));
        let hidden = config.hidden_size;
        let embedding = Embedding {
            width: hidden,
            tokens: table.matrix(Role::Embedding, config.vocab_size, hidden, Initial::Normal),
            positions: (config.position == PositionKind::Learned).then(|| {
                table.matrix(
                    Role::Positions,
                    config.max_position_embeddings,
                    hidden,
                    Initial::Normal,
                )
            }),
        };
        let blocks = (0..config.num_hidden_layers)
            .map(|layer| table.block(config, layer))
            .collect();
        let final_norm = table.norm(config, Role::FinalNorm);
        let head = if config.tie_word_embeddings {
            Linear {
                inputs: hidden,
                outputs: config.vocab_size,
                weight: embedding.tokens,
                bias: None,
                index: None,
            }
        } else {
            let weight = table.matrix(Role::Head, config.vocab_size, hidden, Initial::Normal);
            Linear {
                inputs: hidden,
                outputs: config.vocab_size,
                weight,
                bias: None,
                index: None,
            }
        };
        let score = (num_values > 0).then(|| {
            let weight = table.matrix(Role::Score, num_values, hidden, Initial::Score);
            let bias = table.vector(Role::Score, "bias", num_values, Initial::Zero);
            Linear {
                inputs: hidden,
                outputs: num_values,
                weight,
                bias: Some(bias),
                index: None,
            }
        });
        Self {
            embedding,
            blocks,
            final_norm,
            head,
            score,
            table: table.table,
            initial: table.initial,
            len: table.len,
            modules: table.modules,
            num_linears: table.num_linears,
        }
    }

    /// The matrices of all blocks, ascending: query, key and value are three, and so gate and up are two, also where a
    /// layer or a name holds them together.
    pub(crate) fn matrices(&self) -> Vec<Matrix> {
        let mut matrices = Vec::new();
        for Block { attention, mlp, .. } in &self.blocks {
            let (query, key_value) = (attention.query_width(), attention.key_value_width());
            let expansions = vec![mlp.width; mlp.up.outputs / mlp.width];
            for (linear, parts) in [
                (&attention.qkv, vec![query, key_value, key_value]),
                (&attention.output, vec![attention.output.outputs]),
                (&mlp.up, expansions),
                (&mlp.down, vec![mlp.down.outputs]),
            ] {
                let (mut offset, cols) = (linear.weight, linear.inputs);
                for rows in parts {
                    matrices.push(Matrix { offset, rows, cols });
                    offset += rows * cols;
                }
            }
        }
        matrices
    }
}

struct TableBuilder {
    family: Family,
    table: Vec<Parameter>,
    initial: Vec<Initial>,
    len: usize,
    modules: Vec<Module>,
    num_linears: usize,
}

impl TableBuilder {
    fn new(family: Family) -> Self {
        Self {
            family,
            table: Vec::new(),
            initial: Vec::new(),
            len: 0,
            modules: Vec::new(),
            num_linears: 0,
        }
    }

    fn push(
        &mut self,
        name: String,
        shape: Vec<usize>,
        transposed: bool,
        initial: Initial,
    ) -> usize {
        let offset = self.len;
        let decay = shape.len() > 1;
        let parameter = Parameter {
            name,
            offset,
            shape,
            transposed,
            decay,
        };
        self.len += parameter.len();
        self.table.push(parameter);
        self.initial.push(initial);
        offset
    }

    fn vector(&mut self, role: Role, suffix: &str, len: usize, initial: Initial) -> usize {
        self.push(
            format!("{}.{suffix}", self.family.name(role)),
            vec![len],
            false,
            initial,
        )
    }

    /// A matrix that is no linear layer of a block: never shown transposed.
    fn matrix(&mut self, role: Role, rows: usize, cols: usize, initial: Initial) -> usize {
        self.push(
            format!("{}.weight", self.family.name(role)),
            vec![rows, cols],
            false,
            initial,
        )
    }

    /// The weight of a linear layer of a block, stored as `[outputs, inputs]`.
    fn weight(&mut self, role: Role, outputs: usize, inputs: usize, initial: Initial) -> usize {
        let transposed = self.family.transposes_linear();
        let shape = if transposed {
            vec![inputs, outputs]
        } else {
            vec![outputs, inputs]
        };
        self.push(
            format!("{}.weight", self.family.name(role)),
            shape,
            transposed,
            initial,
        )
    }

    fn norm(&mut self, config: &Config, role: Role) -> Norm {
        let size = config.hidden_size;
        let gain = self.vector(role, "weight", size, Initial::One);
        let bias = (config.norm == NormKind::Layer)
            .then(|| self.vector(role, "bias", size, Initial::Zero));
        Norm {
            kind: config.norm,
            size,
            gain,
            bias,
            eps: config.norm_eps as f32,
        }
    }

    /// A linear layer made of neighbouring parts, each with a name of its own: all weights, then all biases.
    fn linear(
        &mut self,
        inputs: usize,
        parts: &[(Role, usize)],
        bias: bool,
        initial: Initial,
    ) -> Linear {
        let weight = self.len;
        let mut start = 0;
        for &(role, outputs) in parts {
            self.weight(role, outputs, inputs, initial);
            self.modules.push(Module {
                name: self.family.name(role),
                linear: self.num_linears,
                inputs,
                columns: start..start + outputs,
            });
            start += outputs;
        }
        self.num_linears += 1;
        let bias_start = self.len;
        if bias {
            for &(role, outputs) in parts {
                self.vector(role, "bias", outputs, Initial::Zero);
            }
        }
        let outputs = parts.iter().map(|&(_, outputs)| outputs).sum();
        Linear {
            inputs,
            outputs,
            weight,
            bias: bias.then_some(bias_start),
            index: Some(self.num_linears - 1),
        }
    }

    fn block(&mut self, config: &Config, layer: usize) -> Block {
        let (hidden, ff) = (config.hidden_size, config.intermediate_size);
        let (query, key_value) = (config.query_width(), config.key_value_width());

        let attention_norm = self.norm(config, Role::AttentionNorm(layer));
        let qkv_bias = config.attention_bias != AttentionBias::None;
        let qkv = if self.family.fuses_qkv() {
            self.linear(
                hidden,
                &[(Role::FusedQkv(layer), config.qkv_width())],
                qkv_bias,
                Initial::Normal,
            )
        } else {
            let parts = [
                (Role::Query(layer), query),
                (Role::Key(layer), key_value),
                (Role::Value(layer), key_value),
            ];
            self.linear(hidden, &parts, qkv_bias, Initial::Normal)
        };
        let head_norm = |table: &mut Self, role| Norm {
            kind: NormKind::Rms,
            size: config.head_dim,
            gain: table.vector(role, "weight", config.head_dim, Initial::One),
            bias: None,
            eps: config.norm_eps as f32,
        };
        let head_norms = config.qk_norm.then(|| {
            (
                head_norm(self, Role::QueryNorm(layer)),
                head_norm(self, Role::KeyNorm(layer)),
            )
        });
        let output_bias = config.attention_bias == AttentionBias::Qkvo;
        let output = self.linear(
            query,
            &[(Role::AttentionOutput(layer), hidden)],
            output_bias,
            Initial::Residual,
        );

        let mlp_norm = self.norm(config, Role::MlpNorm(layer));
        let up = if config.activation == ActivationKind::Swiglu {
            self.linear(
                hidden,
                &[(Role::Gate(layer), ff), (Role::Up(layer), ff)],
                config.mlp_bias,
                Initial::Normal,
            )
        } else {
            self.linear(
                hidden,
                &[(Role::Up(layer), ff)],
                config.mlp_bias,
                Initial::Normal,
            )
        };
        let down = self.linear(
            ff,
            &[(Role::Down(layer), hidden)],
            config.mlp_bias,
            Initial::Residual,
        );

        Block {
            layer,
            attention_norm,
            attention: Attention {
                heads: config.num_attention_heads,
                key_value_heads: config.num_key_value_heads,
                head_dim: config.head_dim,
                qkv,
                head_norms,
                output,
            },
            mlp_norm,
            mlp: Mlp {
                activation: config.activation,
                width: ff,
                up,
                down,
            },
        }
    }
}
