//! The driver for products with very few rows of A, as in decoding: B is read in place, once, and nothing of it is packed.
//!
//! A is packed with its rows as lanes. A micro-kernel takes several rows of B and multiplies each of their elements with
//! the lanes for its k: all chains of one element of B advance in one instruction, however few lanes are in use.
#![allow(unsafe_code)]

use super::isa::{Along, DOT_LANES, DOT_ROWS, Isa, Operand, Output};
use super::{ALONE_BELOW, Size};
use crate::Pool;

/// Items that a product is cut into, where it is wide enough.
const ITEMS: usize = 64;

/// Size of B from which on it is fetched ahead: about what stays in a cache between two calls.
const FETCH_FLOATS: usize = 2 << 20;

/// Whether this driver takes the product.
pub(super) fn fits(size: Size, a: Operand, b: Operand) -> bool {
    size.m <= DOT_LANES && a.along == Along::Depth && b.along == Along::Depth
}

/// C = A B^T, both operands along depth.
pub(super) fn multiply<I: Isa>(pool: &Pool, size: Size, a: Operand, b: Operand, c: Output) {
    let Size { m, n, k } = size;
    let mut lanes = pool.arenas().lease(k * DOT_LANES);
    for i in 0..m {
        for (l, lanes) in lanes.chunks_exact_mut(DOT_LANES).enumerate() {
            // SAFETY: row i < m and l < k lie within A.
            lanes[i] = unsafe { *a.at(i, l) };
        }
    }
    let lanes: &[f32] = &lanes;
    let item = (n / (ITEMS * DOT_ROWS)).max(1) * DOT_ROWS;
    let fetch = n * k >= FETCH_FLOATS;
    let alone = m * n * k.max(1) < ALONE_BELOW;
    // Whole references: their fields alone are pointers, which threads may not share.
    let (b, c) = (&b, &c);
    pool.for_index(alone, n.div_ceil(item), 0, |index, _| {
        for col in (index * item..n.min((index + 1) * item)).step_by(DOT_ROWS) {
            let cols = DOT_ROWS.min(n - col);
            let mut chains = [[0.0; DOT_LANES]; DOT_ROWS];
            // SAFETY: the CPU has the instructions, as the caller holds kernels of this level; rows col..col + cols of
            // B have k elements, as have the lanes.
            unsafe {
                I::dots(
                    cols,
                    b.at(col, 0),
                    b.stride,
                    lanes.as_ptr(),
                    k,
                    fetch,
                    &mut chains,
                );
            };
            for i in 0..m {
                for (j, chains) in chains[..cols].iter().enumerate() {
                    // SAFETY: element (i, col + j) lies within C and is this item's alone; the bias has n elements.
                    unsafe { c.finish(i, col + j, chains[i]) };
                }
            }
        }
    });
}
