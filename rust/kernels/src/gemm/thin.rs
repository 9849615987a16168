//! The driver for products with few rows of A, as in decoding: B is read from memory once and goes through L1 and L2 only.
//!
//! A is packed once. An item of work is a strip of columns of C; it packs its own panel of B chunk by chunk into the
//! thread's scratch and multiplies it at once with all rows of A.
#![allow(unsafe_code)]

use super::isa::{Along, Isa, Operand, Output, Tile};
use super::{ALONE_BELOW, Size};
use crate::Pool;

/// Most rows of A for which packing B per item, not per call, pays.
const ROWS: usize = 48;
/// Depth of the piece of B that is packed and multiplied at once.
const CHUNK: usize = 256;

/// Whether this driver takes the product.
pub(super) fn fits(size: Size, a: Operand, b: Operand) -> bool {
    size.m <= ROWS && a.along == Along::Depth && b.along == Along::Depth
}

/// C = A B^T, both operands along depth.
pub(super) fn multiply<I: Isa>(pool: &Pool, size: Size, a: Operand, b: Operand, c: Output) {
    let Size { m, n, k } = size;
    let mut packed_a = pool.arenas().lease(m.next_multiple_of(I::A_WIDTH) * k);
    for row in (0..m).step_by(I::A_WIDTH) {
        let dst = packed_a[row * k..].as_mut_ptr();
        // SAFETY: rows from `row` on lie within A; the panel has room for A_WIDTH rows of depth k. The CPU has the
        // instructions, as the caller holds kernels of this level.
        unsafe { I::transpose_a(a.at(row, 0), a.stride, I::A_WIDTH.min(m - row), k, dst, 0) };
    }
    let packed_a: &[f32] = &packed_a;
    // Narrow strips where there are too few wide ones to share out.
    let strip = if n >= 16 * I::NR { I::NR } else { I::LANES };
    let panel = I::NR * CHUNK.min(k.max(1));
    let partials = if c.accumulate && k > CHUNK {
        m * I::NR
    } else {
        0
    };
    let alone = m * n * k.max(1) < ALONE_BELOW;
    // Whole capture: its fields alone are pointers, which threads may not share.
    let (b, c) = (&b, &c);
    pool.for_index(
        alone,
        n.div_ceil(strip),
        panel + partials,
        |index, scratch| {
            let col = index * strip;
            let cols = strip.min(n - col);
            let (panel, partials) = scratch.split_at_mut(panel);
            let mut from = 0;
            loop {
                let depth = CHUNK.min(k - from);
                let (starts, ends) = (from == 0, from + depth == k);
                // SAFETY: rows col..col + cols of B; the panel has room for the chunk.
                unsafe {
                    I::transpose_b(
                        b.at(col, from),
                        b.stride,
                        cols,
                        depth,
                        panel.as_mut_ptr(),
                        0,
                    );
                };
                for row in (0..m).step_by(I::MR) {
                    let out = c.pointer.wrapping_add(row * c.stride + col);
                    let (partial, partial_stride) = if partials.is_empty() {
                        (out, c.stride)
                    } else {
                        (partials.as_mut_ptr().wrapping_add(row * I::NR), I::NR)
                    };
                    let tile = Tile {
                        depth,
                        a: packed_a.as_ptr().wrapping_add(
                            row / I::A_WIDTH * I::A_WIDTH * k
                                + from * I::A_WIDTH
                                + row % I::A_WIDTH,
                        ),
                        b: panel.as_ptr(),
                        cols,
                        partial: if starts { std::ptr::null() } else { partial },
                        partial_stride,
                        out: if ends { out } else { partial },
                        out_stride: if ends { c.stride } else { partial_stride },
                        bias: if ends && !c.bias.is_null() {
                            c.bias.wrapping_add(col)
                        } else {
                            std::ptr::null()
                        },
                        accumulate: ends && c.accumulate,
                    };
                    // SAFETY: both panels hold `depth` steps; the tile lies within C, or its chains within the scratch; no
                    // other item has these columns.
                    unsafe { I::tile(I::MR.min(m - row), &tile) };
                }
                from += depth;
                if from >= k {
                    break;
                }
            }
        },
    );
}
