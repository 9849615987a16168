//! Gradients against finite differences of the forward pass, tensor by tensor.

mod common;

use std::ops::Range;

use common::{ALL, Data, Mixture, Random, all_configs, dot, gpt2, llama, model_with};
use ingot_model::{Config, ForwardOptions, Level, Model, Want};

/// Largest relative difference between the slope along a tensor's own gradient and the gradient's norm.
const TOLERANCE: f64 = 1e-2;

/// What rounding in f32 may add to a slope.
const NOISE: f64 = 1e-2;

/// Checks every tensor: moving it along its gradient must change the loss by the gradient's norm, and moving it in a random
/// direction by the gradient's share in that direction, which a missing part of the gradient would not do.
fn check(name: &str, model: &mut Model, data: &Data, options: &ForwardOptions<'_>) {
    let hidden_rows = options.hidden_rows.map_or(data.tokens.len(), <[i64]>::len);
    let hidden_floats = hidden_rows * model.config().hidden_size;
    let mixture = Mixture::new(data.tokens.len(), model.num_values(), hidden_floats, 5);
    model.zero_grad();
    let (context, _) = model.forward(&data.batch(), options).unwrap();
    model
        .backward(&mut context.unwrap(), &mixture.gradients(options.want))
        .unwrap();
    let gradients = model.gradients().unwrap().to_vec();
    let mut random = Random(17);
    for parameter in model.table().to_vec() {
        let gradient = &gradients[parameter.range()];
        let norm = dot(gradient, gradient).sqrt();
        if norm > NOISE {
            let slope = slope(model, data, options, &mixture, parameter.range(), gradient);
            assert!(
                (slope - norm).abs() < TOLERANCE * norm,
                "{name}: {}: slope {slope}, gradient {norm}",
                parameter.name
            );
        }
        let direction: Vec<f32> = gradient.iter().map(|_| random.signed()).collect();
        let expected = dot(gradient, &direction) / dot(&direction, &direction).sqrt();
        let slope = slope(
            model,
            data,
            options,
            &mixture,
            parameter.range(),
            &direction,
        );
        assert!(
            (slope - expected).abs() < 2e-3 * norm + NOISE,
            "{name}: {}: slope {slope} in a random direction, gradient {expected} of {norm}",
            parameter.name
        );
    }
}

/// Change of the loss per distance moved along `direction`, by fourth-order differences, which allow a step that is large
/// beside the rounding of f32.
fn slope(
    model: &mut Model,
    data: &Data,
    options: &ForwardOptions<'_>,
    mixture: &Mixture,
    range: Range<usize>,
    direction: &[f32],
) -> f64 {
    let start = model.parameters()[range.clone()].to_vec();
    let length = dot(direction, direction).sqrt();
    let step = 1.5e-3 * dot(&start, &start).sqrt().max(0.5);
    let mut loss_at = |multiple: f64| {
        let moved = &mut model.parameters_mut()[range.clone()];
        for ((p, &p0), &d) in moved.iter_mut().zip(&start).zip(direction) {
            *p = (f64::from(p0) + multiple * step * f64::from(d) / length) as f32;
        }
        mixture.loss(&model.forward(&data.batch(), options).unwrap().1)
    };
    let slope =
        (8.0 * (loss_at(1.0) - loss_at(-1.0)) - (loss_at(2.0) - loss_at(-2.0))) / (12.0 * step);
    model.parameters_mut()[range].copy_from_slice(&start);
    slope
}

fn options(want: Want) -> ForwardOptions<'static> {
    ForwardOptions {
        want,
        ..ForwardOptions::default()
    }
}

#[test]
fn every_tensor_of_every_architecture_through_all_outputs() {
    for (name, config) in all_configs() {
        let mut model = model_with(&config, None, 2, 2);
        let data = Data::new(&config, &[5, 1, 0, 9, 70], 1);
        check(name, &mut model, &data, &options(ALL));
    }
}

#[test]
fn batches_of_several_chunks_of_rows() {
    // A wide MLP leaves room for attention's gradients in the place of its pre-activations; a narrow one does not.
    let wide = |base: Config| Config {
        intermediate_size: 96,
        num_hidden_layers: 2,
        ..base
    };
    let lengths: Vec<usize> = (0..40).map(|i| 60 + i / 2).collect();
    for (config, dropout) in [
        (gpt2(), 0.1),
        (wide(gpt2()), 0.0),
        (wide(common::qwen3()), 0.1),
    ] {
        let config = Config {
            num_hidden_layers: 1,
            dropout,
            ..config
        };
        let mut model = model_with(&config, None, 2, 1);
        let data = Data::new(&config, &lengths, 11);
        check("several chunks", &mut model, &data, &options(ALL));
    }
}

#[test]
fn every_level() {
    for level in Level::available() {
        for config in [gpt2(), llama()] {
            let mut model = model_with(&config, Some(level), 1, 1);
            let data = Data::new(&config, &[3, 7], 2);
            check(level.name(), &mut model, &data, &options(ALL));
        }
    }
}

#[test]
fn each_output_alone() {
    let none = Want::default();
    let singles = [
        (
            "logprobs",
            Want {
                logprobs: true,
                ..none
            },
        ),
        (
            "entropy",
            Want {
                entropy: true,
                ..none
            },
        ),
        ("lse", Want { lse: true, ..none }),
        ("zbar", Want { zbar: true, ..none }),
        (
            "values",
            Want {
                values: true,
                ..none
            },
        ),
        (
            "hidden",
            Want {
                hidden: true,
                ..none
            },
        ),
    ];
    for config in [gpt2(), llama()] {
        let mut model = model_with(&config, None, 2, 3);
        let data = Data::new(&config, &[6, 4], 3);
        for (name, want) in singles {
            check(name, &mut model, &data, &options(want));
        }
    }
}

#[test]
fn temperature_banned_ids_and_chosen_rows() {
    let config = llama();
    let mut model = model_with(&config, None, 2, 1);
    let mut data = Data::new(&config, &[6, 5], 4);
    for target in &mut data.targets {
        if [2, 7].contains(target) {
            *target = 3;
        }
    }
    let value_rows: Vec<bool> = (0..11).map(|row| row % 3 == 0).collect();
    // Rows out of order, and one of them three times.
    let hidden_rows = [9, 0, 4, 0, 0];
    let options = ForwardOptions {
        temperature: 0.7,
        banned_ids: &[7, 2, 7],
        value_rows: Some(&value_rows),
        hidden_rows: Some(&hidden_rows),
        ..options(ALL)
    };
    check("chosen rows", &mut model, &data, &options);
}

#[test]
fn dropout_is_replayed_by_the_backward_pass() {
    for base in [gpt2(), llama(), common::qwen3()] {
        let config = Config {
            dropout: 0.3,
            ..base
        };
        let mut model = model_with(&config, None, 2, 1);
        let data = Data::new(&config, &[6, 9], 6);
        check(
            "dropout",
            &mut model,
            &data,
            &ForwardOptions {
                seed: 77,
                ..options(ALL)
            },
        );
    }
}

#[test]
fn the_fused_pass_gives_the_loss_and_gradients_of_the_two_passes() {
    for base in [gpt2(), llama()] {
        let config = Config {
            dropout: 0.2,
            ..base
        };
        let mut model = model_with(&config, None, 2, 0);
        let data = Data::new(&config, &[8, 3, 30], 7);
        let weights: Vec<f32> = (0..41).map(|i| 0.01 * (i - 15) as f32).collect();
        let options = ForwardOptions {
            temperature: 1.3,
            seed: 5,
            ..ForwardOptions::default()
        };

        let loss = model
            .forward_backward(&data.batch(), &weights, &options)
            .unwrap();
        let fused = model.gradients().unwrap().to_vec();
        model.zero_grad();
        let (context, outputs) = model.forward(&data.batch(), &options).unwrap();
        let logprobs = outputs.logprobs.unwrap();
        let d: Vec<f32> = weights.iter().map(|w| -w).collect();
        let gradients = ingot_model::OutputGradients {
            d_logprobs: Some(&d),
            ..Default::default()
        };
        model.backward(&mut context.unwrap(), &gradients).unwrap();
        assert!((loss + dot(&weights, &logprobs)).abs() < 1e-12, "{loss}");
        assert_eq!(
            common::bits(&fused),
            common::bits(model.gradients().unwrap())
        );
    }
}
