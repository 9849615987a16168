//! The network of `ingot`: a decoder-only transformer by configuration, its forward and backward passes on a CPU, and its
//! optimizer.
//!
//! Batches are packed: one flat array of tokens and the offsets of its sequences, no padding. Everything that a loss may
//! need comes out per token (log-probability, entropy, scalar heads, hidden rows), and the loss's gradients with respect to
//! those go in again: [`Model::forward`] and [`Model::backward`], or both in one for the next-token loss:
//! [`Model::forward_backward`].
//!
//! One output's arithmetic depends on its own sequence and the instruction level alone: neither on what shares the batch,
//! nor on the order in it, nor on the number of threads.
#![forbid(unsafe_code)]

mod adapter;
mod batch;
mod config;
mod context;
mod decoder;
mod error;
mod families;
mod head;
mod init;
mod kv_cache;
mod layers;
mod muon;
mod network;
mod optimizer;
mod parameters;
mod sampling;
#[cfg(test)]
mod testing;

pub use adapter::AdapterOptions;
pub use batch::{Batch, Candidates, ForwardOptions, OutputGradients, Outputs, Want};
pub use config::{ActivationKind, AttentionBias, Config, NormKind, PositionKind, RopeScaling};
pub use context::Context;
pub use decoder::{DecodeStep, Decoder, DecoderOptions};
pub use error::ModelError;
pub use families::Family;
pub use ingot_kernels::adamw::EpsMode;
pub use ingot_kernels::{Kernels, Level, Pool};
pub use network::{Model, Options};
pub use optimizer::{Optimizer, OptimizerOptions, ParameterGroup, StepInfo};
pub use parameters::Parameter;
pub use sampling::Sampling;

pub(crate) use layers::Compute;
