//! Packing of operands into panels: `[panel][k][lane]`, in the order in which micro-kernels read them.
//!
//! Lanes of the last panel beyond the operand's width are not written: their products are never stored.
#![allow(unsafe_code)]

use super::isa::{Along, Isa, Operand};
use crate::arena::LINE;

/// Transposition of a square block in registers.
pub(super) trait Transpose {
    /// Rows and columns of the block.
    const SIDE: usize;

    /// `dst[k * dst_stride + i] = src[i * src_stride + k]` for i and k below `SIDE`.
    ///
    /// # Safety
    /// The CPU has the instructions, and all these places are valid.
    unsafe fn block(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize);

    /// Asks for the cache line at an address, which need not be valid.
    ///
    /// # Safety
    /// The CPU has the instruction.
    unsafe fn prefetch(at: *const f32);
}

/// Packs `width` (at most `W`) rows of `depth` floats into one panel of `W` lanes. See [`Isa::transpose_a`].
///
/// # Safety
/// The CPU has the instructions of `T`; `src` is valid for the rows, `dst` for `depth * W` floats.
#[inline(always)]
pub(super) unsafe fn transpose<T: Transpose, const W: usize>(
    src: *const f32,
    stride: usize,
    width: usize,
    depth: usize,
    dst: *mut f32,
    ahead: usize,
) {
    let whole = depth / T::SIDE * T::SIDE;
    for first in (0..width).step_by(T::SIDE) {
        let rows = T::SIDE.min(width - first);
        let start = if rows == T::SIDE { whole } else { 0 };
        // SAFETY: rows first..first + rows are below `width`, and k stays below `depth`.
        unsafe {
            let src = src.add(first * stride);
            let dst = dst.add(first);
            for k in (0..start).step_by(T::SIDE) {
                if ahead > 0 {
                    for i in 0..T::SIDE {
                        T::prefetch(src.wrapping_add(i * stride + k + ahead));
                    }
                }
                T::block(src.add(k), stride, dst.add(k * W), W);
            }
            for i in 0..rows {
                for k in start..depth {
                    *dst.add(k * W + i) = *src.add(i * stride + k);
                }
            }
        }
    }
}

/// Copies rows of `width` floats into panels of `W` lanes. See [`Isa::copy_a`].
///
/// # Safety
/// `src` is valid for `depth` rows, `dst` for the panels.
#[inline(always)]
pub(super) unsafe fn copy<const W: usize>(
    src: *const f32,
    stride: usize,
    width: usize,
    depth: usize,
    dst: *mut f32,
    panel: usize,
) {
    // Few panels at a time: their current lines stay in L1 and their pages in the first TLB.
    let group = GROUP / W * W;
    for first in (0..width).step_by(group) {
        let cols = group.min(width - first);
        let whole = cols / W;
        for k in 0..depth {
            // SAFETY: the caller's: row k has `width` floats, each panel `W` for it.
            unsafe {
                let src = src.add(k * stride + first);
                let dst = dst.add(first / W * panel + k * W);
                for p in 0..whole {
                    let row = src.add(p * W).cast::<[f32; W]>().read();
                    dst.add(p * panel).cast::<[f32; W]>().write(row);
                }
                let rest = src.add(whole * W);
                std::ptr::copy_nonoverlapping(rest, dst.add(whole * panel), cols - whole * W);
            }
        }
    }
}

/// Floats from one panel to the next. An odd number of cache lines, so that the places for one k in different panels
/// spread over all sets of the cache.
pub(super) fn panel_floats(lanes: usize, depth: usize) -> usize {
    ((lanes * depth).div_ceil(LINE) | 1) * LINE
}

/// Which panels an operand is packed into.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    A,
    B,
}

impl Role {
    pub fn panel_width<I: Isa>(self) -> usize {
        match self {
            Self::A => I::A_WIDTH,
            Self::B => I::NR,
        }
    }
}

/// A part of an operand: outer indices `start..start + width`, inner indices `k..k + depth`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Part {
    pub start: usize,
    pub width: usize,
    pub k: usize,
    pub depth: usize,
}

/// Columns of panels that are written side by side.
const GROUP: usize = 512;
/// Elements that one item of packing work moves, roughly.
const ITEM_ELEMENTS: usize = 1 << 15;

/// How the packing of a part is cut into items.
#[derive(Clone, Copy)]
pub(super) struct PackJob<'a> {
    source: Operand<'a>,
    role: Role,
    part: Part,
    /// Panels (along depth) or inner indices (along width) per item.
    step: usize,
    count: usize,
}

impl<'a> PackJob<'a> {
    pub fn new<I: Isa>(source: Operand<'a>, role: Role, part: Part) -> Self {
        let (step, total) = match source.along {
            Along::Depth => {
                let panel = role.panel_width::<I>();
                (
                    ITEM_ELEMENTS / (panel * part.depth).max(1),
                    part.width.div_ceil(panel),
                )
            }
            Along::Width => (ITEM_ELEMENTS / part.width.max(1), part.depth),
        };
        let step = step.clamp(1, total.max(1));
        Self {
            source,
            role,
            part,
            step,
            count: total.div_ceil(step),
        }
    }

    /// Number of items.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Packs one item's share into `dst`, the panels of the whole part (`depth` steps each).
    ///
    /// # Safety
    /// The CPU has the instructions of `I`; the part lies within the operand; `dst` is valid for all panels of the part,
    /// and no two threads run the same item.
    pub unsafe fn run<I: Isa>(&self, item: usize, dst: *mut f32) {
        let Part {
            start,
            width,
            k,
            depth,
        } = self.part;
        let lanes = self.role.panel_width::<I>();
        let panel = panel_floats(lanes, depth);
        match self.source.along {
            Along::Depth => {
                let panels = width.div_ceil(lanes);
                for index in item * self.step..panels.min((item + 1) * self.step) {
                    let first = index * lanes;
                    let source = self.source.at(start + first, k);
                    let rows = lanes.min(width - first);
                    // SAFETY: the panel's rows lie within the part, its place within `dst`.
                    unsafe {
                        let dst = dst.add(index * panel);
                        match self.role {
                            Role::A => {
                                I::transpose_a(source, self.source.stride, rows, depth, dst, 0);
                            }
                            Role::B => {
                                I::transpose_b(source, self.source.stride, rows, depth, dst, 0);
                            }
                        }
                    }
                }
            }
            Along::Width => {
                let first = item * self.step;
                let steps = self.step.min(depth - first);
                let source = self.source.at(start, k + first);
                // SAFETY: these rows lie within the part, their places within the panels.
                unsafe {
                    let dst = dst.add(first * lanes);
                    match self.role {
                        Role::A => I::copy_a(source, self.source.stride, width, steps, dst, panel),
                        Role::B => I::copy_b(source, self.source.stride, width, steps, dst, panel),
                    }
                }
            }
        }
    }
}
