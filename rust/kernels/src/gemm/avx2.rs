//! The AVX2 micro-kernel: 6 x 16 chains in 12 of the 16 registers, two vectors of B, one broadcast element of A.
#![allow(unsafe_code)]
#![allow(
    clippy::wildcard_imports,
    reason = "the intrinsics of one instruction set"
)]

use std::arch::x86_64::*;

use super::isa::{DOT_LANES, DOT_ROWS, Isa, Tile, packing};
use super::pack::Transpose;
use crate::arena::LINE;

const MR: usize = 6;
/// A multiple of the micro-kernel's rows and of the transposition's side.
const A_WIDTH: usize = 4 * MR;
const LANES: usize = 8;
const VECTORS: usize = 2;
const NR: usize = VECTORS * LANES;

pub(super) struct Avx2;

/// 8 x 8.
struct Transpose8;

impl Transpose for Transpose8 {
    const SIDE: usize = 8;

    #[inline(always)]
    unsafe fn prefetch(at: *const f32) {
        // SAFETY: fetching is a hint that touches nothing; the caller has SSE.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    /// For four k at a time: register i gathers rows i and i + 4, one in each 128-bit lane, so that two rounds of
    /// unpacking within lanes finish the transposition.
    #[inline(always)]
    unsafe fn block(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
        // SAFETY: the caller's: a block of 8 x 8 on both sides, and a CPU with AVX.
        unsafe {
            for k in [0, 4] {
                let gather = |i: usize| {
                    let row = |i: usize| _mm_loadu_ps(src.add(i * src_stride + k));
                    _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(row(i)), row(i + 4))
                };
                let (r0, r1, r2, r3) = (gather(0), gather(1), gather(2), gather(3));
                let (a, b) = (_mm256_unpacklo_ps(r0, r1), _mm256_unpackhi_ps(r0, r1));
                let (c, d) = (_mm256_unpacklo_ps(r2, r3), _mm256_unpackhi_ps(r2, r3));
                _mm256_storeu_ps(dst.add(k * dst_stride), _mm256_shuffle_ps::<0x44>(a, c));
                _mm256_storeu_ps(
                    dst.add((k + 1) * dst_stride),
                    _mm256_shuffle_ps::<0xee>(a, c),
                );
                _mm256_storeu_ps(
                    dst.add((k + 2) * dst_stride),
                    _mm256_shuffle_ps::<0x44>(b, d),
                );
                _mm256_storeu_ps(
                    dst.add((k + 3) * dst_stride),
                    _mm256_shuffle_ps::<0xee>(b, d),
                );
            }
        }
    }
}

/// Loads the first `n` (1..=8) floats; the other lanes are 0.
///
/// # Safety
/// A CPU with AVX2; `n` floats are readable.
#[inline(always)]
unsafe fn load(pointer: *const f32, n: usize) -> __m256 {
    // SAFETY: the caller's; masked lanes are not touched.
    unsafe {
        if n == LANES {
            _mm256_loadu_ps(pointer)
        } else {
            _mm256_maskload_ps(pointer, mask(n))
        }
    }
}

/// Stores the first `n` (1..=8) lanes.
///
/// # Safety
/// A CPU with AVX2; `n` floats are writable.
#[inline(always)]
unsafe fn store(pointer: *mut f32, n: usize, x: __m256) {
    // SAFETY: the caller's; masked lanes are not touched.
    unsafe {
        if n == LANES {
            _mm256_storeu_ps(pointer, x);
        } else {
            _mm256_maskstore_ps(pointer, mask(n), x);
        }
    }
}

/// # Safety
/// A CPU with AVX2.
#[inline(always)]
unsafe fn mask(n: usize) -> __m256i {
    // SAFETY: the caller's.
    unsafe {
        _mm256_cmpgt_epi32(
            _mm256_set1_epi32(n as i32),
            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
        )
    }
}

/// `R` rows, `V` vectors of columns of which the last may be partial.
#[target_feature(enable = "avx2,fma")]
unsafe fn kernel<const R: usize, const V: usize>(tile: &Tile) {
    let last = tile.cols - (V - 1) * LANES;
    let lanes = |v: usize| if v + 1 == V { last } else { LANES };
    let mut acc = [[_mm256_setzero_ps(); V]; R];
    // SAFETY: the caller's: see `Isa::tile`.
    unsafe {
        if !tile.partial.is_null() {
            for (r, acc) in acc.iter_mut().enumerate() {
                for (v, acc) in acc.iter_mut().enumerate() {
                    *acc = load(
                        tile.partial.add(r * tile.partial_stride + v * LANES),
                        lanes(v),
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
            let mut columns = [_mm256_setzero_ps(); V];
            for (v, column) in columns.iter_mut().enumerate() {
                *column = _mm256_loadu_ps(b.add(v * LANES));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let row = _mm256_set1_ps(*a.add(r));
                for (acc, column) in acc.iter_mut().zip(columns) {
                    *acc = _mm256_fmadd_ps(row, column, *acc);
                }
            }
            a = a.add(A_WIDTH);
            b = b.add(NR);
        }
        if !tile.bias.is_null() {
            for v in 0..V {
                let bias = load(tile.bias.add(v * LANES), lanes(v));
                for acc in &mut acc {
                    acc[v] = _mm256_add_ps(acc[v], bias);
                }
            }
        }
        for (r, acc) in acc.iter_mut().enumerate() {
            for (v, acc) in acc.iter_mut().enumerate() {
                let out = tile.out.add(r * tile.out_stride + v * LANES);
                if tile.accumulate {
                    *acc = _mm256_add_ps(load(out, lanes(v)), *acc);
                }
                store(out, lanes(v), *acc);
            }
        }
    }
}

/// `R` rows of B times 8 lanes; see [`Isa::dots`].
///
/// # Safety
/// A CPU with AVX2 and FMA; otherwise as for [`Isa::dots`].
#[inline(always)]
pub(super) unsafe fn dots_256<const R: usize>(
    b: *const f32,
    stride: usize,
    lanes: *const f32,
    depth: usize,
    fetch: bool,
    chains: &mut [[f32; DOT_LANES]; DOT_ROWS],
) {
    // SAFETY: the caller's.
    unsafe {
        let mut acc = [_mm256_setzero_ps(); R];
        // Rows after these are fetched one cache line at a time. Not into L1: rows that lie a multiple of 4 KiB apart
        // share one set of it and would push out those in use.
        for start in (0..depth).step_by(LINE) {
            if fetch {
                for r in R..2 * R {
                    _mm_prefetch::<_MM_HINT_T1>(b.wrapping_add(r * stride + start).cast());
                }
            }
            for k in start..depth.min(start + LINE) {
                let lanes = _mm256_loadu_ps(lanes.add(k * DOT_LANES));
                for (r, acc) in acc.iter_mut().enumerate() {
                    *acc = _mm256_fmadd_ps(lanes, _mm256_set1_ps(*b.add(r * stride + k)), *acc);
                }
            }
        }
        for (acc, chains) in acc.into_iter().zip(chains) {
            _mm256_storeu_ps(chains.as_mut_ptr(), acc);
        }
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn dots<const R: usize>(
    b: *const f32,
    stride: usize,
    lanes: *const f32,
    depth: usize,
    fetch: bool,
    chains: &mut [[f32; DOT_LANES]; DOT_ROWS],
) {
    // SAFETY: the caller's.
    unsafe { dots_256::<R>(b, stride, lanes, depth, fetch, chains) }
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
            _ => kernel::<MR, V>(tile),
        }
    }
}

impl Isa for Avx2 {
    const MR: usize = MR;
    const A_WIDTH: usize = A_WIDTH;
    const NR: usize = NR;
    const LANES: usize = LANES;

    unsafe fn tile(num_rows: usize, tile: &Tile) {
        // SAFETY: the caller's.
        unsafe {
            match tile.cols.div_ceil(LANES) {
                1 => rows::<1>(num_rows, tile),
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

    packing!(#[target_feature(enable = "avx2,fma")] a: Transpose8, A_WIDTH; b: Transpose8, NR);
}
