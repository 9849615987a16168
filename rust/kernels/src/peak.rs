//! What this machine can do at most, measured: the yardstick of speed reports.

use std::time::{Duration, Instant};

use crate::arena::Buffer;
use crate::simd::{LANES, Simd, dispatch};
use crate::{Kernels, Pool};

/// Ceilings of the machine with the threads and the level given.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct MeasuredPeak {
    /// Multiply-adds in registers, in 10^9 floating-point operations per second (a multiply-add counts two).
    pub gflops: f64,
    /// Sequential reads from main memory, in 10^9 bytes per second.
    pub read_gbps: f64,
}

/// Independent chains: enough to hide the latency of a multiply-add on any current CPU.
const CHAINS: usize = 12;
/// Steps of each chain per item: short runs, so that some of them escape other load on the machine.
const STEPS: usize = 20_000;
/// Floats per reading item, and their total: larger than the last cache of most machines.
const READ_ITEM: usize = 1 << 18;
const READ_TOTAL: usize = 24 << 20;
/// Time for each of the two measurements.
const BUDGET: Duration = Duration::from_millis(80);

#[inline(always)]
fn multiply_add_chains<S: Simd>(s: S, steps: usize, seed: f32) -> f32 {
    let factor = s.splat(seed);
    let mut chains = [s.splat(1.0); CHAINS];
    for _ in 0..steps {
        for chain in &mut chains {
            *chain = s.fma(*chain, factor, factor);
        }
    }
    chains
        .into_iter()
        .fold(0.0, |sum, chain| sum + s.sum(chain))
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
    let (steps, seed) = (STEPS, std::hint::black_box(0.5_f32));
    let compute_s = best_time_s(|| {
        pool.for_index(false, num_items, 0, |_, _| {
            std::hint::black_box(
                dispatch!(kernels, multiply_add_chains(steps: usize, seed: f32) -> f32),
            );
        });
    });
    let data = Buffer::zeroed(READ_TOTAL);
    let read_s = best_time_s(|| {
        pool.for_each(data.chunks(READ_ITEM).collect(), |x| {
            std::hint::black_box(dispatch!(kernels, read(x: &[f32]) -> f32));
        });
    });
    let flops = 2 * LANES * CHAINS * STEPS * num_items;
    MeasuredPeak {
        gflops: flops as f64 / compute_s / 1e9,
        read_gbps: (READ_TOTAL * 4) as f64 / read_s / 1e9,
    }
}
