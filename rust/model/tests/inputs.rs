//! Wrong inputs are refused with a message that names the argument, the place and the values.

mod common;

use common::{Data, gpt2, llama, model, model_with};
use ingot_model::{
    Batch, Candidates, Config, ForwardOptions, Model, ModelError, Options, RopeScaling, Want,
};

fn refusal(model: &Model, batch: &Batch<'_>, options: &ForwardOptions<'_>) -> String {
    model.forward(batch, options).unwrap_err().to_string()
}

#[test]
fn batches() {
    let config = gpt2();
    let model = model(&config);
    let good = Data::new(&config, &[3, 2], 1);
    let default = ForwardOptions::default();
    let check = |change: &dyn Fn(&mut Data), expected: &str| {
        let mut data = good.clone();
        change(&mut data);
        assert_eq!(refusal(&model, &data.batch(), &default), expected);
    };
    check(
        &|d| d.tokens[3] = 13,
        "tokens[3] is 13, outside 0..13 (token ids below vocab_size)",
    );
    check(
        &|d| d.tokens[0] = -1,
        "tokens[0] is -1, outside 0..13 (token ids below vocab_size)",
    );
    check(
        &|d| d.targets[4] = 13,
        "targets[4] is 13, outside -1..13 (-1 for none, else below vocab_size)",
    );
    check(
        &|d| d.targets[1] = -2,
        "targets[1] is -2, outside -1..13 (-1 for none, else below vocab_size)",
    );
    check(
        &|d| d.targets.truncate(4),
        "targets: has 4 entries, but a batch of that many tokens needs 5",
    );
    check(
        &|d| d.offsets[0] = 1,
        "offsets: starts with 1, but must start with 0",
    );
    check(
        &|d| d.offsets[1] = 6,
        "offsets: decreases from 6 to 5 at index 2",
    );
    check(
        &|d| d.offsets[1] = -4,
        "offsets: decreases from 0 to -4 at index 1",
    );
    check(
        &|d| d.offsets[2] = 4,
        "offsets: ends with 4, but must end with the number of tokens, 5",
    );
    check(
        &|d| d.offsets.clear(),
        "offsets: is empty, but needs one entry more than there are sequences",
    );
    check(
        &|d| d.ids.truncate(1),
        "sequence_ids: has 1 entries, but a batch of that many sequences needs 2",
    );
}

#[test]
fn too_long_for_learned_positions() {
    let config = gpt2();
    let data = Data::new(&config, &[3, 81], 1);
    let error = model(&config)
        .forward(&data.batch(), &ForwardOptions::default())
        .unwrap_err();
    assert_eq!(
        error,
        ModelError::SequenceTooLong {
            sequence: 1,
            length: 81,
            maximum: 80
        }
    );
    let text = error.to_string();
    assert!(text.contains("81") && text.contains("80"), "{text}");
    let rotary = llama();
    assert!(
        model(&rotary)
            .forward(&data.batch(), &ForwardOptions::default())
            .is_ok()
    );
}

#[test]
fn options() {
    let config = gpt2();
    let model = model_with(&config, None, 1, 0);
    let mut data = Data::new(&config, &[3, 2], 1);
    data.targets = vec![0, 1, 2, 3, 4];
    let default = ForwardOptions::default();
    let check = |options: ForwardOptions<'_>, expected: &str| {
        assert_eq!(refusal(&model, &data.batch(), &options), expected);
    };
    check(
        ForwardOptions {
            temperature: 0.0,
            ..default
        },
        "temperature: must be a positive number, got 0",
    );
    check(
        ForwardOptions {
            temperature: f32::NAN,
            ..default
        },
        "temperature: must be a positive number, got NaN",
    );
    check(
        ForwardOptions {
            banned_ids: &[1, 13],
            ..default
        },
        "banned_ids[1] is 13, outside 0..13 (token ids below vocab_size)",
    );
    check(
        ForwardOptions {
            banned_ids: &[5, 2],
            ..default
        },
        "targets: 2 at row 2 is one of banned_ids",
    );
    let everything: Vec<i32> = (0..13).collect();
    check(
        ForwardOptions {
            banned_ids: &everything,
            ..default
        },
        "banned_ids: names the whole vocabulary: no token could be chosen",
    );
    check(
        ForwardOptions {
            want: Want {
                values: true,
                ..Want::default()
            },
            ..default
        },
        "values: was asked for, but the model has no scalar heads: make it with num_values of at least 1",
    );
    check(
        ForwardOptions {
            want: Want {
                hidden: true,
                ..Want::default()
            },
            hidden_rows: Some(&[0, 5]),
            ..default
        },
        "hidden_rows[1] is 5, outside 0..5 (rows of the batch)",
    );
    let with_candidates = |candidates| ForwardOptions {
        want: Want {
            candidate_logprobs: true,
            ..Want::default()
        },
        candidates,
        banned_ids: &[12],
        ..default
    };
    check(
        with_candidates(None),
        "candidates: candidate_logprobs were asked for, but no candidates given",
    );
    let given = |offsets, ids| with_candidates(Some(Candidates { offsets, ids }));
    check(
        given(&[0, 0, 0, 1, 1, 2], &[3, 12]),
        "candidates: 12 at row 4 is one of banned_ids",
    );
    check(
        given(&[0, 0, 0, 1, 1, 2], &[3, 13]),
        "candidates[1] is 13, outside 0..13 (token ids below vocab_size)",
    );
    check(
        given(&[0, 0, 0, 1, 1, 1], &[3, 4]),
        "candidate offsets: ends with 1, but must end with the number of candidates, 2",
    );
    check(
        given(&[0, 0, 0, 1, 1], &[3]),
        "candidate offsets: has 5 entries, but a batch of one token less needs 6",
    );
    let with_values = model_with(&config, None, 1, 1);
    let options = ForwardOptions {
        want: Want {
            values: true,
            ..Want::default()
        },
        value_rows: Some(&[true]),
        ..default
    };
    let text = refusal(&with_values, &data.batch(), &options);
    assert_eq!(
        text,
        "value_rows: has 1 entries, but a batch of that many tokens needs 5"
    );
}

#[test]
fn weights_of_the_fused_pass() {
    let config = gpt2();
    let data = Data::new(&config, &[3], 1);
    let error = model(&config)
        .forward_backward(&data.batch(), &[1.0], &ForwardOptions::default())
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "weights: has 1 entries, but a batch of that many tokens needs 3"
    );
}

#[test]
fn configurations() {
    let check = |config: Config, expected: &str| {
        let error = Model::new(config, 0, Options::default()).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("model configuration: {expected}")
        );
    };
    check(
        Config {
            vocab_size: 0,
            ..gpt2()
        },
        "vocab_size must be at least 1, got 0",
    );
    check(
        Config {
            num_attention_heads: 3,
            num_key_value_heads: 2,
            ..gpt2()
        },
        "num_attention_heads 3 does not divide by num_key_value_heads 2",
    );
    check(
        Config {
            head_dim: 5,
            ..llama()
        },
        "rotary positions need an even head_dim, got 5",
    );
    check(
        Config {
            dropout: 1.0,
            ..gpt2()
        },
        "dropout must be in [0, 1), got 1",
    );
    check(
        Config {
            norm_eps: 0.0,
            ..gpt2()
        },
        "norm_eps must be positive, got 0",
    );
    check(
        Config {
            rope_scaling: Some(RopeScaling::Linear { factor: 2.0 }),
            ..gpt2()
        },
        "rope_scaling is set, but position is \"learned\": it needs \"rotary\"",
    );
    check(
        Config {
            rope_scaling: Some(RopeScaling::Linear { factor: -1.0 }),
            ..llama()
        },
        "rope_scaling: factor must be positive, got -1",
    );
    let threads = Options {
        threads: 0,
        ..Options::default()
    };
    assert!(
        Model::new(gpt2(), 0, threads)
            .unwrap_err()
            .to_string()
            .contains("threads")
    );
}

#[test]
fn configurations_as_json() {
    let text = serde_json::to_string(&common::qwen2()).unwrap();
    assert!(
        text.contains(r#""rope_scaling":{"rope_type":"llama3","factor":4.0"#),
        "{text}"
    );
    assert!(text.contains(r#""attention_bias":"qkv""#), "{text}");
    assert_eq!(
        serde_json::from_str::<Config>(&text).unwrap(),
        common::qwen2()
    );
    let surplus = text.replacen('{', r#"{"hiden_size":3,"#, 1);
    assert!(
        serde_json::from_str::<Config>(&surplus)
            .unwrap_err()
            .to_string()
            .contains("hiden_size")
    );
}
