//! Tiny networks, batches and losses that the tests of this crate share.
#![allow(dead_code)] // Each test file uses its own part.

use ingot_model::{
    ActivationKind, AttentionBias, Batch, Config, ForwardOptions, Level, Model, NormKind, Options,
    OutputGradients, Outputs, PositionKind, RopeScaling, Want,
};

/// Everything that a forward pass can compute from a batch alone.
pub const ALL: Want = Want {
    logprobs: true,
    entropy: true,
    lse: true,
    zbar: true,
    top1: true,
    values: true,
    hidden: true,
    candidate_logprobs: false,
};

/// GPT-2's settings; odd sizes, large initial weights so that every part of the network matters.
pub fn gpt2() -> Config {
    Config {
        vocab_size: 13,
        hidden_size: 15,
        num_hidden_layers: 2,
        num_attention_heads: 3,
        num_key_value_heads: 3,
        head_dim: 5,
        intermediate_size: 23,
        max_position_embeddings: 80,
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
        initializer_range: 0.3,
    }
}

/// Llama's settings with grouped key-value heads and a head of its own.
pub fn llama() -> Config {
    Config {
        hidden_size: 20,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 6,
        norm: NormKind::Rms,
        position: PositionKind::Rotary,
        activation: ActivationKind::Swiglu,
        attention_bias: AttentionBias::None,
        mlp_bias: false,
        tie_word_embeddings: false,
        ..gpt2()
    }
}

/// Qwen3's settings: norms on query and key heads.
pub fn qwen3() -> Config {
    Config {
        qk_norm: true,
        num_key_value_heads: 1,
        tie_word_embeddings: true,
        ..llama()
    }
}

/// Qwen2's settings: biases on query, key and value; rotary scaling as well.
pub fn qwen2() -> Config {
    Config {
        attention_bias: AttentionBias::Qkv,
        rope_scaling: Some(RopeScaling::Llama3 {
            factor: 4.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 16,
        }),
        ..llama()
    }
}

/// A combination that no Hugging Face class has.
pub fn mixed() -> Config {
    Config {
        norm: NormKind::Layer,
        activation: ActivationKind::Relu2,
        position: PositionKind::Learned,
        attention_bias: AttentionBias::Qkv,
        mlp_bias: true,
        qk_norm: true,
        num_hidden_layers: 1,
        ..llama()
    }
}

pub fn all_configs() -> Vec<(&'static str, Config)> {
    let gelu = Config {
        activation: ActivationKind::Gelu,
        num_hidden_layers: 1,
        ..gpt2()
    };
    let relu = Config {
        activation: ActivationKind::Relu,
        tie_word_embeddings: false,
        num_hidden_layers: 1,
        ..gpt2()
    };
    let linear = Config {
        rope_scaling: Some(RopeScaling::Linear { factor: 2.0 }),
        mlp_bias: true,
        ..llama()
    };
    vec![
        ("gpt2", gpt2()),
        ("gpt2 gelu", gelu),
        ("gpt2 relu", relu),
        ("llama", llama()),
        ("llama linear scaling", linear),
        ("qwen2", qwen2()),
        ("qwen3", qwen3()),
        ("mixed", mixed()),
    ]
}

/// A model on `threads` threads of `level` (the best one unless given) with `num_values` scalar heads, its vectors moved
/// away from ones and zeros.
pub fn model_with(
    config: &Config,
    level: Option<Level>,
    threads: usize,
    num_values: usize,
) -> Model {
    let mut model = Model::new(
        config.clone(),
        3,
        Options {
            level,
            threads,
            num_values,
        },
    )
    .unwrap();
    let mut random = Random(11);
    let vectors: Vec<_> = model
        .table()
        .iter()
        .filter(|p| !p.decay)
        .map(ingot_model::Parameter::range)
        .collect();
    let parameters = model.parameters_mut();
    for range in vectors {
        for value in &mut parameters[range] {
            *value += 0.3 * random.signed();
        }
    }
    model
}

pub fn model(config: &Config) -> Model {
    model_with(config, None, 2, 2)
}

/// A small generator for test data (Steele et al. 2014, `SplitMix64`).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// In [-1, 1).
    pub fn signed(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    }
}

/// The arrays of a batch.
#[derive(Clone)]
pub struct Data {
    pub tokens: Vec<i32>,
    pub offsets: Vec<i64>,
    pub targets: Vec<i32>,
    pub ids: Vec<i64>,
}

impl Data {
    /// Random sequences of the given lengths; some positions have no target.
    pub fn new(config: &Config, lengths: &[usize], seed: u64) -> Self {
        let mut random = Random(seed);
        let mut data = Self {
            tokens: vec![],
            offsets: vec![0],
            targets: vec![],
            ids: vec![],
        };
        for (i, &length) in lengths.iter().enumerate() {
            for _ in 0..length {
                data.tokens.push(random.below(config.vocab_size) as i32);
                let target = random.below(config.vocab_size + 3) as i32;
                data.targets.push(if target < config.vocab_size as i32 {
                    target
                } else {
                    -1
                });
            }
            data.offsets.push(data.tokens.len() as i64);
            data.ids.push(1000 + i as i64);
        }
        data
    }

    pub fn batch(&self) -> Batch<'_> {
        Batch {
            tokens: &self.tokens,
            offsets: &self.offsets,
            targets: &self.targets,
            sequence_ids: Some(&self.ids),
        }
    }

    /// The sequences `order` of this batch as a batch of their own.
    pub fn select(&self, order: &[usize]) -> Self {
        let mut data = Self {
            tokens: vec![],
            offsets: vec![0],
            targets: vec![],
            ids: vec![],
        };
        for &i in order {
            let range = self.range(i);
            data.tokens.extend(&self.tokens[range.clone()]);
            data.targets.extend(&self.targets[range]);
            data.offsets.push(data.tokens.len() as i64);
            data.ids.push(self.ids[i]);
        }
        data
    }

    /// Rows of sequence `i`.
    pub fn range(&self, i: usize) -> std::ops::Range<usize> {
        self.offsets[i] as usize..self.offsets[i + 1] as usize
    }
}

/// Fixed random coefficients for all outputs: the loss is their weighted sum.
pub struct Mixture {
    pub logprobs: Vec<f32>,
    pub entropy: Vec<f32>,
    pub lse: Vec<f32>,
    pub zbar: Vec<f32>,
    pub values: Vec<f32>,
    pub hidden: Vec<f32>,
}

impl Mixture {
    pub fn new(num_rows: usize, num_values: usize, hidden_floats: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        let mut draw = |n: usize| (0..n).map(|_| random.signed()).collect::<Vec<f32>>();
        Self {
            logprobs: draw(num_rows),
            entropy: draw(num_rows),
            lse: draw(num_rows),
            zbar: draw(num_rows),
            values: draw(num_rows * num_values),
            hidden: draw(hidden_floats),
        }
    }

    pub fn loss(&self, outputs: &Outputs) -> f64 {
        let pairs = [
            (&self.logprobs, &outputs.logprobs),
            (&self.entropy, &outputs.entropy),
            (&self.lse, &outputs.lse),
            (&self.zbar, &outputs.zbar),
            (&self.values, &outputs.values),
            (&self.hidden, &outputs.hidden),
        ];
        pairs
            .iter()
            .map(|(weights, output)| output.as_ref().map_or(0.0, |output| dot(weights, output)))
            .sum()
    }

    /// Gradients of [`Mixture::loss`] for the outputs in `want`.
    pub fn gradients(&self, want: Want) -> OutputGradients<'_> {
        fn given(wanted: bool, array: &[f32]) -> Option<&[f32]> {
            wanted.then_some(array)
        }
        OutputGradients {
            d_logprobs: given(want.logprobs, &self.logprobs),
            d_entropy: given(want.entropy, &self.entropy),
            d_lse: given(want.lse, &self.lse),
            d_zbar: given(want.zbar, &self.zbar),
            d_values: given(want.values, &self.values),
            d_hidden: given(want.hidden, &self.hidden),
            d_candidates: None,
        }
    }
}

pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(&a, &b)| f64::from(a) * f64::from(b))
        .sum()
}

pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

pub fn logprobs(model: &Model, data: &Data, options: &ForwardOptions<'_>) -> Vec<f32> {
    model
        .forward(&data.batch(), options)
        .unwrap()
        .1
        .logprobs
        .unwrap()
}

/// Levels other than the one that must exist everywhere are tested where the machine has them.
pub fn levels() -> Vec<Level> {
    Level::available()
}
