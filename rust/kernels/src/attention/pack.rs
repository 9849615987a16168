//! Packing the rows of one head for the products: padded to whole vectors, or transposed to tiles of 64 keys.

use super::TILE;
use crate::simd::{LANES, Simd, dispatch};
use crate::{Kernels, Mat, MatMut};

#[inline(always)]
fn pack<S: Simd>(s: S, rows: Mat, padded: usize, out: &mut [f32]) {
    for (r, out) in out
        .chunks_exact_mut(padded)
        .take(rows.num_rows())
        .enumerate()
    {
        let (chunks, tail) = rows.row(r).as_chunks::<LANES>();
        let (out, _) = out.as_chunks_mut::<LANES>();
        for (chunk, out) in chunks.iter().zip(out.iter_mut()) {
            s.store(s.load(chunk), out);
        }
        if !tail.is_empty() {
            s.store(s.load_partial(tail), &mut out[chunks.len()]);
        }
    }
}

#[inline(always)]
fn unpack<S: Simd>(s: S, rows: &[f32], padded: usize, mut out: MatMut) {
    for (r, row) in rows.chunks_exact(padded).take(out.num_rows()).enumerate() {
        let (chunks, _) = row.as_chunks::<LANES>();
        let (out, tail) = out.row_mut(r).as_chunks_mut::<LANES>();
        for (chunk, out) in chunks.iter().zip(out.iter_mut()) {
            s.store(s.load(chunk), out);
        }
        if !tail.is_empty() {
            s.store_partial(s.load(&chunks[out.len()]), tail);
        }
    }
}

#[inline(always)]
fn pack_transposed<S: Simd>(s: S, rows: Mat, out: &mut [f32]) {
    let (num_rows, dim) = (rows.num_rows(), rows.num_cols());
    for first in (0..TILE).step_by(LANES) {
        for column in (0..dim).step_by(LANES) {
            let columns = LANES.min(dim - column);
            let mut square = [s.zero(); LANES];
            for (r, vector) in square
                .iter_mut()
                .enumerate()
                .take(num_rows.saturating_sub(first))
            {
                let row = &rows.row(first + r)[column..column + columns];
                *vector = match row.first_chunk::<LANES>() {
                    Some(chunk) => s.load(chunk),
                    None => s.load_partial(row),
                };
            }
            let square = s.transpose(square);
            for (d, vector) in square.iter().enumerate().take(columns) {
                let start = (column + d) * TILE + first;
                let out = out[start..]
                    .first_chunk_mut::<LANES>()
                    .expect("a tile has 64 keys");
                s.store(*vector, out);
            }
        }
    }
}

impl Kernels {
    /// Copies rows into rows of `padded` elements, the padding zero.
    pub(super) fn pack_rows(self, rows: Mat, padded: usize, out: &mut [f32]) {
        assert!(
            rows.num_cols().next_multiple_of(LANES) == padded
                && out.len() >= rows.num_rows() * padded,
            "pack_rows: sizes do not fit"
        );
        dispatch!(self, pack<'a>(rows: Mat<'a>, padded: usize, out: &mut [f32]));
    }

    /// Copies rows of `padded` elements back without their padding.
    pub(super) fn unpack_rows(self, rows: &[f32], padded: usize, out: MatMut) {
        assert!(
            out.num_cols().next_multiple_of(LANES) == padded
                && rows.len() >= out.num_rows() * padded,
            "unpack_rows: sizes do not fit"
        );
        dispatch!(self, unpack<'a>(rows: &[f32], padded: usize, out: MatMut<'a>));
    }

    /// Transposes at most 64 rows into one row of 64 per column; missing rows become zeros.
    pub(super) fn pack_transposed(self, rows: Mat, out: &mut [f32]) {
        assert!(
            rows.num_rows() <= TILE && out.len() == rows.num_cols() * TILE,
            "pack_transposed: sizes do not fit"
        );
        dispatch!(self, pack_transposed<'a>(rows: Mat<'a>, out: &mut [f32]));
    }
}
