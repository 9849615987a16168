//! The optimizer against the plain formulas in f64, and its promises.

mod common;

use common::{Data, bits, gpt2, llama, model, model_with};
use ingot_model::{
    EpsMode, ForwardOptions, Model, ModelError, Optimizer, OptimizerOptions, ParameterGroup,
    StepInfo,
};

fn fill_gradients(model: &mut Model, seed: u64) {
    let mut random = common::Random(seed);
    for g in model.gradients_mut() {
        *g = random.signed();
    }
}

/// `AdamW` for one value, in f64.
struct Scalar {
    p: f64,
    m: f64,
    v: f64,
}

#[test]
fn steps_follow_the_formulas() {
    for eps_mode in [EpsMode::Torch, EpsMode::Tf] {
        let config = gpt2();
        let mut model = model_with(&config, None, 2, 1);
        let options = OptimizerOptions {
            betas: (0.8, 0.9),
            eps: 1e-3,
            eps_mode,
            muon_momentum: None,
        };
        let groups = Optimizer::default_groups(&model, 0.2);
        let mut optimizer = Optimizer::new(&model, &groups, options).unwrap();
        let decay: Vec<f64> = model
            .table()
            .iter()
            .flat_map(|p| std::iter::repeat_n(if p.shape.len() > 1 { 0.2 } else { 0.0 }, p.len()))
            .collect();
        let mut twin: Vec<Scalar> = model
            .parameters()
            .iter()
            .map(|&p| Scalar {
                p: f64::from(p),
                m: 0.0,
                v: 0.0,
            })
            .collect();
        for step in 1..=5 {
            fill_gradients(&mut model, step);
            let gradients = model.gradients().unwrap().to_vec();
            let norm = gradients
                .iter()
                .map(|&g| f64::from(g) * f64::from(g))
                .sum::<f64>()
                .sqrt();
            let clip = 1.5;
            let info = optimizer.step(&mut model, 0.01, Some(clip)).unwrap();
            assert!((info.grad_norm - norm).abs() < 1e-9 * norm && !info.skipped);
            let (correct_m, correct_v) = (
                1.0 - 0.8_f64.powi(step as i32),
                1.0 - 0.9_f64.powi(step as i32),
            );
            for ((twin, &g), &decay) in twin.iter_mut().zip(&gradients).zip(&decay) {
                let g = f64::from(g) * clip / norm;
                twin.m = 0.8 * twin.m + 0.2 * g;
                twin.v = 0.9 * twin.v + 0.1 * g * g;
                twin.p *= 1.0 - 0.01 * decay;
                twin.p -= 0.01
                    * match eps_mode {
                        EpsMode::Torch => {
                            (twin.m / correct_m) / ((twin.v / correct_v).sqrt() + 1e-3)
                        }
                        EpsMode::Tf => {
                            correct_v.sqrt() / correct_m * twin.m / (twin.v.sqrt() + 1e-3)
                        }
                    };
            }
        }
        assert_eq!(optimizer.steps_taken(), 5);
        for (p, twin) in model.parameters().iter().zip(&twin) {
            assert!(
                (f64::from(*p) - twin.p).abs() < 3e-7 + 1e-5 * twin.p.abs() / 10.0,
                "{p} {}",
                twin.p
            );
        }
    }
}

#[test]
fn a_gradient_that_is_not_finite_skips_the_step() {
    for bad in [f32::NAN, f32::INFINITY] {
        let config = llama();
        let mut model = model(&config);
        let groups = Optimizer::default_groups(&model, 0.1);
        let mut optimizer = Optimizer::new(&model, &groups, OptimizerOptions::default()).unwrap();
        fill_gradients(&mut model, 1);
        optimizer.step(&mut model, 1e-3, None).unwrap();
        let before = (
            bits(model.parameters()),
            bits(optimizer.first_moments()),
            optimizer.steps_taken(),
        );
        model.gradients_mut()[7] = bad;
        let StepInfo { grad_norm, skipped } = optimizer.step(&mut model, 1e-3, Some(1.0)).unwrap();
        assert!(skipped && !grad_norm.is_finite());
        assert_eq!(
            before,
            (
                bits(model.parameters()),
                bits(optimizer.first_moments()),
                optimizer.steps_taken()
            )
        );
    }
}

#[test]
fn groups_scale_the_learning_rate_and_leave_the_rest_alone() {
    let config = gpt2();
    let mut model = model_with(&config, None, 2, 1);
    let group = |names: &[&str], scale| ParameterGroup {
        names: names.iter().map(|&name| name.to_owned()).collect(),
        learning_rate_scale: scale,
        weight_decay: 0.0,
    };
    let groups = [
        group(&["transformer.wpe.weight"], 1.0),
        group(&["score.weight", "transformer.ln_f.bias"], 0.5),
    ];
    let mut optimizer = Optimizer::new(&model, &groups, OptimizerOptions::default()).unwrap();
    model.gradients_mut().fill(1.0);
    let before = model.parameters().to_vec();
    let info = optimizer.step(&mut model, 0.01, None).unwrap();
    // The norm is that of the groups: 80 x 15 positions, 15 weights and 15 biases, all ones.
    assert!((info.grad_norm - (80.0 * 15.0 + 30.0_f64).sqrt()).abs() < 1e-9);
    for parameter in model.table() {
        let expected = match parameter.name.as_str() {
            "transformer.wpe.weight" => 0.01,
            "score.weight" | "transformer.ln_f.bias" => 0.005,
            _ => 0.0,
        };
        for i in parameter.range() {
            assert!(
                (before[i] - model.parameters()[i] - expected).abs() < 1e-6,
                "{}",
                parameter.name
            );
        }
    }
}

#[test]
fn a_saved_state_goes_on_with_the_same_bits() {
    let config = llama();
    let start = || {
        let model = model(&config);
        let groups = Optimizer::default_groups(&model, 0.1);
        let optimizer = Optimizer::new(&model, &groups, OptimizerOptions::default()).unwrap();
        (model, optimizer)
    };
    let step = |(model, optimizer): &mut (Model, Optimizer), seed| {
        fill_gradients(model, seed);
        optimizer.step(model, 1e-3, Some(1.0)).unwrap();
    };
    let mut one = start();
    step(&mut one, 1);
    step(&mut one, 2);
    let mut two = start();
    two.0.parameters_mut().copy_from_slice(one.0.parameters());
    let (m, v) = two.1.moments_mut();
    m.copy_from_slice(one.1.first_moments());
    v.copy_from_slice(one.1.second_moments());
    two.1.set_steps_taken(one.1.steps_taken());
    step(&mut one, 3);
    step(&mut two, 3);
    assert_eq!(bits(one.0.parameters()), bits(two.0.parameters()));
}

#[test]
fn wrong_uses_are_refused() {
    let config = gpt2();
    let mut model = model(&config);
    let default = OptimizerOptions::default();
    let group = |name: &str| ParameterGroup {
        names: vec![name.to_owned()],
        learning_rate_scale: 1.0,
        weight_decay: 0.0,
    };
    let refused =
        |groups: &[ParameterGroup], options| Optimizer::new(&model, groups, options).unwrap_err();
    let error = refused(&[group("transformer.wte.wieght")], default);
    let nearest = "transformer.wte.weight".to_owned();
    assert_eq!(
        error,
        ModelError::UnknownParameter {
            name: "transformer.wte.wieght".to_owned(),
            nearest
        }
    );
    let twice = [group("score.bias"), group("score.bias")];
    let expected = ModelError::DuplicateParameter {
        name: "score.bias".to_owned(),
        first: 0,
        second: 1,
    };
    assert_eq!(refused(&twice, default), expected);
    let beta = OptimizerOptions {
        betas: (0.9, 1.0),
        ..default
    };
    assert_eq!(
        refused(&[], beta).to_string(),
        "betas[1]: must be in [0, 1), got 1"
    );

    let groups = Optimizer::default_groups(&model, 0.1);
    let mut optimizer = Optimizer::new(&model, &groups, default).unwrap();
    assert_eq!(
        optimizer.step(&mut model, 1e-3, None),
        Err(ModelError::NoGradients)
    );
    model.gradients_mut();
    let text = optimizer
        .step(&mut model, f64::NAN, None)
        .unwrap_err()
        .to_string();
    assert_eq!(
        text,
        "learning_rate: must be a finite number of at least 0, got NaN"
    );
    let text = optimizer
        .step(&mut model, 1e-3, Some(0.0))
        .unwrap_err()
        .to_string();
    assert_eq!(text, "clip_norm: must be positive, got 0");
    let mut other = model_with(&llama(), None, 1, 0);
    other.gradients_mut();
    assert!(matches!(
        optimizer.step(&mut other, 1e-3, None),
        Err(ModelError::OptimizerMismatch { .. })
    ));
}

#[test]
fn training_lowers_the_loss() {
    for config in [gpt2(), llama()] {
        let mut model = model_with(&config, None, 2, 0);
        let data = Data::new(&config, &[30, 30], 3);
        let weights = vec![1.0 / 60.0; 60];
        let groups = Optimizer::default_groups(&model, 0.0);
        let mut optimizer = Optimizer::new(&model, &groups, OptimizerOptions::default()).unwrap();
        let mut losses = Vec::new();
        for _ in 0..120 {
            model.zero_grad();
            losses.push(
                model
                    .forward_backward(&data.batch(), &weights, &ForwardOptions::default())
                    .unwrap(),
            );
            optimizer.step(&mut model, 1e-2, Some(1.0)).unwrap();
        }
        assert!(
            losses[119] < 0.2 * losses[0],
            "{} -> {}",
            losses[0],
            losses[119]
        );
    }
}
