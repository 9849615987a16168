//! What must not change the bits: company in the batch, order, threads, micro-batches; and what must.

mod common;

use common::{ALL, Data, Random, all_configs, bits, gpt2, llama, logprobs, model_with};
use ingot_model::{Config, ForwardOptions, Level, Model, Optimizer, OptimizerOptions, Outputs};

const LENGTHS: [usize; 6] = [5, 1, 0, 66, 9, 130];

/// A configuration whose learned positions reach far enough.
fn long(config: &Config) -> Config {
    Config {
        max_position_embeddings: 256,
        ..config.clone()
    }
}

fn score_only(train: bool) -> ForwardOptions<'static> {
    ForwardOptions {
        train,
        ..ForwardOptions::default()
    }
}

#[test]
fn a_sequence_gives_the_same_bits_alone_in_a_pack_and_in_another_order() {
    for level in Level::available() {
        for (name, config) in all_configs() {
            let config = long(&Config {
                dropout: 0.25,
                ..config
            });
            let model = model_with(&config, Some(level), 2, 0);
            let data = Data::new(&config, &LENGTHS, 1);
            for options in [score_only(false), score_only(true)] {
                let packed = logprobs(&model, &data, &options);
                for i in 0..LENGTHS.len() {
                    let alone = logprobs(&model, &data.select(&[i]), &options);
                    assert_eq!(
                        bits(&alone),
                        bits(&packed[data.range(i)]),
                        "{name} {level} sequence {i}"
                    );
                }
                let order = [3, 0, 5, 1, 4, 2];
                let shuffled = data.select(&order);
                let got = logprobs(&model, &shuffled, &options);
                for (place, &i) in order.iter().enumerate() {
                    assert_eq!(
                        bits(&got[shuffled.range(place)]),
                        bits(&packed[data.range(i)]),
                        "{name} {level}"
                    );
                }
            }
        }
    }
}

#[test]
fn training_without_dropout_and_scoring_give_the_same_bits() {
    for (name, config) in all_configs() {
        let config = long(&config);
        let model = model_with(&config, None, 2, 2);
        let data = Data::new(&config, &LENGTHS, 2);
        let run = |train| {
            model.forward(
                &data.batch(),
                &ForwardOptions {
                    want: ALL,
                    train,
                    ..Default::default()
                },
            )
        };
        assert_eq!(run(true).unwrap().1, run(false).unwrap().1, "{name}");
    }
}

#[test]
fn one_token_changes_itself_and_what_follows_in_its_sequence_and_nothing_else() {
    for (name, config) in all_configs() {
        let config = long(&config);
        let model = model_with(&config, None, 2, 0);
        let mut data = Data::new(&config, &LENGTHS, 3);
        for target in &mut data.targets {
            *target = (*target).max(0);
        }
        let before = logprobs(&model, &data, &score_only(false));
        let sequence = data.range(5);
        let changed = sequence.start + 40;
        data.tokens[changed] = (data.tokens[changed] + 1) % config.vocab_size as i32;
        let after = logprobs(&model, &data, &score_only(false));
        for row in 0..before.len() {
            let same = before[row].to_bits() == after[row].to_bits();
            assert_eq!(
                same,
                !(changed..sequence.end).contains(&row),
                "{name} row {row}"
            );
        }
    }
}

#[test]
fn instruction_levels_with_fused_arithmetic_agree_in_every_bit() {
    let fused: Vec<Level> = Level::available()
        .into_iter()
        .filter(|level| *level != Level::Portable)
        .collect();
    for (name, config) in all_configs() {
        let config = long(&config);
        let data = Data::new(&config, &LENGTHS, 4);
        let results: Vec<(Outputs, Vec<u32>)> = fused
            .iter()
            .map(|&level| gradients_of_everything(&config, level, &data))
            .collect();
        for pair in results.windows(2) {
            assert_eq!(pair[0].0, pair[1].0, "{name}");
            assert_eq!(pair[0].1, pair[1].1, "{name}");
        }
    }
}

fn gradients_of_everything(config: &Config, level: Level, data: &Data) -> (Outputs, Vec<u32>) {
    let mut model = model_with(config, Some(level), 2, 1);
    let rows = data.tokens.len();
    let mixture = common::Mixture::new(rows, 1, rows * config.hidden_size, 9);
    let options = ForwardOptions {
        want: ALL,
        ..ForwardOptions::default()
    };
    let (context, outputs) = model.forward(&data.batch(), &options).unwrap();
    model
        .backward(&mut context.unwrap(), &mixture.gradients(ALL))
        .unwrap();
    (outputs, bits(model.gradients().unwrap()))
}

/// Twenty steps of training with dropout on batches of changing shape.
fn trained(config: &Config, threads: usize) -> Model {
    let mut model = model_with(config, None, threads, 0);
    let groups = Optimizer::default_groups(&model, 0.1);
    let mut optimizer = Optimizer::new(&model, &groups, OptimizerOptions::default()).unwrap();
    let mut random = Random(21);
    for step in 0..20 {
        let lengths: Vec<usize> = (0..4).map(|_| random.below(90)).collect();
        let data = Data::new(config, &lengths, step);
        let weights = vec![0.01; data.tokens.len()];
        let options = ForwardOptions {
            seed: step,
            ..ForwardOptions::default()
        };
        model.zero_grad();
        model
            .forward_backward(&data.batch(), &weights, &options)
            .unwrap();
        let info = optimizer.step(&mut model, 1e-3, Some(0.5)).unwrap();
        assert!(!info.skipped);
    }
    model
}

#[test]
fn twenty_steps_give_the_same_weights_on_any_number_of_threads() {
    for config in [gpt2(), llama(), common::qwen3()] {
        let config = long(&Config {
            dropout: 0.1,
            ..config
        });
        let one = trained(&config, 1);
        for threads in [2, 3, 8] {
            let many = trained(&config, threads);
            assert_eq!(
                bits(one.parameters()),
                bits(many.parameters()),
                "{threads} threads"
            );
        }
    }
}

#[test]
fn micro_batches_add_up_to_the_batch() {
    for dropout in [0.0, 0.3] {
        for config in [gpt2(), llama()] {
            let config = long(&Config { dropout, ..config });
            let mut model = model_with(&config, None, 2, 0);
            let data = Data::new(&config, &[40, 17, 3, 60, 1, 28, 33, 9], 6);
            let options = ForwardOptions {
                seed: 4,
                ..ForwardOptions::default()
            };
            let weight = 1.0 / data.tokens.len() as f32;
            let whole = model
                .forward_backward(&data.batch(), &vec![weight; data.tokens.len()], &options)
                .unwrap();
            let expected = model.gradients().unwrap().to_vec();
            model.zero_grad();
            let mut loss = 0.0;
            for i in 0..8 {
                let part = data.select(&[i]);
                loss += model
                    .forward_backward(&part.batch(), &vec![weight; part.tokens.len()], &options)
                    .unwrap();
            }
            assert!((whole - loss).abs() < 1e-12 * whole.abs());
            let got = model.gradients().unwrap();
            for parameter in model.table() {
                let pairs = || {
                    got[parameter.range()]
                        .iter()
                        .zip(&expected[parameter.range()])
                };
                let largest = pairs().map(|(_, b)| b.abs()).fold(0.0, f32::max);
                let difference = pairs().map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                // Keys' biases have a zero gradient in exact arithmetic: only rounding remains there.
                assert!(
                    difference <= 1e-5 * largest + 1e-8,
                    "{}: {difference} of {largest}",
                    parameter.name
                );
            }
        }
    }
}

#[test]
fn dropout_masks_follow_seed_sequence_and_nothing_else() {
    let config = Config {
        dropout: 0.4,
        ..gpt2()
    };
    let model = model_with(&config, None, 2, 0);
    let mut data = Data::new(&config, &[20], 8);
    let with_seed = |data: &Data, seed| {
        logprobs(
            &model,
            data,
            &ForwardOptions {
                seed,
                ..Default::default()
            },
        )
    };
    let first = with_seed(&data, 1);
    assert_eq!(bits(&first), bits(&with_seed(&data, 1)));
    assert_ne!(bits(&first), bits(&with_seed(&data, 2)));
    data.ids = vec![5];
    assert_ne!(bits(&first), bits(&with_seed(&data, 1)));
}
