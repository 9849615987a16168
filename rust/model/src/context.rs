//! What a forward pass leaves for its backward pass.

use std::sync::Arc;

use ingot_kernels::Lease;

use crate::batch::{HeadOptions, Packing};
use crate::layers::RotaryTable;

/// The activations of one forward pass. Several may live at once; each serves one backward pass of the same model with
/// unchanged parameters. Its memory goes back to the model's pool after that, or when it is dropped.
pub struct Context {
    /// The model that made it.
    pub(crate) model: u64,
    /// Version of the model's parameters at that time.
    pub(crate) version: u64,
    /// The adapter that the pass went through.
    pub(crate) adapter: Option<usize>,
    pub(crate) spent: bool,
    pub(crate) packing: Packing,
    pub(crate) head: HeadOptions,
    /// Seed of the dropout masks, where dropout may have been on.
    pub(crate) dropout_seed: Option<u64>,
    pub(crate) rotary: Option<Arc<RotaryTable>>,
    /// One arena per block.
    pub(crate) blocks: Vec<Lease>,
    /// The residual stream after the last block, `[N, d]`.
    pub(crate) output: Lease,
}

impl Context {
    /// Whether a backward pass has used it up.
    pub fn is_spent(&self) -> bool {
        self.spent
    }

    /// Number of tokens of its batch.
    pub fn num_tokens(&self) -> usize {
        self.packing.num_rows()
    }

    /// Number of scalar heads that the pass went to.
    pub fn num_values(&self) -> usize {
        self.head.num_values
    }

    /// Number of rows of the `hidden` output.
    pub fn num_hidden_rows(&self) -> usize {
        self.head.hidden_rows.len()
    }

    /// Number of entries of the `candidate_logprobs` output.
    pub fn num_candidates(&self) -> usize {
        self.head.candidates.len()
    }
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context")
            .field("num_tokens", &self.num_tokens())
            .field("version", &self.version)
            .field("spent", &self.spent)
            .finish_non_exhaustive()
    }
}
