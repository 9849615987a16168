//! Causal attention with grouped queries over packed sequences: forward, backward, and decoding on pages.
//!
//! Keys are taken in tiles of 64 counted from the start of the sequence, and each query row goes through the same
//! arithmetic whatever surrounds it: scores are chains of multiply-adds over the head dimension, the softmax is the
//! online one (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1) with sums over fixed lanes,
//! and the weighted sum of values is a chain over keys in ascending order. A masked key adds an exact zero. So a row's
//! result has the same bits whether it is computed in a training batch, alone, in a chunk of a prompt, or as a single
//! token on cached pages.

mod backward;
mod forward;
mod pack;
mod pages;
mod product;
mod softmax;

pub use pages::{PAGE_POSITIONS, PagedSequence};

use crate::random::{DropoutKey, DropoutScale, site};
use crate::simd::LANES;

/// Keys per tile.
const TILE: usize = PAGE_POSITIONS;

/// Sizes of one attention layer.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AttentionShape {
    /// Number of query heads.
    pub heads: usize,
    /// Number of key-value heads; divides `heads`. Query head h reads key-value head h / (heads / `kv_heads`).
    pub kv_heads: usize,
    /// Elements per head; any positive number.
    pub head_dim: usize,
    /// Factor of the scores, usually `1/sqrt(head_dim)`.
    pub scale: f32,
}

impl AttentionShape {
    /// Query heads per key-value head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// The head dimension rounded up to whole vectors.
    fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// # Panics
    /// If a size is zero or the heads do not divide.
    fn assert_valid(&self) {
        assert!(
            self.kv_heads > 0
                && self.head_dim > 0
                && self.heads > 0
                && self.heads.is_multiple_of(self.kv_heads),
            "attention: {} heads cannot share {} key-value heads of {} elements",
            self.heads,
            self.kv_heads,
            self.head_dim
        );
    }
}

/// Dropout on attention weights, after normalisation; the mask is a function of (seed, layer, head, sequence id, query
/// position, key position) and is replayed by the backward pass.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AttentionDropout<'a> {
    /// Probability of dropping a weight, in [0, 1).
    pub p: f32,
    /// Seed of the call.
    pub seed: u64,
    /// Layer of the network.
    pub layer: u32,
    /// Identity of each sequence of the batch, as many as `offsets` has sequences.
    pub sequence_ids: &'a [i64],
}

/// The mask of the rows of one head of one sequence.
#[derive(Clone, Copy)]
struct HeadDropout {
    scale: DropoutScale,
    key: DropoutKey,
}

impl HeadDropout {
    fn new(dropout: &AttentionDropout, sequence: usize, head: usize) -> Self {
        let key = DropoutKey {
            seed: dropout.seed,
            layer: dropout.layer,
            site: site::ATTENTION_WEIGHTS + head as u32,
            sequence_id: dropout.sequence_ids[sequence],
            position: 0,
        };
        Self {
            scale: DropoutScale::new(dropout.p),
            key,
        }
    }

    /// Hash words of the rows at the given query positions.
    fn row_words(&self, positions: std::ops::Range<usize>) -> Vec<[u32; 2]> {
        positions
            .map(|position| {
                DropoutKey {
                    position: position as u64,
                    ..self.key
                }
                .row_words()
            })
            .collect()
    }
}

/// Scratch memory of a work item, given out piece by piece.
struct Scratch<'a>(&'a mut [f32]);

impl<'a> Scratch<'a> {
    /// The next `length` floats, with whatever an earlier item left in them.
    fn take(&mut self, length: usize) -> &'a mut [f32] {
        let (piece, rest) = std::mem::take(&mut self.0).split_at_mut(length);
        self.0 = rest;
        piece
    }
}

/// Checks a batch's offsets and returns the sequences that have tokens, as (index of the sequence, first token, end).
///
/// # Panics
/// If the offsets do not run from 0 to the number of tokens without descending.
fn sequences(
    offsets: &[i64],
    num_tokens: usize,
    dropout: Option<&AttentionDropout>,
) -> Vec<(usize, usize, usize)> {
    assert!(
        offsets.first() == Some(&0)
            && offsets.last() == Some(&(num_tokens as i64))
            && offsets.is_sorted(),
        "attention: offsets must run from 0 to {num_tokens} without descending"
    );
    assert!(
        dropout.is_none_or(|dropout| dropout.sequence_ids.len() == offsets.len() - 1),
        "attention: one sequence id per sequence"
    );
    let ranges = offsets.windows(2).enumerate();
    ranges
        .map(|(i, pair)| (i, pair[0] as usize, pair[1] as usize))
        .filter(|(_, start, end)| start < end)
        .collect()
}
