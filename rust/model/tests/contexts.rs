//! Contexts: several at once, accumulation, and the errors of a wrong use.

mod common;

use common::{Data, bits, gpt2, llama, model, model_with};
use ingot_model::{Config, Context, ForwardOptions, Model, ModelError, OutputGradients, Want};

fn forward(model: &Model, data: &Data) -> Context {
    model
        .forward(&data.batch(), &ForwardOptions::default())
        .unwrap()
        .0
        .unwrap()
}

fn ones(data: &Data) -> Vec<f32> {
    vec![1.0; data.tokens.len()]
}

fn d_logprobs(d: &[f32]) -> OutputGradients<'_> {
    OutputGradients {
        d_logprobs: Some(d),
        ..OutputGradients::default()
    }
}

#[test]
fn contexts_live_side_by_side_and_gradients_accumulate() {
    let config = llama();
    let mut model = model(&config);
    let (first, second) = (Data::new(&config, &[6, 3], 1), Data::new(&config, &[40], 2));
    let gradient_of = |model: &mut Model, data: &Data| {
        model.zero_grad();
        let mut context = forward(model, data);
        model
            .backward(&mut context, &d_logprobs(&ones(data)))
            .unwrap();
        model.gradients().unwrap().to_vec()
    };
    let of_first = gradient_of(&mut model, &first);
    let of_second = gradient_of(&mut model, &second);

    model.zero_grad();
    let (mut a, mut b) = (forward(&model, &first), forward(&model, &second));
    model.backward(&mut a, &d_logprobs(&ones(&first))).unwrap();
    assert_eq!(bits(model.gradients().unwrap()), bits(&of_first));
    model.backward(&mut b, &d_logprobs(&ones(&second))).unwrap();
    for ((both, a), b) in model
        .gradients()
        .unwrap()
        .iter()
        .zip(&of_first)
        .zip(&of_second)
    {
        assert!(
            (both - (a + b)).abs() <= 1e-5 * (a.abs() + b.abs()) + 1e-6,
            "{both} {a} {b}"
        );
    }
}

#[test]
fn a_spent_context_is_refused() {
    let config = gpt2();
    let mut model = model(&config);
    let data = Data::new(&config, &[4], 1);
    let mut context = forward(&model, &data);
    model
        .backward(&mut context, &d_logprobs(&ones(&data)))
        .unwrap();
    assert!(context.is_spent());
    assert_eq!(
        model.backward(&mut context, &d_logprobs(&ones(&data))),
        Err(ModelError::ContextSpent)
    );
}

#[test]
fn a_stale_context_is_refused() {
    let config = gpt2();
    let mut model = model(&config);
    let data = Data::new(&config, &[4], 1);
    let mut context = forward(&model, &data);
    model.parameters_mut()[0] += 1.0;
    assert_eq!(
        model.backward(&mut context, &d_logprobs(&ones(&data))),
        Err(ModelError::ContextStale)
    );
}

#[test]
fn a_context_of_another_model_is_refused() {
    let config = gpt2();
    let (mut one, two) = (model(&config), model(&config));
    let data = Data::new(&config, &[4], 1);
    let mut context = forward(&two, &data);
    assert_eq!(
        one.backward(&mut context, &d_logprobs(&ones(&data))),
        Err(ModelError::ContextForeign)
    );
}

#[test]
fn wrong_gradients_are_named_and_leave_the_context_usable() {
    let config = gpt2();
    let mut model = model(&config);
    let data = Data::new(&config, &[4], 1);
    let mut context = forward(&model, &data);
    let message = |result: Result<(), ModelError>| result.unwrap_err().to_string();
    let short = [0.0; 3];
    let text = message(model.backward(&mut context, &d_logprobs(&short)));
    assert_eq!(
        text,
        "d_logprobs: has 3 entries, but a context of that many tokens needs 4"
    );
    let values = OutputGradients {
        d_values: Some(&short),
        ..Default::default()
    };
    assert!(message(model.backward(&mut context, &values)).contains("was not asked for values"));
    let hidden = OutputGradients {
        d_hidden: Some(&short),
        ..Default::default()
    };
    assert!(message(model.backward(&mut context, &hidden)).contains("was not asked for hidden"));
    model
        .backward(&mut context, &d_logprobs(&ones(&data)))
        .unwrap();

    let options = ForwardOptions {
        want: common::ALL,
        hidden_rows: Some(&[3, 1]),
        ..Default::default()
    };
    let mut context = model.forward(&data.batch(), &options).unwrap().0.unwrap();
    let text = message(model.backward(&mut context, &values));
    assert_eq!(
        text,
        "d_values: has 3 entries, but the output values needs 8"
    );
    let text = message(model.backward(&mut context, &hidden));
    assert_eq!(
        text,
        "d_hidden: has 3 entries, but the output hidden needs 30"
    );
}

#[test]
fn nothing_is_kept_without_training() {
    let config = gpt2();
    let model = model(&config);
    let data = Data::new(&config, &[4], 1);
    let options = ForwardOptions {
        train: false,
        ..Default::default()
    };
    assert!(model.forward(&data.batch(), &options).unwrap().0.is_none());
}

#[test]
fn empty_batches_and_batches_without_targets_work() {
    for config in [
        gpt2(),
        llama(),
        Config {
            dropout: 0.1,
            ..common::qwen3()
        },
    ] {
        let mut model = model_with(&config, None, 2, 2);
        let mut without_targets = Data::new(&config, &[3, 0, 1], 1);
        without_targets.targets.fill(-1);
        let cases = [
            Data::new(&config, &[], 1),
            Data::new(&config, &[0, 0], 1),
            without_targets,
        ];
        for data in cases {
            let n = data.tokens.len();
            let options = ForwardOptions {
                want: common::ALL,
                ..Default::default()
            };
            let (context, outputs) = model.forward(&data.batch(), &options).unwrap();
            assert_eq!(outputs.logprobs.unwrap(), vec![0.0; n]);
            assert_eq!(outputs.top1.unwrap(), vec![false; n]);
            assert_eq!(outputs.values.unwrap().len(), 2 * n);
            model.zero_grad();
            model
                .backward(&mut context.unwrap(), &d_logprobs(&ones(&data)))
                .unwrap();
            assert!(model.gradients().unwrap().iter().all(|&g| g == 0.0));
            let loss = model
                .forward_backward(&data.batch(), &ones(&data), &ForwardOptions::default())
                .unwrap();
            assert!(loss.abs() < f64::MIN_POSITIVE, "{loss}");
            let scoring = ForwardOptions {
                train: false,
                ..options
            };
            assert_eq!(
                model
                    .forward(&data.batch(), &scoring)
                    .unwrap()
                    .1
                    .lse
                    .unwrap(),
                vec![0.0; n]
            );
        }
    }
}

#[test]
fn outputs_that_were_not_asked_for_are_absent_and_rows_not_asked_for_are_zero() {
    let config = llama();
    let model = model(&config);
    let data = Data::new(&config, &[9], 4);
    let rows: Vec<bool> = (0..9).map(|row| row == 2 || row == 5).collect();
    let want = Want {
        values: true,
        ..Want::default()
    };
    let options = ForwardOptions {
        want,
        value_rows: Some(&rows),
        train: false,
        ..Default::default()
    };
    let outputs = model.forward(&data.batch(), &options).unwrap().1;
    assert!(outputs.logprobs.is_none() && outputs.hidden.is_none());
    let chosen = outputs.values.unwrap();
    let all = ForwardOptions {
        want,
        train: false,
        ..Default::default()
    };
    let all = model
        .forward(&data.batch(), &all)
        .unwrap()
        .1
        .values
        .unwrap();
    for row in 0..9 {
        let expected = if rows[row] {
            &all[2 * row..2 * row + 2]
        } else {
            &[0.0, 0.0]
        };
        assert_eq!(&chosen[2 * row..2 * row + 2], expected);
    }
}
