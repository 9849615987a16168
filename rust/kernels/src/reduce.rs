//! Sums over rows in one fixed order.
//!
//! Element i goes to partial sum i mod 64 (four vectors of 16 lanes, which hide the latency of addition); the vectors
//! are added as (0 + 1) + (2 + 3) and the lanes by the tree of [`Simd::sum`]. The order depends on the row's length
//! alone, and is the same at every level.

use crate::simd::{LANES, Simd};

/// Number of vectors of partial sums.
const VECTORS: usize = 4;

/// What a reduction adds to its `R` sums for one vector of each of its `N` rows.
pub(crate) trait Reduction<const N: usize, const R: usize>: Copy {
    fn step<S: Simd>(self, s: S, x: [S::F; N], sums: [S::F; R]) -> [S::F; R];
}

/// Reduces `N` rows of equal length to `R` sums.
#[inline(always)]
pub(crate) fn reduce<S: Simd, T: Reduction<N, R>, const N: usize, const R: usize>(
    s: S,
    reduction: T,
    rows: [&[f32]; N],
) -> [f32; R] {
    let length = rows[0].len();
    let full = length / LANES;
    let mut chunks: [&[[f32; LANES]]; N] = [&[]; N];
    for (chunks, row) in chunks.iter_mut().zip(rows) {
        assert_eq!(row.len(), length, "rows of a reduction differ in length");
        *chunks = &row.as_chunks::<LANES>().0[..full];
    }
    let mut sums = [[s.zero(); R]; VECTORS];
    let groups = full / VECTORS;
    for group in 0..groups {
        for (v, sums) in sums.iter_mut().enumerate() {
            *sums = reduction.step(s, load(s, chunks, group * VECTORS + v), *sums);
        }
    }
    for (v, sums) in sums.iter_mut().enumerate() {
        let index = groups * VECTORS + v;
        if index < full {
            *sums = reduction.step(s, load(s, chunks, index), *sums);
        } else if index == full && !length.is_multiple_of(LANES) {
            let mut x = [s.zero(); N];
            for (x, row) in x.iter_mut().zip(rows) {
                *x = s.load_partial(&row[full * LANES..]);
            }
            let next = reduction.step(s, x, *sums);
            for (sum, next) in sums.iter_mut().zip(next) {
                *sum = s.select(s.first(length % LANES), next, *sum);
            }
        }
    }
    let mut totals = [0.0; R];
    for (r, total) in totals.iter_mut().enumerate() {
        *total = s.sum(s.add(s.add(sums[0][r], sums[1][r]), s.add(sums[2][r], sums[3][r])));
    }
    totals
}

#[inline(always)]
fn load<S: Simd, const N: usize>(s: S, chunks: [&[[f32; LANES]]; N], index: usize) -> [S::F; N] {
    let mut x = [s.zero(); N];
    for (x, chunks) in x.iter_mut().zip(chunks) {
        *x = s.load(&chunks[index]);
    }
    x
}
