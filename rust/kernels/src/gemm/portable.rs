//! The portable micro-kernel: arrays that the compiler vectorises for the target's baseline.
#![allow(unsafe_code)]

use super::isa::{DOT_LANES, DOT_ROWS, Isa, Tile, packing};
use super::pack::Transpose;
use crate::simd::multiply_add;

const MR: usize = 4;
const A_WIDTH: usize = MR;
const NR: usize = 8;

/// 4 x 8 chains: eight registers of 128 bits.
pub(super) struct Portable;

struct Transpose4;

impl Transpose for Transpose4 {
    const SIDE: usize = 4;

    #[inline(always)]
    unsafe fn prefetch(_at: *const f32) {}

    #[inline(always)]
    unsafe fn block(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
        // SAFETY: the caller's: a block of 4 x 4 on both sides.
        unsafe {
            let rows: [[f32; 4]; 4] =
                std::array::from_fn(|i| src.add(i * src_stride).cast::<[f32; 4]>().read());
            for k in 0..4 {
                dst.add(k * dst_stride)
                    .cast::<[f32; 4]>()
                    .write(rows.map(|row| row[k]));
            }
        }
    }
}

#[inline(always)]
unsafe fn kernel<const R: usize>(tile: &Tile) {
    let cols = tile.cols;
    let mut acc = [[0.0_f32; NR]; R];
    // SAFETY: the caller's: see `Isa::tile`.
    unsafe {
        if !tile.partial.is_null() {
            for (r, acc) in acc.iter_mut().enumerate() {
                let row = tile.partial.add(r * tile.partial_stride);
                acc[..cols].copy_from_slice(std::slice::from_raw_parts(row, cols));
            }
        }
        for k in 0..tile.depth {
            let a = tile.a.add(k * A_WIDTH);
            let b = tile.b.add(k * NR).cast::<[f32; NR]>().read();
            for (r, acc) in acc.iter_mut().enumerate() {
                let a = *a.add(r);
                for (acc, b) in acc.iter_mut().zip(b) {
                    *acc = multiply_add(a, b, *acc);
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            let out = tile.out.add(r * tile.out_stride);
            for (j, &chain) in acc.iter().enumerate().take(cols) {
                let value = if tile.bias.is_null() {
                    chain
                } else {
                    chain + *tile.bias.add(j)
                };
                *out.add(j) = if tile.accumulate {
                    *out.add(j) + value
                } else {
                    value
                };
            }
        }
    }
}

#[inline(always)]
unsafe fn dots<const R: usize>(
    b: *const f32,
    stride: usize,
    lanes: *const f32,
    depth: usize,
    chains: &mut [[f32; DOT_LANES]; DOT_ROWS],
) {
    let mut acc = [[0.0_f32; DOT_LANES]; R];
    for k in 0..depth {
        // SAFETY: the caller's: see `Isa::dots`.
        let lanes = unsafe { lanes.add(k * DOT_LANES).cast::<[f32; DOT_LANES]>().read() };
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: as above.
            let b = unsafe { *b.add(r * stride + k) };
            for (acc, lane) in acc.iter_mut().zip(lanes) {
                *acc = multiply_add(lane, b, *acc);
            }
        }
    }
    chains[..R].copy_from_slice(&acc);
}

impl Isa for Portable {
    const MR: usize = MR;
    const A_WIDTH: usize = A_WIDTH;
    const NR: usize = NR;
    const LANES: usize = NR;

    unsafe fn tile(rows: usize, tile: &Tile) {
        // SAFETY: the caller's.
        unsafe {
            match rows {
                1 => kernel::<1>(tile),
                2 => kernel::<2>(tile),
                3 => kernel::<3>(tile),
                _ => kernel::<MR>(tile),
            }
        }
    }

    unsafe fn dots(
        rows: usize,
        b: *const f32,
        stride: usize,
        lanes: *const f32,
        depth: usize,
        _fetch: bool,
        chains: &mut [[f32; DOT_LANES]; DOT_ROWS],
    ) {
        // SAFETY: the caller's.
        unsafe {
            match rows {
                1 => dots::<1>(b, stride, lanes, depth, chains),
                2 => dots::<2>(b, stride, lanes, depth, chains),
                3 => dots::<3>(b, stride, lanes, depth, chains),
                4 => dots::<4>(b, stride, lanes, depth, chains),
                5 => dots::<5>(b, stride, lanes, depth, chains),
                6 => dots::<6>(b, stride, lanes, depth, chains),
                7 => dots::<7>(b, stride, lanes, depth, chains),
                _ => dots::<DOT_ROWS>(b, stride, lanes, depth, chains),
            }
        }
    }

    packing!(a: Transpose4, A_WIDTH; b: Transpose4, NR);
}
