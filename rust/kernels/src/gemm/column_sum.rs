//! Sums over the rows of a matrix: the gradient of a bias.
use super::ALONE_BELOW;
use crate::simd::{LANES, Simd, dispatch};
use crate::{Kernels, Mat, Pool};

/// Columns that one item adds up: registers hold that many sums, and a row's share is a few cache lines.
const STRIP: usize = 8 * LANES;

/// Adds the rows of up to `STRIP` columns in order, from 0.
#[inline(always)]
fn strip_sum<S: Simd>(s: S, a: Mat<'_>, out: &mut [f32], accumulate: bool) {
    let cols = out.len();
    let mut sums = [0.0_f32; STRIP];
    if cols == STRIP {
        let mut acc = [s.zero(); STRIP / LANES];
        for row in 0..a.num_rows() {
            for (acc, x) in acc.iter_mut().zip(a.row(row).as_chunks::<LANES>().0) {
                *acc = s.add(*acc, s.load(x));
            }
        }
        for (acc, sums) in acc.iter().zip(sums.as_chunks_mut::<LANES>().0) {
            s.store(*acc, sums);
        }
    } else {
        for row in 0..a.num_rows() {
            for (sum, x) in sums.iter_mut().zip(a.row(row)) {
                *sum += x;
            }
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = if accumulate { *out + sum } else { sum };
    }
}

impl Kernels {
    /// `out[j] = sum_i a[i][j]` for A `[M, N]`, out `[N]`: rows are added in order from +0, without contraction, so all
    /// levels give the same bits. `accumulate` adds the sum to the old content of `out`.
    ///
    /// # Panics
    /// If `out` does not have one element per column.
    pub fn column_sum(&self, pool: &Pool, a: Mat, out: &mut [f32], accumulate: bool) {
        assert_eq!(
            a.num_cols(),
            out.len(),
            "column_sum: {} columns into {} sums",
            a.num_cols(),
            out.len()
        );
        let alone = a.num_rows() * a.num_cols() < ALONE_BELOW;
        let kernels = *self;
        let sum_strip = |(i, out): (usize, &mut [f32])| {
            let a = a.cols(i * STRIP..i * STRIP + out.len());
            dispatch!(kernels, strip_sum(a: Mat<'_>, out: &mut [f32], accumulate: bool));
        };
        let strips = out.chunks_mut(STRIP).enumerate();
        if alone {
            strips.for_each(sum_strip);
        } else {
            pool.for_each(strips.collect(), sum_strip);
        }
    }
}
