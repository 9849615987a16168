//! Models that share their parameters: what is written to one does not reach the other.

mod common;

use std::sync::Arc;

use common::{Data, bits, llama, model};
use ingot_model::{ForwardOptions, Model, Optimizer, OptimizerOptions};

fn logprobs(model: &Model, data: &Data) -> Vec<u32> {
    let options = ForwardOptions {
        train: false,
        ..ForwardOptions::default()
    };
    let (_, outputs) = model.forward(&data.batch(), &options).unwrap();
    bits(&outputs.logprobs.unwrap())
}

#[test]
fn a_step_moves_the_model_and_leaves_its_fork() {
    let config = llama();
    let mut model = model(&config);
    let data = Data::new(&config, &[5, 9], 1);
    let fork = model.fork();
    assert_eq!(model.parameters().as_ptr(), fork.parameters().as_ptr());
    let before = logprobs(&fork, &data);
    let groups = Optimizer::default_groups(&model, 0.1);
    let mut optimizer = Optimizer::new(&model, &groups, OptimizerOptions::default()).unwrap();
    let weights = vec![0.1; data.tokens.len()];
    for _ in 0..3 {
        model
            .forward_backward(&data.batch(), &weights, &ForwardOptions::default())
            .unwrap();
        optimizer.step(&mut model, 1e-2, None).unwrap();
    }
    assert_ne!(model.parameters().as_ptr(), fork.parameters().as_ptr());
    assert_eq!(logprobs(&fork, &data), before);
    assert_ne!(logprobs(&model, &data), before);
    assert!(fork.gradients().is_none());
}

#[test]
fn taking_ones_own_memory_is_no_change() {
    let config = llama();
    let mut model = model(&config);
    let data = Data::new(&config, &[5], 1);
    let handle = model.shared_parameters();
    let before = logprobs(&model, &data);
    let version = model.version();
    let place = model.own_parameters().as_ptr();
    assert_ne!(place, handle.as_ptr());
    assert_eq!(Arc::strong_count(&handle), 1);
    assert_eq!(model.version(), version);
    assert_eq!(logprobs(&model, &data), before);
    // What is the model's own already stays where it is.
    assert_eq!(model.parameters_mut().as_ptr(), place);
}
