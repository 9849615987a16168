//! The AVX-512 micro-kernel: 8 x 48 chains in 24 registers, three vectors of B, one broadcast element of A.
#![allow(unsafe_code)]
#![allow(
    clippy::wildcard_imports,
    reason = "the intrinsics of one instruction set"
)]

use std::arch::x86_64::*;

use super::isa::{DOT_LANES, DOT_ROWS, Isa, Tile, packing};
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

    /// Two rounds of unpacking within 128-bit lanes transpose blocks of 4 x 4, two rounds of moving lanes the blocks.
    /// Each row is loaded whole: rows that lie a multiple of 4 KiB apart share one set of L1, which cannot keep them all.
    #[inline(always)]
    unsafe fn block(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
        // SAFETY: the caller's: a block of 16 x 16 on both sides, and a CPU with AVX-512.
        unsafe {
            // quads[q][j]: lane l holds rows 4q..4q + 4 at k = 4l + j.
            let mut quads = [[_mm512_setzero_ps(); 4]; 4];
            for (q, quad) in quads.iter_mut().enumerate() {
                let row = |i: usize| _mm512_loadu_ps(src.add((4 * q + i) * src_stride));
                let (r0, r1, r2, r3) = (row(0), row(1), row(2), row(3));
                let (a, b) = (_mm512_unpacklo_ps(r0, r1), _mm512_unpackhi_ps(r0, r1));
                let (c, d) = (_mm512_unpacklo_ps(r2, r3), _mm512_unpackhi_ps(r2, r3));
                *quad = [
                    _mm512_shuffle_ps::<0x44>(a, c),
                    _mm512_shuffle_ps::<0xee>(a, c),
                    _mm512_shuffle_ps::<0x44>(b, d),
                    _mm512_shuffle_ps::<0xee>(b, d),
                ];
            }
            let [first, second, third, fourth] = quads;
            for (j, (((q0, q1), q2), q3)) in first
                .into_iter()
                .zip(second)
                .zip(third)
                .zip(fourth)
                .enumerate()
            {
                // Lanes (l, m) of two quads: even ones and odd ones of the four k.
                let (a, b) = (
                    _mm512_shuffle_f32x4::<0x88>(q0, q1),
                    _mm512_shuffle_f32x4::<0xdd>(q0, q1),
                );
                let (c, d) = (
                    _mm512_shuffle_f32x4::<0x88>(q2, q3),
                    _mm512_shuffle_f32x4::<0xdd>(q2, q3),
                );
                let out = |l: usize| dst.add((4 * l + j) * dst_stride);
                _mm512_storeu_ps(out(0), _mm512_shuffle_f32x4::<0x88>(a, c));
                _mm512_storeu_ps(out(2), _mm512_shuffle_f32x4::<0xdd>(a, c));
                _mm512_storeu_ps(out(1), _mm512_shuffle_f32x4::<0x88>(b, d));
                _mm512_storeu_ps(out(3), _mm512_shuffle_f32x4::<0xdd>(b, d));
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

/// 256-bit registers: they hold all lanes, and two such multiply-adds start per cycle.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn dots<const R: usize>(
    b: *const f32,
    stride: usize,
    lanes: *const f32,
    depth: usize,
    fetch: bool,
    chains: &mut [[f32; DOT_LANES]; DOT_ROWS],
) {
    // SAFETY: the caller's.
    unsafe { super::avx2::dots_256::<R>(b, stride, lanes, depth, fetch, chains) }
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

    unsafe fn dots(
        rows: usize,
        b: *const f32,
        stride: usize,
        lanes: *const f32,
        depth: usize,
        fetch: bool,
        chains: &mut [[f32; DOT_LANES]; DOT_ROWS],
    ) {
        // SAFETY: the caller's.
        unsafe {
            match rows {
                1 => dots::<1>(b, stride, lanes, depth, fetch, chains),
                2 => dots::<2>(b, stride, lanes, depth, fetch, chains),
                3 => dots::<3>(b, stride, lanes, depth, fetch, chains),
                4 => dots::<4>(b, stride, lanes, depth, fetch, chains),
                5 => dots::<5>(b, stride, lanes, depth, fetch, chains),
                6 => dots::<6>(b, stride, lanes, depth, fetch, chains),
                7 => dots::<7>(b, stride, lanes, depth, fetch, chains),
                _ => dots::<DOT_ROWS>(b, stride, lanes, depth, fetch, chains),
            }
        }
    }

    packing!(#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")] a: Transpose16, A_WIDTH; b: Transpose16, NR);
}
