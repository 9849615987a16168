//! Packing rows of keys or values for the products: whole rows padded to vectors, or transposed to [head_dim][64].

use super::TILE;
use crate::simd::LANES;

/// Copies rows of `dim` elements into rows of `padded` elements; the padding is set to zero.
pub(super) fn pack_rows<'a>(rows: impl Iterator<Item = &'a [f32]>, padded: usize, out: &mut [f32]) {
    for (row, out) in rows.zip(out.chunks_exact_mut(padded)) {
        let (values, padding) = out.split_at_mut(row.len());
        values.copy_from_slice(row);
        padding.fill(0.0);
    }
}

/// Transposes at most 64 rows of `dim` padded elements (stride `padded`) into `dim` rows of 64; missing rows become zeros.
pub(super) fn transpose_rows(
    rows: &[f32],
    num_rows: usize,
    padded: usize,
    dim: usize,
    out: &mut [f32],
) {
    out[..dim * TILE].fill(0.0);
    // Blocks of 16 x 16 keep both sides in the first-level cache.
    for first in (0..num_rows).step_by(LANES) {
        for column in (0..dim).step_by(LANES) {
            for r in first..(first + LANES).min(num_rows) {
                let source = &rows[r * padded..][column..(column + LANES).min(dim)];
                for (d, value) in source.iter().enumerate() {
                    out[(column + d) * TILE + r] = *value;
                }
            }
        }
    }
}
