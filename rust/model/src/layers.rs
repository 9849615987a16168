//! The layers: each file holds a layer's forward pass and, beside it, its backward pass.
//!
//! Shapes: R rows (tokens) of a chunk, N rows of the batch, d the hidden size, H query heads, Hkv key-value heads, h the
//! width of one head, F the width of the MLP, V the vocabulary. All arrays are row-major f32. A gradient is called `d_`
//! and the name of its value; gradients of parameters and of the residual stream are added to, all others overwritten.

mod attention;
mod block;
mod dropout;
mod embedding;
mod linear;
mod mlp;
mod norm;
mod rotary;

pub(crate) use attention::Attention;
pub(crate) use block::{Block, BlockActivations, BlockScratch, Pass};
pub(crate) use dropout::Dropout;
pub(crate) use embedding::Embedding;
pub(crate) use linear::Linear;
pub(crate) use mlp::Mlp;
pub(crate) use norm::{Norm, NormScratch, RowMoments};
pub(crate) use rotary::RotaryTable;

use ingot_kernels::{Kernels, Pool};

/// Rows that one work item of an elementwise pass takes. Items are cut by shape only, never by the number of threads.
pub(crate) const ROWS_PER_ITEM: usize = 32;

/// What does the arithmetic: the kernels of one instruction level and the threads that run them.
pub(crate) struct Compute {
    pub(crate) kernels: Kernels,
    pub(crate) pool: Pool,
}
