//! What this machine can do at most, measured: the yardstick of speed reports.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::arena::Buffer;
use crate::simd::{LANES, Registers, Simd, dispatch};
use crate::{Kernels, Pool};

/// Ceilings of the machine with the threads and the level given.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct MeasuredPeak {
    /// Multiply-adds in registers, in 10^9 floating-point operations per second (a multiply-add counts two).
    pub gflops: f64,
    /// Sequential reads from main memory, in 10^9 bytes per second.
    pub read_gbps: f64,
}

/// Steps of each chain per item: short runs, so that some of them escape other load on the machine.
const STEPS: usize = 20_000;
/// Floats per reading item, and their total: larger than the last cache of most machines.
const READ_ITEM: usize = 1 << 18;
const READ_TOTAL: usize = 24 << 20;
/// Time for each of the two measurements.
const BUDGET: Duration = Duration::from_millis(80);

/// The multiply-adds of one item; returns their number.
#[inline(always)]
fn multiply_adds<S: Simd>(s: S, seed: f32) -> usize {
    match S::REGISTERS {
        Registers::Wide => chains::<S, 12>(s, seed),
        Registers::Narrow => chains::<S, 6>(s, seed),
        Registers::Small => chains::<S, 8>(s, seed),
    }
}

/// `N` independent chains of 16 lanes: as many as fit in the registers beside the operand, which is enough to hide the
/// latency of a multiply-add.
#[inline(always)]
fn chains<S: Simd, const N: usize>(s: S, seed: f32) -> usize {
    let factor = s.splat(seed);
    let mut chains = [s.splat(1.0); N];
    for _ in 0..STEPS {
        for chain in &mut chains {
            *chain = s.fma(*chain, factor, factor);
        }
    }
    std::hint::black_box(
        chains
            .into_iter()
            .fold(0.0, |sum, chain| sum + s.sum(chain)),
    );
    LANES * N * STEPS
}

#[inline(always)]
fn read<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut sums = [s.zero(); 4];
    for group in x.as_chunks::<{ 4 * LANES }>().0 {
        for (sum, x) in sums.iter_mut().zip(group.as_chunks::<LANES>().0) {
            *sum = s.add(*sum, s.load(x));
        }
    }
    sums.into_iter().fold(0.0, |sum, x| sum + s.sum(x))
}

/// The shortest of repeated runs within the budget, in seconds.
fn best_time_s(mut run: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut best = f64::INFINITY;
    while start.elapsed() < BUDGET {
        let begin = Instant::now();
        run();
        best = best.min(begin.elapsed().as_secs_f64());
    }
    best
}

/// Measures both ceilings in about 0.2 s, with all threads of the pool. Other load on the machine lowers them.
#[must_use]
pub fn measured_peak(kernels: Kernels, pool: &Pool) -> MeasuredPeak {
    let num_items = 4 * pool.threads();
    // The seed is data to the compiler; |factor| < 1 keeps the chains finite.
    let seed = std::hint::black_box(0.5_f32);
    let performed = AtomicUsize::new(0);
    let compute_s = best_time_s(|| {
        pool.for_index(false, num_items, 0, |_, _| {
            let count = dispatch!(kernels, multiply_adds(seed: f32) -> usize);
            performed.store(count, Relaxed);
        });
    });
    let data = Buffer::zeroed(READ_TOTAL);
    let read_s = best_time_s(|| {
        pool.for_each(data.chunks(READ_ITEM).collect(), |x| {
            std::hint::black_box(dispatch!(kernels, read(x: &[f32]) -> f32));
        });
    });
    let flops = 2 * performed.load(Relaxed) * num_items;
    MeasuredPeak {
        gflops: flops as f64 / compute_s / 1e9,
        read_gbps: (READ_TOTAL * 4) as f64 / read_s / 1e9,
    }
}
