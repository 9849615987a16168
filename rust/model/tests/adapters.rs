//! Adapters: nothing at first, gradients that are the slope of the loss, and nothing but them changes.

mod common;

use common::{ALL, Data, Mixture, Random, all_configs, bits, dot, llama, model_with};
use ingot_model::{
    AdapterOptions, ForwardOptions, Level, Model, ModelError, Optimizer, OptimizerOptions,
};

/// Names of all linear layers of the blocks.
fn modules(model: &Model) -> Vec<String> {
    model
        .table()
        .iter()
        .filter(|p| p.shape.len() == 2 && (p.name.contains(".layers.") || p.name.contains(".h.")))
        .filter_map(|p| p.name.strip_suffix(".weight").map(str::to_owned))
        .collect()
}

fn fill(model: &mut Model, adapter: usize, seed: u64) {
    let mut random = Random(seed);
    for value in model.adapter_parameters_mut(adapter).unwrap() {
        *value = 0.3 * random.signed();
    }
}

fn low_rank(rank: usize, scale: f32) -> AdapterOptions {
    AdapterOptions {
        rank,
        scale,
        ..AdapterOptions::default()
    }
}

fn through(adapter: Option<usize>) -> ForwardOptions<'static> {
    ForwardOptions {
        want: ALL,
        adapter,
        ..ForwardOptions::default()
    }
}

#[test]
fn zeros_change_no_bit_and_gradients_are_slopes() {
    let runs = all_configs()
        .into_iter()
        .flat_map(|(name, config)| [(name, config.clone(), 0.0), (name, config, 0.3)]);
    for (name, config, dropout) in runs {
        let mut model = model_with(&config, None, 2, 2);
        let data = Data::new(&config, &[5, 1, 0, 9, 30], 1);
        let plain = model.forward(&data.batch(), &through(None)).unwrap().1;
        let all = modules(&model);
        let low_rank = AdapterOptions {
            dropout,
            ..low_rank(3, 0.7)
        };
        let adapter = model.add_adapter(low_rank, &all).unwrap();
        let options = through(Some(adapter));
        assert_eq!(
            model.forward(&data.batch(), &options).unwrap().1,
            plain,
            "{name}"
        );

        fill(&mut model, adapter, 7);
        let whole = ForwardOptions {
            train: false,
            ..options
        };
        let outputs = model.forward(&data.batch(), &options).unwrap().1;
        let same = outputs == model.forward(&data.batch(), &whole).unwrap().1;
        assert_eq!(same, dropout == 0.0, "{name}: dropout while training alone");
        let mixture = Mixture::new(
            data.tokens.len(),
            2,
            data.tokens.len() * config.hidden_size,
            5,
        );
        let context = model.forward(&data.batch(), &options).unwrap().0;
        model
            .backward(&mut context.unwrap(), &mixture.gradients(ALL))
            .unwrap();
        assert!(model.gradients().is_none(), "{name}");
        let gradients = model.adapter_gradients_mut(adapter).unwrap().to_vec();
        for parameter in model.table_of(Some(adapter)).unwrap().to_vec() {
            let gradient = &gradients[parameter.range()];
            let norm = dot(gradient, gradient).sqrt();
            if norm < 1e-2 {
                continue;
            }
            let start = model.adapter_parameters_mut(adapter).unwrap()[parameter.range()].to_vec();
            let step = 1.5e-3 * dot(&start, &start).sqrt().max(0.5);
            let mut loss_at = |multiple: f64| {
                let moved = &mut model.adapter_parameters_mut(adapter).unwrap()[parameter.range()];
                for ((p, &p0), &d) in moved.iter_mut().zip(&start).zip(gradient) {
                    *p = (f64::from(p0) + multiple * step * f64::from(d) / norm) as f32;
                }
                mixture.loss(&model.forward(&data.batch(), &options).unwrap().1)
            };
            let near = loss_at(1.0) - loss_at(-1.0);
            let slope = (8.0 * near - (loss_at(2.0) - loss_at(-2.0))) / (12.0 * step);
            loss_at(0.0);
            assert!(
                (slope - norm).abs() < 1e-2 * norm + 1e-2,
                "{name}: {}: slope {slope}, gradient {norm}",
                parameter.name
            );
        }
    }
}

#[test]
fn heads_of_its_own_are_as_many_as_it_wants() {
    let config = llama();
    let mut model = model_with(&config, None, 1, 1);
    let all = modules(&model);
    let own = AdapterOptions {
        num_values: Some(3),
        ..low_rank(2, 1.0)
    };
    let adapter = model.add_adapter(own, &all).unwrap();
    let none = AdapterOptions {
        num_values: Some(0),
        ..own
    };
    let headless = model.add_adapter(none, &all).unwrap();
    assert_eq!(model.num_values_of(None), 1);
    assert_eq!(model.num_values_of(Some(adapter)), 3);
    let data = Data::new(&config, &[5, 4], 1);
    let values = |model: &Model, adapter| {
        let outputs = model.forward(&data.batch(), &through(adapter)).unwrap().1;
        outputs.values.unwrap()
    };
    let before = values(&model, None);
    assert_eq!(values(&model, Some(adapter)), vec![0.0; 27]);
    fill(&mut model, adapter, 5);
    assert!(
        values(&model, Some(adapter))
            .iter()
            .all(|&value| value != 0.0)
    );
    assert_eq!(values(&model, None), before);
    let error = model.forward(&data.batch(), &through(Some(headless)));
    assert!(
        error
            .unwrap_err()
            .to_string()
            .starts_with("values: was asked for")
    );
}

#[test]
fn a_sequence_gives_the_same_bits_alone_and_in_a_pack() {
    let config = llama();
    for level in Level::available() {
        let mut model = model_with(&config, Some(level), 2, 0);
        let all = modules(&model);
        let adapter = model.add_adapter(low_rank(5, 0.4), &all).unwrap();
        fill(&mut model, adapter, 3);
        let options = ForwardOptions {
            train: false,
            adapter: Some(adapter),
            ..ForwardOptions::default()
        };
        let data = Data::new(&config, &[5, 1, 0, 66, 9], 1);
        let packed = common::logprobs(&model, &data, &options);
        for i in 0..5 {
            let alone = common::logprobs(&model, &data.select(&[i]), &options);
            assert_eq!(bits(&alone), bits(&packed[data.range(i)]), "{level} {i}");
        }
    }
}

#[test]
fn a_step_changes_its_adapter_alone() {
    let config = llama();
    let mut model = model_with(&config, None, 1, 1);
    let all = modules(&model);
    let first = model.add_adapter(low_rank(2, 1.0), &all).unwrap();
    let second = model.add_adapter(low_rank(2, 1.0), &all[..3]).unwrap();
    fill(&mut model, first, 1);
    fill(&mut model, second, 2);
    let base = model.parameters().to_vec();
    let other = model.adapter_parameters_mut(second).unwrap().to_vec();
    let before = model.adapter_parameters_mut(first).unwrap().to_vec();
    let groups = [ingot_model::ParameterGroup {
        names: model
            .table_of(Some(first))
            .unwrap()
            .iter()
            .map(|p| p.name.clone())
            .collect(),
        learning_rate_scale: 1.0,
        weight_decay: 0.0,
    }];
    let settings = OptimizerOptions::default();
    let mut optimizer = Optimizer::of(&model, Some(first), &groups, settings).unwrap();
    assert_eq!(optimizer.first_moments().len(), before.len());
    let data = Data::new(&config, &[6, 4], 1);
    let weights = vec![0.1; data.tokens.len()];
    model
        .forward_backward(&data.batch(), &weights, &through(Some(first)))
        .unwrap();
    let stale = model
        .forward(&data.batch(), &through(Some(second)))
        .unwrap()
        .0;
    optimizer.step(&mut model, 1e-2, None).unwrap();
    assert_eq!(model.parameters(), &base[..]);
    assert_eq!(model.adapter_parameters_mut(second).unwrap(), &other[..]);
    assert_ne!(model.adapter_parameters_mut(first).unwrap(), &before[..]);
    let error = model.backward(
        &mut stale.unwrap(),
        &ingot_model::OutputGradients::default(),
    );
    assert!(matches!(error, Err(ModelError::ContextStale)));
}

#[test]
fn what_is_wrong_is_named() {
    let config = llama();
    let mut model = model_with(&config, None, 1, 0);
    let module = |name: &str| vec![name.to_owned()];
    let text = |error: Result<usize, ModelError>| error.unwrap_err().to_string();
    assert_eq!(
        text(model.add_adapter(low_rank(0, 1.0), &[])),
        "rank: must be at least 1, got 0"
    );
    assert_eq!(
        text(model.add_adapter(low_rank(1, 1.0), &module("lm_head"))),
        "modules: lm_head is no linear layer of a block of this model"
    );
    let whole = AdapterOptions {
        dropout: 1.0,
        ..low_rank(1, 1.0)
    };
    assert_eq!(
        text(model.add_adapter(whole, &[])),
        "dropout: must be at least 0 and below 1, got 1"
    );
    let data = Data::new(&config, &[3], 1);
    let options = ForwardOptions {
        adapter: Some(0),
        ..ForwardOptions::default()
    };
    let error = model.forward(&data.batch(), &options).unwrap_err();
    assert_eq!(error.to_string(), "adapter: is 0, but the model has 0");
}
