//! The driver for products with few rows of A, as in decoding: B is read from memory once and goes through L1 and L2 only.
//!
//! A is packed once. An item of work is a few strips of columns of C; for each it packs a panel of B chunk by chunk into
//! the thread's scratch and multiplies the chunk at once with all rows of A.
#![allow(unsafe_code)]

use super::isa::{Along, Isa, Operand, Output, Segment};
use super::{ALONE_BELOW, Size};
use crate::Pool;

/// Most rows of A for which packing B per item, not per call, pays.
const ROWS: usize = 48;
/// Depth of the piece of B that is packed and multiplied at once.
const CHUNK: usize = 256;
/// Items that a product is cut into, where it is wide enough.
const ITEMS: usize = 32;

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
    // Narrow strips where there are too few wide ones to share out.
    let width = if n >= ITEMS / 2 * I::NR {
        I::NR
    } else {
        I::LANES
    };
    let item = (n / (ITEMS * width)).max(1) * width;
    let panel = I::NR * CHUNK.min(k.max(1));
    let partials = if c.accumulate && k > CHUNK {
        m * I::NR
    } else {
        0
    };
    let strips = Strips {
        size,
        packed_a: &packed_a,
        b,
        c,
        width,
        panel,
    };
    let alone = m * n * k.max(1) < ALONE_BELOW;
    pool.for_index(
        alone,
        n.div_ceil(item),
        panel + partials,
        |index, scratch| {
            for col in (index * item..n.min((index + 1) * item)).step_by(width) {
                // SAFETY: the CPU has the instructions; the columns from `col` on, `width` at most, are this item's alone.
                unsafe { strips.run::<I>(col, scratch) };
            }
        },
    );
}

/// What the strips of one product share.
struct Strips<'a> {
    size: Size,
    packed_a: &'a [f32],
    b: Operand<'a>,
    c: Output<'a>,
    width: usize,
    /// Floats of scratch for a piece of B; the rest is for chains that wait, if C cannot hold them.
    panel: usize,
}

impl Strips<'_> {
    /// Computes the strip of columns that starts at `col`.
    ///
    /// # Safety
    /// The CPU has the instructions of `I`; no other thread uses this strip of C.
    unsafe fn run<I: Isa>(&self, col: usize, scratch: &mut [f32]) {
        let Size { m, n, k } = self.size;
        let cols = self.width.min(n - col);
        let (panel, partials) = scratch.split_at_mut(self.panel);
        let mut from = 0;
        loop {
            let depth = CHUNK.min(k - from);
            let segment = Segment {
                depth,
                starts: from == 0,
                ends: from + depth == k,
            };
            // The piece after this one: on in the same rows of B, or at the start of those of the next strip.
            let ahead = if segment.ends {
                self.width * self.b.stride - from
            } else {
                CHUNK
            };
            // SAFETY: rows col..col + cols of B; the panel has room for the chunk.
            unsafe {
                I::transpose_b(
                    self.b.at(col, from),
                    self.b.stride,
                    cols,
                    depth,
                    panel.as_mut_ptr(),
                    ahead,
                );
            }
            for row in (0..m).step_by(I::MR) {
                let waiting = if partials.is_empty() {
                    (self.c.at(row, col), self.c.stride)
                } else {
                    (partials.as_mut_ptr().wrapping_add(row * I::NR), I::NR)
                };
                let lane = row % I::A_WIDTH;
                let a = self
                    .packed_a
                    .as_ptr()
                    .wrapping_add((row - lane) * k + from * I::A_WIDTH + lane);
                let tile = self
                    .c
                    .tile((row, col), cols, segment, (a, panel.as_ptr()), waiting);
                // SAFETY: both panels hold `depth` steps; the tile lies within C, or its chains within the scratch; no
                // other item has these columns.
                unsafe { I::tile(I::MR.min(m - row), &tile) };
            }
            from += depth;
            if from >= k {
                break;
            }
        }
    }
}
