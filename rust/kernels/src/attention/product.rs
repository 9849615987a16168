//! The one register-blocked product from which attention is built: out = (out +) A B with every element one chain of
//! multiply-adds in ascending order.
#![allow(unsafe_code)]

use crate::Kernels;
use crate::simd::{LANES, Registers, Simd, dispatch};

/// The left operand: element (row, step) lies at `row * row_stride + step * step_stride`.
#[derive(Clone, Copy)]
pub(super) struct Strided<'a> {
    pub(super) data: &'a [f32],
    pub(super) row_stride: usize,
    pub(super) step_stride: usize,
}

/// Whether the chain starts at zero or goes on from what `out` holds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    Zero,
    Continue,
}

/// Sizes of a product: `rows` x `steps` times `steps` x `width`, the width a multiple of 16.
#[derive(Clone, Copy)]
pub(super) struct Extent {
    pub(super) rows: usize,
    pub(super) steps: usize,
    pub(super) width: usize,
}

/// Raw operands of a block.
#[derive(Clone, Copy)]
struct Operands {
    a: *const f32,
    a_row: usize,
    a_step: usize,
    b: *const f32,
    b_step: usize,
    out: *mut f32,
    out_row: usize,
    steps: usize,
    start: Start,
}

/// `R` rows of `C` vectors.
///
/// # Safety
/// All elements that the sizes name must be readable (a, b) or writable (out).
#[inline(always)]
unsafe fn block<S: Simd, const R: usize, const C: usize>(s: S, o: Operands) {
    let mut sums = [[s.zero(); C]; R];
    // SAFETY: the caller answers for every address formed here: rows below R, steps below o.steps, C vectors.
    unsafe {
        if o.start == Start::Continue {
            for (r, sums) in sums.iter_mut().enumerate() {
                for (c, sum) in sums.iter_mut().enumerate() {
                    *sum = s.load(&*o.out.add(r * o.out_row + c * LANES).cast());
                }
            }
        }
        let (mut a, mut b) = (o.a, o.b);
        for _ in 0..o.steps {
            let mut right = [s.zero(); C];
            for (c, right) in right.iter_mut().enumerate() {
                *right = s.load(&*b.add(c * LANES).cast());
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let left = s.splat(*a.add(r * o.a_row));
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum = s.fma(left, right, *sum);
                }
            }
            a = a.wrapping_add(o.a_step);
            b = b.wrapping_add(o.b_step);
        }
        for (r, sums) in sums.iter().enumerate() {
            for (c, sum) in sums.iter().enumerate() {
                s.store(*sum, &mut *o.out.add(r * o.out_row + c * LANES).cast());
            }
        }
    }
}

/// All rows of `C` vectors, `R` at a time, then the rest.
///
/// # Safety
/// As for [`block`], for `rows` rows.
#[inline(always)]
unsafe fn rows<S: Simd, const R: usize, const C: usize>(s: S, rows: usize, mut o: Operands) {
    let mut left = rows;
    // SAFETY: each block covers rows that the caller answers for; pointers move past those done.
    unsafe {
        while left >= R {
            block::<S, R, C>(s, o);
            o.a = o.a.wrapping_add(R * o.a_row);
            o.out = o.out.wrapping_add(R * o.out_row);
            left -= R;
        }
        match left {
            0 => {}
            1 => block::<S, 1, C>(s, o),
            2 => block::<S, 2, C>(s, o),
            3 => block::<S, 3, C>(s, o),
            4 => block::<S, 4, C>(s, o),
            _ => block::<S, 5, C>(s, o),
        }
    }
}

#[inline(always)]
fn product<S: Simd>(
    s: S,
    extent: Extent,
    a: Strided,
    b: &[f32],
    b_stride: usize,
    start: Start,
    out: &mut [f32],
    out_stride: usize,
) {
    let mut o = Operands {
        a: a.data.as_ptr(),
        a_row: a.row_stride,
        a_step: a.step_stride,
        b: b.as_ptr(),
        b_step: b_stride,
        out: out.as_mut_ptr(),
        out_row: out_stride,
        steps: extent.steps,
        start,
    };
    let mut vectors = extent.width / LANES;
    // SAFETY: `Kernels::product` checked that the last element of each operand lies inside its slice.
    unsafe {
        while vectors > 0 {
            let done = match (S::REGISTERS, vectors) {
                (Registers::Wide, 1) | (Registers::Narrow, _) => {
                    rows::<S, 6, 1>(s, extent.rows, o);
                    1
                }
                (Registers::Wide, 2) => {
                    rows::<S, 6, 2>(s, extent.rows, o);
                    2
                }
                (Registers::Wide, 3) => {
                    rows::<S, 6, 3>(s, extent.rows, o);
                    3
                }
                (Registers::Wide, _) => {
                    rows::<S, 6, 4>(s, extent.rows, o);
                    4
                }
                (Registers::Small, _) => {
                    rows::<S, 2, 1>(s, extent.rows, o);
                    1
                }
            };
            o.b = o.b.wrapping_add(done * LANES);
            o.out = o.out.wrapping_add(done * LANES);
            vectors -= done;
        }
    }
}

impl Kernels {
    /// out[r][c] = (out[r][c] or 0) + sum over steps, ascending, of a(r, step) * b[step][c].
    ///
    /// # Panics
    /// If an operand is too short for the extent or the width is not a multiple of 16.
    pub(super) fn product(
        self,
        extent: Extent,
        a: Strided,
        b: &[f32],
        b_stride: usize,
        start: Start,
        out: &mut [f32],
        out_stride: usize,
    ) {
        let Extent { rows, steps, width } = extent;
        if rows == 0 || width == 0 {
            return;
        }
        assert!(
            width.is_multiple_of(LANES),
            "product: the width is not a multiple of the lanes"
        );
        assert!(
            out.len() >= (rows - 1) * out_stride + width,
            "product: the output is too short"
        );
        if steps > 0 {
            let last = (rows - 1) * a.row_stride + (steps - 1) * a.step_stride;
            assert!(
                a.data.len() > last,
                "product: the left operand is too short"
            );
            assert!(
                b.len() >= (steps - 1) * b_stride + width,
                "product: the right operand is too short"
            );
        }
        dispatch!(
            self,
            product<'a>(
                extent: Extent, a: Strided<'a>, b: &[f32], b_stride: usize, start: Start, out: &mut [f32],
                out_stride: usize
            )
        );
    }
}
