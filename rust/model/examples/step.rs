//! Times training steps of one shape and says where the time goes.
//!
//! `cargo run --release -p ingot-model --example step -- [--threads N] [--level L] [--steps N] [--dropout P] [--shape char|char-cpu|gpt2|llama]`
#![allow(clippy::print_stdout)] // A program that reports to the terminal.

use std::time::Instant;

use ingot_model::{
    ActivationKind, AttentionBias, Batch, Config, ForwardOptions, Level, Model, NormKind,
    Optimizer, OptimizerOptions, Options, OutputGradients, PositionKind,
};

/// A network, and the batch it is timed with: sequences and tokens per sequence.
struct Shape {
    config: Config,
    sequences: usize,
    length: usize,
}

/// nanoGPT's character model: 10.7M parameters, 64 x 256 tokens.
fn char_shape() -> Shape {
    let config = Config {
        vocab_size: 65,
        hidden_size: 384,
        num_hidden_layers: 6,
        num_attention_heads: 6,
        num_key_value_heads: 6,
        head_dim: 64,
        intermediate_size: 1536,
        max_position_embeddings: 1024,
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
    };
    Shape {
        config,
        sequences: 64,
        length: 256,
    }
}

fn shape(name: &str) -> Result<Shape, String> {
    let base = char_shape();
    match name {
        "char" => Ok(base),
        "gpt2" => Ok(Shape {
            config: Config {
                vocab_size: 50257,
                hidden_size: 768,
                num_hidden_layers: 12,
                num_attention_heads: 12,
                num_key_value_heads: 12,
                intermediate_size: 3072,
                ..base.config
            },
            sequences: 4,
            length: 1024,
        }),
        "llama" => Ok(Shape {
            config: Config {
                vocab_size: 4096,
                num_key_value_heads: 2,
                intermediate_size: 1024,
                norm: NormKind::Rms,
                position: PositionKind::Rotary,
                activation: ActivationKind::Swiglu,
                attention_bias: AttentionBias::None,
                mlp_bias: false,
                ..base.config
            },
            sequences: 32,
            length: 512,
        }),
        "char-cpu" => Ok(Shape {
            config: Config {
                hidden_size: 128,
                num_hidden_layers: 4,
                num_attention_heads: 4,
                num_key_value_heads: 4,
                head_dim: 32,
                intermediate_size: 512,
                max_position_embeddings: 64,
                ..base.config
            },
            sequences: 12,
            length: 64,
        }),
        other => Err(format!(
            "unknown shape {other:?}: char, char-cpu, gpt2 or llama"
        )),
    }
}

fn argument<T: std::str::FromStr>(
    arguments: &[String],
    name: &str,
    default: T,
) -> Result<T, String> {
    match arguments.iter().position(|argument| argument == name) {
        None => Ok(default),
        Some(i) => {
            let value = arguments
                .get(i + 1)
                .ok_or_else(|| format!("{name} needs a value"))?;
            value
                .parse()
                .map_err(|_| format!("{name}: cannot read {value:?}"))
        }
    }
}

/// Peak resident memory of this process in MiB, where the system says so.
fn peak_memory_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace()
        .nth(1)?
        .parse::<u64>()
        .ok()
        .map(|kib| kib / 1024)
}

fn timed<T>(total_s: &mut f64, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    *total_s += start.elapsed().as_secs_f64();
    result
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let threads = argument(&arguments, "--threads", cores)?;
    let steps = argument(&arguments, "--steps", 3_usize)?;
    let dropout = argument(&arguments, "--dropout", 0.0_f64)?;
    let level_name: String = argument(&arguments, "--level", Level::best().name().to_owned())?;
    let level = Level::parse(&level_name).ok_or_else(|| format!("unknown level {level_name:?}"))?;
    let Shape {
        config,
        sequences,
        length,
    } = shape(&argument(&arguments, "--shape", "char".to_owned())?)?;
    let config = Config { dropout, ..config };

    let num_tokens = sequences * length;
    let tokens: Vec<i32> = (0..num_tokens)
        .map(|i| ((i * 7919 + i / 31) % config.vocab_size) as i32)
        .collect();
    let offsets: Vec<i64> = (0..=sequences).map(|i| (i * length) as i64).collect();
    let mut targets: Vec<i32> = tokens[1..].to_vec();
    targets.push(-1);
    let batch = Batch {
        tokens: &tokens,
        offsets: &offsets,
        targets: &targets,
        sequence_ids: None,
    };
    let weights = vec![1.0 / num_tokens as f32; num_tokens];

    let mut model = Model::new(
        config.clone(),
        0,
        Options {
            level: Some(level),
            threads,
            num_values: 0,
        },
    )?;
    let groups = Optimizer::default_groups(&model, 0.1);
    let mut optimizer = Optimizer::new(&model, &groups, OptimizerOptions::default())?;
    let matrices: usize = model
        .table()
        .iter()
        .filter(|p| p.decay && !p.name.contains("wpe"))
        .map(ingot_model::Parameter::len)
        .sum();
    let attention = config.num_hidden_layers * config.query_width() * length;
    let flops = 6.0 * num_tokens as f64 * (matrices + attention) as f64;
    println!(
        "{:.1}M parameters, {sequences} x {length} tokens, level {}, {threads} threads, {:.2} Tflop per step",
        model.num_parameters() as f64 / 1e6,
        level.name(),
        flops / 1e12
    );

    for step in 0..=steps {
        let options = ForwardOptions {
            seed: step as u64,
            ..ForwardOptions::default()
        };
        let (mut zero_s, mut pass_s, mut update_s) = (0.0, 0.0, 0.0);
        timed(&mut zero_s, || model.zero_grad());
        let loss = timed(&mut pass_s, || {
            model.forward_backward(&batch, &weights, &options)
        })?;
        let info = timed(&mut update_s, || {
            optimizer.step(&mut model, 1e-3, Some(1.0))
        })?;
        let total_s = zero_s + pass_s + update_s;
        println!(
            "{} {total_s:.3} s, {:.0} tokens/s, {:.0} Gflop/s: zero {zero_s:.3}, forward and backward {pass_s:.3}, step {update_s:.3}; loss {loss:.4}, norm {:.3}",
            if step == 0 { "warm-up" } else { "step   " },
            num_tokens as f64 / total_s,
            flops / total_s / 1e9,
            info.grad_norm
        );
    }

    let (mut score_s, mut forward_s, mut backward_s) = (0.0, 0.0, 0.0);
    let scoring = ForwardOptions {
        train: false,
        ..ForwardOptions::default()
    };
    timed(&mut score_s, || model.forward(&batch, &scoring))?;
    let (context, _) = timed(&mut forward_s, || {
        model.forward(&batch, &ForwardOptions::default())
    })?;
    let d_logprobs: Vec<f32> = weights.iter().map(|weight| -weight).collect();
    let gradients = OutputGradients {
        d_logprobs: Some(&d_logprobs),
        ..OutputGradients::default()
    };
    let mut context = context.ok_or("a training pass makes a context")?;
    timed(&mut backward_s, || model.backward(&mut context, &gradients))?;
    println!(
        "parts: forward {forward_s:.3} s, backward {backward_s:.3} s; scoring alone {score_s:.3} s"
    );
    if let Some(peak_mib) = peak_memory_mib() {
        println!("peak memory {peak_mib} MiB");
    }
    Ok(())
}
