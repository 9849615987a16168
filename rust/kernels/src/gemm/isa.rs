//! What a micro-kernel file provides, and the descriptions of operands and tiles passed to it.
#![allow(unsafe_code)]

use std::marker::PhantomData;

use crate::{Mat, MatMut};

/// Which index of an operand has unit stride.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Along {
    /// The inner index k of the product.
    Depth,
    /// The outer index: a row of A or a column of B.
    Width,
}

/// One factor: element (outer i, inner k) lies at `i * stride + k` (along depth) or `k * stride + i` (along width).
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    pub pointer: *const f32,
    pub stride: usize,
    pub along: Along,
    life: PhantomData<&'a [f32]>,
}

// SAFETY: an operand is a shared borrow of f32.
unsafe impl Send for Operand<'_> {}
// SAFETY: an operand is a shared borrow of f32.
unsafe impl Sync for Operand<'_> {}

impl<'a> Operand<'a> {
    /// A matrix whose rows are outer indices.
    pub fn along_depth(m: Mat<'a>) -> Self {
        Self {
            pointer: m.as_ptr(),
            stride: m.row_stride(),
            along: Along::Depth,
            life: PhantomData,
        }
    }

    /// A matrix whose rows are inner indices.
    pub fn along_width(m: Mat<'a>) -> Self {
        Self {
            pointer: m.as_ptr(),
            stride: m.row_stride(),
            along: Along::Width,
            life: PhantomData,
        }
    }

    /// Pointer to element (outer i, inner k).
    pub fn at(&self, i: usize, k: usize) -> *const f32 {
        let (row, col) = match self.along {
            Along::Depth => (i, k),
            Along::Width => (k, i),
        };
        self.pointer.wrapping_add(row * self.stride + col)
    }
}

/// Where the product goes, and what is done at the end of each chain.
#[derive(Clone, Copy)]
pub(super) struct Output<'a> {
    pub pointer: *mut f32,
    pub stride: usize,
    /// Null, or one value per column.
    pub bias: *const f32,
    pub accumulate: bool,
    life: PhantomData<&'a mut [f32]>,
}

// SAFETY: an output is an exclusive borrow of f32; the drivers write each element from one thread at a time.
unsafe impl Send for Output<'_> {}
// SAFETY: as above; disjoint tiles are the drivers' business.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    pub fn new(c: &'a mut MatMut<'_>, bias: Option<&'a [f32]>, accumulate: bool) -> Self {
        Self {
            pointer: c.as_mut_ptr(),
            stride: c.row_stride(),
            bias: bias.map_or(std::ptr::null(), <[f32]>::as_ptr),
            accumulate,
            life: PhantomData,
        }
    }
}

/// The part of the chains that one call of a micro-kernel works through.
#[derive(Clone, Copy)]
pub(super) struct Segment {
    pub depth: usize,
    /// Whether the chains start here.
    pub starts: bool,
    /// Whether the chains end here.
    pub ends: bool,
}

impl Output<'_> {
    /// Pointer to an element.
    pub fn at(&self, row: usize, col: usize) -> *mut f32 {
        self.pointer.wrapping_add(row * self.stride + col)
    }

    /// Ends one chain: adds the bias, then the old value where the product accumulates, and writes the element.
    ///
    /// # Safety
    /// The element lies within C, and no other thread uses it.
    pub unsafe fn finish(&self, row: usize, col: usize, chain: f32) {
        // SAFETY: the caller's; the bias has one value per column of C.
        unsafe {
            let value = if self.bias.is_null() {
                chain
            } else {
                chain + *self.bias.add(col)
            };
            let out = self.at(row, col);
            *out = if self.accumulate { *out + value } else { value };
        }
    }

    /// The micro-tile at (row, col) of C, `cols` wide. `panels` are the places of its operands, `waiting` is where its
    /// chains wait between segments, with the row stride there.
    pub fn tile(
        &self,
        (row, col): (usize, usize),
        cols: usize,
        segment: Segment,
        panels: (*const f32, *const f32),
        waiting: (*mut f32, usize),
    ) -> Tile {
        let Segment {
            depth,
            starts,
            ends,
        } = segment;
        Tile {
            depth,
            a: panels.0,
            b: panels.1,
            cols,
            partial: if starts { std::ptr::null() } else { waiting.0 },
            partial_stride: waiting.1,
            out: if ends { self.at(row, col) } else { waiting.0 },
            out_stride: if ends { self.stride } else { waiting.1 },
            bias: if ends && !self.bias.is_null() {
                self.bias.wrapping_add(col)
            } else {
                std::ptr::null()
            },
            accumulate: ends && self.accumulate,
        }
    }
}

/// One call of a micro-kernel: up to `MR` x `NR` chains over `depth` steps.
///
/// Chains start at 0 or at `partial`. At the end the bias is added if it is not null, then the old content of `out` if
/// `accumulate` is set, and the result goes to `out`.
pub(super) struct Tile {
    pub depth: usize,
    /// The tile's rows in a packed panel of A: `depth` steps of `A_WIDTH`.
    pub a: *const f32,
    /// Packed panel of B: `depth` x `NR`.
    pub b: *const f32,
    /// Columns to compute, 1..=`NR`.
    pub cols: usize,
    /// Null, or the chains so far.
    pub partial: *const f32,
    pub partial_stride: usize,
    pub out: *mut f32,
    pub out_stride: usize,
    /// Null, or one value per column.
    pub bias: *const f32,
    pub accumulate: bool,
}

/// Rows of A that [`Isa::dots`] takes, as lanes.
pub(super) const DOT_LANES: usize = 8;
/// Rows of B that [`Isa::dots`] takes at once: chains enough to hide the latency of a multiply-add.
pub(super) const DOT_ROWS: usize = 8;

/// One instruction set's micro-kernels and packing.
pub(super) trait Isa {
    /// Rows of a micro-tile.
    const MR: usize;
    /// Width of a panel of A: several micro-tiles, so that packing writes whole vectors.
    const A_WIDTH: usize;
    /// Columns of a micro-tile, width of a panel of B.
    const NR: usize;
    /// Columns of one vector: a micro-tile of fewer columns costs whole vectors.
    const LANES: usize;

    /// Computes a tile of `rows` (1..=`MR`) rows.
    ///
    /// # Safety
    /// The CPU has the instructions; the panels hold `depth` steps; `partial`, `out` and `bias` are null or valid for
    /// the rows and columns of the tile, and nobody else uses that part of `out`.
    unsafe fn tile(rows: usize, tile: &Tile);

    /// Chains of up to `DOT_LANES` rows of A with `rows` (1..=`DOT_ROWS`) rows of B: `chains[j][l]` becomes the chain of
    /// `lanes[k * DOT_LANES + l]` and `b[j * stride + k]` over k. With `fetch`, the rows after these, which need not exist, are
    /// fetched into L2 meanwhile.
    ///
    /// # Safety
    /// The CPU has the instructions; the rows of B and the lanes are readable for `depth` steps.
    unsafe fn dots(
        rows: usize,
        b: *const f32,
        stride: usize,
        lanes: *const f32,
        depth: usize,
        fetch: bool,
        chains: &mut [[f32; DOT_LANES]; DOT_ROWS],
    );

    /// Packs a panel of A from an operand along depth: `dst[k * A_WIDTH + i] = src[i * stride + k]` for
    /// `i < width` and `k < depth`. What lies between `width` and `A_WIDTH` is left as it is. Where `ahead` is not 0, the elements that many
    /// places after those read are fetched into the cache; they need not exist.
    ///
    /// # Safety
    /// The CPU has the instructions; `src` is readable at these places and `dst` writable for `depth * A_WIDTH` floats.
    unsafe fn transpose_a(
        src: *const f32,
        stride: usize,
        width: usize,
        depth: usize,
        dst: *mut f32,
        ahead: usize,
    );

    /// As [`Isa::transpose_a`] for a panel of B, `NR` wide.
    ///
    /// # Safety
    /// As for [`Isa::transpose_a`].
    unsafe fn transpose_b(
        src: *const f32,
        stride: usize,
        width: usize,
        depth: usize,
        dst: *mut f32,
        ahead: usize,
    );

    /// Packs panels of A from an operand along width:
    /// `dst[p * panel + k * A_WIDTH + l] = src[k * stride + p * A_WIDTH + l]` for `p * A_WIDTH + l < width`, `k < depth`.
    ///
    /// # Safety
    /// The CPU has the instructions; `src` is readable and `dst` writable at these places.
    unsafe fn copy_a(
        src: *const f32,
        stride: usize,
        width: usize,
        depth: usize,
        dst: *mut f32,
        panel: usize,
    );

    /// As [`Isa::copy_a`] for panels of B, `NR` wide.
    ///
    /// # Safety
    /// As for [`Isa::copy_a`].
    unsafe fn copy_b(
        src: *const f32,
        stride: usize,
        width: usize,
        depth: usize,
        dst: *mut f32,
        panel: usize,
    );
}

/// Implements the packing of [`Isa`] with transpositions and panel widths, under the attributes given.
macro_rules! packing {
    ($(#[$attribute:meta])* a: $transpose_a:ty, $mr:expr; b: $transpose_b:ty, $nr:expr) => {
        unsafe fn transpose_a(src: *const f32, stride: usize, width: usize, depth: usize, dst: *mut f32, ahead: usize) {
            $(#[$attribute])*
            unsafe fn run(src: *const f32, stride: usize, width: usize, depth: usize, dst: *mut f32, ahead: usize) {
                // SAFETY: the caller's.
                unsafe { $crate::gemm::pack::transpose::<$transpose_a, $mr>(src, stride, width, depth, dst, ahead) }
            }
            // SAFETY: the caller's.
            unsafe { run(src, stride, width, depth, dst, ahead) }
        }
        unsafe fn transpose_b(src: *const f32, stride: usize, width: usize, depth: usize, dst: *mut f32, ahead: usize) {
            $(#[$attribute])*
            unsafe fn run(src: *const f32, stride: usize, width: usize, depth: usize, dst: *mut f32, ahead: usize) {
                // SAFETY: the caller's.
                unsafe { $crate::gemm::pack::transpose::<$transpose_b, $nr>(src, stride, width, depth, dst, ahead) }
            }
            // SAFETY: the caller's.
            unsafe { run(src, stride, width, depth, dst, ahead) }
        }
        unsafe fn copy_a(src: *const f32, stride: usize, width: usize, depth: usize, dst: *mut f32, panel: usize) {
            $(#[$attribute])*
            unsafe fn run(src: *const f32, stride: usize, width: usize, depth: usize, dst: *mut f32, panel: usize) {
                // SAFETY: the caller's.
                unsafe { $crate::gemm::pack::copy::<$mr>(src, stride, width, depth, dst, panel) }
            }
            // SAFETY: the caller's.
            unsafe { run(src, stride, width, depth, dst, panel) }
        }
        unsafe fn copy_b(src: *const f32, stride: usize, width: usize, depth: usize, dst: *mut f32, panel: usize) {
            $(#[$attribute])*
            unsafe fn run(src: *const f32, stride: usize, width: usize, depth: usize, dst: *mut f32, panel: usize) {
                // SAFETY: the caller's.
                unsafe { $crate::gemm::pack::copy::<$nr>(src, stride, width, depth, dst, panel) }
            }
            // SAFETY: the caller's.
            unsafe { run(src, stride, width, depth, dst, panel) }
        }
    };
}
pub(super) use packing;
