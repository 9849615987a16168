//! Names, shapes and places of the tensors, and their first values.

mod common;

use common::{gpt2, llama, mixed, qwen2, qwen3};
use ingot_model::{Config, Family, Model, Options};

fn table(config: &Config, num_values: usize) -> Vec<(String, Vec<usize>, bool)> {
    let model = Model::new(
        config.clone(),
        0,
        Options {
            num_values,
            ..Options::default()
        },
    )
    .unwrap();
    model
        .table()
        .iter()
        .map(|p| (p.name.clone(), p.shape.clone(), p.transposed))
        .collect()
}

fn names(config: &Config) -> Vec<String> {
    let config = Config {
        num_hidden_layers: 1,
        ..config.clone()
    };
    table(&config, 0)
        .into_iter()
        .map(|(name, ..)| name)
        .collect()
}

#[test]
fn gpt2_has_the_names_and_shapes_of_hugging_face() {
    let config = Config {
        num_hidden_layers: 1,
        ..gpt2()
    };
    let expected: [(&str, &[usize], bool); 16] = [
        ("transformer.wte.weight", &[13, 15], false),
        ("transformer.wpe.weight", &[80, 15], false),
        ("transformer.h.0.ln_1.weight", &[15], false),
        ("transformer.h.0.ln_1.bias", &[15], false),
        ("transformer.h.0.attn.c_attn.weight", &[15, 45], true),
        ("transformer.h.0.attn.c_attn.bias", &[45], false),
        ("transformer.h.0.attn.c_proj.weight", &[15, 15], true),
        ("transformer.h.0.attn.c_proj.bias", &[15], false),
        ("transformer.h.0.ln_2.weight", &[15], false),
        ("transformer.h.0.ln_2.bias", &[15], false),
        ("transformer.h.0.mlp.c_fc.weight", &[15, 23], true),
        ("transformer.h.0.mlp.c_fc.bias", &[23], false),
        ("transformer.h.0.mlp.c_proj.weight", &[23, 15], true),
        ("transformer.h.0.mlp.c_proj.bias", &[15], false),
        ("transformer.ln_f.weight", &[15], false),
        ("transformer.ln_f.bias", &[15], false),
    ];
    let expected: Vec<_> = expected
        .iter()
        .map(|(name, shape, transposed)| ((*name).to_owned(), shape.to_vec(), *transposed))
        .collect();
    assert_eq!(table(&config, 0), expected);
}

#[test]
fn llama_has_the_names_and_shapes_of_hugging_face() {
    let config = Config {
        num_hidden_layers: 1,
        ..llama()
    };
    let expected: [(&str, &[usize]); 14] = [
        ("model.embed_tokens.weight", &[13, 20]),
        ("model.layers.0.input_layernorm.weight", &[20]),
        ("model.layers.0.self_attn.q_proj.weight", &[24, 20]),
        ("model.layers.0.self_attn.k_proj.weight", &[12, 20]),
        ("model.layers.0.self_attn.v_proj.weight", &[12, 20]),
        ("model.layers.0.self_attn.o_proj.weight", &[20, 24]),
        ("model.layers.0.post_attention_layernorm.weight", &[20]),
        ("model.layers.0.mlp.gate_proj.weight", &[23, 20]),
        ("model.layers.0.mlp.up_proj.weight", &[23, 20]),
        ("model.layers.0.mlp.down_proj.weight", &[20, 23]),
        ("model.norm.weight", &[20]),
        ("lm_head.weight", &[13, 20]),
        ("score.weight", &[2, 20]),
        ("score.bias", &[2]),
    ];
    let expected: Vec<_> = expected
        .iter()
        .map(|(name, shape)| ((*name).to_owned(), shape.to_vec(), false))
        .collect();
    assert_eq!(table(&config, 2), expected);
}

#[test]
fn the_other_families_add_their_names() {
    let has = |config: &Config, name: &str| names(config).contains(&name.to_owned());
    assert!(has(&qwen2(), "model.layers.0.self_attn.k_proj.bias"));
    assert!(!has(&qwen2(), "model.layers.0.self_attn.o_proj.bias"));
    assert!(has(&qwen3(), "model.layers.0.self_attn.q_norm.weight"));
    assert!(!has(&qwen3(), "lm_head.weight"));
    assert!(has(&mixed(), "model.embed_positions.weight"));
    assert!(has(&mixed(), "model.layers.0.input_layernorm.bias"));
    assert!(!has(&mixed(), "model.layers.0.mlp.gate_proj.weight"));
}

#[test]
fn families() {
    let cases = [
        (gpt2(), Family::Gpt2, "gpt2"),
        (llama(), Family::Llama, "llama"),
        (qwen2(), Family::Qwen2, "qwen2"),
        (qwen3(), Family::Qwen3, "qwen3"),
        (mixed(), Family::Ingot, "ingot"),
        (
            Config {
                num_key_value_heads: 1,
                ..gpt2()
            },
            Family::Ingot,
            "ingot",
        ),
        (
            Config {
                mlp_bias: true,
                ..qwen3()
            },
            Family::Ingot,
            "ingot",
        ),
    ];
    for (config, family, name) in cases {
        assert_eq!(Family::of(&config), family);
        assert_eq!(family.model_type(), name);
    }
}

#[test]
fn tensors_cover_the_flat_buffer_without_gaps() {
    for (name, config) in common::all_configs() {
        let model = Model::new(
            config,
            0,
            Options {
                num_values: 3,
                ..Options::default()
            },
        )
        .unwrap();
        let mut next = 0;
        for parameter in model.table() {
            assert_eq!(parameter.offset, next, "{name} {}", parameter.name);
            assert_eq!(parameter.decay, parameter.shape.len() == 2);
            next = parameter.range().end;
        }
        assert_eq!(next, model.parameters().len());
    }
}

#[test]
fn first_values_have_the_promised_spread_and_follow_the_seed_alone() {
    let config = Config {
        hidden_size: 300,
        initializer_range: 0.02,
        vocab_size: 500,
        ..gpt2()
    };
    let config = Config {
        head_dim: 100,
        intermediate_size: 1200,
        num_hidden_layers: 2,
        ..config
    };
    let make = |seed, threads| {
        Model::new(
            config.clone(),
            seed,
            Options {
                threads,
                num_values: 8,
                ..Options::default()
            },
        )
        .unwrap()
    };
    let model = make(1, 1);
    for parameter in model.table() {
        let values = &model.parameters()[parameter.range()];
        let count = values.len() as f64;
        let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
        let deviation = (values
            .iter()
            .map(|&x| (f64::from(x) - mean).powi(2))
            .sum::<f64>()
            / count)
            .sqrt();
        let name = parameter.name.as_str();
        let expected = match name {
            "score.weight" => 1.0 / 301.0_f64.sqrt(),
            _ if name.ends_with("c_proj.weight") => 0.02 / 2.0,
            _ if parameter.decay => 0.02,
            _ => {
                let constant = if name.ends_with("weight") { 1.0 } else { 0.0 };
                assert!(
                    values.iter().all(|x| x.to_bits() == f32::to_bits(constant)),
                    "{name}"
                );
                continue;
            }
        };
        assert!(
            (deviation / expected - 1.0).abs() < 5.0 / (2.0 * count).sqrt(),
            "{name}: {deviation} {expected}"
        );
        assert!(mean.abs() < 5.0 * expected / count.sqrt(), "{name}: {mean}");
    }
    assert_eq!(
        common::bits(model.parameters()),
        common::bits(make(1, 3).parameters())
    );
    assert_ne!(
        common::bits(model.parameters()),
        common::bits(make(2, 1).parameters())
    );
}
