//! Twins of the dropout mask.

use crate::DropoutKey;
use crate::random::{DropoutScale, HASH_MULTIPLIERS, HASH_STEP};

/// Whether element `index` of the row of `key` is kept under dropout with probability `p`.
#[must_use]
pub fn is_kept(key: DropoutKey, p: f32, index: u32) -> bool {
    let row = key.row_words();
    let mut x = index.wrapping_mul(HASH_STEP).wrapping_add(row[0]);
    x ^= x >> 16;
    x = x.wrapping_mul(HASH_MULTIPLIERS[0]);
    x ^= (x >> 15).wrapping_add(row[1]);
    x = x.wrapping_mul(HASH_MULTIPLIERS[1]);
    x ^= x >> 16;
    x >= DropoutScale::new(p).threshold
}

/// Twin of [`crate::Kernels::dropout`].
pub fn dropout(key: DropoutKey, p: f32, x: &mut [f32]) {
    for (i, x) in x.iter_mut().enumerate() {
        *x = if is_kept(key, p, i as u32) {
            *x * DropoutScale::new(p).scale
        } else {
            0.0
        };
    }
}
