//! Packing of operands into panels: `[panel][k][lane]`, in the order in which micro-kernels read them.
//!
//! Lanes of the last panel beyond the operand's width are not written: their products are never stored.
#![allow(unsafe_code)]

use super::isa::{Along, Isa, Operand};

/// Transposition of a square block in registers.
pub(super) trait Transpose {
    /// Rows and columns of the block.
    const SIDE: usize;

    /// `dst[k * dst_stride + i] = src[i * src_stride + k]` for i and k below `SIDE`.
    ///
    /// # Safety
    /// The CPU has the instructions, and all these places are valid.
    unsafe fn block(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize);
}

/// Packs `width` (at most `W`) rows of `depth` floats into one panel of `W` lanes.
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

/// Which panels an operand is packed into.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    A,
    B,
}

impl Role {
    pub fn panel_width<I: Isa>(self) -> usize {
        match self {
            Self::A => I::MR,
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
        match self.source.along {
            Along::Depth => {
                let panels = width.div_ceil(lanes);
                for panel in item * self.step..panels.min((item + 1) * self.step) {
                    let first = panel * lanes;
                    let source = self.source.at(start + first, k);
                    let rows = lanes.min(width - first);
                    // SAFETY: the panel's rows lie within the part, its place within `dst`.
                    unsafe {
                        let dst = dst.add(first * depth);
                        match self.role {
                            Role::A => I::transpose_a(source, self.source.stride, rows, depth, dst),
                            Role::B => I::transpose_b(source, self.source.stride, rows, depth, dst),
                        }
                    }
                }
            }
            Along::Width => {
                for step in item * self.step..depth.min((item + 1) * self.step) {
                    let source = self.source.at(start, k + step);
                    for first in (0..width).step_by(lanes) {
                        // SAFETY: columns first..min(first + lanes, width) of this row lie within the part, the
                        // destination within its panel.
                        unsafe {
                            let dst = dst.add(first * depth + step * lanes);
                            if width - first >= lanes {
                                // A constant length, so that it compiles to plain vector moves.
                                match self.role {
                                    Role::A => {
                                        std::ptr::copy_nonoverlapping(
                                            source.add(first),
                                            dst,
                                            I::MR,
                                        );
                                    }
                                    Role::B => {
                                        std::ptr::copy_nonoverlapping(
                                            source.add(first),
                                            dst,
                                            I::NR,
                                        );
                                    }
                                }
                            } else {
                                std::ptr::copy_nonoverlapping(
                                    source.add(first),
                                    dst,
                                    width - first,
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}
