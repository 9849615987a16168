//! The AVX-512 micro-kernel: 8 x 48 chains in 24 registers, three vectors of B, one broadcast element of A.
#![allow(unsafe_code)]
#![allow(
    clippy::wildcard_imports,
    reason = "the intrinsics of one instruction set"
)]

use std::arch::x86_64::*;

use super::isa::{Isa, Tile, packing};
use super::pack::Transpose;

const MR: usize = 8;
const A_WIDTH: usize = 2 * MR;
const LANES: usize = 16;
const VECTORS: usize = 3;
const NR: usize = VECTORS * LANES;

pub(super) struct Avx512;

/// 16 x 16.
struct Transpose16;

impl Transpose for Transpose16 {
    const SIDE: usize = 16;

    #[inline(always)]
    unsafe fn prefetch(at: *const f32) {
        // SAFETY: fetching is a hint that touches nothing; the caller has SSE.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    /// For four k at a time: register i gathers rows i, i + 4, i + 8 and i + 12, one in each 128-bit lane, so that two
    /// rounds of unpacking within lanes finish the transposition.
    #[inline(always)]
    unsafe fn block(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
        // SAFETY: the caller's: a block of 16 x 16 on both sides, and a CPU with AVX-512.
        unsafe {
            for k in (0..16).step_by(4) {
                let gather = |i: usize| {
                    let row = |i: usize| _mm_loadu_ps(src.add(i * src_stride + k));
                    let low = _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(row(i)), row(i + 4));
                    let high =
                        _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(row(i + 8)), row(i + 12));
                    _mm512_insertf32x8::<1>(_mm512_castps256_ps512(low), high)
                };
                let (r0, r1, r2, r3) = (gather(0), gather(1), gather(2), gather(3));
                let (a, b) = (_mm512_unpacklo_ps(r0, r1), _mm512_unpackhi_ps(r0, r1));
                let (c, d) = (_mm512_unpacklo_ps(r2, r3), _mm512_unpackhi_ps(r2, r3));
                _mm512_storeu_ps(dst.add(k * dst_stride), _mm512_shuffle_ps::<0x44>(a, c));
                _mm512_storeu_ps(
                    dst.add((k + 1) * dst_stride),
                    _mm512_shuffle_ps::<0xee>(a, c),
                );
                _mm512_storeu_ps(
                    dst.add((k + 2) * dst_stride),
                    _mm512_shuffle_ps::<0x44>(b, d),
                );
                _mm512_storeu_ps(
                    dst.add((k + 3) * dst_stride),
                    _mm512_shuffle_ps::<0xee>(b, d),
                );
            }
        }
    }
}

/// `R` rows, `V` vectors of columns of which the last may be partial.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn kernel<const R: usize, const V: usize>(tile: &Tile) {
    let last = (u16::MAX) >> (V * LANES - tile.cols);
    let mask = |v: usize| if v + 1 == V { last } else { u16::MAX };
    let mut acc = [[_mm512_setzero_ps(); V]; R];
    // SAFETY: the caller's: see `Isa::tile`; masked lanes are not touched.
    unsafe {
        if !tile.partial.is_null() {
            for (r, acc) in acc.iter_mut().enumerate() {
                for (v, acc) in acc.iter_mut().enumerate() {
                    *acc = _mm512_maskz_loadu_ps(
                        mask(v),
                        tile.partial.add(r * tile.partial_stride + v * LANES),
                    );
                }
            }
        }
        for r in 0..R {
            let out = tile.out.add(r * tile.out_stride);
            for v in 0..V {
                _mm_prefetch::<_MM_HINT_T0>(out.wrapping_add(v * LANES).cast());
            }
        }
        let (mut a, mut b) = (tile.a, tile.b);
        for _ in 0..tile.depth {
            let mut columns = [_mm512_setzero_ps(); V];
            for (v, column) in columns.iter_mut().enumerate() {
                *column = _mm512_loadu_ps(b.add(v * LANES));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let row = _mm512_set1_ps(*a.add(r));
                for (acc, column) in acc.iter_mut().zip(columns) {
                    *acc = _mm512_fmadd_ps(row, column, *acc);
                }
            }
            a = a.add(A_WIDTH);
            b = b.add(NR);
        }
        if !tile.bias.is_null() {
            for v in 0..V {
                let bias = _mm512_maskz_loadu_ps(mask(v), tile.bias.add(v * LANES));
                for acc in &mut acc {
                    acc[v] = _mm512_add_ps(acc[v], bias);
                }
            }
        }
        for (r, acc) in acc.iter_mut().enumerate() {
            for (v, acc) in acc.iter_mut().enumerate() {
                let out = tile.out.add(r * tile.out_stride + v * LANES);
                if tile.accumulate {
                    *acc = _mm512_add_ps(_mm512_maskz_loadu_ps(mask(v), out), *acc);
                }
                _mm512_mask_storeu_ps(out, mask(v), *acc);
            }
        }
    }
}

/// # Safety
/// As for [`Isa::tile`].
#[inline(always)]
unsafe fn rows<const V: usize>(rows: usize, tile: &Tile) {
    // SAFETY: the caller's.
    unsafe {
        match rows {
            1 => kernel::<1, V>(tile),
            2 => kernel::<2, V>(tile),
            3 => kernel::<3, V>(tile),
            4 => kernel::<4, V>(tile),
            5 => kernel::<5, V>(tile),
            6 => kernel::<6, V>(tile),
            7 => kernel::<7, V>(tile),
            _ => kernel::<MR, V>(tile),
        }
    }
}

impl Isa for Avx512 {
    const MR: usize = MR;
    const A_WIDTH: usize = A_WIDTH;
    const NR: usize = NR;
    const LANES: usize = LANES;

    unsafe fn tile(num_rows: usize, tile: &Tile) {
        // SAFETY: the caller's.
        unsafe {
            match tile.cols.div_ceil(LANES) {
                1 => rows::<1>(num_rows, tile),
                2 => rows::<2>(num_rows, tile),
                _ => rows::<VECTORS>(num_rows, tile),
            }
        }
    }

    packing!(#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")] a: Transpose16, A_WIDTH; b: Transpose16, NR);
}
